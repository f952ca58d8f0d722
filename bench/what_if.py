"""Measures how long ``skep what-if lose NODE`` takes a manager, and for how long it holds the event loop.

::

    .venv/bin/python -m bench.what_if                            # the table, kept in results/
    .venv/bin/python -m bench.what_if --nodes 500 --tasks 10000

The state has services of 100 running tasks, with reservations and one overlay network.  Another task of the loop wakes
up as often as it can.  Its longest delay is how long anything else would have waited: the copy, and the longest slice.
"""

import argparse
import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime

import msgspec

from bench.machine import noise
from bench.run import commit, result_name, write_result
from skep.aio.clock import SystemClock
from skep.aio.event_loop import gc_settings
from skep.aio.time_slices import run_in_slices
from skep.manager.allocator.subnets import NetworkAllocations, allocated
from skep.manager.what_if.answer import Question
from skep.manager.what_if.rehearsal import Rehearsal
from skep.manager.what_if.suppositions import lose
from skep.model.network import Network, NetworkSpec
from skep.model.node import (
    EngineDescription,
    EnginePlugin,
    Node,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
    SessionOwner,
)
from skep.model.service import (
    Endpoint,
    EndpointVirtualIP,
    NetworkAttachmentConfig,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
)
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.values.ids import NetworkId, NodeId, ServiceId, SessionId, TaskId
from skep.model.values.meta import Driver
from skep.store.interface import Object
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction

SERVICE_TASKS = 100
TABLE = ((500, 10_000), (5000, 100_000))
REPEAT = 5
POOL = "10.0.0.0/8"
"""Subnet of the network, which is large enough for an address of each task."""
ENGINE = EngineDescription(plugins=(EnginePlugin(type="Network", name="overlay"),))
"""Description of each node's engine.  Without the driver, no node could have the tasks."""
LIMIT_S, HELD_MS = 2.0, 20.0
"""Promised limits at 5,000 nodes and 100,000 tasks."""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the measured work.  ``count`` is its result."""

    seconds: float
    processor_s: float
    held_ms: float
    """Longest delay of another task of the event loop, which includes time that other processes took."""
    slice_ms: float
    """Longest processor time without a pause."""
    count: int
    busy: float
    """Share of the machine that was busy just before."""


def a_state(nodes: int, tasks: int, returned: float = 0.0) -> State:
    """Return a cluster at rest.  The last nodes have no tasks: the share ``returned`` of all."""
    state = State()

    def put(objects: Iterable[Object]) -> None:
        tx = LocalTransaction(state, time.time_ns())
        for object in objects:
            tx.put(object)
        tx.adopt_into(state)

    used = nodes - round(nodes * returned)
    overlay = Driver(name="overlay")
    spec = NetworkSpec(name="net", driver_configuration=overlay)
    network = allocated(Network(id=NetworkId("net"), spec=spec), NetworkAllocations(), (POOL,), 8)
    put([network, *(_node(number) for number in range(nodes))])
    for first in range(0, tasks, SERVICE_TASKS):
        spec = ServiceSpec(
            name=f"service{first:06}",
            mode=ServiceMode(replicated=ReplicatedService(replicas=SERVICE_TASKS)),
            task_template=TaskSpec(
                networks=(NetworkAttachmentConfig(target=network.id),),
                resources=ResourceRequirements(
                    reservations=Resources(nano_cpus=100_000_000, memory_bytes=1 << 26)
                ),
            ),
        )
        id = ServiceId(f"service{first:06}")
        virtual_ip = EndpointVirtualIP(network_id=network.id, addr=_address(tasks + first))
        put([Service(id=id, spec=spec, endpoint=Endpoint(virtual_ips=(virtual_ip,)))])
        version = state.get(Service, id).spec_version
        put(
            Task(
                id=TaskId(f"task{number:07}"),
                service_id=id,
                slot=number - first + 1,
                node_id=NodeId(f"node{number % used:05}"),
                spec_version=version,
                status=TaskStatus(state=TaskState.RUNNING),
                desired_state=TaskState.RUNNING,
                networks_attachments=(NetworkAttachment(network=network, addresses=(_address(number),)),),
            )
            for number in range(first, first + SERVICE_TASKS)
        )
    return state


def _address(number: int) -> str:
    number += 256  # the first addresses are the subnet's own and its gateway's
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/8"


def _node(number: int) -> Node:
    return Node(
        id=NodeId(f"node{number:05}"),
        spec=NodeSpec(labels={"zone": f"z{number % 3}"}),
        status=NodeStatus(state=NodeState.READY),
        session=SessionOwner(session_id=SessionId(f"session{number}")),
        description=NodeDescription(
            hostname=f"name{number}",
            resources=Resources(nano_cpus=16_000_000_000, memory_bytes=64 << 30),
            engine=ENGINE,
        ),
    )


async def ask(state: State) -> int:
    """Ask what follows from the loss of one node, and return the number of tasks that move."""
    clock = SystemClock()
    question = Question(Rehearsal(state, time.time_ns()), lambda _: True)
    await asyncio.sleep(0)
    await run_in_slices(question.begin(), clock)
    lose(question.rehearsal, [NodeId("node00001")])
    await run_in_slices(question.settle(), clock)
    return sum(move.tasks for one in question.answer.services for move in one.moves if move.target)


async def time_work(work: Callable[[State], Awaitable[int]], state: State) -> Timing:
    """Run ``work`` once, while another task wakes up as often as it can."""
    busy = noise()
    held_s = slice_s = 0.0

    async def watch() -> None:
        nonlocal held_s, slice_s
        while True:
            before, processor = time.perf_counter(), time.process_time()
            await asyncio.sleep(0)
            held_s = max(held_s, time.perf_counter() - before)
            slice_s = max(slice_s, time.process_time() - processor)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    began, processor = time.perf_counter(), time.process_time()
    count = await work(state)
    took, processor_s = time.perf_counter() - began, time.process_time() - processor
    await asyncio.sleep(0)
    watching.cancel()
    return Timing(
        seconds=took,
        processor_s=processor_s,
        held_ms=1000 * held_s,
        slice_ms=1000 * slice_s,
        count=count,
        busy=busy,
    )


def _line(nodes: int, tasks: int, one: Timing) -> str:
    figures = f"{one.seconds:.3f} | {one.processor_s:.3f} | {one.held_ms:.1f} | {one.slice_ms:.1f}"
    return f"| {nodes} | {tasks} | {figures} | {one.count} | {one.busy:.0%} |"


def measure(
    work: Callable[[State], Awaitable[int]],
    *,
    description: str,
    kind: str,
    title: str,
    counted: str,
    limits: str,
    returned: float = 0.0,
) -> None:
    """Measure one size, or the whole table, as the command's options say.

    Args:
        work: The measured work.  Returns a number for the column ``counted``.
        description: Text of the command's help.
        kind: Name of the result's files.
        limits: The promised limits at the largest size, as a sentence.
        returned: Share of the nodes that have no tasks.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--tasks", type=int)
    options = parser.parse_args()
    now, at = datetime.now(UTC), commit()
    sizes = [(options.nodes or 500, options.tasks or 10_000)] if options.nodes or options.tasks else TABLE
    columns = (
        "nodes",
        "tasks",
        "wall, s",
        "processor, s",
        "loop held, ms",
        "longest slice, ms",
        counted,
        "busy",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    kept = []
    for nodes, tasks in sizes:
        state = a_state(nodes, tasks, returned)
        gc_settings.configure_gc()  # as the manager's process does after loading
        timings = []
        for _ in range(REPEAT):
            timings.append(asyncio.run(time_work(work, state)))
            gc.collect()
        lines += [_line(nodes, tasks, one) for one in timings]
        kept.append({"nodes": nodes, "tasks": tasks, "timings": msgspec.to_builtins(timings)})
        gc.unfreeze()
    print("\n".join(lines))
    if len(sizes) > 1:
        text = "\n".join(
            (
                f"# `{title}`, {now:%Y-%m-%d %H:%M} UTC, commit {at}",
                "",
                limits,
                "`busy`: share of the machine that other work took just before. Where it is high, processor time is",
                "the figure to read: other processes delay a loop as well.",
                "",
                *lines,
                "",
            )
        )
        write_result(result_name(now, at, kind), text, kept)


if __name__ == "__main__":
    measure(
        ask,
        description=__doc__,
        kind="what-if",
        title="skep what-if lose NODE",
        counted="tasks moved",
        limits=f"Each question by itself. Limits at 5,000 nodes: {LIMIT_S:g} s, and {HELD_MS:g} ms for which the "
        "event loop is held.",
    )
