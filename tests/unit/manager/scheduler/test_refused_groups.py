"""Thousands of tasks without room: they hold up neither the event loop nor other tasks, and show why at the end."""

import asyncio
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control_loops.failures import Failures
from skep.manager.scheduler import loop, placement, state
from skep.manager.scheduler.decision_writer import TOGETHER, write_decisions
from skep.manager.scheduler.explaining.pending_reasons import REST_S_MAX, Texts, Why
from skep.manager.scheduler.group_queue import RETRIES_S, GroupQueue
from skep.manager.scheduler.groups import Groups
from skep.manager.scheduler.loop import Scheduler
from skep.manager.scheduler.nodes import filters, spread
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.model.node import Availability, Node
from skep.model.options.labels import PRIORITY
from skep.model.service import Resources, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import new_id
from skep.store.interface import Commit, Transaction, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.harness.clocks import PausingClock
from tests.support.managers.counted_calls import counting_calls_of_callbacks
from tests.unit.manager.scheduler.test_scheduler_loop import put, scheduling, wait_for

MIB = 1 << 20
LARGE = Resources(memory_bytes=100 * MIB)


async def a_store(*objects: object, nodes: int = 3) -> MemoryStore:
    store = MemoryStore(SystemClock())
    has = Resources(memory_bytes=10 * MIB)
    await store.update_each(put, [a_node(f"n{number}", has=has) for number in range(nodes)])
    await store.update_each(put, objects)
    return store


def waiting(service: Service, count: int, *, is_global: bool = False) -> list[Task]:
    return [
        a_task(
            f"{service.id}-{number:04}",
            service=service,
            slot=0 if is_global else number + 1,
            node=f"n{number}" if is_global else "",
            state=TaskState.PENDING,
        )
        for number in range(count)
    ]


def texts(store: MemoryStore) -> set[str]:
    return {one.status.err for one in store.view().find(Task) if not one.node_id or one.status.err}


def pause(tx: Transaction, node_id: str) -> None:
    node = tx.get(Node, node_id)
    tx.put(replace(node, spec=replace(node.spec, availability=Availability.PAUSE)))


async def record(store: MemoryStore, into: list[Commit]) -> None:
    async with store.watch(Task) as watch:
        async for commit in watch:
            into += (commit,)


def with_new_text(seen: list[Commit]) -> int:
    events = (event for commit in seen for event in commit.events if isinstance(event, Updated))
    return sum(
        isinstance(one.new, Task)
        and isinstance(one.old, Task)
        and not one.new.node_id
        and one.new.status.err != one.old.status.err
        for one in events
    )


async def test_refused_tasks_of_a_global_service_are_decided_again_in_pieces() -> None:
    """Counted are calls between two pauses: about fifty for each task."""
    count = 1000
    service, other = a_service("agent", is_global=True, reserve=LARGE), a_service("other")
    store = await a_store(service, other, *waiting(service, count, is_global=True), nodes=count)
    async with scheduling(store, PausingClock()):
        await wait_for(store, lambda: texts(store) == {"insufficient resources on 1 node"})
        with counting_calls_of_callbacks() as counts:
            await store.update(pause, "n1")
            await store.update_each(put, waiting(other, 1))
            await wait_for(store, lambda: bool(store.view().get(Task, "other-0000").node_id))
            await wait_for(store, lambda: len(texts(store)) == 2)
    assert max(counts) < 15 * count


async def test_refused_groups_of_higher_priority_hold_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are decisions, each of which takes a look at all nodes."""
    services = [
        a_service(f"s{number:03}", reserve=Resources(memory_bytes=(100 + number) * MIB))
        for number in range(300)
    ]
    services = [replace(one, spec=replace(one.spec, labels={PRIORITY: "1"})) for one in services]
    other = a_service("other")
    store = await a_store(*services, other, *(task for one in services for task in waiting(one, 1)))
    decided, real = [], placement.placing

    def placing(tasks: Any, *args: Any, **options: Any) -> Any:
        decided.extend(task.service_id for task in tasks)
        return real(tasks, *args, **options)

    monkeypatch.setattr(state, "placing", placing)
    async with scheduling(store, PausingClock(2 * RETRIES_S)):
        await wait_for(store, lambda: "" not in texts(store))
        decided.clear()

        def event(tx: Transaction) -> None:
            pause(tx, "n1")
            tx.put(*waiting(other, 1))

        await store.update(event)
        await wait_for(store, lambda: bool(store.view().get(Task, "other-0000").node_id))
        assert decided.index("other") < 5
        await wait_for(store, lambda: len(texts(store)) == 1 and "not available" in texts(store).pop())
    assert {*decided} == {"other", *(one.id for one in services)}


async def test_room_goes_to_refused_groups_of_higher_priority_however_many_have_none() -> None:
    services = [a_service(f"s{number:03}", reserve=LARGE) for number in range(300)]
    high = a_service("z", reserve=Resources(memory_bytes=50 * MIB))
    high = replace(high, spec=replace(high.spec, labels={PRIORITY: "1"}))
    store = await a_store(*services, high, *(task for one in (*services, high) for task in waiting(one, 1)))
    async with scheduling(store):
        await wait_for(store, lambda: "" not in texts(store))
        await store.update(put, a_node("new", has=LARGE))
        await wait_for(store, lambda: any(one.node_id for one in store.view().find(Task)))
        assert store.view().get(Task, "z-0000").node_id == "new"


async def test_an_assignment_waits_for_no_text_of_another_task() -> None:
    service, other = a_service("web", reserve=LARGE), a_service("other")
    store = await a_store(service, other, *waiting(service, 20 * TOGETHER))
    seen: list[Commit] = []
    async with scheduling(store), asyncio.TaskGroup() as group:
        await wait_for(
            store, lambda: texts(store) == {"no suitable node (insufficient resources on 3 nodes)"}
        )
        watching = group.create_task(record(store, seen))
        await asyncio.sleep(0)
        await store.update(lambda tx: tx.delete(Node, "n1"))
        await store.update_each(put, waiting(other, 1))
        await wait_for(store, lambda: bool(store.view().get(Task, "other-0000").node_id))
        assert with_new_text(seen) <= 2 * TOGETHER
        await wait_for(
            store, lambda: texts(store) == {"no suitable node (insufficient resources on 2 nodes)"}
        )
        watching.cancel()
    assert with_new_text(seen) == 20 * TOGETHER


async def test_the_first_text_of_a_task_waits_for_no_text_that_changes() -> None:
    """An update stops the tasks that hold what the new one is refused, once it shows that."""
    service, other = a_service("web", reserve=LARGE), a_service("other", reserve=LARGE)
    store = await a_store(service, other, *waiting(service, 20 * TOGETHER))
    seen: list[Commit] = []
    async with scheduling(store), asyncio.TaskGroup() as group:
        await wait_for(
            store, lambda: texts(store) == {"no suitable node (insufficient resources on 3 nodes)"}
        )
        watching = group.create_task(record(store, seen))
        await asyncio.sleep(0)
        await store.update(lambda tx: tx.delete(Node, "n1"))
        await store.update_each(put, waiting(other, 1))
        await wait_for(store, lambda: bool(store.view().get(Task, "other-0000").status.err))
        assert with_new_text(seen) <= 3 * TOGETHER
        watching.cancel()


async def test_a_group_that_is_removed_while_it_is_decided_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, began = spread.Spread.choosing, asyncio.Event()

    def slowly(self: spread.Spread) -> Any:
        began.set()
        for _ in range(200):
            yield
        return (yield from real(self))

    monkeypatch.setattr(spread.Spread, "choosing", slowly)
    service, other = a_service("web", reserve=LARGE), a_service("other")
    store = await a_store(service, other, *waiting(service, 1))
    scheduler = Scheduler(store, PausingClock(), new_id, Random(1))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(scheduler.run())
        await began.wait()
        await store.update(lambda tx: tx.delete(Task, "web-0000"))
        await store.update_each(put, waiting(other, 1))
        await wait_for(store, lambda: bool(store.view().get(Task, "other-0000").node_id))
        await asyncio.sleep(0)
        running.cancel()
    assert scheduler.state.texts._why == {}


async def test_however_often_a_group_is_decided_the_last_task_gets_its_text() -> None:
    """Nodes change with each text that is written, so it is never up to date for all."""
    service = a_service("web", reserve=LARGE)
    tasks = waiting(service, 6 * TOGETHER)
    store = await a_store(service, *tasks, nodes=20)
    async with scheduling(store):
        for number in range(15):
            before = store.view().revision
            await store.update(lambda tx, number=number: tx.delete(Node, f"n{number}"))
            await wait_for(store, lambda before=before: store.view().revision > before + 1)
        assert "" not in texts(store)


async def test_a_text_that_is_as_before_is_not_written_again() -> None:
    service, other = a_service("web", reserve=LARGE), a_service("other")
    store = await a_store(service, other, *waiting(service, 3))
    async with scheduling(store):
        await wait_for(store, lambda: "" not in texts(store))
        node = store.view().get(Node, "n1")
        await store.update(put, replace(node, spec=replace(node.spec, labels={"zone": "a"})))
        await store.update_each(put, waiting(other, 1))
        await wait_for(store, lambda: bool(store.view().get(Task, "other-0000").node_id))
        before = store.view().revision
        await store.update(put, a_node("n9", has=Resources()))
        await wait_for(
            store, lambda: texts(store) == {"no suitable node (insufficient resources on 4 nodes)"}
        )
    assert store.view().revision == before + 2


async def test_a_text_that_is_right_again_while_another_one_is_to_be_written_stays() -> None:
    (task,) = waiting(a_service("web"), 1)
    task = replace(task, status=replace(task.status, err="present"))
    store, clock, groups = await a_store(task), PausingClock(), Groups()
    groups.enter(task.id, task.id)
    refused = Texts(store, clock, groups, Accounting(), Failures(clock, Random(1)))
    refused.set(task.id, Why("outdated"))
    taking = asyncio.create_task(refused.take(TOGETHER))
    await asyncio.sleep(0)
    refused.set(task.id, Why("present"))
    assert await taking == []


class _RestingClock(PausingClock):
    """Records the rests, and lets other tasks run instead."""

    def __init__(self) -> None:
        super().__init__(step_s=0.01)
        self.rests: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        await asyncio.sleep(0)


async def test_texts_rest_for_longer_than_they_take_while_decisions_are_made() -> None:
    services = [a_service(f"s{number}") for number in range(3 * TOGETHER)]
    tasks = [task for one in services for task in waiting(one, 1)]
    store, clock, groups = await a_store(*services, *tasks), _RestingClock(), Groups()
    refused = Texts(store, clock, groups, Accounting(), Failures(clock, Random(1)))
    for task in tasks:
        groups.enter(task.id, task.id)
        refused.set(task.id, Why("no room"))
    refused.release()
    writing = asyncio.create_task(refused.run(GroupQueue(clock, lambda _: 0)))
    while len(clock.rests) < 3:
        if len(clock.rests) == 1:  # a pass begins while the second of three transactions is written
            refused.hold()
            refused.release()
        await asyncio.sleep(0)
    writing.cancel()
    quiet, busy, quiet_again = clock.rests
    assert (quiet, quiet_again) == (0, 0)
    assert 0.02 < busy <= REST_S_MAX


@pytest.mark.parametrize("change", ["stopped", "deleted", "failed"])
async def test_room_of_an_assignment_that_ends_while_it_is_written_is_for_others(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The other one was refused because of it."""
    services = [a_service("first", reserve=LARGE), a_service("second", reserve=LARGE)]
    store = await a_store(*services, *(task for one in services for task in waiting(one, 1)), nodes=0)
    await store.update(put, a_node("n1", has=LARGE))
    real, ended = write_decisions, list[str]()

    def end(tx: Transaction, id: str) -> None:
        task = tx.get(Task, id)
        if change == "deleted":
            tx.delete(Task, id)
        elif change == "stopped":
            tx.put(replace(task, desired_state=TaskState.SHUTDOWN))
        else:
            tx.put(replace(task, status=replace(task.status, state=TaskState.FAILED)))

    async def write(term: Any, decisions: Any, now: Any) -> Any:
        first = not ended
        ended.append(decisions[0].task.id)
        written = await real(term, decisions, now) if not first or change == "failed" else None
        if first:
            await store.update(end, ended[0])
            for _ in range(10):
                await asyncio.sleep(0)  # the commit is read
        return written or await real(term, decisions, now)

    monkeypatch.setattr(loop, "write_decisions", write)
    async with scheduling(store):
        await wait_for(
            store, lambda: any(one.node_id and one.id != ended[0] for one in store.view().find(Task))
        )


async def test_an_explanation_that_fails_is_shown_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = filters.explaining

    def failing(requirements: Any, *args: Any) -> Any:
        if requirements.memory_bytes == 101 * MIB:
            raise RuntimeError("a bad node")
        return (yield from real(requirements, *args))

    monkeypatch.setattr(placement, "explaining", failing)
    services = [a_service("bad", reserve=Resources(memory_bytes=101 * MIB)), a_service("good", reserve=LARGE)]
    store = await a_store(*services, *(task for one in services for task in waiting(one, 1)))
    async with scheduling(store):
        await wait_for(store, lambda: "" not in texts(store))
    assert store.view().get(Task, "bad-0000").status.err == "scheduling failed: RuntimeError: a bad node"
    assert "insufficient" in store.view().get(Task, "good-0000").status.err
