"""Measure the cost of one node event for the leader's loops in a large cluster.

::

    .venv/bin/python -m bench.node_events

A store in memory holds 5,000 nodes with 20 running tasks each: one of each of four global services, and of 320 services
with 250 replicas.  The production loops of one leader run on it.  An *event* is one commit about one node: it describes
itself differently, reports other slots of its volumes, fails, or returns.  The result is the processor time of the
whole process from the commit until no work is left, minus an idle process's for the same time.
"""

import asyncio
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from random import Random

from msgspec.structs import replace

from bench.loops import a_service, wait_settled
from bench.run import figures_page, measure_alone
from bench.scheduling import proposal_of
from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import configure_gc
from skep.manager.control_loops.loops import loops
from skep.model.node import Node, NodeDescription, NodeState, NodeStatus
from skep.model.options.labels import ON_DISCONNECT
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import GlobalService, Resources, Service, ServiceMode
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId, new_id
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore

NODES, GLOBALS, SERVICES, REPLICAS = 5000, 4, 320, 250
TASKS = NODES * GLOBALS + SERVICES * REPLICAS
EVENTS = 20
LIMIT_MS = 5.0
"""Most milliseconds of the leader's loops for one event."""


def main() -> None:
    """Measure each kind of event and keep the result, or print a profile (``--profile``)."""
    if sys.argv[1:] == ["--profile"]:
        asyncio.run(measure(is_profiled=True))
    else:
        measure_alone(__doc__ or "", "node-events", measure, document)


def document(costs: dict[str, list[float]], busy: float) -> str:
    """Return the result for people."""
    title = f"Processor time of the leader for one of {EVENTS} node events, {NODES:,} nodes, {TASKS:,} tasks"
    rows = (
        (
            name,
            f"{statistics.median(some):.1f} ms ({min(some):.1f} to {max(some):.1f}), limit {LIMIT_MS:g} ms",
        )
        for name, some in costs.items()
    )
    return figures_page(title, busy, rows)


async def measure(*, is_profiled: bool = False) -> dict[str, list[float]]:
    """Build the cluster, take it over, and change its nodes.  Return the milliseconds of each event, by its kind."""
    clock = SystemClock()
    store = MemoryStore(clock)
    store.cluster.commit(proposal_of(store, [*all_nodes(), *all_services()]), None)
    store.cluster.commit(proposal_of(store, list(all_tasks(store.view().find(Service)))), None)
    gc.collect()
    configure_gc()
    async for term in store.terms(NodeId("m1"), ""):
        async with AsyncExitStack() as stack:
            running = await stack.enter_async_context(asyncio.TaskGroup())
            started = [running.create_task(loop.run()) for loop in loops(term, clock, new_id, Random(1))]
            await wait_settled(time.perf_counter(), time.process_time())
            await asyncio.sleep(5)  # until every loop has loaded its part
            found: dict[str, list[float]] = {}
            for number, (name, change) in enumerate(EVENT_KINDS.items()):
                profile = cProfile.Profile() if is_profiled else None
                found[name] = [
                    await _cost_ms(store, f"n{number * EVENTS + each:05}", change, profile)
                    for each in range(EVENTS)
                ]
                if profile is not None:
                    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
            for task in started:
                task.cancel()
        return found
    raise AssertionError("a store in memory always has a term")


async def _cost_ms(
    store: MemoryStore, id: str, change: Callable[[Node], Node], profile: cProfile.Profile | None
) -> float:
    """Return the processor time of one event, without the loops' periodic work."""
    await asyncio.sleep(0.2)
    idle_ms = await _used_ms(0.3)
    if profile is not None:
        profile.enable()
    began = time.process_time()
    await store.update(_changed, id, change)
    used_ms = await _used_ms(0.3, began)
    if profile is not None:
        profile.disable()
    return used_ms - idle_ms


async def _used_ms(seconds: float, began: float | None = None) -> float:
    began = time.process_time() if began is None else began
    await asyncio.sleep(seconds)
    return (time.process_time() - began) * 1000


def _changed(tx: Transaction, id: str, change: Callable[[Node], Node]) -> None:
    tx.put(change(tx.get(Node, id)))


def _described(node: Node) -> Node:
    return _with_label(node, "disk", "full")


def _with_slots(node: Node) -> Node:
    return _with_label(node, SLOT_VOLUMES_LABEL, "data=s00001.7@1763894400000")


def _with_label(node: Node, name: str, value: str) -> Node:
    engine = replace(node.description.engine, labels={**node.description.engine.labels, name: value})
    return replace(node, description=replace(node.description, engine=engine))


def _in_state(state: NodeState) -> Callable[[Node], Node]:
    return lambda node: replace(node, status=replace(node.status, state=state))


EVENT_KINDS = {
    "describes itself differently": _described,
    "reports other slots of its volumes": _with_slots,
    "goes down, its tasks stay (skep.on-disconnect=keep)": _in_state(NodeState.DOWN),
}


def all_nodes() -> Iterator[Node]:
    for number in range(NODES):
        yield Node(
            id=NodeId(f"n{number:05}"),
            status=NodeStatus(state=NodeState.READY),
            description=NodeDescription(
                hostname=f"name{number}",
                resources=Resources(nano_cpus=256_000_000_000, memory_bytes=1 << 40),
            ),
        )


def all_services() -> Iterator[Service]:
    for number in range(GLOBALS + SERVICES):
        service = a_service(ServiceId(f"s{number:05}"), REPLICAS, memory_mib=1 + number % 10)
        spec = replace(service.spec, labels={ON_DISCONNECT: "keep"})
        if number < GLOBALS:
            spec = replace(spec, mode=ServiceMode(global_=GlobalService()))
        yield replace(service, spec=spec)


def all_tasks(services: Sequence[Service]) -> Iterator[Task]:
    number = 0
    for service in services:
        is_global = service.spec.mode.global_ is not None
        for slot in range(NODES if is_global else REPLICAS):
            number += 1
            yield Task(
                id=TaskId(f"t{number:07}"),
                service_id=service.id,
                slot=0 if is_global else slot + 1,
                spec=service.spec.task_template,
                spec_version=service.spec_version,
                node_id=NodeId(f"n{number % NODES:05}"),
                status=TaskStatus(state=TaskState.RUNNING),
                desired_state=TaskState.RUNNING,
            )


if __name__ == "__main__":
    main()
