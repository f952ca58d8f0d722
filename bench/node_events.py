"""Measure the cost of one node event for the leader's loops in a large cluster.

::

    .venv/bin/python -m bench.node_events

A store in memory holds 5,000 nodes with 20 running tasks each: one of each of four global services, and of 320
services with 250 replicas.  All have the same image.  The production loops of one leader run on it.  An *event* is
one commit about one node: it describes itself differently, reports other slots of its volumes, fails, or returns.
The result is the processor time of the whole process from the commit until no work is left, minus an idle process's
for the same time.  Then each node asks for the image three times (``FindImage``).
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

from bench.loops import IMAGE, a_service, wait_settled
from bench.run import figures_page, measure_alone
from bench.scheduling import proposal_of
from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import configure_gc
from skep.manager.control_loops.loops import loops
from skep.manager.nodes.image_directory import ImageDirectory
from skep.model.networks.data_planes import IMAGES_LABEL
from skep.model.node import (
    EngineDescription,
    Node,
    NodeDescription,
    NodeRole,
    NodeState,
    NodeStatus,
)
from skep.model.options.labels import ON_DISCONNECT
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import GlobalService, Resources, Service, ServiceMode
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ClusterId, NodeId, ServiceId, TaskId, new_id
from skep.security.identity import NodeIdentity
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller

NODES, GLOBALS, SERVICES, REPLICAS = 5000, 4, 320, 250
TASKS = NODES * GLOBALS + SERVICES * REPLICAS
EVENTS = 20
LIMIT_MS = 5.0
"""Most milliseconds of the leader's loops for one event."""
FIND_IMAGE, IMAGE_LIMIT_MS = "one node asks for an image that each node has", 0.1


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
            f"{statistics.median(some):.3g} ms ({min(some):.3g} to {max(some):.3g}), limit {limit_ms(name):g} ms",
        )
        for name, some in costs.items()
    )
    return figures_page(title, busy, rows)


def limit_ms(name: str) -> float:
    """Return the limit for one kind of event."""
    return IMAGE_LIMIT_MS if name == FIND_IMAGE else LIMIT_MS


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
            found[FIND_IMAGE] = [await _find_image_ms(store) for _ in range(3)]
            for task in started:
                task.cancel()
        return found
    raise AssertionError("a store in memory always has a term")


async def _find_image_ms(store: MemoryStore) -> float:
    """Return the processor time of one node's request, when each node asks for one image."""
    directory = ImageDirectory(store, ClusterId("c"), SystemClock(), Random(1))
    request = skep.FindImageRequest(images=[IMAGE])
    began = time.process_time()
    for number in range(NODES):
        identity = NodeIdentity(
            node_id=NodeId(f"n{number:05}"), cluster_id=ClusterId("c"), role=NodeRole.WORKER
        )
        caller = Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)
        response = await directory.find(request, caller)
        assert response.sources
    return (time.process_time() - began) * 1000 / NODES


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
            status=NodeStatus(state=NodeState.READY, addr="127.0.0.1"),
            description=NodeDescription(
                hostname=f"name{number}",
                engine=EngineDescription(labels={IMAGES_LABEL: "2374"}),
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
