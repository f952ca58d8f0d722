"""Answers: JSON objects, long lists in pieces, streams of JSON lines, multiplexed output.

The event loop is never held longer than it takes to encode one piece.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from enum import IntEnum
from itertools import islice
from typing import Any, Self, TypeVar

import msgspec
from aiohttp import web

T = TypeVar("T")

_PIECE = 128
"""List items encoded at once: about a millisecond of tasks."""

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"

_encoder = msgspec.json.Encoder()


def json_answer(value: Any, status: int = 200) -> web.Response:
    """``value`` as Docker's JSON, with the newline that ends it."""
    return web.Response(body=_encoder.encode(value) + b"\n", status=status, content_type="application/json")


def json_list_answer(items: Sequence[T], show: Callable[[T], Any] = lambda item: item) -> web.Response:
    """A list of objects, each as ``show`` makes it; a long one goes out in pieces while it is being encoded."""
    shown = map(show, items)
    if len(items) <= _PIECE:
        return json_answer(list(shown))
    return web.Response(body=_list_pieces(shown), content_type="application/json")


async def _list_pieces(items: Iterable[Any]) -> AsyncIterator[bytes]:
    async for piece in _pieces(items):
        yield piece
    yield b"\n"


async def _pieces(items: Iterable[Any]) -> AsyncIterator[bytes]:
    """The JSON list of ``items``, cut between items."""
    iterator = iter(items)
    lead = b"["
    while batch := list(islice(iterator, _PIECE)):
        yield lead + _encoder.encode(batch)[1:-1]
        lead = b","
        await asyncio.sleep(0)  # others' turn
    yield b"]" if lead == b"," else b"[]"


class ChunkedAnswer:
    """An answer that is sent in pieces while its context is open.  ``response``: what the handler returns then."""

    def __init__(self, request: web.Request, status: int = 200, content_type: str | None = None) -> None:
        self._request = request
        self.response = web.StreamResponse(status=status)
        if content_type is not None:
            self.response.headers["Content-Type"] = content_type

    async def __aenter__(self) -> Self:
        self.response.enable_chunked_encoding()
        await self.response.prepare(self._request)
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class JsonLines(ChunkedAnswer):
    """One JSON object per line, each sent at once."""

    def __init__(self, request: web.Request, status: int = 200) -> None:
        super().__init__(request, status, "application/json")

    async def send(self, value: Any) -> None:
        """Send ``value`` as one line (dockerd ends each with CR LF or LF; readers take both).

        Raises: ConnectionResetError: the client has gone.
        """
        await self.response.write(_encoder.encode(value) + b"\n")


class OutputStream(IntEnum):
    """Which of its outputs a process wrote to; the number stands in the frame's head."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    SYSTEM = 3
    """What the engine itself has to say once a stream has begun: clients print it as an error."""


def frame(stream: OutputStream, data: bytes) -> bytes:
    """``data`` in the engine's multiplexed format: stream, three zero bytes, length (big-endian), data."""
    return bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


class OutputFrames(ChunkedAnswer):
    """A process's output: framed, or raw where it had a terminal.

    Up to API 1.41 it has no content type (clients know from the container); from 1.42 on it says which it is.
    """

    def __init__(self, request: web.Request, *, tty: bool, content_type: str | None) -> None:
        super().__init__(request, content_type=content_type)
        self._tty = tty

    async def send(self, stream: OutputStream, data: bytes) -> None:
        """Send one message.  Raises: ConnectionResetError: the client has gone."""
        await self.response.write(data if self._tty else frame(stream, data))
