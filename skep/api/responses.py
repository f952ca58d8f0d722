"""Responses: JSON objects, long lists in pieces, streams of JSON lines, multiplexed output.

The event loop is never held longer than it takes to encode one piece.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from enum import IntEnum
from functools import partial
from itertools import islice
from typing import Any, Self, TypeVar

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

T = TypeVar("T")
C = TypeVar("C")

_PIECE = 128
"""List items encoded at once: about a millisecond of tasks."""
_KNOWN_PIECE = 512
"""The same where most of them are cached: a quarter of a millisecond; 5 ms for the first request."""

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"

_encoder = msgspec.json.Encoder()


class KnownJson:
    """The JSON of objects that never change, cached from one long list to the next.

    An object is known by its id and by being the same one, shown in the same circumstances: whatever else its response
    depends on.  What is not listed any more is forgotten.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, object, bytes]] = {}
        self._circumstances: Any = None

    def agreed(self, circumstances: C) -> C:
        """Those of the last list if they are equal, so that they are identical objects."""
        if circumstances != self._circumstances:
            self._circumstances = circumstances
        agreed: C = self._circumstances
        return agreed

    def of(self, id: str, object: T, circumstances: C, show: Callable[[C, T], Any]) -> bytes:
        """The JSON of what ``show`` makes of ``object``.  ``circumstances``: as agreed."""
        known = self._known.get(id)
        if known is None or known[0] is not object or known[1] is not circumstances:
            known = self._known[id] = (object, circumstances, _encoder.encode(show(circumstances, object)))
        return known[2]

    def keep_only(self, ids: Collection[str]) -> None:
        """Drop all others."""
        if len(self._known) > len(ids):
            wanted = frozenset(ids)
            self._known = {id: known for id, known in self._known.items() if id in wanted}


def json_response(value: Any, status: int = 200) -> web.Response:
    """``value`` as Docker's JSON, with the newline that ends it."""
    return web.Response(body=_encoder.encode(value) + b"\n", status=status, content_type="application/json")


def json_list_response(items: Sequence[T], show: Callable[[T], Any] = lambda item: item) -> web.Response:
    """A list of objects, each as ``show`` makes it; a long one goes out in pieces while it is being encoded."""
    shown = map(show, items)
    if len(items) <= _PIECE:
        return json_response(list(shown))
    return web.Response(body=_list_of(_pieces(shown)), content_type="application/json")


def known_list_response(
    items: Sequence[T], show: Callable[[C, T], Any], circumstances: C, known: KnownJson
) -> web.Response:
    """The same for all objects of a kind, which have an ``id``; of a long list only new objects are encoded."""
    if len(items) <= _PIECE:
        return json_list_response(items, partial(show, circumstances))
    pieces = _known_pieces(items, show, known.agreed(circumstances), known)
    return web.Response(body=_list_of(pieces), content_type="application/json")


async def _list_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The JSON list of the items in ``pieces``, of which there are some."""
    lead = b"["
    async for piece in pieces:
        yield lead + piece
        lead = b","
        await asyncio.sleep(0)  # others' turn
    yield b"]\n"


async def _pieces(items: Iterable[Any]) -> AsyncIterator[bytes]:
    iterator = iter(items)
    while batch := list(islice(iterator, _PIECE)):
        yield _encoder.encode(batch)[1:-1]


async def _known_pieces(
    items: Sequence[T], show: Callable[[C, T], Any], circumstances: C, known: KnownJson
) -> AsyncIterator[bytes]:
    ids: list[str] = [item.id for item in items]  # type: ignore[attr-defined]
    for start in range(0, len(items), _KNOWN_PIECE):
        batch = zip(ids[start : start + _KNOWN_PIECE], items[start : start + _KNOWN_PIECE], strict=True)
        yield b",".join([known.of(id, item, circumstances, show) for id, item in batch])
    known.keep_only(ids)


class ChunkedResponse:
    """A response that is sent in pieces, from ``begin`` on or while its context is open.

    ``response``: what the handler returns then.
    """

    def __init__(self, request: web.Request, status: int = 200, content_type: str | None = None) -> None:
        self._request = request
        self.response = web.StreamResponse(status=status)
        if content_type is not None:
            self.response.headers["Content-Type"] = content_type

    async def begin(self) -> None:
        """Send the head."""
        self.response.enable_chunked_encoding()
        await self.response.prepare(self._request)

    async def __aenter__(self) -> Self:
        await self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class JsonLines(ChunkedResponse):
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
    """Messages of the engine itself after a stream has begun: clients print them as errors."""


def frame(stream: OutputStream, data: bytes) -> bytes:
    """``data`` in the engine's multiplexed format: stream, three zero bytes, length (big-endian), data."""
    return bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


class OutputFrames(ChunkedResponse):
    """A process's output: framed, or raw where it had a terminal.

    Up to API 1.41 it has no content type (clients look at the container); from 1.42 on it has.
    """

    def __init__(self, request: web.Request, *, tty: bool, content_type: str | None) -> None:
        super().__init__(request, content_type=content_type)
        self._tty = tty

    async def send(self, stream: OutputStream, data: bytes) -> None:
        """Send one message.  Raises: ConnectionResetError: the client has gone."""
        await self.response.write(data if self._tty else frame(stream, data))

    async def send_all(self, messages: Iterable[tuple[OutputStream, bytes]]) -> None:
        """Send several at once.  Raises: ConnectionResetError: the client has gone."""
        await self.response.write(
            b"".join(data if self._tty else frame(stream, data) for stream, data in messages)
        )


class Hijacked(web.StreamResponse):
    """What a handler returns for a connection that is no longer HTTP: nothing is written for it."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write no head: it was sent when the connection was taken over."""
        self.force_close()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Write no end: the connection was closed by its user."""
