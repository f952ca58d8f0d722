"""Whether a task is unused, while its users lose their managers or change them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.aio.clock import Clock, SystemClock
from skep.errors import Unavailable
from skep.manager.discovery.draining import Draining
from skep.manager.discovery.loop import Discovery
from skep.model.node import Node, NodeState, NodeStatus, SessionOwner
from skep.model.secret import Config, ConfigSpec
from skep.model.service import Endpoint, PortConfig
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import ConfigId, NodeId, SessionId
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.support.harness.clocks import FastClock
from tests.support.managers.wire_rig import until

NET = an_overlay("net1")
OWN, SECOND, THIRD = NodeId("m1"), NodeId("m2"), NodeId("m3")
N2 = NodeId("n2")


class Link:
    """To another manager, whose node has not applied anything until it is said."""

    def __init__(self) -> None:
        self.asked: list[skep.AwaitTablesRequest] = []
        self.reply: Callable[[skep.AwaitTablesRequest], skep.AwaitTablesResponse] | None = None

    async def call(self, method: str, request: skep.AwaitTablesRequest, *, timeout_s: float) -> Any:
        self.asked.append(request)
        if self.reply is None:
            raise Unavailable("it does not respond")
        return self.reply(request)


class Rig:
    """This manager, the leader, with links to two others; ``n1`` runs the task that stops, ``n2`` uses it."""

    def __init__(self, clock: Clock | None = None) -> None:
        clock = clock or SystemClock()
        self.store = MemoryStore(clock)
        self.other = MemoryStore(clock, cluster=self.store.cluster)  # another manager's replica
        self.links = {SECOND: Link(), THIRD: Link()}
        self.discovery = Discovery(self.store, OWN, lambda *_: pytest.fail("not called"), clock)
        self.draining = Draining(
            self.store,
            OWN,
            self.discovery,
            lambda manager: cast("ManagerChannel", self.links[manager]),
            clock,
            Random(1),
        )

    async def place_users(self, manager: NodeId) -> Task:
        """``n2`` has its session with ``manager``, ``n1`` has none: it is its own task that stops."""
        service = a_service("web")
        tasks = []
        for number, node in enumerate(("n1", N2)):
            place = NetworkAttachment(network=NET, addresses=(f"10.0.1.{number + 2}/24",))
            task = a_task(node=node, service=service, slot=number + 1, state=TaskState.RUNNING)
            tasks.append(replace(task, networks_attachments=(place,)))
        nodes = [replace(a_node("n1"), session=None), a_node(N2)]
        for one in (NET, service, *nodes, *tasks):
            await self.store.update(lambda tx, one=one: tx.put(one))
        await self.move(manager, "s1")
        await self.store.update(
            lambda tx: tx.put(replace(tx.get(Task, tasks[0].id), desired_state=TaskState.SHUTDOWN))
        )
        return tasks[0]

    async def move(self, manager: NodeId, session: str) -> None:
        own = SessionOwner(manager_id=manager, session_id=SessionId(session))
        await self.other.update(lambda tx: tx.put(replace(tx.get(Node, N2), session=own)))

    async def join(self, id: str, manager: NodeId, like: Task) -> None:
        """Another node registers, and comes to the network with a task like ``like``."""
        await self.register(id, manager)
        await self.attach(id, like)

    async def register(self, id: str, manager: NodeId) -> None:
        session = SessionOwner(manager_id=manager, session_id=SessionId(f"of {id}"))
        await self.other.update(lambda tx: tx.put(replace(a_node(id), session=session)))

    async def attach(self, id: str, like: Task) -> None:
        task = replace(
            a_task(node=id, slot=9, state=TaskState.RUNNING), networks_attachments=like.networks_attachments
        )
        await self.other.update(lambda tx: tx.put(task))

    @property
    def revision(self) -> int:
        return self.store.view().revision

    def has_applied(self, request: skep.AwaitTablesRequest) -> skep.AwaitTablesResponse:
        """What a manager responds whose nodes have applied everything, or that has none."""
        return skep.AwaitTablesResponse(applied=request.revision)


@pytest.fixture
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    rig = Rig(getattr(request, "param", None))
    running = asyncio.create_task(rig.discovery.run())
    yield rig
    running.cancel()
    await asyncio.wait([running])


async def is_held(waiting: "asyncio.Task[None]", rig: Rig) -> bool:
    """Whether it still waits when this manager has handled all there is."""
    await rig.discovery.wait_handled()
    for _ in range(20):
        await asyncio.sleep(0)
    return not waiting.done()


async def ended(waiting: "asyncio.Task[None]") -> None:
    async with asyncio.timeout(10):
        await waiting


def waits(rig: Rig, task: Task) -> "asyncio.Task[None]":
    return asyncio.create_task(rig.draining.wait_unused(task, rig.revision))


@pytest.mark.parametrize("end", ["it is down", "it is removed", "it has applied them"])
async def test_a_node_without_a_stream_goes_on_with_the_tables_it_has(rig: Rig, end: str) -> None:
    task = await rig.place_users(OWN)
    waiting = waits(rig, task)
    assert await is_held(waiting, rig)
    match end:
        case "it is down":
            down = NodeStatus(state=NodeState.DOWN)
            await rig.store.update(lambda tx: tx.put(replace(tx.get(Node, N2), status=down)))
        case "it is removed":
            await rig.store.update(lambda tx: tx.delete(Node, N2))
        case _:
            rig.discovery.state.acknowledgements.applied(N2, NET.id, rig.revision)
    await ended(waiting)


async def test_a_node_that_is_removed_together_with_a_change_of_all_nodes_is_not_waited_for(rig: Rig) -> None:
    task = await rig.place_users(OWN)
    waiting = waits(rig, task)
    assert await is_held(waiting, rig)
    ports = (PortConfig(target_port=80, published_port=8080),)
    public = a_service("public", ports=ports)
    public = replace(public, endpoint=Endpoint(ports=ports))

    def change(tx: Transaction) -> None:
        tx.delete(Node, N2)
        tx.put(public)  # the first one with a port: now all nodes get the ingress network

    await rig.store.update(change)
    await ended(waiting)


async def test_a_node_that_goes_to_another_manager_meanwhile_is_waited_for_there(rig: Rig) -> None:
    task = await rig.place_users(OWN)
    waiting = waits(rig, task)
    assert await is_held(waiting, rig)
    await rig.move(SECOND, "s2")
    await until(lambda: len(rig.links[SECOND].asked) > 1)  # and asked again
    assert not waiting.done()
    rig.links[SECOND].reply = rig.has_applied
    await ended(waiting)


async def test_a_manager_that_has_lost_the_node_when_it_responds_does_not_speak_for_the_next_one(
    rig: Rig,
) -> None:
    task = await rig.place_users(SECOND)
    waiting = waits(rig, task)
    await until(lambda: rig.links[SECOND].asked)
    rig.store.partition()  # the move is not seen here yet
    await rig.move(THIRD, "s2")
    responses = len(rig.links[SECOND].asked)
    rig.links[SECOND].reply = rig.has_applied
    await until(lambda: len(rig.links[SECOND].asked) > responses)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    rig.store.heal()
    await until(lambda: rig.links[THIRD].asked)
    assert not waiting.done()
    rig.links[THIRD].reply = rig.has_applied
    await ended(waiting)


async def test_a_manager_that_has_died_is_not_waited_for_when_its_nodes_have_gone(rig: Rig) -> None:
    task = await rig.place_users(SECOND)
    waiting = waits(rig, task)
    await until(lambda: rig.links[SECOND].asked)
    rig.links[THIRD].reply = rig.has_applied
    await rig.move(THIRD, "s2")
    await ended(waiting)


async def test_a_node_that_comes_to_the_network_meanwhile_is_not_waited_for(rig: Rig) -> None:
    task = await rig.place_users(SECOND)
    await rig.register("n3", THIRD)
    waiting = waits(rig, task)
    await until(lambda: rig.links[SECOND].asked)
    await rig.attach("n3", task)
    rig.links[SECOND].reply = rig.has_applied
    await ended(waiting)
    assert not rig.links[THIRD].asked


@pytest.mark.parametrize("manager", [OWN, SECOND])
async def test_a_node_that_was_taken_for_down_meanwhile_is_waited_for_again(
    rig: Rig, manager: NodeId
) -> None:
    """It keeps its session, and its data plane may go on with the tables of before."""
    task = await rig.place_users(manager)
    waiting = waits(rig, task)
    assert await is_held(waiting, rig)
    await until(lambda: manager == OWN or rig.links[SECOND].asked)
    rig.store.partition()  # both changes are seen here at once
    rig.links[SECOND].reply = rig.has_applied  # as of the moment when it was down
    for state in (NodeState.DOWN, NodeState.READY):
        await rig.other.update(
            lambda tx, state=state: tx.put(replace(tx.get(Node, N2), status=NodeStatus(state=state)))
        )
    asked = len(rig.links[SECOND].asked)
    await until(lambda: manager == OWN or len(rig.links[SECOND].asked) > asked)
    rig.links[SECOND].reply = None
    rig.store.heal()
    assert await is_held(waiting, rig)
    rig.links[SECOND].reply = rig.has_applied
    rig.discovery.state.acknowledgements.applied(N2, NET.id, rig.revision)
    await ended(waiting)


@pytest.mark.parametrize("manager", [OWN, SECOND])
async def test_a_change_of_something_else_does_not_delay_a_stop(rig: Rig, manager: NodeId) -> None:
    task = await rig.place_users(manager)
    stopped_at = rig.revision
    await rig.discovery.wait_handled()
    rig.discovery.state.acknowledgements.applied(N2, NET.id, rig.revision)
    rig.links[SECOND].reply = rig.has_applied
    await rig.other.update(lambda tx: tx.put(Config(id=ConfigId("c1"), spec=ConfigSpec(name="motd"))))
    async with asyncio.timeout(10):
        await rig.draining.wait_unused(task, stopped_at)


async def test_a_manager_that_has_responded_is_asked_again_for_a_node_that_comes_to_it(rig: Rig) -> None:
    task = await rig.place_users(SECOND)
    await rig.join("n3", THIRD, task)
    rig.links[THIRD].reply = rig.has_applied
    waiting = waits(rig, task)
    await until(lambda: rig.links[THIRD].asked and rig.links[SECOND].asked)
    rig.links[THIRD].reply = None
    await rig.move(THIRD, "s2")
    rig.links[SECOND].reply = rig.has_applied
    await until(lambda: len(rig.links[THIRD].asked) > 1)
    assert not waiting.done()
    rig.links[THIRD].reply = rig.has_applied
    await ended(waiting)


async def test_what_a_manager_said_is_asked_again_for_a_node_that_came_since(rig: Rig) -> None:
    task = await rig.place_users(SECOND)
    rig.links[SECOND].reply = rig.has_applied
    async with asyncio.timeout(10):
        await rig.draining.wait_unused(task, rig.revision)
        await rig.draining.wait_unused(task, rig.revision)
        assert len(rig.links[SECOND].asked) == 1  # known
        await rig.move(SECOND, "s2")
        await rig.draining.wait_unused(task, rig.revision)
    assert len(rig.links[SECOND].asked) == 2


@pytest.mark.parametrize("rig", [FastClock(20)], indirect=True)
async def test_a_manager_whose_replica_is_behind_does_not_say_that_it_has_no_such_node(rig: Rig) -> None:
    await rig.place_users(SECOND)
    request = skep.AwaitTablesRequest(network_id=NET.id, revision=rig.revision)
    caller = cast("Caller", None)
    assert (await rig.draining.await_tables(request, caller)).applied == rig.revision  # it has none
    rig.store.partition()
    await rig.move(OWN, "s2")
    assert (await rig.draining.await_tables(request, caller)).applied == 0
    rig.store.heal()
    assert (await rig.draining.await_tables(request, caller)).applied == 0
    rig.discovery.state.acknowledgements.applied(N2, NET.id, rig.revision)
    assert (await rig.draining.await_tables(request, caller)).applied >= request.revision


async def test_a_manager_that_starts_again_from_a_snapshot_waits_for_no_later_tables_than_of_the_stop() -> (
    None
):
    """Nodes of other managers never get tables of the snapshot's revision when nothing of theirs changes."""
    rig = Rig()
    task = await rig.place_users(SECOND)
    stopped_at = rig.revision
    await rig.other.update(lambda tx: tx.put(Config(id=ConfigId("c1"), spec=ConfigSpec(name="motd"))))
    rig.links[SECOND].reply = lambda _: skep.AwaitTablesResponse(applied=stopped_at)
    running = asyncio.create_task(rig.discovery.run())
    async with asyncio.timeout(10):
        await rig.draining.wait_unused(task, stopped_at)
    running.cancel()
    await asyncio.wait([running])
