"""Header blocks (HPACK, RFC 7541): what peers send is decoded once, what we send is made once.

Decoding is a function of the block and of the table that the blocks before it have built.  Nodes send each other's
blocks: the first of each connection is the same for all of a kind, and so is the table after it.  Therefore tables
are values, shared by all connections that have come to the same one, and the function caches its last results.  A
client announces a table of size 0, so that a block of a response can be decoded without state.

Source: RFC 7541, gRPC's PROTOCOL-HTTP2.md.
"""

from collections import deque
from collections.abc import Mapping
from functools import lru_cache

import msgspec
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple
from hpack.exceptions import HPACKError
from hpack.hpack import encode_integer

from skep.rpc.frames import Code, Violation
from skep.rpc.status import PUSHBACK, CallFailed, encode_message

HEADER_LIST_BYTES_MAX = 64 * 1024
"""Of one request, decoded."""
REMEMBERED = 256
"""Blocks whose meaning, or whose bytes, are cached for all connections."""
REMEMBERED_BYTES_MAX = 1024
"""A longer block is decoded each time: the cache stays small whatever peers send."""


class Request(msgspec.Struct, frozen=True):
    """What a server of gRPC needs of a call's headers; a missing one is empty."""

    method: str
    path: str
    content_type: str
    timeout: str
    """As the client wrote it, such as ``5S``."""
    build_id: str = ""
    """The build that a call of BuildKit's protocol belongs to."""
    session: tuple[tuple[str, str], ...] = ()
    """What a client of BuildKit's protocol says of a session that it opens by a call: names in lower case, values."""


class Table:
    """The dynamic table of a decoder, latest entry first.  Immutable, and compared by identity."""

    __slots__ = ("entries", "size", "size_max")

    def __init__(self, entries: tuple[tuple[bytes, bytes], ...], size: int, size_max: int) -> None:
        self.entries = entries
        self.size = size
        """As the protocol counts it."""
        self.size_max = size_max


_SESSION = b"x-docker-expose-session-"

EMPTY = Table((), 0, 4096)
"""What a connection begins with."""


def decoded(table: Table, block: bytes) -> tuple[Request, Table]:
    """The request of a header block, and the table after it.  Raises: Violation."""
    return (_remembered if len(block) <= REMEMBERED_BYTES_MAX else _decoded)(table, block)


def _decoded(table: Table, block: bytes) -> tuple[Request, Table]:
    decoder = Decoder(max_header_list_size=HEADER_LIST_BYTES_MAX)
    inner = decoder.header_table
    inner.dynamic_entries = deque(table.entries)
    inner._current_size, inner._maxsize = table.size, table.size_max
    try:
        pairs = decoder.decode(block, raw=True)
    except HPACKError as error:
        raise Violation(f"headers that cannot be decoded: {error}", Code.COMPRESSION_ERROR) from error
    names = (b":method", b":path", b"content-type", b"grpc-timeout", b"buildkit-controlapi-buildid")
    headers = dict(pairs)
    session = tuple(
        (name.decode("ascii", "replace"), value.decode("ascii", "replace"))
        for name, value in pairs
        if name.startswith(_SESSION)
    )
    method, path, content_type, timeout, build = (
        headers.get(name, b"").decode("ascii", "replace") for name in names
    )
    request = Request(method, path, content_type, timeout, build, session)
    entries = tuple(inner.dynamic_entries)
    if entries == table.entries and inner._maxsize == table.size_max:
        return request, table
    return request, Table(entries, inner._current_size, inner._maxsize)


_remembered = lru_cache(REMEMBERED)(_decoded)


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that enters no table."""
    sizes = bytes(encode_integer(len(name), 7)), bytes(encode_integer(len(value), 7))
    return b"\0" + sizes[0] + name + sizes[1] + value


NO_TABLE = b"\x20"
"""Sent once, before our first block: the following ones use no table, whatever the peer allows."""
_OK = b"\x88"  # `:status: 200` stands in the static table
ANSWER = _OK + _literal(b"content-type", b"application/grpc+proto")
"""Headers of a gRPC response."""
TRAILERS_OK = _literal(b"grpc-status", b"0")


def trailers(failure: CallFailed) -> bytes:
    """The last header block of a call that failed."""
    block = _literal(b"grpc-status", b"%d" % failure.status)
    block += _literal(b"grpc-message", encode_message(failure.message))
    if failure.retry_after_s is None:
        return block
    return block + _literal(PUSHBACK.encode(), b"%d" % round(failure.retry_after_s * 1000))


def refusal(http_status: int) -> bytes:
    """Headers for a request that is none of gRPC."""
    return _literal(b":status", b"%d" % http_status)


@lru_cache(REMEMBERED)
def request_block(
    path: str,
    timeout_s: float | None,
    metadata: tuple[tuple[str, str], ...] = (),
    *,
    scheme: str = "http",
    authority: str = "localhost",
) -> bytes:
    """The header block of a call, which means the same wherever it comes: it enters no table."""
    headers = [
        (":method", "POST"),
        (":scheme", scheme),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *metadata,
    ]
    if timeout_s is not None:
        headers.append(("grpc-timeout", f"{max(1, round(timeout_s * 1000))}m"))
    # Never indexed: the peer could not read the block without those before it.
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(*header) for header in headers]))


def response_headers(block: bytes) -> Mapping[str, str]:
    """The headers in a block of a server whose table has size 0.  Raises: Violation."""
    return (_remembered_answer if len(block) <= REMEMBERED_BYTES_MAX else _answer)(block)


def _answer(block: bytes) -> Mapping[str, str]:
    decoder = Decoder(max_header_list_size=HEADER_LIST_BYTES_MAX)
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    try:
        return {str(name): str(value) for name, value in decoder.decode(block)}
    except (HPACKError, UnicodeDecodeError) as error:
        raise Violation(f"unreadable headers: {error!r}") from error


_remembered_answer = lru_cache(REMEMBERED)(_answer)
