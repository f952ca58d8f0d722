"""A change of one service costs the leader's loops the same in a small cluster and in one ten times as large.

Counted in function calls, which do not depend on the machine; ``bench/loops.py`` measures time and larger clusters.
"""

import cProfile
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.jobs import run_job
from skep.manager.control.services import create_service
from skep.manager.scheduler.loop import Scheduler
from skep.manager.schedules.state import SchedulesState
from skep.model.options.schedules import CRON
from skep.model.service import ReplicatedJob, ReplicatedService, Resources, Service, ServiceMode
from skep.model.task import Task, TaskState
from skep.model.values.ids import new_id
from skep.model.values.times import timestamp
from skep.store.interface import Commit, Object, Transaction
from skep.store.level import SCHEDULES
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.control_loops import leading, wait_for

NODES, REPLICAS = 20, 10


def put(tx: Transaction, object: Object) -> None:
    tx.put(object)


async def calls_for_a_change(services: int) -> int:
    """Function calls from scaling one service until its new tasks have nodes."""
    store = MemoryStore(SystemClock())
    await store.update_each(
        put, [a_node(f"n{number}", has=Resources(memory_bytes=1 << 40)) for number in range(NODES)]
    )
    names = [f"s{number:04}" for number in range(services)]
    reserve = Resources(memory_bytes=1 << 20)
    await store.update_each(put, [a_service(name, replicas=REPLICAS, reserve=reserve) for name in names])
    running = [
        replace(
            a_task(
                f"{name}-{slot}",
                slot=slot + 1,
                node=f"n{slot}",
                service=store.view().get(Service, name),
                state=TaskState.RUNNING,
            ),
            spec_version=store.view().get(Service, name).spec_version,
        )
        for name in names
        for slot in range(REPLICAS)
    ]
    await store.update_each(put, running)

    def tasks_of(name: str, count: int) -> Callable[[], bool]:
        return lambda: sum(bool(task.node_id) for task in store.view().find(Task, service_id=name)) >= count

    def scale(tx: Transaction, name: str) -> None:
        service = tx.get(Service, name)
        mode = ServiceMode(replicated=ReplicatedService(replicas=REPLICAS + 5))
        tx.put(replace(service, spec=replace(service.spec, mode=mode)))

    async with leading(store):
        # The last ones: until they are done the loops have looked at everything, and remember what they need.
        for name in names[-2:]:
            await store.update(scale, name)
            await wait_for(store, tasks_of(name, REPLICAS + 5))
        profile = cProfile.Profile()
        profile.enable()
        await store.update(scale, names[0])
        await wait_for(store, tasks_of(names[0], REPLICAS + 5))
        profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


async def test_a_change_costs_the_same_in_a_cluster_ten_times_as_large() -> None:
    small, large = await calls_for_a_change(10), await calls_for_a_change(100)
    assert large < 1.2 * small, f"{small} calls among 10 services, {large} among 100"


async def calls_for_a_run(jobs: int) -> int:
    """Function calls from the request for a run of one scheduled job until its task has a node."""
    store = MemoryStore(SystemClock())
    await store.update_each(put, [a_node("n1", has=Resources(memory_bytes=1 << 40))])
    await store.update(lambda tx: tx.raise_level(SCHEDULES))
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    specs = [
        replace(a_service_spec(f"j{number:04}"), mode=mode, labels={CRON: "0 0 29 2 *"})
        for number in range(jobs)
    ]
    now = timestamp(SystemClock().now_ns())
    ids = [
        (await store.update(create_service, spec, new_id=new_id, new_name=lambda: "", now=now)).id
        for spec in specs
    ]

    async def run(id: str) -> None:
        await store.update(run_job, id, now=timestamp(SystemClock().now_ns()), replaces=False)
        await wait_for(store, lambda: any(task.node_id for task in store.view().find(Task, service_id=id)))

    async with leading(store):
        for id in ids[-2:]:
            await run(id)
        calls = []
        for id in ids[:3]:
            profile = cProfile.Profile()
            profile.enable()
            await run(id)
            profile.disable()
            calls.append(sum(entry.callcount for entry in profile.getstats()))
    return min(calls)  # a round of another loop may have come between


async def test_a_run_costs_the_same_among_ten_times_as_many_scheduled_jobs() -> None:
    few, many = await calls_for_a_run(10), await calls_for_a_run(100)
    assert many < 1.2 * few, f"{few} calls among 10 jobs, {many} among 100"


async def test_a_look_at_every_job_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong twin: a loop that looks at all jobs after each commit."""
    real = SchedulesState.on_commit

    def careful(self: SchedulesState, commit: Commit) -> None:
        real(self, commit)
        next(self.start(self._view()))

    monkeypatch.setattr(SchedulesState, "on_commit", careful)
    few, many = await calls_for_a_run(10), await calls_for_a_run(100)
    assert many > 1.2 * few


async def test_work_on_everything_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong twin: a scheduler that begins anew after every batch."""
    real = Scheduler._schedule

    async def careful(self: Scheduler, due: list[str]) -> None:
        await real(self, due)
        for _ in self.state.start(self._term.view()):
            pass

    monkeypatch.setattr(Scheduler, "_schedule", careful)
    small, large = await calls_for_a_change(10), await calls_for_a_change(100)
    assert large > 1.2 * small
