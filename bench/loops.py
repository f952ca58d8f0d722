"""The cost of the leader's loops in a large cluster: a change of one service, and the recovery after a leader change.

::

    .venv/bin/python -m bench.loops                       # the curve and the recovery, kept in results/
    .venv/bin/python -m bench.loops --services 5000

A store in memory holds services of 20 running tasks on 1,000 nodes, and the production loops of one leader
(orchestrator, allocator, scheduler, reaper, ...) run on it. *Change*: services are scaled from 20 to 25, one after
another, each until its five tasks are assigned.  The result is the processor time of the whole process per change.
*Recovery*: all loops begin a term on this store, which has one service with a waiting task.  The results are the times
until that task is assigned, and until no work is left.
"""

import argparse
import asyncio
import cProfile
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from random import Random

import msgspec
from msgspec.structs import replace

from bench.machine import noise
from bench.run import commit, result_name, write_result
from bench.scheduling import proposal_of, reference_ns
from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import configure_gc
from skep.manager.control_loops.loops import loops
from skep.model.container import ContainerSpec
from skep.model.node import Node, NodeDescription, NodeSpec, NodeState, NodeStatus
from skep.model.service import (
    ReplicatedService,
    ResourceRequirements,
    Resources,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId, new_id
from skep.store.interface import Term, Transaction, Updated
from skep.store.memory import MemoryStore

NODES = 1000
REPLICAS, SCALED = 20, 25
CHANGES = 20
SIZES = (50, 500, 5000, 10_000)
WAITING = ServiceId("waiting")
IMAGE = "busybox:1"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Results at one size, in seconds unless the name says otherwise."""

    services: int
    tasks: int
    change_ms: list[float]
    """Processor time per change."""
    change_calls: list[int]
    """Function calls per change."""
    first_wall_s: float
    first_processor_s: float
    """Processor time from the start of the term until the waiting task is assigned."""
    settled_wall_s: float
    settled_processor_s: float
    """Processor time from the start of the term until no work is left."""
    busy: float
    reference_ns: float


def main() -> None:
    """Measure one size, or the curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--services", type=int)
    options = parser.parse_args()
    results = []
    for services in [options.services] if options.services else SIZES:
        gc.unfreeze()
        gc.collect()
        results.append(asyncio.run(measure(services)))
        print(_line(results[-1]), flush=True)
    if not options.services:
        _keep(results)


async def measure(services: int) -> Result:
    """Build the cluster, take it over, and change it."""
    clock = SystemClock()
    store = MemoryStore(clock)
    store.cluster.commit(proposal_of(store, [*all_nodes(), *all_services(services)]), None)
    stored = store.view().find(Service)
    store.cluster.commit(proposal_of(store, list(all_tasks(stored))), None)
    configure_gc()  # as the manager does after loading
    busy = noise()
    async for term in store.terms(NodeId("m1"), ""):
        async with AsyncExitStack() as stack:
            began, processor = time.perf_counter(), time.process_time()
            running = await stack.enter_async_context(asyncio.TaskGroup())
            started = [running.create_task(loop.run()) for loop in _loops(term, clock)]
            await _wait_assigned(store, WAITING, 1)
            first = time.perf_counter() - began, time.process_time() - processor
            settled = await wait_settled(began, processor)
            changes = [await _change_ms(store, service.id) for service in stored[:CHANGES]]
            calls = [await _change_calls(store, service.id) for service in stored[CHANGES : CHANGES + 11]][1:]
            for task in started:
                task.cancel()
        return Result(
            services=services,
            tasks=len(store.view().find(Task)),
            change_ms=changes,
            change_calls=calls,
            first_wall_s=first[0],
            first_processor_s=first[1],
            settled_wall_s=settled[0],
            settled_processor_s=settled[1],
            busy=busy,
            reference_ns=reference_ns(),
        )
    raise AssertionError("never elected")


def _loops(term: Term, clock: SystemClock) -> list:  # type: ignore[type-arg]
    return loops(term, clock, new_id, Random(1))


async def _change_ms(store: MemoryStore, id: ServiceId) -> float:
    """Return the processor time of scaling one service, until its new tasks are assigned and no work is left."""
    began = time.process_time()

    def scale(tx: Transaction) -> None:
        service = tx.get(Service, id)
        mode = ServiceMode(replicated=ReplicatedService(replicas=SCALED))
        tx.put(replace(service, spec=replace(service.spec, mode=mode)))

    await store.update(scale)
    await _wait_assigned(store, id, SCALED)
    _, processor = await wait_settled(time.perf_counter(), began)
    return processor * 1000


async def _change_calls(store: MemoryStore, id: ServiceId) -> int:
    """Return the number of function calls for the same change."""
    profile = cProfile.Profile()
    profile.enable()
    await _change_ms(store, id)
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


async def _wait_assigned(store: MemoryStore, id: ServiceId, count: int) -> None:
    """Return when ``count`` tasks of the service have a node."""
    async with store.watch(Task) as watch:
        if assigned(store, id) >= count:
            return
        async for change in watch:
            if any(isinstance(event, Updated) for event in change.events) and assigned(store, id) >= count:
                return


def assigned(store: MemoryStore, id: ServiceId) -> int:
    return sum(1 for task in store.view().find(Task, service_id=id) if task.node_id)


async def wait_settled(began: float, processor: float) -> tuple[float, float]:
    """Wait for 50 ms with almost no work.

    Return the seconds (wall-clock, processor) from ``began`` and ``processor`` until then.
    """
    while True:
        wall_s, processor_s = time.perf_counter() - began, time.process_time() - processor
        await asyncio.sleep(0.05)
        if time.process_time() - processor - processor_s < 0.002:
            return wall_s, processor_s


def all_nodes() -> Iterator[Node]:
    for number in range(NODES):
        yield Node(
            id=NodeId(f"node{number:04}"),
            spec=NodeSpec(labels={"zone": f"z{number % 3}"}),
            status=NodeStatus(state=NodeState.READY),
            description=NodeDescription(
                hostname=f"name{number}",
                resources=Resources(nano_cpus=256_000_000_000, memory_bytes=1 << 40),
            ),
        )


def all_services(count: int) -> Iterator[Service]:
    for number in range(count):
        yield a_service(ServiceId(f"service{number:05}"), REPLICAS, memory_mib=1 + number % 10)
    yield a_service(WAITING, 1, memory_mib=1)


def a_service(id: ServiceId, replicas: int, memory_mib: int) -> Service:
    reservations = Resources(nano_cpus=1_000_000, memory_bytes=memory_mib << 20)
    template = TaskSpec(
        container_spec=ContainerSpec(image=IMAGE),
        resources=ResourceRequirements(reservations=reservations),
    )
    mode = ServiceMode(replicated=ReplicatedService(replicas=replicas))
    return Service(id=id, spec=ServiceSpec(name=id, task_template=template, mode=mode))


def all_tasks(services: Sequence[Service]) -> Iterator[Task]:
    number = 0
    for service in services:
        if service.id == WAITING:
            continue
        for slot in range(1, REPLICAS + 1):
            number += 1
            yield Task(
                id=TaskId(f"task{number:07}"),
                service_id=service.id,
                slot=slot,
                spec=service.spec.task_template,
                spec_version=service.spec_version,
                node_id=NodeId(f"node{number % NODES:04}"),
                status=TaskStatus(state=TaskState.RUNNING),
                desired_state=TaskState.RUNNING,
            )


HEADER = (
    "| services | tasks | change: processor, ms | calls | until the waiting task is assigned: wall, s | processor, s "
    "| until settled: wall, s | processor, s | busy | reference, ns |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def _line(result: Result) -> str:
    return " | ".join(
        (
            f"| {result.services}",
            f"{result.tasks}",
            f"{statistics.median(result.change_ms):.1f} ({min(result.change_ms):.1f})",
            f"{statistics.median(result.change_calls):.0f}",
            f"{result.first_wall_s:.2f}",
            f"{result.first_processor_s:.2f}",
            f"{result.settled_wall_s:.2f}",
            f"{result.settled_processor_s:.2f}",
            f"{result.busy:.0%}",
            f"{result.reference_ns:.1f} |",
        )
    )


def _keep(results: list[Result]) -> None:
    now = datetime.now(UTC)
    text = "\n".join(
        (
            f"# What the leader's loops cost in a large cluster, {now:%Y-%m-%d %H:%M} UTC, commit {commit()}",
            "",
            f"{NODES} nodes, services of {REPLICAS} running tasks, all loops of the leader on the store in memory.",
            f"A change scales one service from {REPLICAS} to {SCALED}: median (smallest) of {CHANGES}.",
            "Calls: Python's function calls for one change, the same on any machine. `busy`: share of the machine",
            "that other work took just before; where it is high, wall times hold that work, and processor time is the",
            "figure to read. `reference`: one turn of an empty loop in Python then, to compare with other runs.",
            "",
            HEADER,
            *map(_line, results),
            "",
        )
    )
    write_result(result_name(now, commit(), "loops"), text, msgspec.to_builtins(results))
    print(text)


if __name__ == "__main__":
    main()
