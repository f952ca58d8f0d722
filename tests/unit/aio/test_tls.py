"""TLS connections that share their read buffer behave as asyncio's own."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar, cast

import pytest

from skep.aio.connections import tls
from skep.api.http.connection import Connection
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.node.front.splice import relay
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import MANAGER_NAME, ServerTls, client_context

T = TypeVar("T")
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def a_pair(authority: Authority, node_id: str, role: NodeRole) -> KeyPair:
    key = new_private_key()
    identity = NodeIdentity(node_id=NodeId(node_id), cluster_id=ClusterId("cluster"), role=role)
    certificate = authority.sign(signing_request(key), identity)
    return KeyPair(certificate_pem=certificate, key_pem=private_pem(key), root_pem=authority.root_pem)


@asynccontextmanager
async def connections(names: list[str]) -> AsyncIterator[list[tuple[Ends, Ends]]]:
    """One per name: what the client has of it, and what the server has."""
    authority = Authority.create()
    context = ServerTls(a_pair(authority, "m1", NodeRole.MANAGER)).front
    both: list[tuple[Ends, Ends]] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for name in names:
            wanted = client_context(a_pair(authority, name, NodeRole.WORKER))
            client, served = await asyncio.gather(a_client(listener, wanted), a_served(listener, context))
            both.append((client, served))
        yield both
        for ends in both:
            for _, writer in ends:
                writer.transport.abort()


async def a_client(listener: socket.socket, context: ssl.SSLContext) -> Ends:
    streams = Streams()
    host, port = listener.getsockname()
    await tls.connect(lambda: streams, host, port, context, server_name=MANAGER_NAME)
    return streams.ends


async def a_served(listener: socket.socket, context: ssl.SSLContext) -> Ends:
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    streams = Streams()
    await tls.accept(lambda: streams, connection, context, handshake_s=10)
    return streams.ends


class Streams(asyncio.StreamReaderProtocol):
    """A protocol as a reader and a writer."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        super().__init__(self.reader)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        loop = asyncio.get_running_loop()
        self.ends = (self.reader, asyncio.StreamWriter(transport, self, self.reader, loop))


async def test_connections_that_are_read_in_turn_keep_apart():
    names = [f"n{number}" for number in range(5)]
    async with connections(names) as both, asyncio.TaskGroup() as group:
        for number, ((_, writer), _) in enumerate(both):
            writer.write(bytes([number]) * 3_000_000)
        reads = [group.create_task(reader.readexactly(3_000_000)) for _, (reader, _) in both]
    assert [read.result() == bytes([number]) * 3_000_000 for number, read in enumerate(reads)] == [True] * 5


async def test_the_peer_certificate_can_be_read_at_any_time():
    async with connections(["n1", "n2"]) as both:
        for name, (_, (_, writer)) in zip(("n1", "n2"), both, strict=True):
            connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
            certificate = writer.get_extra_info("peercert")
            assert certificate == connection.getpeercert()
            assert (("commonName", name),) in certificate["subject"]
            assert writer.get_extra_info("peername")[0] == "127.0.0.1"
            assert writer.get_extra_info("nothing", "default") == "default"


async def test_connections_of_a_thread_read_into_one_buffer():
    async with connections(["n1", "n2"]) as both:
        buffers = {id(writer.transport._ssl_protocol._ssl_buffer) for ends in both for _, writer in ends}  # type: ignore[attr-defined]
    assert len(buffers) == 1


async def test_a_failed_handshake_raises_at_both_ends():
    """A certificate of another cluster is not taken."""
    context = ServerTls(a_pair(Authority.create(), "m1", NodeRole.MANAGER)).front
    wanted = client_context(a_pair(Authority.create(), "n1", NodeRole.WORKER))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        ended = await asyncio.gather(
            a_client(listener, wanted), a_served(listener, context), return_exceptions=True
        )
    assert isinstance(ended[0], ssl.SSLCertVerificationError)
    assert isinstance(ended[1], OSError)


async def test_a_peer_that_says_nothing_is_given_up():
    context = ServerTls(a_pair(Authority.create(), "m1", NodeRole.MANAGER)).front
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs, pytest.raises(ConnectionAbortedError, match="handshake"):
        await tls.accept(Streams, ours, context, handshake_s=0.01)
    assert ours.fileno() == -1


class HalfOpen(asyncio.Protocol):
    """Says what it has read, once the other end sends no more, and closes later."""

    def __init__(self, *, stays_open: bool = True) -> None:
        self.read = b""
        self.stays_open = stays_open
        self.ended = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.read += data

    def eof_received(self) -> bool:
        self.ended.set()
        return self.stays_open

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()


@pytest.mark.parametrize("stays_open", [True, False])
@pytest.mark.parametrize("sends_more", [True, False])
async def test_a_client_that_has_closed_its_direction_still_gets_the_response(
    stays_open: bool, sends_more: bool
) -> None:
    """As ``docker exec`` without ``-i`` does: Go's CloseWrite sends close_notify, and no FIN."""
    authority = Authority.create()
    server = ServerTls(a_pair(authority, "m1", NodeRole.MANAGER)).front
    wanted = client_context(a_pair(authority, "n1", NodeRole.WORKER))
    ours, theirs = socket.socketpair()
    protocol = HalfOpen(stays_open=stays_open)
    ours.setblocking(False)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = wanted.wrap_bio(to_client, to_server, server_hostname=MANAGER_NAME)

    async def step(call: Callable[[], T]) -> T:
        """Do it over the socket."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                result = call()
            except ssl.SSLWantReadError:
                await loop.sock_sendall(ours, to_server.read())
                to_client.write(await loop.sock_recv(ours, 65536))
            else:
                await loop.sock_sendall(ours, to_server.read())
                return result

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(tls.accept(lambda: protocol, theirs, server, handshake_s=10))
        await step(client.do_handshake)
        await step(lambda: client.write(b"request"))
        with suppress(ssl.SSLWantReadError):
            client.unwrap()  # writes close_notify; the other end's is not waited for
        await asyncio.get_running_loop().sock_sendall(ours, to_server.read())
        await protocol.ended.wait()
        assert protocol.read == b"request"
        if not stays_open:
            await protocol.lost.wait()
            return
        assert not protocol.transport.is_closing()
        if sends_more:
            await asyncio.get_running_loop().sock_sendall(ours, b"\x17\x03\x03\x40\x00" + bytes(16384))
            await protocol.lost.wait()
            return
        protocol.transport.write(b"response")
        content = await asyncio.get_running_loop().sock_recv(ours, 65536)
        assert content, "the response, encrypted: OpenSSL reads nothing after its own close_notify"
        protocol.transport.close()
        ours.close()
        await protocol.lost.wait()


async def test_the_end_of_an_upgraded_exchange_reaches_a_client_that_keeps_its_direction_open() -> None:
    """Only Go's clients send close_notify when they have no input.  ``skep exec`` waits for the end of the output."""
    authority = Authority.create()
    context = ServerTls(a_pair(authority, "m1", NodeRole.MANAGER)).front
    wanted = client_context(a_pair(authority, "n1", NodeRole.WORKER))
    client, upstream = Connection(), Streams()
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        connecting = asyncio.ensure_future(
            asyncio.open_connection(*listener.getsockname(), ssl=wanted, server_hostname=MANAGER_NAME)
        )
        accepted, _ = await loop.sock_accept(listener)
        await tls.accept(lambda: client, accepted, context, handshake_s=10)
        reader, writer = await connecting
    manager = await Connection.over(ours)
    await loop.connect_accepted_socket(lambda: upstream, theirs)
    async with asyncio.timeout(20):
        relaying = asyncio.ensure_future(relay(client, manager, b"start", is_one_exchange=False))
        assert await upstream.ends[0].readexactly(5) == b"start"
        upstream.ends[1].write(b"output")
        upstream.ends[1].close()
        assert await reader.read() == b"output"
        writer.close()
        await relaying
    assert client.is_lost
