"""Sockets by which processes of one node speak with each other."""

import asyncio
import os
import stat
from pathlib import Path

from skep.dataplane.net_process.ipc import framed, read_frame, serve


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = await read_frame(reader, 100)
    writer.write(framed(body or b""))
    await writer.drain()
    writer.close()


async def test_a_socket_is_for_its_user_alone_and_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "process.sock"
    path.write_text("left by a process that was killed")
    before = os.umask(0o022)
    try:
        server = await serve(echo, path)
        assert os.umask(0o022) == 0o022, "other files keep the process's mask"
    finally:
        os.umask(before)
    async with server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(framed(b"hello"))
        assert await read_frame(reader, 100) == b"hello"
        writer.close()
