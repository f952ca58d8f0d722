"""A value that decodes and does not parse (of another version, say) ends nothing but what is about its object."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control_loops.loops import loops
from skep.manager.discovery import network_tables
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.telemetry import events
from skep.manager.telemetry.events import ClusterEvents
from skep.model.node import Node, SessionOwner
from skep.model.task import NetworkAttachment, Task
from skep.model.values.ids import NodeId, SessionId, new_id
from skep.store.interface import Object, Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.support.managers.wire_rig import until

CLOCK = SystemClock()
NETWORK = an_overlay("net1", subnet="10.0.1.0/24")
GOOD = NetworkAttachment(network=NETWORK, addresses=("10.0.1.9/24",))
BAD = NetworkAttachment(network=NETWORK, addresses=("here and there/24",))


async def put(store: MemoryStore, *objects: Object) -> None:
    for one in objects:
        await store.update(lambda tx, one=one: tx.put(one))


@asynccontextmanager
async def running(*parts: Any) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part.run()) for part in parts]
        await asyncio.sleep(0)
        yield
        for task in tasks:
            task.cancel()


def placed(id: str, place: NetworkAttachment) -> Task:
    task = a_task(id, node="n1", service=a_service("web", replicas=2), slot=1 if id == "good" else 2)
    return replace(task, networks_attachments=(place,))


@pytest.mark.parametrize("comes_later", [False, True])
async def test_an_address_that_is_none_costs_no_other_task_its_place(comes_later: bool) -> None:
    store = MemoryStore(CLOCK)
    await put(store, a_node("n1"), NETWORK, a_service("web", replicas=2), placed("good", GOOD))
    bad = placed("bad", BAD)
    if not comes_later:
        await put(store, bad)
    terms = aiter(store.terms(NodeId("m1"), "127.0.0.1:2377"))
    term = await anext(terms)
    async with running(*loops(term, CLOCK, new_id, Random(1))):
        if comes_later:
            await put(store, bad)
        await put(store, a_service("other", replicas=1))
        await until(lambda: any(task.node_id for task in store.view().find(Task, service_id="other")))


@pytest.mark.parametrize("comes_later", [False, True])
async def test_what_cannot_be_put_into_a_table_leaves_the_rest_of_it(
    comes_later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = network_tables.endpoint_of  # type: ignore[attr-defined]

    def endpoint_of(task: Task, *rest: Any) -> Any:
        if task.id == "bad":
            raise ValueError("an address of another version")
        return real(task, *rest)

    monkeypatch.setattr(network_tables, "endpoint_of", endpoint_of)
    store = MemoryStore(CLOCK)
    await put(store, a_node("n1"), NETWORK, a_service("web", replicas=2))
    if not comes_later:
        await put(store, placed("bad", BAD))
    discovery = Discovery(store, NodeId("m1"), lambda *_: pytest.fail("not called"), CLOCK)
    async with running(discovery):
        await put(store, placed("bad", BAD), placed("good", GOOD))
        await until(lambda: "good" in discovery.state.tables.tables[NETWORK.id].endpoints)
    assert "bad" not in discovery.state.tables.tables[NETWORK.id].endpoints


async def test_a_commit_without_a_presentable_event_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = events.messages_of

    def messages_of(event: Any, now_ns: int, view: Any) -> Any:
        if "bad" in str(event):
            raise ValueError("a label of another version")
        return real(event, now_ns, view)

    monkeypatch.setattr(events, "messages_of", messages_of)
    store = MemoryStore(CLOCK)
    reported = ClusterEvents(store, CLOCK)
    async with running(reported):
        await put(store, a_service("bad"), a_service("good"))
        await until(lambda: [kept.message.actor.id for kept in reported.past] == ["good"])


async def test_a_node_that_the_dispatcher_makes_nothing_of_costs_no_other_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore(CLOCK)
    elsewhere = SessionOwner(manager_id=NodeId("m2"), session_id=SessionId("s1"))
    await put(store, *(replace(a_node(id), session=elsewhere) for id in ("bad", "good")))
    dispatcher = Dispatcher(store, ManagerPeer(node_id=NodeId("m1"), addr=""), CLOCK, new_id, Random(1))
    noted: list[str] = []

    def note_node(node_id: NodeId, *_: object) -> None:
        if node_id == "bad":
            raise ValueError("a stamp of another version")
        noted.append(node_id)

    monkeypatch.setattr(dispatcher.sessions, "lose", note_node)
    async with running(dispatcher):
        await until(lambda: noted == ["good"])
        await store.update(relabel)
        await until(lambda: noted == ["good", "good"])


def relabel(tx: Transaction) -> None:
    """In one commit."""
    for node in tx.find(Node):
        tx.put(replace(node, spec=replace(node.spec, labels={"tier": "front"})))
