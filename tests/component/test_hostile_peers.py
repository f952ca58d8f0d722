"""Hostile clients of the port of nodes and managers: their effect and their cost are bounded."""

import asyncio
import gc
import resource
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection

from skep.aio.connections.handshakes import HANDSHAKES_MAX
from skep.errors import NotFound, ResourceExhausted
from skep.rpc import frames
from skep.rpc.server import ServerConnection
from skep.security.keypair import KeyPair
from skep.security.tls import client_context, joining_context
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import open_channel, split_address
from skep.wire.server import NODE_BYTES_MAX, NODE_CONNECTIONS_MAX
from tests.support.managers.wire_calls import METHODS, call
from tests.support.managers.wire_rig import Cluster, a_session, a_worker, put, service_task, until

MEBIBYTE = 1 << 20


@pytest.fixture
async def cluster(request: pytest.FixtureRequest):
    """Its parameter limits the bytes of one node."""
    async with Cluster(node_bytes_max=getattr(request, "param", NODE_BYTES_MAX)).serving() as serving:
        yield serving


async def is_served(cluster: Cluster, pair: KeyPair) -> bool:
    """Whether a node with a certificate gets an answer."""
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        return isinstance(await call(channel, "HEARTBEAT"), NotFound)


def resident_bytes() -> int:
    """Memory of this process, in which the server runs too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Allow this process ``count`` descriptors meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("many", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_connections_without_a_handshake_are_bounded_and_delay_no_others(cluster, tmp_path, many):
    pair = await a_worker(cluster, tmp_path)
    loop = asyncio.get_running_loop()
    silent: list[socket.socket] = []
    before, most = resident_bytes(), 0
    with descriptors(many + HANDSHAKES_MAX + 1000):
        try:
            for number in range(many):
                one = socket.socket()
                one.setblocking(False)
                silent.append(one)
                await loop.sock_connect(one, split_address(cluster.address))
                most = max(most, cluster.bound.handshakes)
                if number % 1000 == 999:
                    assert await is_served(cluster, pair)
            # Full, but for the places of those that were served in between.
            assert HANDSHAKES_MAX - many // 500 <= most <= HANDSHAKES_MAX
            assert resident_bytes() - before < 64 * MEBIBYTE
            assert await is_served(cluster, pair)
        finally:
            for one in silent:
                one.close()
    await until(lambda: cluster.bound.handshakes == 0)


async def test_a_flood_of_handshakes_pushes_out_its_own(cluster):
    slow = await silent_from(cluster, "127.0.0.2")
    flood = [await silent_from(cluster, "127.0.0.3") for _ in range(HANDSHAKES_MAX + 50)]
    await until(lambda: cluster.bound.handshakes == HANDSHAKES_MAX)
    with pytest.raises(TimeoutError):  # it is older than all the others, and still there
        async with asyncio.timeout(0.2):
            await asyncio.get_running_loop().sock_recv(slow, 1)
    for one in (slow, *flood):
        one.close()


async def silent_from(cluster: Cluster, address: str) -> socket.socket:
    """A connection from ``address`` on which nothing is said."""
    one = socket.socket()
    one.setblocking(False)
    one.bind((address, 0))
    await asyncio.get_running_loop().sock_connect(one, split_address(cluster.address))
    return one


async def a_stranger(cluster: Cluster, address: str) -> asyncio.StreamWriter:
    """A connection from ``address`` without a certificate, past its handshake."""
    host, port = split_address(cluster.address)
    context = joining_context(cluster.authority.root_pem)
    _, writer = await asyncio.open_connection(
        host, port, ssl=context, server_hostname="swarm-ca", local_addr=(address, 0)
    )
    return writer


async def asks_for_the_root(cluster: Cluster) -> None:
    """What a machine does first that joins."""
    context = joining_context(cluster.authority.root_pem)
    async with asyncio.timeout(5), open_channel(cluster.address, context, "swarm-ca") as channel:
        await channel.call(methods.GET_ROOT_CA_CERTIFICATE, pb.GetRootCACertificateRequest())


async def test_strangers_that_say_nothing_keep_no_machine_from_joining(cluster):
    """As many as there are places, from as many addresses as that takes, and then one more."""
    silent = [await a_stranger(cluster, f"127.0.1.{number // 4 + 1}") for number in range(64)]
    await until(lambda: cluster.bound.connections == 64)
    await asks_for_the_root(cluster)
    for writer in silent:
        writer.transport.abort()


async def test_strangers_of_one_address_are_few(cluster):
    silent = [await a_stranger(cluster, "127.0.0.9") for _ in range(10)]
    await until(lambda: cluster.bound.connections == 4)
    await asks_for_the_root(cluster)
    for writer in silent:
        writer.transport.abort()


async def test_a_stranger_that_never_calls_is_ended_soon(cluster):
    context = joining_context(cluster.authority.root_pem)
    async with open_channel(cluster.address, context, "swarm-ca") as channel:
        await channel.call(methods.GET_ROOT_CA_CERTIFICATE, pb.GetRootCACertificateRequest())
        silent = await a_stranger(cluster, "127.0.0.9")
        await until(silent.transport.is_closing)
        await until(lambda: cluster.bound.connections == 1)
        await channel.call(methods.GET_ROOT_CA_CERTIFICATE, pb.GetRootCACertificateRequest())
    silent.transport.abort()


@pytest.mark.parametrize("cluster", [128 * 1024], indirect=True)
async def test_what_a_lost_connection_held_is_counted_no_more(cluster, tmp_path):
    """A handler has taken it when its peer goes, and the node has another connection, which is served."""
    pair = await a_worker(cluster, tmp_path)
    path, padding = METHODS["LISTEN_SUBSCRIPTIONS"].path, b"\xfa\x01\xc0\xb8\x02" + bytes(40_000)
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as kept:
        assert isinstance(await call(kept, "HEARTBEAT"), NotFound)
        for _ in range(5):
            deaf, writer = await a_deaf_client(cluster, pair)
            deaf.request(path, padding)
            await until(lambda: cluster.bound.held_bytes > 40_000)
            writer.transport.abort()
            await until(lambda: cluster.bound.connections == 1)
        assert isinstance(await call(kept, "HEARTBEAT"), NotFound)


@pytest.mark.parametrize("cluster", [4 * MEBIBYTE], indirect=True)
async def test_half_messages_of_one_node_on_many_connections_are_bounded(cluster, tmp_path):
    """The connection that brings more than a node may have held is ended; other nodes are served."""
    greedy, other = await a_worker(cluster, tmp_path / "greedy"), await a_worker(cluster, tmp_path / "other")
    clients = [await a_deaf_client(cluster, greedy) for _ in range(4)]
    most = 0
    for deaf, writer in clients:
        for _ in range(30):
            deaf.half_request(METHODS["UPDATE_TASK_STATUS"].path, MEBIBYTE, bytes(60_000))
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0)
            most = max(most, cluster.bound.held_bytes)
    await until(lambda: cluster.bound.connections < 4)
    assert MEBIBYTE < most <= 4 * MEBIBYTE + 16 * 1024
    assert await is_served(cluster, other)
    for _, writer in clients:
        writer.transport.abort()
    await until(lambda: cluster.bound.held_bytes == 0)


async def test_one_node_may_hold_so_many_connections_and_no_more(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path / "greedy")
    other = await a_worker(cluster, tmp_path / "other")
    host, port = split_address(cluster.address)
    writers = []
    for _ in range(NODE_CONNECTIONS_MAX + 5):
        _, writer = await asyncio.open_connection(
            host, port, ssl=client_context(pair), server_hostname="swarm-manager"
        )
        writers.append(writer)
    await until(lambda: cluster.bound.connections == NODE_CONNECTIONS_MAX)
    assert await is_served(cluster, other)
    for writer in writers:
        writer.close()
    await until(lambda: cluster.bound.connections == 0)
    assert await is_served(cluster, pair)


def _is_of_the_server(one: object) -> bool:
    """The callers are in this process, too."""
    return isinstance(one, ServerConnection) or (isinstance(one, ssl.SSLObject) and one.server_side)


async def test_connections_that_have_ended_leave_nothing_for_the_collector(cluster, tmp_path):
    """Memory of those that come and go is free at once, however seldom cycles are looked for."""
    pair = await a_worker(cluster, tmp_path)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            assert await is_served(cluster, pair)
        await until(lambda: cluster.bound.connections == 0)
        kept = [type(one) for one in gc.get_objects() if _is_of_the_server(one)]
    finally:
        gc.enable()
    assert kept == []


@pytest.mark.parametrize("has_certificate", [True, False], ids=["a node", "a stranger"])
async def test_a_message_of_a_gibibyte_is_refused_when_its_length_is_said(cluster, tmp_path, has_certificate):
    """Not after a gibibyte was taken: the length comes first."""
    pair = await a_worker(cluster, tmp_path)
    context = client_context(pair) if has_certificate else joining_context(pair.root_pem)
    method = methods.UPDATE_TASK_STATUS if has_certificate else methods.ISSUE_NODE_CERTIFICATE
    before = resident_bytes()
    endless = methods.ClientStreaming(method.path, method.request, method.reply)
    async with (
        open_channel(cluster.address, context, "swarm-manager") as channel,
        channel.stream(endless) as stream,
    ):
        await announce(stream, 1 << 30)
        with pytest.raises(ResourceExhausted, match="larger than max"):
            await stream.receive()
    assert resident_bytes() - before < 16 * MEBIBYTE
    assert await is_served(cluster, pair)


async def announce(stream, length: int) -> None:
    """Begin a message of ``length`` bytes and send a few of them."""
    inner = stream._stream = stream._connection.open()
    head = frames.frame(frames.HEADERS, frames.END_HEADERS, inner.id, stream._block)
    inner.send_data(head, b"\0" + length.to_bytes(4, "big") + b"x" * 1000)
    await inner.drain()


class Deaf:
    """An HTTP/2 client over TLS that sends and never reads."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        self._http = H2Connection(H2Configuration(client_side=True))
        self._http.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self._writer.write(self._http.data_to_send())

    def ping(self) -> None:
        self._http.ping(b"12345678")
        self.flush()

    def request(self, path: str, message: bytes) -> None:
        stream_id = self._open(path)
        data = b"\0" + len(message).to_bytes(4, "big") + message
        for start in range(0, len(data), 16_000):
            self._http.send_data(
                stream_id, data[start : start + 16_000], end_stream=start + 16_000 >= len(data)
            )
        self.flush()

    def half_request(self, path: str, length: int, begin: bytes) -> None:
        """Announce a message of ``length`` bytes and send the beginning of it."""
        stream_id = self._open(path)
        data = b"\0" + length.to_bytes(4, "big") + begin
        for start in range(0, len(data), 16_000):
            self._http.outbound_flow_control_window = self._http.streams[
                stream_id
            ].outbound_flow_control_window = 1 << 20
            self._http.send_data(stream_id, data[start : start + 16_000])
        self.flush()

    def _open(self, path: str) -> int:
        stream_id = self._http.get_next_available_stream_id()
        headers = [
            *((":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "m")),
            *(("content-type", "application/grpc"), ("te", "trailers")),
        ]
        self._http.send_headers(stream_id, headers)
        return stream_id


async def a_deaf_client(cluster: Cluster, pair: KeyPair) -> tuple[Deaf, asyncio.StreamWriter]:
    host, port = split_address(cluster.address)
    reader, writer = await asyncio.open_connection(
        host, port, ssl=client_context(pair), server_hostname="swarm-manager"
    )
    return Deaf(reader, writer), writer


async def test_pings_are_bounded_when_the_replies_are_not_read(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    deaf, writer = await a_deaf_client(cluster, pair)
    before = resident_bytes()
    sent = 0
    try:
        async with asyncio.timeout(3):
            while sent < 64 * MEBIBYTE:
                for _ in range(1000):
                    deaf.ping()
                sent += 17_000
                await writer.drain()
    except TimeoutError:
        pass  # the server reads no more: what this test is about
    assert sent < 64 * MEBIBYTE
    assert resident_bytes() - before < 96 * MEBIBYTE
    assert await is_served(cluster, pair)
    writer.transport.abort()


async def test_a_node_that_never_reads_its_assignments_costs_one_message_and_goes_down_alone(
    cluster, tmp_path
):
    slow, healthy = await a_worker(cluster, tmp_path / "slow"), await a_worker(cluster, tmp_path / "healthy")
    async with a_session(cluster, slow) as (_, session_id), a_session(cluster, healthy) as (channel, own):
        deaf, writer = await a_deaf_client(cluster, slow)
        request = pb.AssignmentsRequest(session_id=session_id).SerializeToString()
        deaf.request(METHODS["ASSIGNMENTS"].path, request)
        before = resident_bytes()
        for _ in range(50):
            service, task = service_task(slow.identity.node_id)
            await put(cluster, service, task)
        await cluster.until(
            lambda view: cluster.node(slow.identity.node_id).status.state.value == "down", within_s=10
        )
        assert resident_bytes() - before < 32 * MEBIBYTE
        writer.transport.abort()
        del own, channel
