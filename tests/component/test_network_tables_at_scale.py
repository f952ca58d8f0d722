"""Tables of 20,000 tasks do not block the loop, neither while a manager reads them nor while it sends them."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.model.node import Node, NodeRole, NodeStatus, SessionOwner
from skep.model.service import Service
from skep.model.task import NetworkAttachment, Task
from skep.model.values.ids import ClusterId, NodeId, ServiceId, SessionId, TaskId
from skep.security.identity import NodeIdentity
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from tests.component.test_responsiveness import HELD_S_MAX, turns
from tests.support.builders import a_node, a_service, a_task, an_overlay

NET = an_overlay("net1", subnet="10.0.0.0/16")
SERVICES, TASKS, NODES = 500, 20_000, 50
REQUEST = skep.AppliedTables(session_id="s").SerializeToString()


class Peer:
    """One node's end of its stream: sends its session once, and counts the messages."""

    def __init__(self) -> None:
        self.endpoints = 0
        self.messages = 0
        self.is_complete = asyncio.Event()
        self.received = asyncio.Event()
        self._unread = [REQUEST, b"\0" + len(REQUEST).to_bytes(4, "big")]

    async def recv_data(self, size: int, within_s: float | None = None) -> bytes:
        if self._unread:
            return self._unread.pop()
        return await asyncio.get_running_loop().create_future()

    async def send_initial_metadata(self) -> None:
        """Nothing to do."""

    async def send_message(self, message: Any) -> None:
        self.messages += 1
        self.endpoints += sum(len(change.endpoints) for change in message.changes)
        message.SerializeToString()
        if self.is_complete.is_set():
            self.received.set()
        elif not message.more:
            self.is_complete.set()
        await asyncio.sleep(0)


def caller(id: NodeId) -> Caller:
    identity = NodeIdentity(node_id=id, cluster_id=ClusterId("c"), role=NodeRole.WORKER)
    return Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)


@pytest.fixture
async def store() -> MemoryStore:
    store = MemoryStore(SystemClock())
    random = Random(1)

    def node(tx: Transaction, number: int) -> Node:
        up = replace(a_node(f"n{number:02}").status, addr=f"192.168.0.{number}")
        session = SessionOwner(manager_id=NodeId("m"), session_id=SessionId("s"))
        return tx.put(replace(a_node(f"n{number:02}"), status=up, session=session))

    def service(tx: Transaction, number: int) -> Service:
        return tx.put(replace(a_service(f"s{number:03}"), id=ServiceId(f"s{number:03}")))

    def task(tx: Transaction, number: int) -> Task:
        address = f"10.0.{number // 250}.{number % 250 + 2}/16"
        place = NetworkAttachment(network=NET, addresses=(address,))
        task = a_task(slot=number, node=f"n{number % NODES:02}", service=f"s{random.randrange(SERVICES):03}")
        return tx.put(replace(task, id=TaskId(f"t{number:05}"), networks_attachments=(place,)))

    await store.update(lambda tx: tx.put(NET))
    for what, count in ((node, NODES), (service, SERVICES), (task, TASKS)):
        await store.update_each(what, range(count))
    return store


@asynccontextmanager
async def frozen() -> AsyncIterator[None]:
    """What is there is not gone through by the collector, as in a manager that has loaded."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.mark.timeout(120)
async def test_reading_and_sending_20_000_tasks_does_not_block_the_loop(store: MemoryStore) -> None:
    sessions = {
        node.id: LiveSession(node.id, SessionId("s"), lambda: None, deadline=1e9)
        for node in store.view().find(Node)
    }
    discovery = Discovery(store, NodeId("m"), lambda node_id, _: sessions[node_id], SystemClock())
    (handler,) = discovery.services()
    peers = {id: Peer() for id in sessions}
    async with frozen(), turns() as measured, asyncio.TaskGroup() as group:
        running = [group.create_task(discovery.run())]
        running += [group.create_task(handler.serve(peer, caller(id))) for id, peer in peers.items()]
        for peer in peers.values():
            await peer.is_complete.wait()
        assert {peer.endpoints for peer in peers.values()} == {TASKS}
        down = replace(
            store.view().get(Node, "n07"), status=NodeStatus(state=a_node().status.state, addr="192.168.1.7")
        )
        await store.update(lambda tx: tx.put(down))
        for peer in peers.values():
            await peer.received.wait()
        assert {peer.endpoints for peer in peers.values()} == {
            TASKS
        }  # of the other nodes nothing is said again
        for task in running:
            task.cancel()
    assert measured.held_s < HELD_S_MAX
