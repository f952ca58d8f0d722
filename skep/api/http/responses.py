"""Forms of responses: JSON objects, long lists in pieces, streams of JSON lines, and multiplexed output.

The event loop is never blocked for longer than the encoding of one piece.
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
"""Number of list items that are encoded at once.  As many tasks take about a millisecond."""
_KNOWN_PIECE = 512
"""Number of list items that are encoded at once if most are cached.  They take a quarter of a millisecond, or 5 ms for
the first request.
"""

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"

_encoder = msgspec.json.Encoder()


class KnownJson:
    """Cached JSON of immutable objects, from one long list to the next.

    An entry is valid as long as the object and the circumstances are the same.  The circumstances are everything else
    on which the response depends.  Objects that are no longer listed are dropped.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, object, bytes]] = {}
        self._circumstances: Any = None

    def agreed(self, circumstances: C) -> C:
        """Return the circumstances of the last list if they are equal, so that they can be compared by identity."""
        if circumstances != self._circumstances:
            self._circumstances = circumstances
        agreed: C = self._circumstances
        return agreed

    def of(self, id: str, object: T, circumstances: C, show: Callable[[C, T], Any]) -> bytes:
        """Return the JSON of ``show(circumstances, object)``.  ``circumstances`` come from ``agreed``."""
        known = self._known.get(id)
        if known is None or known[0] is not object or known[1] is not circumstances:
            known = self._known[id] = (object, circumstances, _encoder.encode(show(circumstances, object)))
        return known[2]

    def keep_only(self, ids: Collection[str]) -> None:
        """Drop all other objects."""
        if len(self._known) > len(ids):
            wanted = frozenset(ids)
            self._known = {id: known for id, known in self._known.items() if id in wanted}


def json_response(value: Any, status: int = 200) -> web.Response:
    """Return ``value`` as Docker's JSON, with a newline at the end."""
    return web.Response(body=_encoder.encode(value) + b"\n", status=status, content_type="application/json")


def json_list_response(items: Sequence[T], show: Callable[[T], Any] = lambda item: item) -> web.Response:
    """Return a list of objects, each converted by ``show``.  A long list is sent in pieces while it is
    being encoded.
    """
    shown = map(show, items)
    if len(items) <= _PIECE:
        return json_response(list(shown))
    return web.Response(body=_list_of(_pieces(shown)), content_type="application/json")


def known_list_response(
    items: Sequence[T], show: Callable[[C, T], Any], circumstances: C, known: KnownJson
) -> web.Response:
    """Return a list of all objects of a kind.  If it is long, only new objects are encoded.  Each object has an
    ``id``.
    """
    if len(items) <= _PIECE:
        return json_list_response(items, partial(show, circumstances))
    pieces = _known_pieces(items, show, known.agreed(circumstances), known)
    return web.Response(body=_list_of(pieces), content_type="application/json")


async def _list_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the JSON list of the items in ``pieces``, which is not empty."""
    lead = b"["
    async for piece in pieces:
        yield lead + piece
        lead = b","
        await asyncio.sleep(0)  # lets other requests run between two pieces
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

    The handler returns ``response`` afterwards.
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


JSON_SEQUENCE = "application/json-seq"
"""Media type of RFC 7464, which begins each object with a record separator."""


class JsonLines(ChunkedResponse):
    """One JSON object per line, each sent at once."""

    def __init__(
        self, request: web.Request, status: int = 200, content_type: str = "application/json"
    ) -> None:
        super().__init__(request, status, content_type)
        self._lead = b"\x1e" if content_type == JSON_SEQUENCE else b""

    async def send(self, value: Any) -> None:
        """Send ``value`` as one line. dockerd ends lines with CR LF or LF, and clients accept both.

        Raises:
            ConnectionResetError: The client has disconnected.
        """
        await self.response.write(self._lead + _encoder.encode(value) + b"\n")


class OutputStream(IntEnum):
    """A stream of a process's output.  The value is the number in the frame's head."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    SYSTEM = 3
    """Messages of the engine itself, after the output has started.  Clients print them as errors."""


def frame(stream: OutputStream, data: bytes) -> bytes:
    """Return ``data`` in the engine's multiplexed format: stream, three zero bytes, length (big-endian), data."""
    return bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


class OutputFrames(ChunkedResponse):
    """A response with the output of a process.  It is framed, or raw if the process has a terminal.

    Up to API 1.41 it has no content type (clients look at the container), and from 1.42 on it has one.
    """

    def __init__(self, request: web.Request, *, tty: bool, content_type: str | None) -> None:
        super().__init__(request, content_type=content_type)
        self._tty = tty

    async def send(self, stream: OutputStream, data: bytes) -> None:
        """Send one message.  Raises: ConnectionResetError: the client has disconnected."""
        await self.response.write(data if self._tty else frame(stream, data))

    async def send_all(self, messages: Iterable[tuple[OutputStream, bytes]]) -> None:
        """Send several messages at once.  Raises: ConnectionResetError: the client has disconnected."""
        await self.response.write(
            b"".join(data if self._tty else frame(stream, data) for stream, data in messages)
        )


class Hijacked(web.StreamResponse):
    """Response of a handler that has turned its connection into a stream.  It writes nothing."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write no head, because it was sent when the connection was taken over."""
        self.force_close()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Write no end, because the protocol that took over the connection has closed it."""
