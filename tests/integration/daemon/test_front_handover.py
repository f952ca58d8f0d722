"""Connections that the front passes to the manager process: they come back, and outlive either process."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from aiohttp import web

from tests.support.clients.front_process import process
from tests.support.clients.front_rig import MIB, Rig, echo


class Client:
    """One raw connection to the front."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def of(cls, rig: Rig) -> "Client":
        return cls(*await asyncio.open_unix_connection(rig.socket))

    def send(self, method: str, path: str, body: bytes = b"", *headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: d", f"Content-Length: {len(body)}", *headers, "", ""]
        self.writer.write("\r\n".join(lines).encode() + body)

    async def response(self) -> tuple[int, bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def get(self, path: str) -> tuple[int, bytes]:
        self.send("GET", path)
        return await self.response()

    async def has_ended(self) -> bool:
        """Return when the other end has closed."""
        with contextlib.suppress(ConnectionError):
            await self.reader.read()
        return self.reader.at_eof()


@pytest.fixture(autouse=True)
async def limit():  # type: ignore[no-untyped-def]
    """None of this takes long."""
    async with asyncio.timeout(60):
        yield


async def wait_pid(client: Client) -> int:
    status, body = await client.get("/nodes")
    assert status == 200, body
    return int(json.loads(body)["pid"])


def descriptors(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# --- one connection, several processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_ahead", [False, True], ids=["in turn", "sent ahead"])
async def test_a_connection_comes_back_with_the_first_request_that_is_not_the_managers(
    front_rig: Rig, is_ahead: bool
) -> None:
    """The node answers on the same connection, and gets the whole request, body and all."""
    async with front_rig.manager(echo):
        client = await Client.of(front_rig)
        client.send("POST", "/services/create", b"x" * 100_000)
        if not is_ahead:
            assert json.loads((await client.response())[1])["bytes"] == 100_000
        client.send("GET", "/nodes")
        if not is_ahead:
            assert json.loads((await client.response())[1])["manager"] == "/nodes"
        client.send("POST", "/swarm/join", b"y" * 300_000)
        if is_ahead:
            assert json.loads((await client.response())[1])["bytes"] == 100_000
            assert json.loads((await client.response())[1])["manager"] == "/nodes"
        assert json.loads((await client.response())[1]) == {"here": "/swarm/join", "bytes": 300_000}
        assert await client.has_ended()
    assert front_rig.connections == 1


async def test_an_engine_gets_its_request_of_a_connection_the_manager_had(front_rig: Rig) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"upgrade: tcp" in head.lower()
        writer.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        writer.write(b"got " + await reader.read())  # until the client's half is closed
        writer.close()

    async with front_rig.manager(echo), front_rig.engine(serve):
        client = await Client.of(front_rig)
        assert (await client.get("/tasks"))[0] == 200
        client.send("POST", "/containers/theirs/attach", b"", "Connection: Upgrade", "Upgrade: tcp")
        assert b"101 UPGRADED" in await client.reader.readuntil(b"\r\n\r\n")
        client.writer.write(b"stdin")
        client.writer.write_eof()
        assert await client.reader.read() == b"got stdin"


async def test_a_remote_clients_connection_serves_all_destinations_in_turn(front_rig: Rig) -> None:
    """It cannot be passed itself; what is passed in its place comes back like any other."""
    async with front_rig.manager(echo):
        client = Client(*await asyncio.open_connection("127.0.0.1", front_rig.port))
        for number in range(3):
            assert json.loads((await client.get(f"/tasks?n={number}"))[1])["manager"] == f"/tasks?n={number}"
        client.send("POST", "/swarm/join", b"y" * MIB)
        assert json.loads((await client.response())[1]) == {"here": "/swarm/join", "bytes": MIB}
        assert await client.has_ended()
    assert front_rig.connections == 1


async def test_a_response_has_left_whole_before_its_connection_comes_back(front_rig: Rig) -> None:
    """Though the client reads nothing until it has sent the next request."""

    async def long(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"w" * 8 * MIB)

    async with front_rig.manager(long):
        client = await Client.of(front_rig)
        client.send("GET", "/tasks")
        client.send("GET", "/info")
        assert await client.response() == (200, b"w" * 8 * MIB)
        assert json.loads((await client.response())[1])["here"] == "/info"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /tasks HTTP/1.1\r\nA: " + b"x" * 70_000, b"431"),
        (b"POST /tasks HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST /tasks HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", b"400"),
        (b"GET /_skep/lag HTTP/1.1\r\nHost: d\r\n\r\n", b"200"),  # not the manager's, whatever it has there
    ],
    ids=["no request", "long head", "two lengths", "no chunk", "internal path"],
)
async def test_what_no_manager_should_see_is_refused_as_on_a_new_connection(
    front_rig: Rig, sent: bytes, status: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nX-Of: engine\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with front_rig.manager(echo), front_rig.engine(serve):
        for is_new in (True, False):
            client = await Client.of(front_rig)
            if not is_new:
                await client.get("/nodes")
            client.writer.write(sent)
            response = await client.reader.read()
            assert response.split()[1] == status, response
            assert b"manager" not in response


async def test_an_upgrade_that_the_manager_does_not_do_is_answered_and_ends_the_connection(
    front_rig: Rig,
) -> None:
    async with front_rig.manager(echo):
        client = await Client.of(front_rig)
        client.send("POST", "/tasks", b"", "Connection: Upgrade", "Upgrade: tcp")
        assert (await client.response())[0] == 200
        assert await client.has_ended()


async def test_no_descriptors_are_left(front_rig: Rig) -> None:
    async with front_rig.manager(echo):
        await (await Client.of(front_rig)).get("/nodes")
        before = descriptors()
        for number in range(30):
            client = await Client.of(front_rig)
            await client.get("/nodes")
            if number % 3 == 0:
                await client.get("/info")  # comes back
            elif number % 3 == 1:
                client.send("GET", "/tasks", b"", "Connection: close")
                await client.response()
            client.writer.close()
            await client.writer.wait_closed()
        while descriptors() > before:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)


# --- the manager ends -----------------------------------------------------------------------------------------------


async def test_a_killed_managers_idle_connections_go_on_with_the_next(front_rig: Rig, tmp_path: Path) -> None:
    client, other = await Client.of(front_rig), await Client.of(front_rig)
    async with process("manager", tmp_path) as manager:
        assert await wait_pid(client) == manager.pid
        await other.get("/nodes")  # by now the manager has ended what it does for the first
        manager.kill()
        await manager.wait()
    async with process("manager", tmp_path) as manager:
        assert await wait_pid(client) == manager.pid


@pytest.mark.parametrize("is_kept", [False, True], ids=["new", "kept"])
async def test_a_manager_killed_before_it_answers_is_a_503(
    front_rig: Rig, tmp_path: Path, is_kept: bool
) -> None:
    async with process("manager", tmp_path) as manager:
        other, client = await Client.of(front_rig), await Client.of(front_rig)
        if is_kept:
            await client.get("/nodes")
        client.send("POST", "/tasks/hang", b"{}")
        await other.get("/nodes")  # by now the manager has both
        manager.kill()
        status, body = await client.response()
        assert status == 503
        assert b"ended before it answered" in body
        assert await client.has_ended()


async def test_a_manager_killed_within_its_response_breaks_the_connection(
    front_rig: Rig, tmp_path: Path
) -> None:
    async with process("manager", tmp_path) as manager:
        client = await Client.of(front_rig)
        client.send("GET", "/tasks/begin")
        await client.reader.readuntil(b"first")
        manager.kill()
        assert await client.has_ended()


async def test_a_manager_that_stops_gives_its_connections_back(front_rig: Rig, tmp_path: Path) -> None:
    """Idle ones at once, others when they are answered or cut; nothing is lost on either."""
    idle, hanging = await Client.of(front_rig), await Client.of(front_rig)
    async with process("manager", tmp_path) as manager:
        await idle.get("/nodes")
        hanging.send("GET", "/tasks/hang")
        await idle.get("/nodes")
        manager.terminate()
        assert (await hanging.response())[0] == 503
        await manager.wait()
    async with process("manager", tmp_path) as manager:
        assert await wait_pid(idle) == manager.pid


@pytest.mark.parametrize("front_rig", [{"queued_max": 4}], indirect=True)
async def test_a_manager_that_hangs_holds_up_its_requests_alone(front_rig: Rig, tmp_path: Path) -> None:
    """And no more than so many: further ones are refused, and it answers the others when it goes on."""
    async with process("manager", tmp_path) as manager:
        await wait_pid(await Client.of(front_rig))
        manager.send_signal(signal.SIGSTOP)
        clients, refused = [], 0
        while not refused:
            client = await Client.of(front_rig)
            client.send("POST", "/nodes", b"x" * 30_000)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    status, body = await client.response()
                    assert (status, b"accepts no more" in body) == (503, True)
                    refused += 1
                    continue
            clients.append(client)
        assert (await (await Client.of(front_rig)).get("/info"))[0] == 200
        manager.send_signal(signal.SIGCONT)
        for client in clients:
            assert (await client.response())[0] == 200


async def test_a_manager_without_a_free_descriptor_answers_what_it_has(
    front_rig: Rig, tmp_path: Path
) -> None:
    async with process("manager", tmp_path, descriptors=40):
        clients = [await Client.of(front_rig) for _ in range(50)]
        responses = [await client.get("/nodes") for client in clients]
        statuses = [status for status, _ in responses]
        assert statuses.count(200) > 10
        assert statuses.count(503) > 5
        assert set(statuses) == {200, 503}
        assert (await clients[0].get("/nodes"))[0] == 200


# --- the node process ends ------------------------------------------------------------------------------------------


async def test_connections_outlive_a_killed_node_process_and_come_back_to_the_next(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    async with rig.manager(echo):
        async with process("front", tmp_path) as front:
            client, other = await Client.of(rig), await Client.of(rig)
            assert (await client.get("/nodes"))[0] == (await other.get("/nodes"))[0] == 200
            front.kill()
            await front.wait()
        assert (await client.get("/nodes"))[0] == 200
        assert (await other.get("/nodes"))[0] == 200
        other.send("GET", "/info")  # there is no process to answer it
        assert await other.has_ended()
        async with process("front", tmp_path):
            await (await Client.of(rig)).get("/nodes")
            assert json.loads((await client.get("/info"))[1])["here"] == "/info"
            assert await client.has_ended()


async def test_a_front_that_ends_ends_its_connections(tmp_path: Path) -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        if request.path == "/nodes":
            return await echo(request)
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    rig = Rig(tmp_path)
    async with rig.manager(hang):
        async with rig.front():
            client = await Client.of(rig)
            await client.get("/nodes")
            client.send("GET", "/tasks")
            await asked.wait()
        await ended.wait()
        assert await client.has_ended()
