"""The longest callbacks of a manager's event loop in a cluster of 200,000 tasks, where one service has 20,000.

::

    .venv/bin/python -m bench.large                 # kept in results/
    .venv/bin/python -m bench.large --dry           # only printed

The leader's loops and the API run on a store in memory.  The benchmark measures the processor time of single callbacks,
which other load hardly changes.  It names the longest callbacks of each phase, and counts all that take over 20 ms.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from random import Random
from typing import Any

import msgspec
from msgspec.structs import replace

from bench import loops as cluster
from bench.holds import name_of
from bench.machine import noise
from bench.run import commit, result_name, write_result
from bench.scheduling import proposal_of
from bench.viewing import serve_store
from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import configure_gc
from skep.manager.control_loops.loops import loops
from skep.model.node import Node, NodeState
from skep.model.service import ReplicatedService, Service, ServiceMode, UpdateConfig
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId, new_id
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore

SERVICES, LARGE, TASKS_OF_LARGE = 9000, ServiceId("large"), 20_000
REPORTS = 20_000
TOGETHER = 1000
LIMIT_S = 0.02
OWN = " measured"
"""Suffix that marks this benchmark's own callbacks between two phases."""


class Phase(msgspec.Struct, kw_only=True):
    """Processor seconds of the loop's callbacks in one phase.

    ``longest`` has the longest callbacks, with their names.
    """

    name: str
    processor_s: float = 0.0
    over_limit: int = 0
    longest: list[tuple[float, str]] = []


class Held:
    """Measures each callback of the loop in the current phase."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            took = time.thread_time() - began
            if self.phases and took >= LIMIT_S / 10 and OWN not in (name := name_of(handle)):
                phase = self.phases[-1]
                phase.over_limit += took > LIMIT_S
                phase.longest = sorted([*phase.longest, (took, name)], reverse=True)[:3]

        asyncio.Handle._run = timed  # type: ignore[method-assign]

    @asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        """Run a phase until it ends, and all resulting work is done."""
        self.phases.append(phase := Phase(name=name))
        began = time.process_time()
        yield
        await cluster.wait_settled(time.perf_counter(), began)
        phase.processor_s = time.process_time() - began
        print(line(phase), flush=True)


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    is_dry = parser.parse_args().dry
    busy = noise()
    phases = asyncio.run(measure())
    if not is_dry:
        _keep(phases, busy)


async def measure() -> list[Phase]:
    """Run all phases, one after another on one cluster."""
    clock, held = SystemClock(), Held()
    store = MemoryStore(clock)
    store.cluster.commit(
        proposal_of(store, [*cluster.all_nodes(), *cluster.all_services(SERVICES), _large()]), None
    )
    stored = store.view().find(Service)
    store.cluster.commit(proposal_of(store, list(_tasks(stored))), None)
    configure_gc()
    async for term in store.terms(NodeId("m1"), ""):
        async with asyncio.TaskGroup() as running:
            async with held.phase("take-over"):
                leading = [running.create_task(one.run()) for one in loops(term, clock, new_id, Random(1))]
                await _wait(lambda: cluster.assigned(store, cluster.WAITING) == 1)
            await _after_that(store, held)
            for one in leading:
                one.cancel()
        break
    return held.phases


async def _after_that(store: MemoryStore, held: Held) -> None:
    async with _client(store) as read_all:
        for path in ("/nodes", "/tasks", "/services?status=true", '/tasks?filters={"service":["large"]}'):
            async with held.phase(f"GET {path}"):
                await read_all(path)
    async with held.phase(f"{REPORTS} reports"):
        await store.update_each(_report, [TaskId(id) for id in store.view().ids(Task)[:REPORTS]])
    async with held.phase("one task of 20,000 fails"):
        failed = store.view().find(Task, service_id=LARGE)[0]
        await store.update(_put, replace(failed, status=TaskStatus(state=TaskState.FAILED)))
        await _wait(lambda: len(store.view().find(Task, slot=f"{LARGE}/{failed.slot}")) == 2)
    async with held.phase("a node with 200 tasks is lost"):
        node = store.view().find(Node)[7]
        lost = {task.id for task in store.view().find(Task, node_id=node.id) if task.is_active}
        await store.update(_put, replace(node, status=replace(node.status, state=NodeState.DOWN)))
        await _wait(lambda: not any(store.view().get(Task, id).is_wanted for id in lost))
    async with held.phase(f"20,000 tasks are updated, {TOGETHER} at a time"):
        await store.update(_new_image)
        await _wait(lambda: _updated(store) >= TOGETHER)


def _large() -> Service:
    one = cluster.a_service(LARGE, TASKS_OF_LARGE, memory_mib=1)
    return replace(one, spec=replace(one.spec, update_config=UpdateConfig(parallelism=TOGETHER)))


def _tasks(stored: Iterable[Service]) -> Iterator[Task]:
    yield from cluster.all_tasks([service for service in stored if service.id != LARGE])
    large = next(service for service in stored if service.id == LARGE)
    mode = ServiceMode(replicated=ReplicatedService(replicas=TASKS_OF_LARGE))
    assert large.spec.mode == mode
    for slot in range(1, TASKS_OF_LARGE + 1):
        yield Task(
            id=TaskId(f"large{slot:06}"),
            service_id=LARGE,
            slot=slot,
            spec=large.spec.task_template,
            spec_version=large.spec_version,
            node_id=NodeId(f"node{slot % cluster.NODES:04}"),
            status=TaskStatus(state=TaskState.RUNNING),
            desired_state=TaskState.RUNNING,
        )


def _put(tx: Transaction, object: Any) -> None:
    tx.put(object)


def _report(tx: Transaction, id: TaskId) -> None:
    task = tx.get(Task, id)
    tx.put(replace(task, status=replace(task.status, message="started")))


def _new_image(tx: Transaction) -> None:
    service = tx.get(Service, LARGE)
    container = service.spec.task_template.container_spec
    assert container is not None
    template = replace(service.spec.task_template, container_spec=replace(container, image="busybox:2"))
    tx.put(replace(service, spec=replace(service.spec, task_template=template)))


def _updated(store: MemoryStore) -> int:
    version = store.view().get(Service, LARGE).spec_version
    tasks = store.view().find(Task, service_id=LARGE)
    return sum(1 for task in tasks if task.spec_version == version and task.node_id)


async def _wait(holds: Callable[[], bool]) -> None:
    """Return when ``holds()`` is true."""
    while not holds():  # noqa: ASYNC110  a check at each commit would cost more than the measured work
        await asyncio.sleep(0.5)


@asynccontextmanager
async def _client(store: MemoryStore) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    async with serve_store(store, read_bufsize=1 << 20) as client:

        async def read_all(path: str) -> None:
            async with client.get(f"http://manager{path}") as response:
                assert response.status == 200, response.status
                async for _ in response.content.iter_any():
                    pass

        yield read_all


HEADER = "| phase | processor, s | callbacks over 20 ms | the longest, ms | its name |\n|---|---|---|---|---|"


def line(phase: Phase) -> str:
    """Return a row of the table."""
    took, name = phase.longest[0] if phase.longest else (0.0, "")
    return f"| {phase.name} | {phase.processor_s:.2f} | {phase.over_limit} | {took * 1000:.1f} | {name} |"


def _keep(phases: list[Phase], busy: float) -> None:
    now = datetime.now(UTC)
    text = "\n".join(
        (
            f"# What holds the loop with 200,000 tasks, {now:%Y-%m-%d %H:%M} UTC, commit {commit()}",
            "",
            f"{cluster.NODES} nodes, {SERVICES} services of {cluster.REPLICAS} tasks and one of {TASKS_OF_LARGE}.",
            f"Other work took {busy:.0%} of the machine just before, which can double processor times.",
            "",
            HEADER,
            *map(line, phases),
            "",
        )
    )
    write_result(result_name(now, commit(), "large"), text, msgspec.to_builtins(phases))


if __name__ == "__main__":
    main()
