"""The scheduler's loop on a store in memory: many decisions at once, and those that go wrong."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import Clock, SystemClock
from skep.aio.time_slices import SlicedWork
from skep.manager.scheduler import dependencies, placement
from skep.manager.scheduler.decision_writer import Decision, DecisionWriter
from skep.manager.scheduler.loop import Scheduler
from skep.manager.scheduler.nodes import filters, spread
from skep.manager.scheduler.nodes.accounting import Account
from skep.manager.scheduler.state import SchedulerState
from skep.model.container import Mount
from skep.model.node import Node
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.service import Resources, Service, UpdateState
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, VolumeId, new_id
from skep.model.values.meta import Driver
from skep.model.volume import PublishStatus, Volume, VolumeSpec
from skep.store.interface import Commit, Object, Transaction, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.harness.clocks import PausingClock
from tests.support.managers.counted_calls import calls_of, counting_calls_of_callbacks

NODES = 1000


def put(tx: Transaction, object: Object) -> None:
    tx.put(object)


def waiting(count: int, *, constraints: tuple[str, ...] = (), name: str = "s") -> list[Task]:
    """One pending task each of so many services, all asking for the same."""
    reserve = Resources(memory_bytes=1 << 20)
    services = [a_service(f"{name}{n:03}", reserve=reserve, constraints=constraints) for n in range(count)]
    return [a_task(f"t-{one.id}", service=one, state=TaskState.PENDING) for one in services]


@asynccontextmanager
async def scheduling(store: MemoryStore, clock: Clock | None = None) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        running = group.create_task(Scheduler(store, clock or SystemClock(), new_id, Random(1)).run())
        yield
        running.cancel()


async def wait_for(store: MemoryStore, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20), store.watch(Task) as watch:
        if condition():
            return
        async for _ in watch:
            if condition():
                return


def nodes_of(store: MemoryStore) -> Counter[str]:
    return Counter(task.node_id for task in store.view().find(Task))


async def a_store(*objects: Object) -> MemoryStore:
    store = MemoryStore(SystemClock())
    await store.update_each(put, [a_node(f"n{n}", has=Resources(memory_bytes=1 << 40)) for n in range(10)])
    await store.update_each(put, objects)
    return store


async def test_single_tasks_of_many_services_use_all_nodes_alike() -> None:
    store = await a_store(*waiting(600))
    async with scheduling(store):
        await wait_for(store, lambda: "" not in nodes_of(store))
    assert set(nodes_of(store).values()) == {60}


async def tasks_on_one_node_here_and_three_there() -> set[int]:
    """Tasks of each node, when 40 services of one task spread over two zones."""
    store = MemoryStore(SystemClock())
    await store.update_each(put, [a_node(f"n{n}", labels={"zone": "a" if n == 0 else "b"}) for n in range(4)])
    services = [a_service(f"s{n:03}", spread=("node.labels.zone",)) for n in range(40)]
    tasks = [a_task(f"t-{one.id}", service=one, state=TaskState.PENDING) for one in services]
    await store.update_each(put, tasks)
    async with scheduling(store):
        await wait_for(store, lambda: "" not in nodes_of(store))
    return set(nodes_of(store).values())


async def test_single_tasks_with_a_preference_use_branches_of_different_size_by_their_nodes() -> None:
    assert await tasks_on_one_node_here_and_three_there() == {10}


async def test_first_tasks_that_count_as_copies_of_each_other_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = spread._Fork.__init__
    monkeypatch.setattr(
        spread._Fork, "__init__", lambda fork, children, counts: real(fork, children, counts=True)
    )
    assert await tasks_on_one_node_here_and_three_there() != {10}


async def test_a_decision_that_cannot_be_written_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real, bad = DecisionWriter.write, {"t-s007"}

    def write(writer: DecisionWriter, tx: Transaction, decision: Decision) -> None:
        if decision.task.id in bad:
            raise ValueError("a bad object")
        real(writer, tx, decision)

    monkeypatch.setattr(DecisionWriter, "write", write)
    store = await a_store(*waiting(100))
    async with scheduling(store):
        await wait_for(store, lambda: nodes_of(store)[""] == 1)
        assert store.view().get(Task, "t-s007").node_id == ""
        bad.clear()
        await wait_for(store, lambda: "" not in nodes_of(store))
    assert max(nodes_of(store).values()) - min(nodes_of(store).values()) <= 1


async def test_an_unreadable_spec_affects_its_task_only() -> None:
    bad = waiting(1, constraints=("node.labels.x ~ 1",), name="bad")
    store = await a_store(*waiting(40), *bad)
    async with scheduling(store):
        await wait_for(
            store, lambda: nodes_of(store)[""] == 1 and bool(store.view().get(Task, bad[0].id).status.err)
        )
    assert store.view().get(Task, bad[0].id).status.err.startswith("scheduling failed: constraint expected")
    assert set(nodes_of(store).values()) == {1, 4}


async def test_what_is_retired_while_its_decision_is_written_takes_no_place() -> None:
    tasks = waiting(50)
    store = await a_store(*tasks)

    def retire(tx: Transaction) -> None:
        tx.put(replace(tx.get(Task, "t-s000"), desired_state=TaskState.SHUTDOWN))

    async with scheduling(store):
        await asyncio.sleep(0)
        await store.update(retire)
        await wait_for(store, lambda: nodes_of(store)[""] <= 1)
        await store.update_each(put, waiting(50, name="later"))
        await wait_for(store, lambda: nodes_of(store)[""] <= 1)
    retired = store.view().get(Task, "t-s000")
    held = Counter(task.node_id for task in store.view().find(Task) if task.is_wanted)
    assert retired.status.state in (TaskState.PENDING, TaskState.ASSIGNED)
    assert sum(held.values()) == 99
    assert max(held.values()) - min(held.values()) <= 1


async def test_what_a_service_on_all_nodes_waits_for_is_not_looked_up_for_each_of_its_tasks() -> None:
    service = a_service("agent", is_global=True)
    service = replace(service, spec=replace(service.spec, labels={DEPENDS_ON: "db=service_started"}))
    tasks = [a_task(f"t{n}", service=service, state=TaskState.PENDING, node=f"n{n}") for n in range(300)]
    store = await a_store(service, *tasks)

    def all_say_why() -> bool:
        return {one.status.err for one in store.view().find(Task)} == {"waits for db, which does not exist"}

    with calls_of(dependencies.awaited) as looks:
        async with scheduling(store):
            await wait_for(store, all_say_why)
    assert 0 < len(looks) < 30


async def test_what_waits_is_decided_again_when_a_service_changes_and_not_for_its_updates_progress() -> None:
    service = a_service("web")
    service = replace(service, spec=replace(service.spec, labels={DEPENDS_ON: "db=service_started"}))
    task = a_task("t", service=service, state=TaskState.PENDING)
    store = await a_store(service, task)
    waits = dependencies.Waits(0.0)
    assert waits.of("group", task, store.view(), 0.0, {}) is not None

    def again(before: Service, after: Service) -> list[str]:
        return list(waits.record(Commit(1, (Updated(before, after),)), 0.0))

    for name, due in (("db", ["group"]), ("web", ["group"]), ("other", [])):
        assert again(a_service(name), a_service(name, state=UpdateState.UPDATING)) == []
        assert again(a_service(name), a_service(name, replicas=2)) == due


async def test_no_step_looks_at_more_than_some_nodes_however_many_services_ask_for_something_else() -> None:
    """Whether there are candidates, and why there are none, is found out with pauses: counted are calls, not time."""
    store = MemoryStore(SystemClock())
    await store.update_each(put, [a_node(f"n{n}", labels={"zone": "a"}) for n in range(NODES)])
    services = [
        a_service(f"s{n}", constraints=(f"node.labels.zone!={n}", "node.labels.zone==b")) for n in range(9)
    ]
    services += [a_service(f"m{n}", constraints=(f"node.labels.zone!={n}",)) for n in range(9)]
    await store.update_each(put, services)
    with counting_calls_of_callbacks() as counts:
        async with scheduling(store, PausingClock()):
            await asyncio.sleep(0)
            await store.update_each(
                put, [a_task(one.id, service=one, state=TaskState.PENDING) for one in services]
            )
            await wait_for(
                store, lambda: all(one.node_id or one.status.err for one in store.view().find(Task))
            )
    assert len([one for one in store.view().find(Task) if one.node_id]) == 9
    assert max(counts) < 12 * NODES


@pytest.mark.parametrize("full", [NODES, NODES - 1])
async def test_no_step_looks_at_more_than_some_of_the_nodes_that_a_service_is_on(full: int) -> None:
    """One task on each node but for one, or on all: the node without one, which has more of other services and so comes
    last, is not found by passing over the others."""
    store = MemoryStore(SystemClock())
    service = a_service("web", max_replicas=1, replicas=NODES)
    await store.update_each(put, [a_node(f"n{n:04}") for n in range(NODES)])
    await store.update(put, service)
    running = [
        a_task(f"t{n:04}", service=service, slot=n + 1, node=f"n{n:04}", state=TaskState.RUNNING)
        for n in range(full)
    ]
    other = a_service("other")
    running += [
        a_task(f"o{n}", service=other, slot=n + 1, node=f"n{NODES - 1:04}", state=TaskState.RUNNING)
        for n in range(9)
    ]
    await store.update_each(put, running)
    async with scheduling(store, PausingClock()):
        await asyncio.sleep(0.1)  # it has entered them, which has a test of its own
        with counting_calls_of_callbacks() as counts:
            await store.update(put, a_task("last", service=service, slot=NODES, state=TaskState.PENDING))
            await wait_for(store, lambda: (task := store.view().get(Task, "last")).node_id or task.status.err)
    last = store.view().get(Task, "last")
    assert last.node_id == ("" if full == NODES else f"n{full:04}")
    assert ("max replicas per node" in last.status.err) == (full == NODES)
    assert max(counts) < 6 * NODES


async def test_room_that_comes_while_a_refusal_is_explained_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    explained, real = asyncio.Event(), filters.explaining

    def slowly(*asked: Any) -> SlicedWork[str]:
        explained.set()
        for _ in range(200):
            yield
        return (yield from real(*asked))

    monkeypatch.setattr(placement, "explaining", slowly)
    here, there = waiting(1, constraints=("node.labels.zone==a",)), waiting(1, name="other")
    store = await a_store(*here, *there)
    async with scheduling(store, PausingClock()):
        await explained.wait()
        node = store.view().get(Node, "n3")
        await store.update(put, replace(node, spec=replace(node.spec, labels={"zone": "a"})))
        await wait_for(store, lambda: "" not in nodes_of(store))
    assert store.view().get(Task, here[0].id).node_id == "n3"


async def test_room_that_comes_while_nodes_are_searched_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    searched, has_come, real = asyncio.Event(), asyncio.Event(), spread.Spread.choosing

    def slowly(self: spread.Spread) -> SlicedWork[Account | None]:
        account = yield from real(self)
        if account is None and not has_come.is_set():
            searched.set()
            while not has_come.is_set():
                yield
            for _ in range(200):  # the commit arrives
                yield
        return account

    monkeypatch.setattr(spread.Spread, "choosing", slowly)
    store = MemoryStore(SystemClock())
    room = a_node("n1").description.resources.memory_bytes
    large = a_service("large", reserve=Resources(memory_bytes=room))
    await store.update_each(put, [a_node("n1"), large])
    await store.update_each(
        put, [a_task(f"t{n}", service=large, slot=n, state=TaskState.PENDING) for n in (1, 2)]
    )
    async with scheduling(store, PausingClock()):
        await searched.wait()  # the first task has the only node
        await store.update(put, a_node("n2"))
        has_come.set()
        await wait_for(store, lambda: set(nodes_of(store)) == {"n1", "n2"})


async def test_tasks_that_are_removed_during_a_decision_that_fails_take_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen, removed, real = asyncio.Event(), asyncio.Event(), spread.Spread.choosing

    def failing(self: spread.Spread) -> SlicedWork[Account | None]:
        account = yield from real(self)
        if account is None and not removed.is_set():
            chosen.set()
            while not removed.is_set():
                yield
            for _ in range(200):  # the commit arrives
                yield
            raise RuntimeError("a bad node")
        return account

    monkeypatch.setattr(spread.Spread, "choosing", failing)
    store = MemoryStore(SystemClock())
    room = a_node("n1").description.resources.memory_bytes
    services = [a_service(name, reserve=Resources(memory_bytes=room)) for name in ("large", "later")]
    await store.update_each(put, [a_node("n1"), *services])
    large = [a_task(f"t{n}", service=services[0], slot=n, state=TaskState.PENDING) for n in (1, 2)]
    await store.update_each(put, large)
    async with scheduling(store, PausingClock()):
        await chosen.wait()  # the first has the node, and there is none for the second
        await store.update(lambda tx: [tx.delete(Task, one.id) for one in large])
        removed.set()
        await store.update(put, a_task("last", service=services[1], slot=1, state=TaskState.PENDING))
        await wait_for(store, lambda: store.view().get(Task, "last").node_id == "n1")


async def test_a_volume_has_those_groups_decided_again_that_mount_it() -> None:
    plain = waiting(1, constraints=("node.labels.x==1",), name="plain")
    store = await a_store(*plain, *(with_volume(task) for task in waiting(2)))

    async def groups_after(volume: Volume) -> set[str]:
        with calls_of(SchedulerState.decide) as decided:
            await store.update(put, volume)
            for _ in range(300):
                await asyncio.sleep(0)
        looked = {group for call in decided.of(SchedulerState.decide) for group in call["due"]}
        return {group.partition("/")[0] for group in looked}

    volume = Volume(id=VolumeId("v1"), spec=VolumeSpec(name="of-s001", driver=Driver(name="d")))
    entry = PublishStatus(node_id=NodeId("n1"))
    async with scheduling(store):
        await wait_for(store, lambda: all(task.status.err for task in store.view().find(Task)))
        assert (
            await groups_after(replace(volume, id=VolumeId("v2"), spec=VolumeSpec(name="of-none"))) == set()
        )
        assert await groups_after(volume) == {"s001"}
        assert await groups_after(replace(volume, message="no driver")) == {"s001"}
        published = replace(volume, publish_status=(entry,))
        assert await groups_after(published) == {"s000", "s001"}, (
            "the node may have had its number of volumes"
        )


def with_volume(task: Task) -> Task:
    """It mounts a cluster volume of its service."""
    assert task.spec.container_spec is not None
    mount = Mount(type="cluster", source=f"of-{task.service_id}", target="/d")
    return replace(
        task,
        spec=replace(task.spec, container_spec=replace(task.spec.container_spec, mounts=(mount,))),
    )
