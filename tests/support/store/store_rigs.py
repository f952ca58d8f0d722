"""A cluster of two managers' stores, in memory and on a real etcd, with the same faults."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from skep.aio.clock import SystemClock
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.encryption.cipher import Cipher, new_wrapping_key
from skep.store.etcd.initialize import cluster_in, initialize
from skep.store.etcd.requests import PREFIX, etcd_key
from skep.store.etcd.store import open_store
from skep.store.interface import Store, Transaction
from skep.store.leadership import LeaderRecord
from skep.store.level import LEVEL
from skep.store.memory import Loss, MemoryCluster, MemoryStore
from tests.support.store.etcd_rig import Relay, a_member, member_settings

FIRST, SECOND = NodeId("m1"), NodeId("m2")


class Rig(Protocol):
    """``store`` is the manager under test.  ``other`` is another manager's replica of the same cluster."""

    store: Store
    other: Store

    async def depose(self) -> None:
        """Make another manager the leader without notifying ``store``."""

    def lose_request(self) -> None:
        """Lose the next write of ``store`` before it is stored."""

    def lose_reply(self) -> None:
        """Store the next write of ``store``, and lose its response.  Call ``reconnect`` afterwards."""

    def cut_store(self) -> None:
        """Cut ``store`` off from the quorum."""

    def cut_other(self) -> None:
        """Stop the watch of ``other``."""

    def reconnect(self) -> None:
        """Restore the connections."""

    async def compact(self) -> None:
        """Compact the whole history."""


def found(tx: Transaction) -> None:
    """Create the initial objects of every rig's cluster."""
    tx.put(Swarm(id=ClusterId("cluster")))


class MemoryRig:
    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.store = MemoryStore(SystemClock(), self.cluster)
        self.other = MemoryStore(SystemClock(), self.cluster)

    async def depose(self) -> None:
        self.cluster.stand(self.other, SECOND)
        self.cluster.elect(SECOND, quietly=True)

    def lose_request(self) -> None:
        self._lose_once(Loss.REQUEST)

    def lose_reply(self) -> None:
        self._lose_once(Loss.REPLY)

    def _lose_once(self, loss: Loss) -> None:
        losses = [loss]
        self.store.faults.loss = lambda _: losses.pop() if losses else None

    def cut_store(self) -> None:
        self.store.partition()

    def cut_other(self) -> None:
        self.other.partition()

    def reconnect(self) -> None:
        for store in (self.store, self.other):
            if store.faults.is_partitioned:
                store.heal()

    async def compact(self) -> None:
        self.cluster.compact()


class EtcdRig:
    def __init__(
        self, store: Store, other: Store, relay: Relay, other_relay: Relay, client: EtcdClient, key: bytes
    ) -> None:
        self.store = store
        self.other = other
        self.client = client
        self._relay = relay
        self._other_relay = other_relay
        self._key = key

    async def depose(self) -> None:
        name = etcd_key(keys.LEADER)
        cipher = Cipher((await cluster_in(self.client)).ring, self._key)
        record = msgspec.json.encode(LeaderRecord(node=SECOND, term=1_000_000))
        await self.client.put(name, cipher.encrypt(name, record))

    async def give_up_leadership(self) -> None:
        """Let the next candidate lead.  Both have one member, so the raft term stays the same."""
        name = etcd_key(keys.LEADER)
        cipher = Cipher((await cluster_in(self.client)).ring, self._key)
        await self.client.put(
            name, cipher.encrypt(name, msgspec.json.encode(LeaderRecord(node=FIRST, term=0)))
        )

    def lose_request(self) -> None:
        self._relay.lose_request_with(PREFIX + b"o/")

    def lose_reply(self) -> None:
        self._relay.swallow_replies()

    def cut_store(self) -> None:
        self._relay.cut()

    def cut_other(self) -> None:
        self._other_relay.cut()

    def reconnect(self) -> None:
        self._relay.reconnect()
        self._other_relay.reconnect()

    async def compact(self) -> None:
        reply = await self.client.range(pb.RangeRequest(key=etcd_key(keys.FORMAT)))
        await self.client.compact(reply.header.revision)


@asynccontextmanager
async def memory_rig() -> AsyncIterator[Rig]:
    rig = MemoryRig()
    await rig.store.update(found)
    await rig.store.update(lambda tx: tx.raise_level(LEVEL))
    yield rig


@asynccontextmanager
async def etcd_rig(root: Path) -> AsyncIterator[Rig]:
    settings = member_settings(root)
    key, clock = new_wrapping_key(), SystemClock()
    relay, other_relay = Relay(settings.socket), Relay(settings.socket)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(a_member(settings).running())
        await initialize(settings.socket, key, clock, found)
        stores: list[Store] = []
        for node, one in ((FIRST, relay), (SECOND, other_relay)):
            path = root / f"{node}.sock"
            await stack.enter_async_context(one.listening(path))
            stores.append(await stack.enter_async_context(open_store(path, node, key, clock)))
        client = await stack.enter_async_context(EtcdClient(settings.socket))
        yield EtcdRig(stores[0], stores[1], relay, other_relay, client, key)
