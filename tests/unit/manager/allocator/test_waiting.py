"""What waits for a network costs nothing until there is something for it; counted are the attempts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import Clock, SystemClock
from skep.errors import Unavailable
from skep.manager.allocator.addresses import _Pool
from skep.manager.allocator.changes import ReleaseTask
from skep.manager.allocator.loop import Allocator
from skep.manager.allocator.state import AllocatorState
from skep.manager.allocator.subnets import allocated
from skep.manager.allocator.waiting import WaitingTasks
from skep.model.network import IPAMConfig, Network
from skep.model.networks import routes
from skep.model.networks.routes import ROUTES_LABEL
from skep.model.node import Node, NodeState
from skep.model.service import EndpointSpec, NetworkAttachmentConfig, Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import NetworkId, ServiceId, TaskId, new_id
from skep.store.interface import Object, Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service_spec, a_task, an_overlay
from tests.support.harness.clocks import PausingClock
from tests.support.managers.counted_calls import Calls, calls_of

NET = an_overlay("net1", subnet="10.0.1.0/28")
HAS = 13
"""Addresses for tasks."""


def put(tx: Transaction, object: Object) -> None:
    tx.put(object)


def new_tasks(name: str, count: int, network: Network = NET) -> list[Object]:
    """A service without a virtual address, and its new tasks."""
    spec = replace(a_service_spec(name), endpoint_spec=EndpointSpec(mode="dnsrr"))
    targets = (NetworkAttachmentConfig(target=network.id),)
    spec = replace(spec, task_template=replace(spec.task_template, networks=targets))
    service = Service(id=name, spec=spec)  # type: ignore[arg-type]
    return [service, *(a_task(f"{name}{n:04}", service=service, state=TaskState.NEW) for n in range(count))]


@asynccontextmanager
async def allocating(
    *objects: Object, store: MemoryStore | None = None, clock: Clock | None = None
) -> AsyncIterator[MemoryStore]:
    """An allocator runs, which has seen ``objects``."""
    store = store or MemoryStore(SystemClock())
    await store.update_each(put, objects)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(Allocator(store, clock or SystemClock(), new_id, Random(1)).run())
        await seen(store)
        yield store
        running.cancel()


async def seen(store: MemoryStore) -> None:
    """The allocator has nothing to do any more: nothing is written in many turns of the event loop."""
    turns = 0
    revision = store.view().revision
    while turns < 500:
        await asyncio.sleep(0)
        turns = turns + 1 if store.view().revision == revision else 0
        revision = store.view().revision


def released(store: MemoryStore, service: str = "") -> list[Task]:
    tasks = store.view().find(Task, service_id=service) if service else store.view().find(Task)
    return [task for task in tasks if task.status.state is TaskState.PENDING]


async def end(store: MemoryStore, *tasks: Task) -> None:
    await store.update_each(
        put, [replace(task, status=replace(task.status, state=TaskState.FAILED)) for task in tasks]
    )
    await seen(store)


@pytest.fixture
def attempts() -> Iterator[Calls]:
    """Searches for an address, tasks looked at, and networks whose allocation was tried."""
    with calls_of(_Pool.first_free, AllocatorState.release, allocated) as attempts:
        yield attempts


async def test_of_those_that_wait_for_a_full_network_one_is_looked_at_for_each_address(
    attempts: Calls,
) -> None:
    async with allocating(NET, *new_tasks("a", 200), *new_tasks("b", 5)) as store:
        assert len(released(store)) == HAS
        assert len(attempts.of(AllocatorState.release)) == 205
        assert len(attempts.of(_Pool.first_free)) <= 2 * HAS + 3, "and not for each task that waits"
        assert sum("no available IPv4" in task.status.err for task in store.view().find(Task)) == 205 - HAS
        for _ in range(3):
            attempts.clear()
            await end(store, released(store)[0])
            assert len(released(store)) == HAS
            assert len(attempts.of(AllocatorState.release)) <= 3
            assert len(attempts.of(_Pool.first_free)) <= 5


class Reluctant(MemoryStore):
    """Refuses to write that a task has addresses."""

    refuses = True

    async def update_each(
        self, body: Callable[[Transaction, Any], Any], items: Iterable[Any], /
    ) -> Sequence[Any]:
        items = list(items)
        if self.refuses and any(isinstance(item, ReleaseTask) for item in items):
            return [Unavailable("not now") for _ in items]
        return await super().update_each(body, items)


async def test_a_task_that_goes_before_its_addresses_are_written_keeps_none() -> None:
    store = Reluctant(SystemClock())
    async with allocating(NET, *new_tasks("a", HAS), store=store):
        assert released(store) == []
        tasks = store.view().find(Task, service_id="a")
        await end(store, *tasks)
        store.refuses = False
        await store.update_each(put, new_tasks("b", HAS))
        await seen(store)
        assert len(released(store, "b")) == HAS


async def test_an_address_goes_to_whoever_waits_for_one_of_the_network() -> None:
    async with allocating(NET, *new_tasks("a", 3 * HAS)) as store:
        await store.update_each(put, new_tasks("b", 5))
        await seen(store)
        assert not released(store, "b")
        while ended := released(store, "a"):
            await end(store, *ended)
        assert len(released(store, "b")) == 5


async def test_the_virtual_address_that_a_service_gives_up_is_for_a_task_that_waits() -> None:
    spec = a_service_spec("b")
    targets = (NetworkAttachmentConfig(target=NET.id),)
    spec = replace(spec, task_template=replace(spec.task_template, networks=targets))
    async with allocating(NET) as store:
        await store.update(put, Service(id="b", spec=spec))  # type: ignore[arg-type]
        await seen(store)
        await store.update_each(put, new_tasks("a", 2 * HAS))
        await seen(store)
        assert len(released(store)) == HAS - 1
        service = store.view().get(Service, "b")
        await store.update(
            put, replace(service, spec=replace(spec, endpoint_spec=EndpointSpec(mode="dnsrr")))
        )
        await seen(store)
        assert len(released(store)) == HAS


async def test_a_deleted_task_does_not_wait() -> None:
    async with allocating(NET, *new_tasks("a", HAS + 2)) as store:
        waiting = [one for one in store.view().find(Task) if one.status.err]
        assert len(waiting) == 2
        await store.update(lambda tx: tx.delete(Task, waiting[0].id))
        await end(store, released(store)[0])
        assert store.view().get(Task, waiting[1].id).status.state is TaskState.PENDING


async def test_more_addresses_are_for_those_that_wait() -> None:
    async with allocating(NET, *new_tasks("a", 20)) as store:
        assert NET.ipam_options is not None
        configs = (*NET.ipam_options.configs, IPAMConfig(subnet="10.0.2.0/24", gateway="10.0.2.1"))
        larger = replace(NET, ipam_options=replace(NET.ipam_options, configs=configs))
        await store.update(put, larger)
        await seen(store)
        assert len(released(store)) == 20


async def test_a_task_waits_for_a_network_until_it_is_there_and_is_told_when_it_is_removed() -> None:
    async with allocating(*new_tasks("a", 1)) as store:
        assert store.view().get(Task, "a0000").status.err == "network net1 not found"
        full = an_overlay("net1", subnet="10.0.1.0/31")
        await store.update(put, full)
        await seen(store)
        assert "no available IPv4 addresses" in store.view().get(Task, "a0000").status.err
        await store.update(lambda tx: tx.delete(Network, "net1"))
        await seen(store)
        assert store.view().get(Task, "a0000").status.err == "network net1 not found"
        await store.update(put, NET)
        await seen(store)
        assert len(released(store)) == 1


async def test_the_tasks_of_one_service_are_released_with_pauses() -> None:
    most = 0

    async def watch(looked: Calls) -> None:
        nonlocal most
        while True:
            await asyncio.sleep(0)
            most = max(most, len(looked))
            looked.clear()

    with calls_of(AllocatorState.release) as looked:
        watching = asyncio.create_task(watch(looked))
        async with allocating(an_overlay("net1"), *new_tasks("a", 200), clock=PausingClock()) as store:
            assert len(released(store)) == 200
        watching.cancel()
    assert 0 < most <= 2


# -- networks that cannot be allocated ---------------------------------------------------------------------------------

CLUSTER = Swarm(id="c1", default_addr_pool=("10.0.0.0/24",), subnet_size=25)  # type: ignore[arg-type]
FIRST, SECOND = an_overlay("first", subnet="10.0.0.0/25"), an_overlay("second", subnet="")
ROUTE = "10.0.0.128/26=eth0"


def with_routes(node: Node, routes: str) -> Node:
    engine = replace(node.description.engine, labels={ROUTES_LABEL: routes})
    return replace(node, description=replace(node.description, engine=engine))


async def test_a_network_without_room_is_tried_again_when_a_route_is_gone_and_for_no_other_news_of_nodes(
    attempts: Calls,
) -> None:
    nodes = [with_routes(a_node(f"n{number}"), ROUTE) for number in range(5)]
    async with allocating(CLUSTER, FIRST, SECOND, *nodes, *new_tasks("a", 50, SECOND)) as store:
        assert "could not find an available" in store.view().get(Task, "a0049").status.err
        attempts.clear()
        down = [replace(node, status=replace(node.status, state=NodeState.DOWN)) for node in nodes]
        await store.update_each(put, down)
        await store.update_each(put, [a_node("new"), *(replace(node, load=0.5) for node in nodes)])
        await store.update(lambda tx: tx.delete(Node, "new"))
        await seen(store)
        assert not attempts
        await store.update_each(put, [with_routes(node, "") for node in nodes[1:]])
        await seen(store)
        assert len(attempts.of(allocated)) > 0
        assert len(attempts.of(AllocatorState.release)) == 0, "the reason is the same"
        await store.update(lambda tx: tx.delete(Node, "n0"))
        await seen(store)
        assert len(released(store)) == 50


async def test_the_routes_of_all_nodes_are_not_parsed_at_once() -> None:
    nodes = [with_routes(a_node(f"n{number}"), f"10.0.7.{number}/32=eth0") for number in range(100)]
    async with allocating(CLUSTER, *nodes) as store:
        before = routes._read.cache_info().misses
        await store.update(put, SECOND)
        await seen(store)
        assert routes._read.cache_info().misses == before


async def test_a_subnet_of_a_removed_network_is_for_the_one_that_waits(attempts: Calls) -> None:
    other = an_overlay("other", subnet="10.0.0.128/25")
    tasks = new_tasks("a", 2, other)
    async with allocating(CLUSTER, FIRST, SECOND, other, *tasks) as store:
        await store.update(lambda tx: tx.delete(Network, "other"))
        await seen(store)
        attempts.clear()
        first, last = released(store)
        await end(store, first)
        assert not attempts.of(allocated), "it has an address of the removed network"
        await end(store, last)
        assert len(attempts.of(allocated)) == 1
        assert store.view().get(Network, "second").ipam_options is not None


def test_no_task_is_checked_twice_in_a_turn_although_others_end_meanwhile() -> None:
    """The second check would give its address to another task, while the first one's release is written."""
    waiting, service, full = WaitingTasks(), ServiceId("s1"), NetworkId("net1")
    for name in ("parked1", "parked2"):
        waiting.park(service, TaskId(name), full)
    for name in ("new1", "new2", "new3"):
        waiting.add(service, TaskId(name))
    waiting.begin(service)
    checked = []
    for id in waiting.due(service, lambda _: False, 10):
        checked.append(id)
        if id == "parked1":  # the allocator pauses after each task
            waiting.remove(service, TaskId("new1"))
            waiting.remove(service, TaskId("new2"))
    assert checked == ["parked1", "parked2", "new3"]
    assert not waiting.is_checking


def test_tasks_that_become_new_during_a_turn_are_left_to_the_next_one() -> None:
    waiting, service = WaitingTasks(), ServiceId("s1")
    for name in ("new1", "new2", "new3"):
        waiting.add(service, TaskId(name))
    waiting.begin(service)
    assert [*waiting.due(service, lambda _: False, 2)] == ["new1", "new2"]
    waiting.begin(service)
    assert [*waiting.due(service, lambda _: False, 2)] == ["new3", "new1"], (
        "first those that were not checked"
    )
    assert waiting.is_checking
    assert [*waiting.due(service, lambda _: False, 2)] == ["new2"]
    assert not waiting.is_checking
