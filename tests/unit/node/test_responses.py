"""Whether a manager process answers, and what is done when it does not."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from sim.world.time import VirtualClock, VirtualLoop
from skep.api.http.liveness import LivenessConnection
from skep.errors import Unavailable
from skep.node.supervision.responses import POLL_S, REQUESTS_MAX, ManagerProbe, wait_hung


async def test_a_server_that_says_anything_answers(tmp_path: Path) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    async with await asyncio.start_unix_server(refuse, tmp_path / "sock"):
        with probing(tmp_path / "sock") as probe:
            assert [await probe.responds() for _ in range(3)] == [True] * 3, "each on a new connection"


async def test_one_connection_carries_all_requests(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while True:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")

    connections: list[asyncio.StreamWriter] = []
    async with await asyncio.start_unix_server(answer, tmp_path / "sock"):
        with probing(tmp_path / "sock") as probe:
            assert [await probe.responds() for _ in range(5)] == [True] * 5
            assert (len(connections), len(heads)) == (1, 5)
            connections[0].close()
            assert await probe.responds() is True, "a closed connection is not a hung server"
            assert len(connections) == 2


async def test_a_manager_answers_without_its_http_server_until_another_request_arrives(
    tmp_path: Path,
) -> None:
    requests: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        requests.append(request.path)
        return web.Response(text="from aiohttp")

    server = web.Server(answer)
    loop = asyncio.get_running_loop()
    async with await loop.create_unix_server(lambda: LivenessConnection(server), str(tmp_path / "sock")):
        with probing(tmp_path / "sock") as probe:
            assert [await probe.responds() for _ in range(REQUESTS_MAX + 1)] == [True] * (REQUESTS_MAX + 1)
        assert requests == []
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "sock"))) as session:
            for path in ("/a", "/b", "/_skep/lag"):
                async with session.get(f"http://manager{path}") as response:
                    assert await response.text() == "from aiohttp"
        assert requests == ["/a", "/b", "/_skep/lag"]
    await server.shutdown()


async def test_a_server_that_accepts_no_connections_does_not_respond(tmp_path: Path) -> None:
    """Without a file descriptor left, a process still answers on the connections that it has."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async with await asyncio.start_unix_server(answer, tmp_path / "sock") as server:
        with probing(tmp_path / "sock", 0.1) as probe:
            assert await probe.responds() is True
            listening = server.sockets[0].fileno()
            asyncio.get_running_loop().remove_reader(listening)
            found = [await probe.responds() for _ in range(REQUESTS_MAX + 2)]
            assert found == [True] * (REQUESTS_MAX - 1) + [False] * 3


async def test_a_server_that_falls_silent_and_returns_is_asked_anew(tmp_path: Path) -> None:
    is_silent = False

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            if not is_silent:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async with await asyncio.start_unix_server(answer, tmp_path / "sock"):
        with probing(tmp_path / "sock", 0.1) as probe:
            assert await probe.responds() is True
            is_silent = True
            assert [await probe.responds() for _ in range(3)] == [False] * 3
            is_silent = False
            assert await probe.responds() is True


async def test_where_none_listens_nothing_is_said(tmp_path: Path) -> None:
    with probing(tmp_path / "sock") as probe:
        assert await probe.responds() is None
        with socket.socket(socket.AF_UNIX) as left_over:
            left_over.bind(str(tmp_path / "sock"))
        assert await probe.responds() is None


async def test_a_process_that_stands_still_does_not_answer_also_when_its_queue_is_full(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(tmp_path / "sock"))
        stopped.listen(2)
        with probing(tmp_path / "sock", 0.1) as probe:
            assert [await probe.responds() for _ in range(6)] == [False] * 6


@contextmanager
def probing(path: Path, within_s: float = POLL_S) -> Iterator[ManagerProbe]:
    probe = ManagerProbe(path, within_s)
    try:
        yield probe
    finally:
        probe.close()


def test_one_that_is_silent_hands_over_and_is_past_help() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    handed_over: list[float] = []

    async def ask() -> bool:
        return loop.time() < 60

    async def hand_over() -> None:
        handed_over.append(loop.time())
        raise Unavailable("the member does not answer")

    why = loop.run_until_complete(wait_hung(ask, hand_over, clock))
    assert 62 <= handed_over[0] <= 65
    assert len(handed_over) >= 4, "again and again, as it may have failed"
    assert 73 <= loop.time() <= 78
    assert why.startswith("it did not respond for 1")
    loop.close()


def test_a_hand_over_that_hangs_does_not_put_off_the_end() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    handed_over: list[float] = []

    async def ask() -> bool:
        return loop.time() < 60

    async def hand_over() -> None:
        handed_over.append(loop.time())
        await asyncio.Event().wait()

    loop.run_until_complete(wait_hung(ask, hand_over, clock))
    assert len(handed_over) == 1, "one at a time"
    assert 73 <= loop.time() <= 78
    loop.close()


def test_one_that_does_not_listen_yet_is_waited_for() -> None:
    loop = VirtualLoop()

    async def ask() -> None:
        return None

    async def hand_over() -> None:
        raise AssertionError("no leadership to hand over")

    waiting = loop.create_task(wait_hung(ask, hand_over, VirtualClock(loop)))
    loop.run_until_complete(asyncio.wait({waiting}, timeout=600))
    assert not waiting.done()
    waiting.cancel()
    loop.run_until_complete(asyncio.wait({waiting}))
    loop.close()
