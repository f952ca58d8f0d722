"""The API sockets: requests answered here, passed to the manager, and relayed to an engine."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from skep.errors import FailedPrecondition
from tests.support.clients.front_rig import MIB, Rig, echo

# --- here -----------------------------------------------------------------------------------------------------------


async def test_what_the_node_answers_itself_reaches_its_application(front_rig: Rig) -> None:
    async with front_rig.client() as client, client.post("/v1.41/swarm/init", data=b"x" * MIB) as response:
        assert await response.json() == {"here": "/v1.41/swarm/init", "bytes": MIB}


async def test_what_is_no_http_is_refused(front_rig: Rig) -> None:
    for sent, status in ((b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nA: " + b"x" * 70_000, b"431")):
        reader, writer = await asyncio.open_unix_connection(front_rig.socket)
        writer.write(sent)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 " + status), answer
        assert b'{"message":' in answer
        writer.close()


async def test_the_socket_is_for_root_and_the_docker_group(front_rig: Rig) -> None:
    assert front_rig.socket.stat().st_mode & 0o007 == 0


async def test_a_second_front_on_the_same_socket_is_refused_and_the_first_goes_on(front_rig: Rig) -> None:
    with pytest.raises(FailedPrecondition, match="another process serves the API"):
        async with front_rig.front():
            pass
    async with front_rig.client() as client, client.get("/info") as response:
        assert response.status == 200


async def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(rig.socket))
    assert rig.socket.exists()
    async with rig.front(), rig.client() as client, client.get("/info") as response:
        assert response.status == 200


PING, PONG = (
    b"GET /v1.41/_ping HTTP/1.1\r\nHost: d\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK",
)


async def test_the_connection_of_a_ping_is_kept_for_every_destination(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    async with (
        rig.front(ping=lambda _method, version: PONG if version == "1.41" else None),
        rig.manager(echo),
    ):
        reader, writer = await asyncio.open_unix_connection(rig.socket)
        for _ in range(3):
            writer.write(PING)
            assert await reader.readexactly(len(PONG)) == PONG
        writer.write(b"GET /tasks HTTP/1.1\r\nHost: d\r\n\r\n")
        assert b"X-Of: manager" in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        reader, writer = await asyncio.open_unix_connection(rig.socket)
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG
        writer.write(b"GET /v1.99/_ping HTTP/1.1\r\nHost: d\r\n\r\n")
        assert b'"here": "/v1.99/_ping"' in await reader.read(), (
            "what is not a plain ping is the application's"
        )
        writer.close()


async def test_a_client_that_pings_and_reads_nothing_is_dropped(tmp_path: Path) -> None:
    async def send_pings(client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await loop.sock_sendall(client, PING)
            await asyncio.sleep(0)  # so that the front reads each by itself

    rig = Rig(tmp_path)
    async with rig.front(ping=lambda _method, _version: PONG * 1000):
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, str(rig.socket))
            async with asyncio.timeout(30):
                with pytest.raises(ConnectionError):
                    await send_pings(client)
        async with rig.client() as other, other.get("/info") as response:
            assert response.status == 200


# --- to the manager -------------------------------------------------------------------------------------------------


async def test_swarm_requests_go_to_the_manager_over_one_kept_connection(front_rig: Rig) -> None:
    async with front_rig.manager(echo), front_rig.client() as client:
        for number in range(5):
            async with client.post(f"/v1.41/services/create?n={number}", data=b"y" * 1000) as response:
                assert response.headers["X-Of"] == "manager"
                assert await response.json() == {
                    "manager": f"/v1.41/services/create?n={number}",
                    "bytes": 1000,
                }
        async with client.head("/nodes") as response:
            assert response.status == 200
    assert front_rig.connections == 1


async def test_one_clients_connection_serves_all_destinations_in_turn(front_rig: Rig) -> None:
    async with front_rig.manager(echo), front_rig.client() as client:
        for path, key in (("/tasks", "manager"), ("/info", "here"), ("/nodes", "manager")):
            async with client.get(path) as response:
                assert key in await response.json()


async def test_requests_sent_ahead_are_answered_in_order(front_rig: Rig) -> None:
    async with front_rig.manager(echo):
        reader, writer = await asyncio.open_unix_connection(front_rig.socket)
        writer.write(b"".join(b"GET /tasks?n=%d HTTP/1.1\r\nHost: d\r\n\r\n" % n for n in range(3)))
        for number in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            assert b"/tasks?n=%d" % number in await reader.readexactly(length)
        writer.close()


async def test_large_and_chunked_bodies_pass_both_ways(front_rig: Rig) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"z" * 65_536

    async def stream(request: web.Request) -> web.StreamResponse:
        received = len(await request.read())
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for _ in range(received // 65_536):
            await response.write(b"w" * 65_536)
        return response

    async with front_rig.manager(stream), front_rig.client() as client:
        async with client.post("/secrets/create", data=pieces()) as response:
            assert len(await response.read()) == 4 * MIB
        async with client.get("/nodes") as response:
            assert await response.read() == b""
    assert front_rig.connections == 1


async def test_an_endless_answer_arrives_piece_by_piece_and_ends_with_its_client(front_rig: Rig) -> None:
    ended = asyncio.Event()

    async def follow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            await response.write(b"first line\n")
            await asyncio.Event().wait()
        finally:
            ended.set()
        return response

    async with front_rig.manager(follow), front_rig.client() as client:
        async with client.get("/services/web/logs?follow=1") as response:
            assert await response.content.readline() == b"first line\n"
            response.close()
        async with asyncio.timeout(5):
            await ended.wait()


@pytest.mark.parametrize("is_kept", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("is_half", [False, True], ids=["closed", "half closed"])
async def test_a_client_that_goes_away_before_its_answer_ends_the_request(
    front_rig: Rig, is_half: bool, is_kept: bool
) -> None:
    """Whether the manager was asked over a fresh connection or one that had been used before."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        if request.path == "/nodes":
            return await echo(request)
        await request.read()
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with front_rig.manager(hang), asyncio.timeout(5):
        reader, writer = await asyncio.open_unix_connection(front_rig.socket)
        if is_kept:
            writer.write(b"GET /nodes HTTP/1.1\r\nHost: d\r\n\r\n")
            await reader.readuntil(b"}")
        writer.write(b"POST /services/create HTTP/1.1\r\nHost: d\r\nContent-Length: 2\r\n\r\n{}")
        await asked.wait()
        if is_half:
            writer.write_eof()
            assert await reader.read() == b""
        writer.close()
        await ended.wait()
        async with front_rig.client() as client, client.get("/nodes") as response:
            assert response.status == 200
    assert front_rig.connections == 2  # the one of the hanging request is not used again


async def test_a_request_may_come_in_pieces_and_may_have_its_body_asked_for(front_rig: Rig) -> None:
    async with front_rig.manager(echo), asyncio.timeout(5):
        reader, writer = await asyncio.open_unix_connection(front_rig.socket)
        request = b"POST /services/create HTTP/1.1\r\nHost: d\r\nContent-Length: 4\r\n\r\n{  }"
        for _ in range(2):  # routed by the front, then by the manager
            for start in range(0, len(request), 5):
                writer.write(request[start : start + 5])
                await asyncio.sleep(0.001)
            assert b'"bytes": 4' in await reader.readuntil(b"}")
        writer.write(
            b"POST /services/create HTTP/1.1\r\nHost: d\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        assert b'"bytes": 2' in await reader.readuntil(b"}")
        writer.close()


async def test_outside_of_a_swarm_dockers_words_are_given(front_rig: Rig) -> None:
    front_rig.member.refusal = "This node is not a swarm manager."
    async with front_rig.client() as client, client.get("/secrets") as response:
        assert response.status == 503
        assert response.headers["Content-Type"] == "application/json"
        assert await response.json() == {"message": "This node is not a swarm manager."}


async def test_a_request_waits_for_a_manager_that_is_starting(front_rig: Rig) -> None:
    async with front_rig.client() as client, asyncio.TaskGroup() as group:
        asked = group.create_task(client.get("/nodes").__aenter__())
        await asyncio.sleep(0)
        async with front_rig.manager(echo):
            response = await asked
            assert response.status == 200
            await response.read()


async def test_a_manager_that_restarted_is_found_again(front_rig: Rig) -> None:
    async with front_rig.client() as client:
        for _ in range(3):
            async with front_rig.manager(echo), client.get("/nodes") as response:
                assert (await response.json())["manager"] == "/nodes"


# --- to the engine --------------------------------------------------------------------------------------------------


async def test_everything_else_goes_to_the_engine_byte_for_byte(front_rig: Rig) -> None:
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.readuntil(b"\r\n\r\n"))
        seen.extend(await reader.readexactly(5))
        writer.write(b"HTTP/1.1 201 Created\r\nX-Odd:  kept \r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async with front_rig.engine(serve):
        reader, writer = await asyncio.open_unix_connection(front_rig.socket)
        writer.write(b"POST /v1.41/volumes/create HTTP/1.1\r\nHost: d\r\nContent-Length: 5\r\n\r\nhello")
        answer = await reader.read()
        writer.close()
    assert answer == b"HTTP/1.1 201 Created\r\nX-Odd:  kept \r\nContent-Length: 2\r\n\r\nok"
    assert bytes(seen).endswith(b"Connection: close\r\n\r\nhello")


async def test_a_hijacked_connection_passes_half_closes_on(front_rig: Rig) -> None:
    """What ends the standard input of ``docker run -i``: the client closes its half, output goes on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"upgrade: tcp" in head.lower()
        writer.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        received = await reader.read()  # until the client's half is closed
        writer.write(b"got " + received)
        writer.close()

    async with front_rig.engine(serve):
        reader, writer = await asyncio.open_unix_connection(front_rig.socket)
        writer.write(
            b"POST /containers/theirs/attach HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
        )
        assert b"101 UPGRADED" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"stdin")
        writer.write_eof()
        assert await reader.read() == b"got stdin"
        writer.close()


async def test_a_client_that_does_not_read_holds_the_engine_up(front_rig: Rig) -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 * MIB))
        for _ in range(64):
            writer.write(b"v" * MIB)
            await writer.drain()
            sent += 1
        writer.close()

    async with front_rig.engine(serve):
        reader, writer = await asyncio.open_unix_connection(front_rig.socket, limit=65_536)
        writer.write(b"GET /images/theirs/get HTTP/1.1\r\nHost: d\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while sent != before:  # until nothing moves any more
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 16, "the front read a body that is not consumed"
        total = 0
        while data := await reader.read(MIB):
            total += len(data)
        assert total == 64 * MIB
        writer.close()


async def test_an_engine_that_is_away_is_a_503(front_rig: Rig) -> None:
    async with front_rig.client() as client, client.get("/volumes") as response:
        assert response.status == 503
        assert "the Docker Engine at" in (await response.json())["message"]


# --- answers that come before the request has ended -----------------------------------------------------------------


async def refused(rig: Rig, path: str, *headers: str) -> bytes:
    """The whole answer to a request whose 20 MB of body are sent before anything of it is read."""
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    lines = [f"POST {path} HTTP/1.1", "Host: d", f"Content-Length: {20 * MIB}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    for _ in range(20):
        writer.write(b"u" * MIB)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_refusal_of_the_front_is_delivered_though_the_body_is_unread(front_rig: Rig) -> None:
    front_rig.member.refusal = "This node is not a swarm manager."
    answer = await refused(front_rig, "/services/create")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"This node is not a swarm manager." in answer


async def test_a_refusal_of_the_manager_is_delivered_though_the_body_is_unread(front_rig: Rig) -> None:
    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "too large"}, status=413)

    async with front_rig.manager(refuse):
        answer = await refused(front_rig, "/services/create", "Connection: close")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"too large" in answer


async def test_a_refusal_of_this_node_is_delivered_though_the_body_is_unread(tmp_path: Path) -> None:
    async def refuse(_request: web.Request) -> web.Response:
        response = web.json_response({"message": "too large"}, status=413)
        response.force_close()
        return response

    rig = Rig(tmp_path)
    async with rig.front(refuse):
        answer = await refused(rig, "/images/load")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"too large" in answer


async def test_a_refusal_of_the_engine_is_delivered_though_the_body_is_unread(front_rig: Rig) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\nConnection: close\r\n\r\nno such")
        writer.write_eof()
        await asyncio.sleep(0.5)  # as Go's server does before it closes on a client that still sends
        writer.close()

    async with front_rig.engine(serve):
        answer = await refused(front_rig, "/build")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"no such")
