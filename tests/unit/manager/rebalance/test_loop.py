"""The leader's loop: runs that it continues, and those that it starts after nodes return."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.rebalance.loop import AT_ONCE, Rebalancer
from skep.manager.rebalance.records import rebalancing_in, set_after_return, start_run, stop_run
from skep.manager.services.freezes import end_freeze, set_freeze
from skep.model.node import Node
from skep.model.options.freezes import FreezeRequest
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.store.store_transactions import put

NOW = Timestamp("2026-11-28T00:00:00Z")


class Steps(SystemClock):
    """A clock that moves on when the loop waits, and then hands over to the test."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits = asyncio.Event()
        self.continues = asyncio.Event()

    def monotonic(self) -> float:
        return self.now_s

    def now_ns(self) -> int:
        return round(self.now_s * SECOND_NS)

    async def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 0.001)
        self.waits.set()
        await self.continues.wait()
        self.continues.clear()


class Leader:
    """A store, and the loop on it."""

    def __init__(self) -> None:
        self.clock = Steps()
        self.store = MemoryStore(self.clock)
        self.running: asyncio.Task[None] | None = None

    async def step(self, number: int = 1) -> None:
        """Let the loop make so many steps."""
        if self.running is None:
            self.running = asyncio.create_task(Rebalancer(self.store, self.clock).run())
            await self.clock.waits.wait()
        for _ in range(number):
            self.clock.waits.clear()
            self.clock.continues.set()
            async with asyncio.timeout(10):
                await self.clock.waits.wait()

    def moving(self) -> list[Task]:
        return [one for one in self.store.view().find(Task) if one.relocation is not None and one.is_active]

    async def finish_moves(self) -> None:
        """Make the moves as the orchestrator and the nodes do."""
        for task in self.moving():
            assert task.relocation is not None
            ended = replace(
                task,
                desired_state=TaskState.SHUTDOWN,
                status=replace(task.status, state=TaskState.SHUTDOWN),
            )
            await self.store.update(put, ended)
            heir = a_task(slot=task.slot, node=task.relocation.target)
            heir = replace(heir, spec=task.spec, service_id=task.service_id, spec_version=task.spec_version)
            await self.store.update(put, heir)


@pytest.fixture
async def leader() -> Leader:
    """Return a leader of two nodes, of which n2 is empty, and eight services with two tasks on n1."""
    found = Leader()
    await found.store.update(put, Swarm(id=ClusterId("c")))
    for id in ("n1", "n2"):
        await found.store.update(put, a_node(id))
    for number in range(8):
        service = a_service(f"s{number}", replicas=2)
        await found.store.update(put, service)
        version = found.store.view().get(Service, service.id).spec_version
        for slot in (1, 2):
            task = a_task(slot=slot, node="n1", service=service)
            await found.store.update(put, replace(task, spec_version=version))
    return found


async def test_a_run_makes_a_few_moves_at_a_time_until_none_is_left(leader: Leader) -> None:
    await leader.step(3)
    assert leader.moving() == [], "nothing moves by itself"
    await leader.store.update(start_run, "ada", NOW)
    await leader.step()
    assert len(leader.moving()) == AT_ONCE
    await leader.step(2)
    assert len(leader.moving()) == AT_ONCE
    for _ in range(8):
        await leader.finish_moves()
        await leader.step()
    record = rebalancing_in(leader.store.view())
    assert (record.run, record.last) == (None, "8 moves")
    tasks = [one for one in leader.store.view().find(Task) if one.is_active]
    assert sorted(one.node_id for one in tasks) == ["n1"] * 8 + ["n2"] * 8


async def test_a_freeze_holds_a_run_back_and_says_so(leader: Leader) -> None:
    await leader.store.update(start_run, "ada", NOW)
    until = FreezeRequest(until=timestamp(3600 * SECOND_NS))
    await leader.store.update(set_freeze, "", until, by="bob", now_ns=0)
    await leader.step(2)
    run = rebalancing_in(leader.store.view()).run
    assert run is not None
    assert (leader.moving(), "frozen" in run.waiting) == ([], True)
    await leader.store.update(end_freeze, "")
    await leader.step()
    assert len(leader.moving()) == AT_ONCE


async def test_a_stopped_run_begins_no_move_and_ends_with_the_last_one(leader: Leader) -> None:
    await leader.store.update(start_run, "ada", NOW)
    await leader.step()
    await leader.store.update(stop_run)
    await leader.step()
    assert rebalancing_in(leader.store.view()).run is not None
    await leader.finish_moves()
    await leader.step()
    assert leader.moving() == []
    assert rebalancing_in(leader.store.view()).last == f"stopped after {AT_ONCE} moves"


async def test_a_move_that_takes_too_long_is_given_up_and_its_service_stays(leader: Leader) -> None:
    await leader.store.update(start_run, "ada", NOW)
    await leader.step()
    slow = leader.moving()[0]
    leader.clock.now_s += 301
    await leader.step()
    assert slow.id not in {one.id for one in leader.moving()}
    run = rebalancing_in(leader.store.view()).run
    assert run is not None
    assert run.skipped == (slow.service_id,)


async def test_a_move_that_a_freeze_holds_back_is_not_given_up_meanwhile(leader: Leader) -> None:
    await leader.store.update(start_run, "ada", NOW)
    await leader.step()
    moving = {one.id for one in leader.moving()}
    until = FreezeRequest(until=timestamp(3600 * SECOND_NS))
    await leader.store.update(set_freeze, "", until, by="bob", now_ns=0)
    await leader.step()
    leader.clock.now_s += 301
    await leader.step()
    await leader.store.update(end_freeze, "")
    await leader.step()
    run = rebalancing_in(leader.store.view()).run
    assert run is not None
    assert ({one.id for one in leader.moving()}, run.skipped) == (moving, ())
    leader.clock.now_s += 301
    await leader.step()
    assert len(leader.moving()) < len(moving), (
        "nothing holds it back any more, and its successor does not run"
    )


async def test_a_move_has_its_time_under_a_new_leader_whose_clock_is_ahead(leader: Leader) -> None:
    await leader.store.update(start_run, "ada", NOW)
    await leader.step()
    moving = {one.id for one in leader.moving()}
    assert leader.running is not None
    leader.running.cancel()
    leader.running = None
    leader.clock.now_s += 301
    await leader.step(2)
    assert {one.id for one in leader.moving()} == moving


async def test_after_a_return_a_run_starts_when_the_wait_is_over(leader: Leader) -> None:
    await leader.store.update(set_after_return, 60)

    async def has_started(until_s: float) -> bool:
        while leader.clock.now_s < until_s:
            await leader.step()
        return rebalancing_in(leader.store.view()).run is not None

    assert not await has_started(55)
    await leader.store.update(put, a_node("n3"))
    assert not await has_started(110), "the wait begins again with each return"
    assert await has_started(150)
    assert isinstance(leader.store.view().get(Node, "n3"), Node)
