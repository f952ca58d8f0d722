"""A terminal in the page: a WebSocket connected to a command in a task's container, like ``skep exec -it``.

Binary messages contain input and output.  Text messages are JSON: ``{"resize": {"rows": R, "columns": C}}`` from the
page, and at the end ``{"exit_code": N}`` or ``{"error": "..."}`` to the page.
"""

import asyncio
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

import msgspec
from aiohttp import WSMsgType, web

from skep.aio.groups import first_alone
from skep.api.client.raw import Exchange, RawClient, json
from skep.errors import InvalidArgument, SkepError, Unavailable

_MESSAGE_BYTES_MAX: Final = 64 * 1024
"""Largest message.  The page sends a larger paste in parts."""
_PAGE_READ_S: Final = 60.0
"""Seconds for the page to read written data."""
_HEARTBEAT_S: Final = 30.0
"""Seconds between pings.  Proxies close connections that are idle for 60 s."""
_WORDS_MAX: Final = 64
"""Words of the command that a terminal runs."""
_SIDE_MAX: Final = 1000
"""Rows or columns of a terminal."""
_HANG_UP: Final = b"\x03\x04"
"""Input that is sent when the page disconnects.  It ends an idle shell, which would otherwise keep running."""


class _Size(msgspec.Struct, frozen=True):
    rows: int
    columns: int


class _Control(msgspec.Struct, frozen=True):
    resize: _Size


class TerminalCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command and its task."""

    task: str
    words: tuple[str, ...]
    user: str
    size: _Size


def command_of(request: web.BaseRequest) -> TerminalCommand:
    """Return the command that a request names.  Raises: InvalidArgument."""
    query = request.query
    words = tuple(query.getall("command", [])) or ("/bin/sh",)
    if not query.get("task") or "/" in query["task"] or len(words) > _WORDS_MAX:
        raise InvalidArgument("a terminal needs a task, and a command of at most 64 words")
    size = _checked(_number(query.get("rows", "24")), _number(query.get("columns", "80")))
    return TerminalCommand(task=query["task"], words=words, user=query.get("user", ""), size=size)


def _number(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 5):
        raise InvalidArgument(f"invalid size of a terminal: {word[:20]!r}")
    return int(word)


def _checked(rows: int, columns: int) -> _Size:
    if not (0 < rows <= _SIDE_MAX and 0 < columns <= _SIDE_MAX):
        raise InvalidArgument(f"a terminal has 1 to {_SIDE_MAX} rows and columns")
    return _Size(rows, columns)


async def join_terminal(request: web.BaseRequest, client: RawClient) -> web.WebSocketResponse:
    """Run the command that ``request`` names until it or the page ends.  Raises: InvalidArgument: it names
    no command.
    """
    command = command_of(request)
    page = web.WebSocketResponse(max_msg_size=_MESSAGE_BYTES_MAX, heartbeat=_HEARTBEAT_S, compress=False)
    if not page.can_prepare(request).ok:
        raise InvalidArgument("a terminal needs a websocket")
    await page.prepare(request)
    try:
        end: dict[str, Any] = {"exit_code": await _run(page, client, command)}
    except SkepError as error:
        end = {"error": str(error)}
    with suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(_PAGE_READ_S):
            if not page.closed:
                await page.send_str(json(end).decode())
                await page.close()
    return page


async def _run(page: web.WebSocketResponse, client: RawClient, command: TerminalCommand) -> int:
    """Run the command and return its exit code.  Raises: SkepError."""
    target = await client.get(f"/skep/tasks/{quote(command.task, safe='')}/target")
    task = f"/skep/tasks/{target['TaskID']}"
    created = await client.post(
        f"{task}/container/exec",
        {
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "Tty": True,
            "User": command.user,
            "Env": ["TERM=xterm-256color"],
            "Cmd": list(command.words),
        },
    )
    path = f"{task}/exec/{created['Id']}"
    start = {"Detach": False, "Tty": True, "ConsoleSize": [command.size.rows, command.size.columns]}
    async with client.exchange("POST", f"{path}/start", json(start), upgrade=True) as stream:
        try:
            with first_alone(SkepError):
                async with asyncio.TaskGroup() as group:
                    typing = group.create_task(_type(page, stream, client, path), name="typed in a terminal")
                    await _print(page, stream)
                    typing.cancel()
        finally:
            _hang_up(stream)
    ended = await client.get(f"{path}/json")
    return int(ended["ExitCode"] or 0)


def _hang_up(stream: Exchange) -> None:
    if not stream.writer.is_closing():
        stream.writer.write(_HANG_UP)
        stream.writer.close()  # closes after the written data


async def _print(page: web.WebSocketResponse, stream: Exchange) -> None:
    """Send output to the page until the command or the page ends.  Raises: Unavailable: the page does not read."""
    with suppress(ConnectionError):
        async for piece in stream.raw_pieces():
            try:
                async with asyncio.timeout(_PAGE_READ_S):
                    await page.send_bytes(piece)
            except TimeoutError:
                raise Unavailable("the page takes nothing") from None


async def _type(page: web.WebSocketResponse, stream: Exchange, client: RawClient, path: str) -> None:
    """Send the page's input to the command until the page disconnects."""
    with suppress(ConnectionError):
        async for message in page:
            if message.type is WSMsgType.BINARY:
                stream.writer.write(message.data)
                await stream.writer.drain()
            elif message.type is WSMsgType.TEXT:
                await _resize(client, path, message.data)
    _hang_up(stream)


async def _resize(client: RawClient, path: str, text: str) -> None:
    with suppress(SkepError, msgspec.DecodeError):  # the command may have ended
        asked = msgspec.json.decode(text, type=_Control).resize
        size = _checked(asked.rows, asked.columns)
        await client.post(f"{path}/resize", query={"h": str(size.rows), "w": str(size.columns)})
