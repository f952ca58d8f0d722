"""Requests to the manager over connections that were used before: most of them go on without waking a task."""

import asyncio
from contextlib import closing
from pathlib import Path

from aiohttp import web

from tests.integration.daemon.front_rig import MIB, Rig, echo


async def test_a_request_that_may_be_repeated_goes_again_when_its_kept_connection_is_gone(
    front_rig: Rig,
) -> None:
    """Whole and unchanged, body and all; the client hears of nothing."""
    came: list[bytes] = []

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.read(MIB))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        if len(came) == 1:
            came.append(await reader.read(MIB))
        writer.close()

    request = b"GET /tasks HTTP/1.1\r\nhost: d\r\ncontent-length: 4\r\n\r\nbody"
    with closing(await asyncio.start_unix_server(answer_once, front_rig.manager_socket)):
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_unix_connection(front_rig.socket)
            for _ in range(2):
                writer.write(request)
                assert await reader.readuntil(b"{}") == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
            writer.close()
    assert came == [request, request, request]


async def test_answers_of_every_shape_pass_over_a_kept_connection(front_rig: Rig) -> None:
    """In pieces, too long to be waited for, without a length, and none after which it cannot be kept."""
    length = 200_000
    answers = [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", b"wh", b"at"],
        [b"HTTP/1.1 200 OK\r\nContent-", b"Length: 4\r\n\r\nwhat"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length, b"w" * length],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwhat\r\n", b"0\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"the rest"],
    ]
    opened = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        for pieces in answers:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.005)
        writer.close()

    with closing(await asyncio.start_unix_server(answer, front_rig.manager_socket)):
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_unix_connection(front_rig.socket)
            writer.write(b"GET /tasks HTTP/1.1\r\nHost: d\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            for pieces in answers:
                writer.write(b"GET /tasks HTTP/1.1\r\nHost: d\r\n\r\n")
                expected = b"".join(pieces)
                assert await reader.readexactly(len(expected)) == expected
            assert await reader.read() == b""
            writer.close()
    assert opened == 1


async def test_a_manager_that_dies_within_a_small_answer_breaks_the_clients_connection(
    front_rig: Rig,
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for text in (b"what", b"wh"):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + text)
        writer.close()

    with closing(await asyncio.start_unix_server(answer, front_rig.manager_socket)):
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_unix_connection(front_rig.socket)
            writer.write(b"GET /tasks HTTP/1.1\r\nHost: d\r\n\r\n")
            await reader.readuntil(b"what")
            writer.write(b"GET /tasks HTTP/1.1\r\nHost: d\r\n\r\n")
            assert not (await reader.read()).endswith(b"what")
            writer.close()


async def test_a_front_that_ends_lets_go_of_what_is_under_way(tmp_path: Path) -> None:
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
    async with rig.manager(hang), asyncio.timeout(5):
        async with rig.front():
            reader, writer = await asyncio.open_unix_connection(rig.socket)
            writer.write(b"GET /nodes HTTP/1.1\r\nHost: d\r\n\r\n")
            await reader.readuntil(b"}")
            writer.write(b"GET /tasks HTTP/1.1\r\nHost: d\r\n\r\n")
            await asked.wait()
        await ended.wait()
        assert await reader.read() == b""
        writer.close()
