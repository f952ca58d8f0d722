"""TLS connections that share their read buffer behave as asyncio's own."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from skep.aio import lean_tls
from skep.model.ids import ClusterId, NodeId
from skep.model.node import NodeRole
from skep.security.authority import Authority
from skep.security.identity import Identity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import MANAGER_NAME, ServerTls, client_context

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def a_pair(authority: Authority, node_id: str, role: NodeRole) -> KeyPair:
    key = new_private_key()
    identity = Identity(node_id=NodeId(node_id), cluster_id=ClusterId("cluster"), role=role)
    certificate = authority.sign(signing_request(key), identity)
    return KeyPair(certificate_pem=certificate, key_pem=private_pem(key), root_pem=authority.root_pem)


@pytest.fixture(autouse=True)
def lean(monkeypatch):
    monkeypatch.setattr("asyncio.sslproto.SSLProtocol", asyncio.sslproto.SSLProtocol)  # for after the test
    lean_tls.make_lean()


@asynccontextmanager
async def connections(names: list[str]) -> AsyncIterator[list[tuple[Ends, Ends]]]:
    """One per name: what the client has of it, and what the server has."""
    authority = Authority.create()
    served: asyncio.Queue[Ends] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await served.put((reader, writer))

    tls = ServerTls(a_pair(authority, "m1", NodeRole.MANAGER)).front
    both: list[tuple[Ends, Ends]] = []
    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        for name in names:
            context = client_context(a_pair(authority, name, NodeRole.WORKER))
            ends = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=MANAGER_NAME)
            both.append((ends, await served.get()))
        yield both
        for client, served_one in both:
            for _, writer in (client, served_one):
                writer.transport.abort()


async def test_connections_that_are_read_in_turn_keep_apart():
    names = [f"n{number}" for number in range(5)]
    async with connections(names) as both, asyncio.TaskGroup() as group:
        for number, ((_, writer), _) in enumerate(both):
            writer.write(bytes([number]) * 3_000_000)
        reads = [group.create_task(reader.readexactly(3_000_000)) for _, (reader, _) in both]
    assert [read.result() == bytes([number]) * 3_000_000 for number, read in enumerate(reads)] == [True] * 5


async def test_who_the_peer_is_is_told_whenever_somebody_asks():
    async with connections(["n1", "n2"]) as both:
        for name, (_, (_, writer)) in zip(("n1", "n2"), both, strict=True):
            connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
            certificate = writer.get_extra_info("peercert")
            assert certificate == connection.getpeercert()
            assert (("commonName", name),) in certificate["subject"]
            assert writer.get_extra_info("peername")[0] == "127.0.0.1"
            assert writer.get_extra_info("nothing", "default") == "default"
