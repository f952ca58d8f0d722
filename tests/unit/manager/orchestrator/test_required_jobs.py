"""Jobs that services wait for: with a time to live, given up, or completed on nodes that are gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from random import Random

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.control.services import create_service
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.orchestrator.reaper.loop import Reaper
from skep.manager.scheduler.dependencies import awaited
from skep.model.node import Node
from skep.model.options.dependencies import DEPENDS_ON, is_wait
from skep.model.options.labels import JOB_TTL
from skep.model.options.schedules import CRON
from skep.model.service import (
    GlobalJob,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateState,
)
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ClusterId, NodeId, ServiceId
from skep.model.values.times import timestamp
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service_spec, a_task
from tests.support.managers.rollouts import a_spec, a_world, wanted

ONCE = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
EVERYWHERE = ServiceMode(global_job=GlobalJob())
NEVER_AGAIN = RestartPolicy(condition=RestartCondition.NONE)
COMPLETED = "migrate=service_completed_successfully"


def a_migration(mode: ServiceMode = ONCE, **labels: str) -> ServiceSpec:
    return replace(a_service_spec("migrate", restart=NEVER_AGAIN), mode=mode, labels=labels)


def a_web(depends_on: str = COMPLETED) -> ServiceSpec:
    return replace(a_service_spec("web"), labels={DEPENDS_ON: depends_on})


class Leading:
    """Orchestrator and reaper on an in-memory store and virtual time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.clock = VirtualClock(loop)
        self.store = MemoryStore(self.clock)
        self._numbers = count(1)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        def begin(tx: Transaction) -> None:
            tx.raise_level(4)
            tx.put(Swarm(id=ClusterId("c")))
            tx.put(a_node("n1"))

        await self.store.update(begin)
        loops = [
            asyncio.create_task(
                kind(self.store, self.clock, lambda: f"t{next(self._numbers)}", Random(1)).run()
            )
            for kind in (Orchestrator, Reaper)
        ]
        yield
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)

    async def create(self, spec: ServiceSpec) -> None:
        now = timestamp(self.clock.now_ns())
        await self.store.update(create_service, spec, new_id=lambda: spec.name, new_name=str, now=now)
        await asyncio.sleep(1)

    async def report(self, state: TaskState) -> None:
        """The nodes report that of every task of the job."""

        def write(tx: Transaction) -> None:
            for task in tx.find(Task, service_id="migrate"):
                if task.is_active:
                    node = task.node_id or NodeId("n1")
                    tx.put(replace(task, node_id=node, status=TaskStatus(state=state)))

        await self.store.update(write)
        await asyncio.sleep(1)

    def reason(self) -> str:
        """What a new task of the web service waits for; empty: nothing."""
        web = self.store.view().get(Service, "web")
        pending = a_task("p", service=web, state=TaskState.PENDING)
        waiting = awaited(pending, self.store.view(), lambda task, view: 0.0, 10.0**6)
        return waiting.reason if waiting is not None else ""

    @property
    def job(self) -> Service | None:
        found = self.store.view().lookup(Service, "migrate")
        return found if found is not None and found.removed_at is None else None


@pytest.fixture
def loop() -> VirtualLoop:
    return VirtualLoop()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_job_with_a_time_to_live_stays_as_long_as_a_service_requires_it(
    loop: VirtualLoop, is_first: bool
) -> None:
    leading = Leading(loop)

    async def live() -> None:
        async with leading.running():
            specs = [a_migration(**{JOB_TTL: "10m"}), a_web()]
            for spec in specs if is_first else reversed(specs):
                await leading.create(spec)
            await leading.report(TaskState.COMPLETE)
            await asyncio.sleep(3600)
            assert leading.job is not None
            assert leading.reason() == ""

            def without(tx: Transaction) -> None:
                web = tx.get(Service, "web")
                tx.put(replace(web, spec=replace(web.spec, labels={})))

            await leading.store.update(without)
            await asyncio.sleep(5)
            assert leading.job is None

    loop.run_until_complete(live())


def test_a_job_that_a_service_can_do_without_goes_in_time(loop: VirtualLoop) -> None:
    leading = Leading(loop)

    async def live() -> None:
        async with leading.running():
            await leading.create(a_migration(**{JOB_TTL: "10m"}))
            await leading.create(a_web(f"{COMPLETED}+optional"))
            await leading.report(TaskState.COMPLETE)
            await asyncio.sleep(700)
            assert leading.job is None
            assert leading.reason() == ""

    loop.run_until_complete(live())


def test_a_global_job_has_completed_also_when_its_nodes_are_gone(loop: VirtualLoop) -> None:
    leading = Leading(loop)

    async def live() -> None:
        async with leading.running():
            await leading.create(a_migration(EVERYWHERE))
            await leading.create(a_web())
            assert leading.reason() == "waits for migrate to complete"
            await leading.report(TaskState.COMPLETE)
            await leading.store.update(lambda tx: tx.delete(Node, "n1"))
            await asyncio.sleep(5)
            assert leading.store.view().find(Task, service_id="migrate") == []
            assert leading.reason() == ""

    loop.run_until_complete(live())


def test_a_wait_for_what_does_not_come_says_so(loop: VirtualLoop) -> None:
    leading = Leading(loop)

    async def live() -> None:
        async with leading.running():
            await leading.create(a_web())
            assert leading.reason() == "waits for migrate, which does not exist"
            await leading.create(a_migration())
            assert leading.reason() == "waits for migrate to complete"
            await leading.report(TaskState.RUNNING)
            assert is_wait(leading.reason())
            await leading.report(TaskState.FAILED)
            assert leading.reason() == "waits for migrate to complete, which has failed"
            assert not is_wait(leading.reason())

    loop.run_until_complete(live())


def test_a_job_with_a_schedule_may_complete_with_its_next_run(loop: VirtualLoop) -> None:
    leading = Leading(loop)

    async def live() -> None:
        async with leading.running():
            await leading.create(a_migration(**{CRON: "@hourly"}))
            await leading.create(a_web())
            assert leading.reason() == "waits for migrate to complete"

    loop.run_until_complete(live())


@pytest.mark.parametrize(
    ("reason", "fails"),
    [
        ("waits for db to be healthy", False),
        ("waits for db, which does not exist", True),
        ("waits for migrate to complete, which has failed", True),
    ],
)
def test_the_progress_deadline_counts_a_wait_for_what_does_not_come(reason: str, fails: bool) -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.PAUSE)
    world = a_world(update, replicas=1)
    world.update(a_spec("app:2", replicas=1, update=update))
    world.settle()
    (task,) = wanted(world, "app:2")
    world.put(replace(task, status=TaskStatus(state=TaskState.PENDING, err=reason)))
    world.now += 3600.0
    world.settle()
    status = world.service.update_status
    assert status is not None
    assert (status.state is UpdateState.PAUSED) is fails
    assert (reason in status.message) is fails
    assert ServiceId(world.service.id)
