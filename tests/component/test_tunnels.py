"""Tunnels from a manager to the containers of a node, over real connections between the two."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.agent.session.managers import KnownManager
from skep.api.http.connection import Connection
from skep.api.http.tunnelling import join_client
from skep.errors import NotFound, PermissionDenied, ResourceExhausted, SkepError, Unavailable
from skep.manager.nodes.tunnels import PER_NODE_MAX, NodeTunnels, TunnelLimits
from skep.model.node import Node, NodeRole, NodeState, NodeStatus
from skep.model.task import ContainerStatus, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId
from skep.security.tls import client_context
from skep.store.interface import Transaction
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import open_channel
from tests.support.builders import a_node, a_task
from tests.support.managers.fake_worker import FakeWorker
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_worker, an_agent_of, until

HEAD = b"GET / HTTP/1.1\r\n\r\n"


class Containers:
    """A node's containers: the test has the other end of every connection."""

    def __init__(self) -> None:
        self.task: Task
        """Of the node."""
        self.requests: list[skep.TunnelRequest] = []
        self.ends: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.may_connect = asyncio.Event()
        self.may_connect.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        yield

    async def connect(self, request: skep.TunnelRequest) -> Connection:
        self.requests.append(request)
        await self.may_connect.wait()
        if request.port == 1:
            raise NotFound("nothing listens there")
        ours, theirs = socket.socketpair()
        self.ends.put_nowait(await asyncio.open_unix_connection(sock=theirs))
        return await Connection.over(ours)


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


@pytest.fixture
async def containers(cluster, tmp_path):
    """Those of the node of ``task``."""
    async with node_of(cluster, tmp_path) as containers:
        yield containers


@asynccontextmanager
async def node_of(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Containers]:
    containers = Containers()
    pair = await a_worker(cluster, tmp_path)
    peers = [KnownManager(MANAGER_ID, cluster.address)]
    async with an_agent_of(peers, pair, tmp_path, FakeWorker(), Random(1), containers=containers) as agent:
        containers.task = a_running_task(agent.node_id)
        await until(lambda: agent.node_id in cluster.tunnels.streams)
        await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.READY)
        yield containers


def a_running_task(node: NodeId) -> Task:
    status = TaskStatus(state=TaskState.RUNNING, container_status=ContainerStatus(container_id="c1"))
    return replace(a_task("t1", node=node), status=status)


async def test_bytes_go_both_ways_and_each_direction_ends_by_itself(cluster, containers):
    async with cluster.tunnels.open(containers.task, head=HEAD) as tunnel:
        reader, writer = await containers.ends.get()
        assert containers.requests[0].task_id == "t1"
        assert containers.requests[0].container_id == "c1"
        assert containers.requests[0].head == HEAD
        await tunnel.send(b"question")
        assert await reader.readexactly(8) == b"question"
        await tunnel.end()
        assert await reader.read() == b""
        writer.write(b"answer")
        assert await tunnel.read() == b"answer"
        writer.close()
        assert await tunnel.read() == b""
    await until(lambda: not cluster.tunnels.open_count)


async def test_twenty_megabytes_arrive_as_they_were_sent(cluster, containers):
    piece, count = bytes(range(256)) * 1024, 80
    async with cluster.tunnels.open(containers.task, head=HEAD) as tunnel:
        reader, writer = await containers.ends.get()

        async def echo() -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.close()

        async def send() -> None:
            for _ in range(count):
                await tunnel.send(piece)
            await tunnel.end()

        async with asyncio.TaskGroup() as group:
            group.create_task(echo())
            group.create_task(send())
            received = bytearray()
            while data := await tunnel.read():
                received += data
        assert received == piece * count


async def test_what_is_not_read_stops_its_sender(cluster, containers):
    async with cluster.tunnels.open(containers.task, head=HEAD):
        _, writer = await containers.ends.get()
        sent, has_room = 0, True
        while has_room:
            writer.write(bytes(1 << 16))
            sent += 1 << 16
            assert sent < 4 << 20
            try:
                async with asyncio.timeout(1):
                    await writer.drain()
            except TimeoutError:
                has_room = False


async def test_the_container_sees_the_end_of_a_client_that_vanishes(cluster, containers):
    client = asyncio.ensure_future(hold(cluster, containers.task))
    reader, writer = await containers.ends.get()
    writer.write(b"nobody reads it")
    client.cancel()
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    await until(lambda: not cluster.tunnels.open_count)


async def test_a_client_gets_an_error_when_the_node_vanishes(cluster, containers):
    async with cluster.tunnels.open(containers.task, head=HEAD) as tunnel:
        await containers.ends.get()
        cluster.bound.disconnect(lambda identity: identity.node_id == containers.task.node_id)
        with pytest.raises(Unavailable, match="was lost"):
            await tunnel.read()
    await until(lambda: not cluster.tunnels.open_count)


async def test_a_node_that_cannot_connect_says_why(cluster, containers):
    with pytest.raises(SkepError, match="nothing listens there"):
        async with cluster.tunnels.open(containers.task, port=1):
            pass


async def test_a_node_that_hangs_is_named_through_another_manager_too(tmp_path):
    limits = TunnelLimits(open_s=0.2)
    async with Cluster(tunnel_limits=limits).serving() as cluster, node_of(cluster, tmp_path) as containers:
        containers.may_connect.clear()
        manager = cluster.pair("manager2", NodeRole.MANAGER)
        await cluster.store.update(lambda tx: tx.put(a_node("manager2", role=NodeRole.MANAGER)))
        async with open_channel(cluster.address, client_context(manager), "swarm-manager") as channel:
            other = NodeTunnels(
                cluster.store, NodeId("manager2"), cluster.dispatcher.session, lambda _: channel, limits
            )
            for tunnels in (cluster.tunnels, other):
                with pytest.raises(Unavailable, match=r"^node worker has not opened a connection in 0\.2 s$"):
                    async with tunnels.open(containers.task, head=HEAD):
                        pass


async def test_the_tunnel_of_a_node_that_hangs_ends_when_it_has_been_down_for_a_while(tmp_path):
    """The kernel of a machine whose node process hangs keeps the connection."""
    limits = TunnelLimits(lost_s=0.12)
    async with Cluster(tunnel_limits=limits).serving() as cluster, node_of(cluster, tmp_path) as containers:

        def down(tx: Transaction) -> None:
            node = tx.get(Node, containers.task.node_id)
            tx.put(replace(node, status=replace(node.status, state=NodeState.DOWN)))

        async with cluster.tunnels.open(containers.task, head=HEAD) as tunnel, asyncio.timeout(20):
            _reader, _writer = await containers.ends.get()
            read = asyncio.ensure_future(tunnel.read())
            assert not (await asyncio.wait([read], timeout=5 * limits.lost_s))[0], "its node is ready"
            while not read.done():  # this node sends heartbeats, so the dispatcher marks it as ready again
                await cluster.store.update(down)
                await asyncio.wait([read], timeout=limits.lost_s)
            with pytest.raises(Unavailable, match="was lost"):
                await read
        await until(lambda: not cluster.tunnels.open_count)


async def test_the_tunnels_of_a_node_are_bounded(cluster, containers):
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        held = [group.create_task(hold(cluster, containers.task)) for _ in range(PER_NODE_MAX)]
        await until(lambda: cluster.tunnels.open_count[containers.task.node_id] == PER_NODE_MAX)
        with pytest.raises(ResourceExhausted, match="too many connections to containers"):
            async with cluster.tunnels.open(containers.task, head=HEAD):
                pass
        for one in held:
            one.cancel()
    async with cluster.tunnels.open(containers.task, head=HEAD) as tunnel:
        await tunnel.send(b"room again")


async def hold(cluster, task) -> None:
    async with cluster.tunnels.open(task, head=HEAD):
        await asyncio.Event().wait()


async def test_a_node_of_an_earlier_version_is_named(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent_of(
        [KnownManager(MANAGER_ID, cluster.address)], pair, tmp_path, FakeWorker(), Random(1)
    ) as agent:
        await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.READY)
        with pytest.raises(Unavailable, match=r"node worker cannot be reached.*has no tunnels.*upgrade it"):
            async with cluster.tunnels.open(a_running_task(agent.node_id), head=HEAD):
                pass


async def test_a_worker_opens_no_tunnel_to_another_node(cluster, containers, tmp_path):
    """Neither by asking a manager for one, nor by taking the order of another node."""
    request = skep.TunnelRequest(node_id=containers.task.node_id, task_id="t1", container_id="c1", head=HEAD)
    other = cluster.pair("another", NodeRole.WORKER)
    await cluster.store.update(
        lambda tx: tx.put(
            replace(
                tx.get(Node, containers.task.node_id), id=NodeId("another"), status=NodeStatus(), session=None
            )
        )
    )
    async with open_channel(cluster.address, client_context(other), "swarm-manager") as channel:
        async with channel.stream(methods.RELAY_TUNNEL) as call:
            await call.send(skep.TunnelPiece(request=request))
            with pytest.raises(PermissionDenied):
                await call.receive()
        containers.may_connect.clear()  # the node's own answer would come first
        client = asyncio.ensure_future(hold(cluster, containers.task))
        await until(lambda: containers.requests)
        (id,) = cluster.tunnels.expected
        async with channel.stream(methods.TUNNEL) as call, asyncio.timeout(10):
            await call.send(skep.TunnelPiece(id=id))
            with pytest.raises(NotFound, match="no such order"):
                await call.receive()
        containers.may_connect.set()
        await containers.ends.get()
        client.cancel()
    assert len(containers.requests) == 1


class Client:
    """A client by TCP whose connection a manager has joined with a tunnel."""

    def __init__(self, cluster, task) -> None:
        self._cluster, self._task = cluster, task

    async def __aenter__(self) -> "Client":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.end = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        self.end.setblocking(False)
        self.joined = asyncio.ensure_future(self._join(await Connection.over(ours, check_s=0.05)))
        return self

    async def _join(self, accepted: Connection) -> None:
        try:
            async with self._cluster.tunnels.open(self._task, head=HEAD) as tunnel:
                await join_client(accepted, tunnel, body=self.body(), linger_s=0.1)
        finally:
            accepted.abort()

    def body(self) -> Coroutine[Any, Any, None] | None:
        return None

    async def __aexit__(self, *_: object) -> None:
        self.end.close()
        self.joined.cancel()
        await asyncio.wait([self.joined])

    def break_off(self) -> None:
        """As the kernel does for one that does not answer its probes."""
        self.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end.close()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.end, data)

    async def read(self, count: int) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.end, count)


class Request(Client):
    """One whose connection stays HTTP."""

    def body(self) -> Coroutine[Any, Any, None]:
        return asyncio.sleep(0)


UPGRADED = b"HTTP/1.1 101 UPGRADED\r\n\r\n"


async def test_a_client_that_vanishes_behind_its_input_holds_no_tunnel(cluster, containers):
    """Nothing is sent to it any more, so nothing else would notice."""
    async with asyncio.timeout(20), Client(cluster, containers.task) as client:
        reader, writer = await containers.ends.get()
        writer.write(UPGRADED)
        assert await client.read(100) == UPGRADED
        await client.send(b"input")
        client.end.shutdown(socket.SHUT_WR)
        assert await reader.read() == b"input"
        assert not client.joined.done()
        client.break_off()
        await until(lambda: not cluster.tunnels.open_count)


async def test_a_request_ends_with_its_client(cluster, containers):
    async with asyncio.timeout(20), Request(cluster, containers.task) as client:
        reader, writer = await containers.ends.get()
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        assert await client.read(100)
        client.end.close()
        assert await reader.read() == b""
        await until(lambda: not cluster.tunnels.open_count)


@pytest.mark.parametrize("is_upgraded", [True, False])
async def test_only_a_connection_that_was_upgraded_takes_more_than_its_request(
    cluster, containers, is_upgraded
):
    """A node of an earlier version keeps the connection of a request that it refused, and answers what comes next."""
    response = UPGRADED if is_upgraded else b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n"
    async with asyncio.timeout(20), Client(cluster, containers.task) as client:
        reader, writer = await containers.ends.get()
        await client.send(b"more")
        for part in (response[:5], response[5:]):
            writer.write(part)
            await writer.drain()
        received = b""
        while received != response:
            received += await client.read(100)
        if is_upgraded:
            assert await reader.readexactly(4) == b"more"
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await reader.read(100)
