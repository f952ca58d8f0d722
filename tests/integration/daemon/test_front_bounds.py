"""What clients of the API by TCP may keep to themselves: connections, time, and never root's socket."""

import asyncio
import socket
import ssl
import struct
import subprocess
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import web

from skep.api.http.connection import Connection
from skep.api.http.handover_server import RequestTimes
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.node.front.server import ClientLimits
from skep.node.front.splice import relay
from skep.node.front.users import ApiTls
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import CERTIFICATE_FILE, KEY_FILE, ROOT_FILE, KeyPair, save
from skep.security.keys import new_private_key, private_pem, signing_request
from tests.support.clients.front_rig import Rig
from tests.support.security.api_authority import an_authority

PATIENCE_S = 10.0


HURRIED = {
    "limits": ClientLimits(request_s=0.05, idle_s=0.05),
    "times": RequestTimes(check_s=0.05, request_s=0.05, idle_s=0.05),
}
"""Short limits for what clients may take, in both processes."""


async def is_answered(rig: Rig) -> bool:
    async with rig.client() as client, client.get("/info") as response:
        return response.status == 200


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the other end closes within the test's patience."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await reader.read() == b""
        except ConnectionError:
            return True


@pytest.mark.parametrize("front_rig", [{"limits": ClientLimits(connections=5)}], indirect=True)
async def test_connections_by_tcp_are_bounded_and_leave_roots_socket_free(front_rig: Rig) -> None:
    opened = [await asyncio.open_connection("127.0.0.1", front_rig.port) for _ in range(6)]
    assert await ended(opened[5][0])
    assert await is_answered(front_rig)
    opened[0][1].close()
    await opened[0][1].wait_closed()
    reader, writer = await asyncio.open_connection("127.0.0.1", front_rig.port)
    writer.write(b"GET /info HTTP/1.1\r\nHost: d\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    for _, each in (*opened, (reader, writer)):
        each.close()


@pytest.mark.parametrize("front_rig", [{"limits": ClientLimits(connections_per_source=3)}], indirect=True)
async def test_one_address_does_not_take_all_connections(front_rig: Rig) -> None:
    greedy = [
        await asyncio.open_connection("127.0.0.1", front_rig.port, local_addr=("127.0.0.7", 0))
        for _ in range(4)
    ]
    assert await ended(greedy[3][0])
    reader, writer = await asyncio.open_connection("127.0.0.1", front_rig.port)
    writer.write(b"GET /info HTTP/1.1\r\nHost: d\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    for _, each in (*greedy, (reader, writer)):
        each.close()


@pytest.mark.parametrize("front_rig", [HURRIED], indirect=True)
@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /tasks HTTP/1.1\r\nHo",
        b"POST /services/create HTTP/1.1\r\nHost: d\r\nContent-Length: 100\r\n\r\n{",
        b"POST /services/create HTTP/1.1\r\nHost: d\r\nContent-Length: 1000000\r\n\r\n{",
    ],
    ids=["nothing", "a head", "a small body", "a long body"],
)
async def test_a_request_that_is_not_finished_is_not_waited_for_without_end(
    front_rig: Rig, begun: bytes
) -> None:
    async def reads(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async with front_rig.manager(reads):
        reader, writer = await asyncio.open_connection("127.0.0.1", front_rig.port)
        writer.write(begun)
        assert await ended(reader)
        writer.close()


@pytest.mark.parametrize("front_rig", [HURRIED], indirect=True)
async def test_a_stream_takes_its_time(front_rig: Rig) -> None:
    """Longer than any patience with requests: answers, and bodies without a length."""
    going_on = asyncio.Event()

    async def follow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await going_on.wait()
        await response.write(await request.content.readany())
        return response

    async with front_rig.manager(follow):
        reader, writer = await asyncio.open_connection("127.0.0.1", front_rig.port)
        writer.write(b"POST /services/create HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.5)  # ten times its patience
        going_on.set()
        writer.write(b"4\r\nlate\r\n0\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            assert b"late" in await reader.readuntil(b"0\r\n\r\n")
        writer.close()


async def test_handshakes_are_bounded_and_delay_no_others(tmp_path: Path) -> None:
    authority, key = Authority.create(), new_private_key()
    identity = NodeIdentity(node_id=NodeId("n"), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)
    pair = KeyPair(
        certificate_pem=authority.sign(signing_request(key), identity, timedelta(days=1)),
        key_pem=private_pem(key),
        root_pem=authority.root_pem,
    )
    rig = Rig(tmp_path, ClientLimits(handshakes=10))
    async with AsyncExitStack() as stack:
        save(pair, tmp_path)
        files = (tmp_path / name for name in (CERTIFICATE_FILE, KEY_FILE, ROOT_FILE))
        await stack.enter_async_context(rig.front(tls=ApiTls(*files)))
        silent = [await asyncio.open_connection("127.0.0.1", rig.port) for _ in range(11)]
        assert await ended(silent[0][0])  # the oldest makes room
        assert await is_answered(rig)
        for _, writer in silent:
            writer.close()


async def test_strangers_take_no_place_of_a_client_with_an_identity(tmp_path: Path) -> None:
    authority = an_authority(tmp_path / "ca")
    rig = Rig(tmp_path, ClientLimits(strangers_per_source=3, connections=2, stranger_s=1.0))
    trust = ssl.create_default_context(cafile=str(authority.root))
    with_certificate = ssl.create_default_context(cafile=str(authority.root))
    with_certificate.load_cert_chain(*authority.pair("client"))

    async def opened(context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("localhost", rig.port, ssl=context, family=socket.AF_INET)

    async with rig.front(tls=ApiTls(*authority.pair("server"), authority.root)):
        strangers = [await opened(trust) for _ in range(4)]
        assert await ended(strangers[0][0]), "the oldest stranger makes room"
        reader, writer = await opened(with_certificate)
        writer.write(b"GET /info HTTP/1.1\r\nHost: d\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        strangers[3][1].write(b"GET /info HTTP/1.1\r\nHo")
        for receiving, _ in strangers[1:]:
            assert await ended(receiving), "a stranger that proves nothing is ended soon"
        again = await opened(trust)
        again[1].write(b"GET /info HTTP/1.1\r\nHost: d\r\n\r\n")
        assert (await again[0].readline()).startswith(b"HTTP/1.1 401")
        for _, each in (*strangers, (reader, writer), again):
            each.close()


async def test_clients_by_tcp_that_vanish_are_noticed(front_rig: Rig) -> None:
    """By the kernel, which asks each that is silent."""
    _, writer = await asyncio.open_connection("127.0.0.1", front_rig.port)
    writer.write(b"GET /info HTTP/1.1\r\nHost: d\r\n")
    await writer.drain()
    ours = writer.get_extra_info("sockname")
    command = ["ss", "-tnoH", "dport", f"= :{ours[1]}"]
    shown = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert "timer:(keepalive," in shown.stdout
    writer.close()


async def test_a_client_that_breaks_off_behind_its_request_is_relayed_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    ours, manager = socket.socketpair()
    with manager:
        ends = await Connection.over(accepted, check_s=0.05), await Connection.over(ours)
        client.shutdown(socket.SHUT_WR)
        relaying = asyncio.ensure_future(relay(*ends, b"", is_one_exchange=False))
        assert await asyncio.to_thread(manager.recv, 1) == b""
        assert not relaying.done()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        async with asyncio.timeout(PATIENCE_S):
            await relaying
        assert ends[1].is_lost
