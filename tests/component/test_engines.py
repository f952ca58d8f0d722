"""What a manager does for Docker Engines alone: keys, attachments, tasks held back, gossip passed on."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from skep.manager.control.networks import remove_network
from skep.manager.control_loops.loops import loops
from skep.manager.gossip.keys import ROTATION_S, rotated, step
from skep.manager.gossip.relay import GossipRelay
from skep.manager.nodes.attachment_service import CONTAINER_ID_CHARACTERS_MAX
from skep.model.network import Network
from skep.model.networks.data_planes import DOCKER, SKEP
from skep.model.networks.gossip import GossipKeys, decoded_keys
from skep.model.node import Node, NodeCertificate, NodeState
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import new_id
from skep.model.values.times import SECOND_NS, timestamp
from skep.security.keypair import KeyPair
from skep.security.tls import client_context
from skep.store.interface import Transaction
from skep.store.kinds import GOSSIP_KEYS_ID, Payload
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel, StreamCall, open_channel
from skep.wire.convert.node import description_to_pb
from tests.support.builders import a_docker_node, a_service, a_task, an_overlay
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_worker, describe, put

NET = an_overlay("net1", subnet="10.0.1.0/24", attachable=True)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


@asynccontextmanager
async def an_engines_session(
    cluster: Cluster, pair: KeyPair
) -> AsyncIterator[
    tuple[ManagerChannel, StreamCall[pb.SessionRequest, pb.SessionMessage], pb.SessionMessage]
]:
    """Joined and registered as a Docker Engine: the channel, the stream of session messages, the first one."""
    node = cluster.node(pair.identity.node_id)
    joined = replace(node.certificate or NodeCertificate(), plane=DOCKER)
    await put(cluster, replace(node, certificate=joined))
    async with (
        open_channel(cluster.address, client_context(pair), "swarm-manager") as channel,
        channel.stream(methods.SESSION) as call,
    ):
        description = description_to_pb(a_docker_node().description)
        await call.send(pb.SessionRequest(description=description), end=True)
        message = await call.receive()
        assert message is not None
        yield channel, call, message


def numbers(message: pb.SessionMessage, subsystem: str) -> list[int]:
    return [key.lamport_time for key in message.network_bootstrap_keys if key.subsystem == subsystem]


def rotate(tx: Transaction) -> GossipKeys:
    keys = rotated(decoded_keys(tx.get(Payload, GOSSIP_KEYS_ID).data), secrets.token_bytes, timestamp(0))
    tx.put(Payload(id=GOSSIP_KEYS_ID, data=keys.encode()))
    return keys


async def attach(channel: ManagerChannel, network: str, container: str = "c1", address: str = "") -> str:
    config = pb.NetworkAttachmentConfig(target=network, addresses=[address] if address else [])
    request = pb.AttachNetworkRequest(config=config, container_id=container)
    return (await channel.call(methods.ATTACH_NETWORK, request, timeout_s=5)).attachment_id


async def detach(channel: ManagerChannel, id: str) -> None:
    await channel.call(methods.DETACH_NETWORK, pb.DetachNetworkRequest(attachment_id=id), timeout_s=5)


async def test_an_engine_gets_the_gossip_keys_and_each_rotation(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with an_engines_session(cluster, pair) as (_, call, message):
        assert numbers(message, "networking:gossip") == [1, 2, 3]
        assert numbers(message, "networking:ipsec") == [4, 5, 6]
        await cluster.store.update(rotate)
        changed = await call.receive()
        assert changed is not None
        assert numbers(changed, "networking:gossip") == [2, 3, 7]
        assert numbers(changed, "networking:ipsec") == [5, 6, 8]
        kept = {key.lamport_time: key.key for key in message.network_bootstrap_keys}
        assert all(kept.get(key.lamport_time, key.key) == key.key for key in changed.network_bootstrap_keys)


async def test_a_skep_node_gets_no_gossip_key(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with (
        open_channel(cluster.address, client_context(pair), "swarm-manager") as channel,
        channel.stream(methods.SESSION) as call,
    ):
        await call.send(pb.SessionRequest(description=description_to_pb(describe())), end=True)
        message = await call.receive()
        assert message is not None
        assert not message.network_bootstrap_keys


async def test_a_task_waits_for_its_engines_own_address_on_the_network(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with (
        an_engines_session(cluster, pair) as (channel, _, message),
        channel.stream(methods.ASSIGNMENTS) as call,
    ):
        node_id = pair.identity.node_id
        await call.send(pb.AssignmentsRequest(session_id=message.session_id), end=True)
        assert await call.receive() is not None
        service = a_service()
        places = (NetworkAttachment(network=NET, addresses=("10.0.1.5/24",)),)
        on_network = replace(
            a_task("late", node=node_id, service=service, state=TaskState.ASSIGNED),
            networks_attachments=places,
        )
        plain = a_task("early", slot=2, node=node_id, service=service, state=TaskState.ASSIGNED)
        await put(cluster, NET, service, on_network, plain)
        first = await call.receive()
        assert first is not None
        assert [change.assignment.task.id for change in first.changes] == ["early"]
        own = (NetworkAttachment(network=NET, addresses=("10.0.1.2/24",)),)
        await cluster.store.update(lambda tx: tx.put(replace(tx.get(Node, node_id), attachments=own)))
        second = await call.receive()
        assert second is not None
        assert [change.assignment.task.id for change in second.changes] == ["late"]


async def test_a_containers_place_on_a_network_is_a_task_of_its_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    await put(cluster, NET)
    async with an_engines_session(cluster, pair) as (channel, _, _):
        id = await attach(channel, "net1", "c0ffee", "10.0.1.9")
        task = cluster.view.get(Task, id)
        assert task.node_id == pair.identity.node_id
        assert task.spec.network_attachment_spec is not None
        assert task.spec.network_attachment_spec.container_id == "c0ffee"
        assert [network.target for network in task.spec.networks] == [NET.id]
        assert task.networks_attachments[0].addresses == ("10.0.1.9",)
        with pytest.raises(FailedPrecondition, match=f"network net1 is in use by task {id}"):
            await cluster.store.update(remove_network, NET.id)
        await detach(channel, id)
        assert cluster.view.lookup(Task, id) is None
        await cluster.store.update(remove_network, NET.id)


async def test_a_place_that_cannot_be_is_refused_with_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    closed = an_overlay("closed", subnet="10.0.2.0/24")
    of_skep = an_overlay("ours", subnet="10.0.3.0/24", attachable=True, plane=SKEP)
    await put(cluster, NET, closed, of_skep)
    async with an_engines_session(cluster, pair) as (channel, _, _):
        with pytest.raises(NotFound, match="network gone not found"):
            await attach(channel, "gone")
        with pytest.raises(PermissionDenied, match="network closed not manually attachable"):
            await attach(channel, "closed")
        with pytest.raises(FailedPrecondition, match="network ours belongs to skep nodes"):
            await attach(channel, "ours")
        for container in ("", "c" * (CONTAINER_ID_CHARACTERS_MAX + 1)):
            with pytest.raises(InvalidArgument, match="container id is missing"):
                await attach(channel, "net1", container)
        with pytest.raises(NotFound, match="attachment gone not found"):
            await detach(channel, "gone")
    assert not cluster.view.find(Task)


async def test_an_engine_detaches_nothing_of_another_node_and_no_task_of_a_service(
    cluster: Cluster, tmp_path: Path
) -> None:
    first, second = await a_worker(cluster, tmp_path / "1"), await a_worker(cluster, tmp_path / "2")
    service = a_service()
    task = a_task("task", node=second.identity.node_id, service=service)
    await put(cluster, NET, service, task)
    async with AsyncExitStack() as stack:
        one, _, _ = await stack.enter_async_context(an_engines_session(cluster, first))
        two, _, _ = await stack.enter_async_context(an_engines_session(cluster, second))
        id = await attach(one, "net1")
        with pytest.raises(PermissionDenied, match="doesn't belong to this node"):
            await detach(two, id)
        with pytest.raises(NotFound):
            await detach(two, task.id)
    assert cluster.view.lookup(Task, id) is not None
    assert cluster.view.lookup(Task, task.id) is not None


@asynccontextmanager
async def leading(store: MemoryStore) -> AsyncIterator[None]:
    """The leader's loops run within."""
    term = await anext(aiter(store.terms(MANAGER_ID, "127.0.0.1:2377")))
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(loop.run()) for loop in loops(term, SystemClock(), new_id, Random(1))]
        yield
        for task in running:
            task.cancel()


async def test_the_leader_places_an_attachment_gives_the_node_its_address_and_forgets_what_ended(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    node_id = pair.identity.node_id
    await put(cluster, an_overlay("net1", subnet="", attachable=True))
    async with leading(cluster.store), an_engines_session(cluster, pair) as (channel, _, _):
        id = await attach(channel, "net1")
        await cluster.until(lambda view: view.get(Task, id).status.state is TaskState.ASSIGNED)
        task, node = cluster.view.get(Task, id), cluster.node(node_id)
        (place,) = task.networks_attachments
        own = {one.network.spec.name: one.addresses[0] for one in node.attachments if one.network}
        assert {place.addresses[0], own["net1"]} == {"10.0.0.2/24", "10.0.0.3/24"}
        assert cluster.view.get(Network, "net1").driver_state.options["skep.data-plane"] == "docker"
        ended = replace(task.status, state=TaskState.FAILED)
        await cluster.store.update(lambda tx: tx.put(replace(tx.get(Task, id), status=ended)))
        await cluster.until(lambda view: view.lookup(Task, id) is None)
        await cluster.until(lambda view: not view.get(Node, node_id).attachments)


async def test_the_leader_makes_the_keys_once_and_rotates_them_every_twelve_hours() -> None:
    store = MemoryStore(SystemClock())
    begin = 1_700_000_000 * SECOND_NS

    def numbers() -> list[int]:
        keys = decoded_keys(store.view().get(Payload, GOSSIP_KEYS_ID).data)
        return sorted(key.lamport_time for key in keys.keys)

    assert await store.update(step, timestamp(begin), secrets.token_bytes) == ROTATION_S
    first = store.view().get(Payload, GOSSIP_KEYS_ID)
    later = begin + int((ROTATION_S - 60) * SECOND_NS)
    assert (
        await store.update(step, timestamp(later), secrets.token_bytes) == 60
    )  # another leader: nothing is rotated early
    assert store.view().get(Payload, GOSSIP_KEYS_ID) == first
    assert numbers() == [1, 2, 3, 4, 5, 6]
    assert await store.update(step, timestamp(later + 60 * SECOND_NS), secrets.token_bytes) == ROTATION_S
    assert numbers() == [2, 3, 5, 6, 7, 8]


# --- port 7946 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    """A port that is free on every address of the loopback network."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def an_echo(host: str, port: int) -> AsyncIterator[None]:
    """A gossip member that echoes what it received."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"heard " + await reader.read())
        writer.close()

    async with await asyncio.start_server(answer, host, port):
        yield


@asynccontextmanager
async def a_relay(store: MemoryStore, port: int) -> AsyncIterator[None]:
    relay = GossipRelay(store, "127.0.0.1", SystemClock(), Random(1), port)
    running = asyncio.create_task(relay.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def asked(port: int, source: str) -> bytes:
    """The response to a client at the address ``source``; empty if the connection is closed at once.

    Raises: ConnectionRefusedError: no listener.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        writer.write(b"hello")
        writer.write_eof()
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def at(id: str, address: str) -> Node:
    node = a_docker_node(id)
    return replace(node, status=replace(node.status, addr=address))


async def listens(port: int) -> None:
    """Return once the relay listens."""
    async with asyncio.timeout(5):
        while True:
            try:
                await asked(port, "127.0.0.9")
            except ConnectionRefusedError:
                await asyncio.sleep(0.005)
            else:
                return


async def test_a_manager_passes_gossip_on_between_docker_nodes_only(port: int) -> None:
    store = MemoryStore(SystemClock())
    async with an_echo("127.0.0.2", port), a_relay(store, port):
        with pytest.raises(ConnectionRefusedError):
            await asked(port, "127.0.0.3")  # no docker node: no listener
        await store.update(lambda tx: (tx.put(at("d1", "127.0.0.2")), tx.put(at("d2", "127.0.0.3"))))
        await listens(port)
        assert await asked(port, "127.0.0.3") == b"heard hello"
        assert await asked(port, "127.0.0.9") == b""  # no docker node's address
        assert await asked(port, "127.0.0.2") == b""  # d2 does not listen, and no node is relayed to itself


async def test_a_dead_docker_node_is_in_no_peer_list(port: int) -> None:
    store = MemoryStore(SystemClock())
    down = at("d1", "127.0.0.2")
    down = replace(down, status=replace(down.status, state=NodeState.DOWN))
    async with an_echo("127.0.0.2", port), a_relay(store, port):
        await store.update(lambda tx: (tx.put(down), tx.put(at("d2", "127.0.0.3"))))
        await listens(port)
        assert await asked(port, "127.0.0.3") == b""
