"""The scheduler alone, as SwarmKit's own Go benchmark measures its scheduler: from one commit to the last placement.

::

    .venv/bin/python -m bench.scheduling                                # the table, kept in results/
    .venv/bin/python -m bench.scheduling --nodes 1000 --tasks 10000 --kind plugin

One operation is the same as SwarmKit's: a fresh store in memory, with the scheduler running and watching it.  One
commit brings READY nodes and PENDING tasks without a service, and a watcher counts until it has seen each task
assigned.  The clock starts before that commit (the objects are created and encoded before, like the transaction's body
there) and stops with the last task.  SwarmKit's numbers include 50 ms of debouncing.  Skep's scheduler does not wait.

``plugin``: each task has a network whose plugin every third node has.  ``constraints``: a constraint that half of the
nodes meet, reservations and a spread preference over three zones.  ``services``: the same, in services of 100 tasks
whose spec is stored once, as in a real cluster.  ``affinity``: services of the kind ``services`` with priorities.
Every second one has to be in the zones of the previous service and apart from its nodes, and the others have a largest
skew and avoid the nodes of another service.
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from random import Random
from typing import Literal, get_args

import msgspec

from bench.machine import noise
from bench.run import commit, result_name, write_result
from skep.aio.clock import SystemClock
from skep.aio.event_loop import gc_settings
from skep.manager.scheduler.loop import Scheduler
from skep.model.network import Network
from skep.model.node import (
    EngineDescription,
    EnginePlugin,
    Node,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
)
from skep.model.options.affinity import AFFINITY, ANTI_AFFINITY, ANTI_AFFINITY_PREFERRED, MAX_SKEW
from skep.model.options.labels import PRIORITY
from skep.model.service import (
    Placement,
    PlacementPreference,
    ResourceRequirements,
    Resources,
    Service,
    ServiceSpec,
    SpreadOver,
    TaskSpec,
)
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId, new_id
from skep.model.values.meta import Driver, Version
from skep.store.interface import Object, Updated
from skep.store.kinds import SpecVersion, spec_version_id
from skep.store.memory import MemoryStore
from skep.store.transactions.proposal import Proposal
from skep.store.transactions.transaction import LocalTransaction

Kind = Literal["plain", "plugin", "constraints", "services", "affinity"]

PLUGIN = EnginePlugin(type="Network", name="network")
ZONES = 3
SERVICE_TASKS = 100

SWARMKIT_S = {
    ("plain", 1000, 1000): 0.0994,
    ("plain", 1000, 10_000): 0.6482,
    ("plain", 1000, 100_000): 7.37,
    ("plugin", 1000, 1000): 0.1073,
    ("plugin", 1000, 10_000): 0.7367,
    ("plugin", 1000, 100_000): 8.47,
    ("plugin", 5000, 100_000): 33.64,
}
"""Medians of SwarmKit's benchmark on a machine like this one (Go 1.19.8, 2 processors, the commit that Docker Engine
20.10.24 is built with), by kind, nodes and tasks."""

TABLE = [
    (kind, nodes, tasks)
    for kind in ("plain", "plugin", "constraints", "services", "affinity")
    for nodes in (1000, 5000)
    for tasks in (1000, 10_000, 100_000)
]


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One operation: seconds of wall-clock and of processor time."""

    wall_s: float
    processor_s: float
    busy: float
    """Share of the machine that was busy just before."""
    reference_ns: float
    """The value of ``reference_ns()`` at that time."""


def reference_ns() -> float:
    """Return the smallest processor time of one turn of an empty loop, to compare runs at different times."""
    turns, best = 20_000, float("inf")
    for _ in range(50):
        began = time.process_time_ns()
        for _ in range(turns):
            pass
        best = min(best, (time.process_time_ns() - began) / turns)
    return best


def main() -> None:
    """Measure one operation, or the whole table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--tasks", type=int)
    parser.add_argument("--kind", choices=get_args(Kind), default="plain")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.nodes or options.tasks:
        row = measured(options.kind, options.nodes or 1000, options.tasks or 1000, options.repeat)
        print(line(row[0], row[1]))
        return
    now, measured_commit, rows = datetime.now(UTC), commit(), []
    print(HEADER)
    for kind, nodes, tasks in TABLE:
        rows.append(measured(kind, nodes, tasks, options.repeat))  # type: ignore[arg-type]
        print(line(*rows[-1]), flush=True)
    _keep(rows, now, measured_commit)


def measured(kind: Kind, nodes: int, tasks: int, repeat: int) -> tuple[tuple[str, int, int], list[Timing]]:
    """Run ``repeat`` operations of one size, after a warm-up."""
    timings: list[Timing] = []
    if tasks <= 10_000:
        asyncio.run(operation(kind, nodes, tasks))
    for _ in range(repeat):
        gc.collect()
        busy = noise()
        wall_s, processor_s = asyncio.run(operation(kind, nodes, tasks))
        timings.append(Timing(wall_s=wall_s, processor_s=processor_s, busy=busy, reference_ns=reference_ns()))
    return (kind, nodes, tasks), timings


async def operation(kind: Kind, nodes: int, tasks: int) -> tuple[float, float]:
    """Return the seconds (wall, processor) from the commit of ``nodes`` and ``tasks`` until all are assigned."""
    clock = SystemClock()
    store = MemoryStore(clock)
    created = proposal_of(store, [*_nodes(kind, nodes), *_tasks(kind, tasks)])
    thresholds = gc.get_threshold()
    async for term in store.terms(NodeId("m1"), ""):
        scheduler = Scheduler(term, clock, new_id, Random(1))
        async with asyncio.TaskGroup() as group:
            assigned = group.create_task(_all_assigned(store, tasks))
            running = group.create_task(scheduler.run())
            for _ in range(5):
                await asyncio.sleep(0)  # until both watch
            gc_settings.configure_gc()  # as the manager's process does after loading
            began, processor = time.perf_counter(), time.process_time()
            store.cluster.commit(created, None)
            await assigned
            took = time.perf_counter() - began, time.process_time() - processor
            running.cancel()
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        return took
    raise AssertionError("never elected")


def proposal_of(store: MemoryStore, objects: Sequence[Object]) -> Proposal:
    """Return one proposal for all objects, larger than a transaction may be, as SwarmKit's is."""
    puts: list[tuple[str, bytes]] = []
    for object in objects:
        tx = LocalTransaction(store.view(), time.time_ns())  # type: ignore[arg-type]
        tx.put(object)
        puts += tx.proposal().puts
    return Proposal(puts=tuple(puts))


async def _all_assigned(store: MemoryStore, wanted: int) -> None:
    seen = 0
    async with store.watch(Task) as watch:
        async for commit in watch:
            for event in commit.events:
                match event:
                    case Updated(_, Task() as task):
                        seen += task.status.state is TaskState.ASSIGNED
            if seen >= wanted:
                return


def _nodes(kind: Kind, count: int) -> Iterator[Node]:
    for number in range(count):
        plugins = (PLUGIN,) if kind == "plugin" and number % 3 == 0 else ()
        yield Node(
            id=NodeId(f"node{number}"),
            spec=NodeSpec(labels={"zone": f"z{number % ZONES}", "disk": "ssd" if number % 2 else "hdd"}),
            status=NodeStatus(state=NodeState.READY),
            description=NodeDescription(
                hostname=f"name{number}",
                engine=EngineDescription(plugins=plugins),
                resources=Resources(nano_cpus=256_000_000_000, memory_bytes=1 << 40),
            ),
        )


def _affinities(number: int, services: int) -> dict[str, str]:
    """Return the labels of one of the services of kind ``affinity``."""
    labels = {PRIORITY: str(number % 3)}
    if number % 2:
        other = f"service{number - 1:05}"
        return {**labels, AFFINITY: f"{other}@node.labels.zone", ANTI_AFFINITY: other}
    avoided = f"service{(number + 2) % services:05}"
    return {**labels, MAX_SKEW: "1@node.labels.zone", ANTI_AFFINITY_PREFERRED: avoided}


def _tasks(kind: Kind, count: int) -> Iterator[Task | SpecVersion | Service]:
    spec = TaskSpec()
    if kind in ("constraints", "services", "affinity"):
        spread = PlacementPreference(spread=SpreadOver(spread_descriptor="node.labels.zone"))
        spec = TaskSpec(
            placement=Placement(constraints=("node.labels.disk == ssd",), preferences=(spread,)),
            resources=ResourceRequirements(
                reservations=Resources(nano_cpus=10_000_000, memory_bytes=1 << 20)
            ),
        )
    attachments: tuple[NetworkAttachment, ...] = ()
    if kind == "plugin":
        network = Network(id=NetworkId("net"), driver_state=Driver(name=PLUGIN.name))
        attachments = (NetworkAttachment(network=network),)
    is_served, version = kind in ("services", "affinity"), Version(index=1)
    for number in range(count):
        service_id = ServiceId(f"service{number // SERVICE_TASKS:05}" if is_served else "")
        if is_served and number % SERVICE_TASKS == 0:
            id = spec_version_id(service_id, version)
            yield SpecVersion(id=id, service_id=service_id, index=1, spec=ServiceSpec(task_template=spec))
            if kind == "affinity":
                labels = _affinities(number // SERVICE_TASKS, count // SERVICE_TASKS)
                named = ServiceSpec(name=service_id, labels=labels, task_template=spec)
                yield Service(id=service_id, spec=named, spec_version=version)
        yield Task(
            id=TaskId(f"task{number:07}"),
            service_id=service_id,
            slot=number + 1,
            spec=TaskSpec() if is_served else spec,
            spec_version=version if is_served else None,
            status=TaskStatus(state=TaskState.PENDING),
            desired_state=TaskState.RUNNING,
            networks_attachments=attachments,
        )


# -- the result ----------------------------------------------------------------------------------------------------


HEADER = (
    "| what | nodes | tasks | wall, s | processor, s | µs a task | SwarmKit, s | limit, s | of limit | busy "
    "| reference, ns |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def limit_s(kind: str, nodes: int, tasks: int) -> float | None:
    """Return half of SwarmKit's time, or all of it with constraints.  None for sizes without a SwarmKit
    measurement.
    """
    if kind == "affinity":  # compared with SwarmKit without affinity, which it does not have
        theirs = SWARMKIT_S.get(("plain", nodes, tasks), SWARMKIT_S.get(("plugin", nodes, tasks)))
        return theirs / 2 if theirs is not None else None
    theirs = SWARMKIT_S.get(("plain" if kind in ("constraints", "services") else kind, nodes, tasks))
    if theirs is None:
        return None
    return theirs if kind in ("constraints", "services") else theirs / 2


def line(row: tuple[str, int, int], timings: list[Timing]) -> str:
    """Return one row of the table: medians, with the smallest values in brackets."""
    kind, nodes, tasks = row
    wall = [one.wall_s for one in timings]
    processor = [one.processor_s for one in timings]
    theirs = SWARMKIT_S.get(row)
    limit = limit_s(*row)
    ratio = f"{statistics.median(processor) / limit:.2f}" if limit else "–"
    return " | ".join(
        (
            f"| {kind}",
            f"{nodes}",
            f"{tasks}",
            f"{statistics.median(wall):.3g} ({min(wall):.3g})",
            f"{statistics.median(processor):.3g} ({min(processor):.3g})",
            f"{statistics.median(processor) / tasks * 1e6:.1f}",
            f"{theirs:.3g}" if theirs else "–",
            f"{limit:.3g}" if limit else "–",
            ratio,
            f"{statistics.median(one.busy for one in timings):.0%}",
            f"{statistics.median(one.reference_ns for one in timings):.1f} |",
        )
    )


def _keep(rows: list[tuple[tuple[str, int, int], list[Timing]]], now: datetime, at: str) -> None:
    text = "\n".join(
        (
            f"# The scheduler beside SwarmKit's own benchmark, {now:%Y-%m-%d %H:%M} UTC, commit {at}",
            "",
            "Medians, smallest in brackets. `busy`: share of the machine that other work took just before; where it is",
            "high, processor time is the figure to read (and even that is larger than on a quiet machine). SwarmKit's:",
            "wall clock on a quiet machine of this size. The limit is half of it; with constraints, all of it.",
            "`reference`: one turn of an empty loop in Python then, to compare with other runs.",
            "",
            HEADER,
            *(line(row, timings) for row, timings in rows),
            "",
        )
    )
    kept = [
        {"kind": kind, "nodes": nodes, "tasks": tasks, "timings": msgspec.to_builtins(timings)}
        for (kind, nodes, tasks), timings in rows
    ]
    write_result(result_name(now, at, "scheduling"), text, kept)


if __name__ == "__main__":
    main()
