"""A service of a thousand tasks does not keep the leader busy with nothing else."""

import asyncio
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.orchestrator.convergence import deciding_all
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.orchestrator.state import THROTTLE_S_MAX, throttle_s
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import new_id
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.counted_calls import calls_of

TASKS, REPORTS = 1000, 200


@pytest.mark.parametrize(
    ("tasks", "rests_s"), [(0, 0), (20, 0), (399, 0), (400, 0.01), (2000, 0.05), (10**6, THROTTLE_S_MAX)]
)
def test_only_large_services_rest(tasks: int, rests_s: float) -> None:
    assert throttle_s(tasks) == pytest.approx(rests_s)


def put(tx: Transaction, object: Service | Task) -> None:
    tx.put(object)


def report(tx: Transaction, slot: int) -> None:
    task = tx.get(Task, f"t{slot:04}")
    tx.put(replace(task, status=replace(task.status, state=TaskState.RUNNING)))


class HandClock(SystemClock):
    """Its time passes when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_reports_of_a_large_service_have_all_of_it_decided_only_now_and_then() -> None:
    store, clock = MemoryStore(SystemClock()), HandClock()
    await store.update(lambda tx: tx.put(a_node("n1")))
    await store.update(lambda tx: tx.put(a_service("web", replicas=TASKS)))
    web = store.view().get(Service, "web")
    tasks = [
        replace(
            a_task(f"t{slot:04}", slot=slot, node="n1", service=web, state=TaskState.STARTING),
            spec_version=web.spec_version,
        )
        for slot in range(1, TASKS + 1)
    ]
    await store.update_each(put, tasks)
    with calls_of(deciding_all) as decided:
        async with asyncio.TaskGroup() as group, store.watch(Task) as watch:
            running = group.create_task(Orchestrator(store, clock, new_id, Random(1)).run())
            for slot in range(1, REPORTS + 1):
                await store.update(report, slot)
            await store.update(lambda tx: tx.delete(Task, "t0999"))
            assert len(decided) == 1
            clock.now += throttle_s(TASKS)  # a missing slot is counted among all
            while len(store.view().find(Task)) < TASKS:
                await anext(watch)
            assert len(decided) == 2
            running.cancel()
