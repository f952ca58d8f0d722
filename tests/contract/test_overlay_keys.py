"""Keys of encrypted overlays from the store over the wire to the nodes, and to no others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import SystemRandom

import pytest

from skep.agent.agent import Agent
from skep.agent.managers import ManagerList
from skep.aio.clock import SystemClock
from skep.manager.discovery.key_rotation import OverlayKeyRotation
from skep.manager.discovery.key_service import KeyService
from skep.manager.discovery.overlay_keys import decoded_ring, pair_keys
from skep.model.ids import NetworkId, NodeId
from skep.model.meta import Driver
from skep.model.network import Network, NetworkSpec
from skep.model.pair_keys import KeysTold, NodeKeys, after
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.node.local import Peer
from skep.node.renewal import KeyPairCredentials
from skep.security import keypair
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, client_context
from skep.store.kinds import OVERLAY_KEYS_ID, Payload
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.client import connected
from skep.wire.convert.overlay_keys import keys_from_pb
from skep.wire.server import serve
from tests.support.builders import a_task
from tests.support.wire_rig import (
    MANAGER_ID,
    Cluster,
    FakeWorker,
    a_worker,
    describe,
    put,
    until,
    with_all_methods,
)

CLOCK = SystemClock()
SECURE = Network(
    id=NetworkId("secure"),
    spec=NetworkSpec(name="secure", driver_configuration=Driver(name="overlay", options={"encrypted": ""})),
)


def on_secure(id: str, node: NodeId, state: TaskState = TaskState.RUNNING) -> Task:
    task = a_task(id, node=node, state=state)
    fields = {name: getattr(task, name) for name in task.__struct_fields__}
    fields["networks_attachments"] = (NetworkAttachment(network=SECURE, addresses=("10.0.5.2/24",)),)
    return Task(**fields)


class Listening:
    """What one node has heard."""

    def __init__(self) -> None:
        self.keys = NodeKeys()
        self.messages = 0
        self._news = asyncio.Event()

    async def read(self, address: str, pair: KeyPair) -> None:
        async with (
            connected(address, client_context(pair), MANAGER_NAME) as channel,
            channel.stream(methods.OVERLAY_KEYS) as call,
        ):
            await call.send(pb.KeysRequest(), end=True)
            async for message in call:
                self.keys = after(self.keys, keys_from_pb(message))
                self.messages += 1
                self._news.set()

    async def wait_peers(self, *nodes: NodeId) -> None:
        async with asyncio.timeout(10):
            while set(self.keys.peers) != set(nodes) or not self.messages:
                self._news.clear()
                await self._news.wait()

    async def wait_epoch_after(self, epoch: int) -> int:
        """The newest epoch that every peer has keys of."""
        async with asyncio.timeout(10):
            while not self.keys.peers or (newest := _newest(self.keys)) <= epoch:
                self._news.clear()
                await self._news.wait()
        return newest


def _newest(keys: NodeKeys) -> int:
    return min(peer.keys[-1].epoch for peer in keys.peers.values())


@asynccontextmanager
async def telling(cluster: Cluster) -> AsyncIterator[str]:
    """A server that tells keys, from the cluster's store; gives its address."""
    service = KeyService(cluster.store, CLOCK)
    async with (
        serve(
            service.services(),
            host="127.0.0.1",
            port=0,
            tls=cluster.tls.front,
            cluster_id=cluster.id,
        ) as bound,
        asyncio.TaskGroup() as group,
    ):
        running = group.create_task(service.run())
        yield f"127.0.0.1:{bound.port}"
        running.cancel()


@asynccontextmanager
async def listening(address: str, pair: KeyPair) -> AsyncIterator[Listening]:
    node = Listening()
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(node.read(address, pair))
        yield node
        reading.cancel()


@asynccontextmanager
async def rotating(store: MemoryStore, period_s: float) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        loop = OverlayKeyRotation(store, CLOCK, SystemRandom(), incarnation=1, period_s=period_s)
        running = group.create_task(loop.run())
        yield
        running.cancel()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


async def three(cluster: Cluster, directory: Path) -> list[tuple[NodeId, KeyPair]]:
    pairs = [await a_worker(cluster, directory / str(number)) for number in range(3)]
    return [(pair.identity.node_id, pair) for pair in pairs]


async def test_each_node_hears_its_own_pairs_and_nobody_elses(cluster: Cluster, tmp_path: Path) -> None:
    (a, pair_a), (b, pair_b), (c, pair_c) = await three(cluster, tmp_path)
    async with (
        telling(cluster) as address,
        rotating(cluster.store, 3600),
        listening(address, pair_a) as at_a,
        listening(address, pair_b) as at_b,
        listening(address, pair_c) as at_c,
    ):
        await put(cluster, SECURE, on_secure("t1", a), on_secure("t2", b))
        await at_a.wait_peers(b)
        await at_b.wait_peers(a)
        await at_c.wait_peers()
        ring = decoded_ring(cluster.view.get(Payload, OVERLAY_KEYS_ID).data)
        assert at_a.keys.peers[b].keys == pair_keys(ring, a, b)
        assert at_b.keys.peers[a].keys == pair_keys(ring, b, a)
        assert at_c.keys == NodeKeys()

        await put(cluster, on_secure("t3", c))
        await at_c.wait_peers(a, b)
        await at_a.wait_peers(b, c)
        await put(cluster, on_secure("t2", b, TaskState.SHUTDOWN))
        await at_b.wait_peers()
        await at_a.wait_peers(c)
        assert at_a.keys.wireguard_private == b""


async def test_rotations_reach_everybody_and_old_epochs_leave(cluster: Cluster, tmp_path: Path) -> None:
    (a, pair_a), (b, pair_b), _ = await three(cluster, tmp_path)
    await put(cluster, SECURE, on_secure("t1", a), on_secure("t2", b))
    async with (
        telling(cluster) as address,
        rotating(cluster.store, 0.1),
        listening(address, pair_a) as at_a,
        listening(address, pair_b) as at_b,
    ):
        epoch = 0
        for _ in range(6):
            epoch = await at_a.wait_epoch_after(epoch)
        await at_b.wait_epoch_after(epoch - 1)
        epochs = [key.epoch for key in at_a.keys.peers[b].keys]
        assert len(epochs) == 3
        assert epochs == sorted(set(epochs))
        assert len({key.sending for key in at_a.keys.peers[b].keys}) == 3


async def test_without_an_encrypted_network_there_are_no_secrets(cluster: Cluster, tmp_path: Path) -> None:
    (_, pair), *_ = await three(cluster, tmp_path)
    async with (
        telling(cluster) as address,
        rotating(cluster.store, 0.01),
        listening(address, pair) as node,
    ):
        await put(cluster, Network(id=NetworkId("plain"), spec=NetworkSpec(name="plain")))
        await node.wait_peers()
        assert cluster.view.lookup(Payload, OVERLAY_KEYS_ID) is None
        await put(cluster, SECURE)
        async with asyncio.timeout(5):
            async with cluster.store.watch(Payload) as watch:
                while cluster.view.lookup(Payload, OVERLAY_KEYS_ID) is None:
                    await anext(aiter(watch))


async def test_an_agent_hears_its_keys_in_its_session(cluster: Cluster, tmp_path: Path) -> None:
    """And keeps its session with a manager that does not know of keys (the rig's answers UNIMPLEMENTED)."""
    (a, pair_a), (b, _), _ = await three(cluster, tmp_path)
    heard: list[KeysTold] = []
    worker = FakeWorker()
    keypair.save(pair_a, tmp_path)
    service = KeyService(cluster.store, CLOCK)
    for services in ((), service.services()):
        async with (
            serve(
                with_all_methods([*cluster.dispatcher.services(), *cluster.logs.services(), *services]),
                host="127.0.0.1",
                port=0,
                tls=cluster.tls.front,
                cluster_id=cluster.id,
            ) as bound,
            asyncio.TaskGroup() as group,
        ):
            agent = Agent(
                credentials=KeyPairCredentials(tmp_path, CLOCK, SystemRandom()),
                managers=ManagerList([Peer(MANAGER_ID, f"127.0.0.1:{bound.port}")]),
                describe=describe,
                sink=worker,
                reports=worker.reports,
                logs=worker,
                clock=CLOCK,
                random=SystemRandom(),
                overlay_keys=heard.append,
            )
            running = [group.create_task(agent.run()), group.create_task(service.run())]
            async with asyncio.timeout(10):
                await agent.registered.wait()
            if services:
                await put(cluster, SECURE, on_secure("t1", a), on_secure("t2", b))
                async with rotating(cluster.store, 3600):
                    await until(lambda: heard and [peer.node_id for peer in heard[-1].peers] == [b])
            else:
                await until(lambda: worker.sets)
                assert heard == []
                assert agent.registered.is_set()
            for task in running:
                task.cancel()
