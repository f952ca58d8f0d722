"""A store with damaged values: an invalid value in memory, or a flipped byte in a real etcd."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

from skep.aio.clock import SystemClock
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient, prefix_end
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.etcd.initialize import initialize
from skep.store.etcd.requests import PREFIX, etcd_key
from skep.store.etcd.store import open_store
from skep.store.interface import Store
from skep.store.memory import MemoryCluster, MemoryStore
from skep.store.transactions.proposal import Proposal
from tests.support.builders import a_service
from tests.support.managers.control_loops import wait_for
from tests.support.store.etcd_rig import Relay, a_member, member_settings
from tests.support.store.store_rigs import found


class DamageRig(Protocol):
    """A store that has seen everything undamaged, and replicas that see it in its current state."""

    store: Store

    async def damage(self, key: str) -> None:
        """Damage the value of an existing key."""

    async def load(self) -> Store:
        """Return the store of a manager that starts now."""

    async def reload(self) -> None:
        """Let ``store`` load everything again."""

    async def keys(self, prefix: str) -> Sequence[str]:
        """Return the keys with this prefix."""


class MemoryDamage:
    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.store = MemoryStore(SystemClock(), self.cluster)

    async def damage(self, key: str) -> None:
        self.cluster.commit(Proposal(puts=((key, b'{"ID": 7, "Spec'),)), None)

    async def load(self) -> Store:
        return MemoryStore(SystemClock(), self.cluster)

    async def reload(self) -> None:
        self.store.partition()
        self.cluster.commit(Proposal(puts=((keys.writer_epoch_key(NodeId("m9")), b""),)), None)
        self.cluster.compact()
        self.store.heal()

    async def keys(self, prefix: str) -> Sequence[str]:
        return sorted(key for key in self.cluster.log if key.startswith(prefix))


class EtcdDamage:
    def __init__(
        self, store: Store, relay: Relay, client: EtcdClient, socket: Path, key: bytes, stack: AsyncExitStack
    ) -> None:
        self.store = store
        self._relay = relay
        self.client = client
        self._socket = socket
        self._key = key
        self._stack = stack

    async def damage(self, key: str) -> None:
        (kv,) = (await self.client.range(pb.RangeRequest(key=etcd_key(key)))).kvs
        flipped = bytearray(kv.value)
        flipped[-3] ^= 1
        await self.client.put(kv.key, bytes(flipped))

    async def load(self) -> Store:
        opening = open_store(self._socket, NodeId("m2"), self._key, SystemClock())
        return await self._stack.enter_async_context(opening)

    async def reload(self) -> None:
        self._relay.cut()
        for _ in range(2):
            written = await self.client.put(etcd_key(keys.writer_epoch_key(NodeId("m9"))), b"")
        await self.client.compact(written.header.revision)
        self._relay.reconnect()
        await self.store.barrier()

    async def keys(self, prefix: str) -> Sequence[str]:
        first = etcd_key(prefix)
        request = pb.RangeRequest(key=first, range_end=prefix_end(first), keys_only=True)
        return [kv.key[len(PREFIX) :].decode() for kv in (await self.client.range(request)).kvs]


@asynccontextmanager
async def memory_damage() -> AsyncIterator[DamageRig]:
    yield MemoryDamage()


@asynccontextmanager
async def etcd_damage(root: Path) -> AsyncIterator[DamageRig]:
    settings = member_settings(root)
    key, clock = new_wrapping_key(), SystemClock()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(a_member(settings).running())
        await initialize(settings.socket, key, clock, found)
        relay, path = Relay(settings.socket), root / "m1.sock"
        await stack.enter_async_context(relay.listening(path))
        store = await stack.enter_async_context(open_store(path, NodeId("m1"), key, clock))
        client = await stack.enter_async_context(EtcdClient(settings.socket))
        yield EtcdDamage(store, relay, client, settings.socket, key, stack)


def damage(cluster: MemoryCluster, kind: str, id: str, part: str) -> None:
    cluster.commit(Proposal(puts=((keys.object_key(kind, id, part), b'{"ID": 7, "Spec'),)), None)


async def a_good_service_converges(store: Store) -> None:
    await store.update(lambda tx: tx.put(a_service("good", replicas=3)))

    def is_assigned() -> bool:
        tasks = store.view().find(Task, service_id="good")
        return sum(task.status.state is TaskState.ASSIGNED for task in tasks) == 3

    await wait_for(store, is_assigned)


def cluster_with(*objects: object) -> MemoryCluster:
    cluster = MemoryCluster()
    store = MemoryStore(SystemClock(), cluster)
    asyncio.run(put_all(store, *objects))
    return cluster


async def put_all(store: Store, *objects: object) -> None:
    for one in objects:
        await store.update(lambda tx, one=one: tx.put(one))
