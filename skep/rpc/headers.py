"""Decodes and encodes header blocks (HPACK, RFC 7541), with results that all connections share.

The content of a block depends on its bytes and on the dynamic table that earlier blocks have built.  Most nodes send
the same blocks in the same order, so tables are immutable values that connections share, and recent results are cached.
Clients announce a table of size 0, so that they can decode response blocks without state.

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
"""Largest decoded size of the headers of one request."""
REMEMBERED = 256
"""Number of entries of each cache that all connections share."""
REMEMBERED_BYTES_MAX = 1024
"""Longer blocks are not cached, which limits the memory that peers can fill."""


class CallHeaders(msgspec.Struct, frozen=True):
    """The headers of a call that a gRPC server uses.  An absent header is empty."""

    method: str
    path: str
    content_type: str
    timeout: str
    """The header as sent, such as ``5S``."""
    build_id: str = ""
    """Id of the build, in BuildKit's protocol."""
    session: tuple[tuple[str, str], ...] = ()
    """Session headers of a BuildKit client: lower-case names with their values."""


class HeaderTable:
    """The dynamic table of a decoder, latest entry first.  Immutable, and compared by identity."""

    __slots__ = ("entries", "size", "size_max")

    def __init__(self, entries: tuple[tuple[bytes, bytes], ...], size: int, size_max: int) -> None:
        self.entries = entries
        self.size = size
        """Size as RFC 7541 counts it: names, values and 32 bytes for each entry."""
        self.size_max = size_max


_SESSION = b"x-docker-expose-session-"

EMPTY = HeaderTable((), 0, 4096)
"""The table of a new connection."""


def decoded(table: HeaderTable, block: bytes) -> tuple[CallHeaders, HeaderTable]:
    """Decode the request of a header block.  Return it with the resulting table.  Raises: Violation."""
    return (_remembered if len(block) <= REMEMBERED_BYTES_MAX else _decoded)(table, block)


def _decoded(table: HeaderTable, block: bytes) -> tuple[CallHeaders, HeaderTable]:
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
    request = CallHeaders(method, path, content_type, timeout, build, session)
    entries = tuple(inner.dynamic_entries)
    if entries == table.entries and inner._maxsize == table.size_max:
        return request, table
    return request, HeaderTable(entries, inner._current_size, inner._maxsize)


_remembered = lru_cache(REMEMBERED)(_decoded)


def _literal(name: bytes, value: bytes) -> bytes:
    """Encode a header without indexing."""
    sizes = bytes(encode_integer(len(name), 7)), bytes(encode_integer(len(value), 7))
    return b"\0" + sizes[0] + name + sizes[1] + value


NO_TABLE = b"\x20"
"""Sets the table size to 0.  Sent once, before the first block."""
_OK = b"\x88"  # the entry for `:status: 200` in the static table
ANSWER = _OK + _literal(b"content-type", b"application/grpc+proto")
"""Headers of a gRPC response."""
TRAILERS_OK = _literal(b"grpc-status", b"0")


def trailers(failure: CallFailed) -> bytes:
    """Return the last header block of a failed call."""
    block = _literal(b"grpc-status", b"%d" % failure.status)
    block += _literal(b"grpc-message", encode_message(failure.message))
    if failure.retry_after_s is None:
        return block
    return block + _literal(PUSHBACK.encode(), b"%d" % round(failure.retry_after_s * 1000))


def refusal(http_status: int) -> bytes:
    """Return response headers for a request that is not gRPC."""
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
    """Return the header block of a call.  It uses no dynamic table, so every connection can send it."""
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
    # Never indexed, because an indexed header could not be decoded on another connection.
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(*header) for header in headers]))


def response_headers(block: bytes) -> Mapping[str, str]:
    """Decode a header block of a server that uses no table.  Raises: Violation."""
    return (_remembered_answer if len(block) <= REMEMBERED_BYTES_MAX else _answer)(block)


def _answer(block: bytes) -> Mapping[str, str]:
    decoder = Decoder(max_header_list_size=HEADER_LIST_BYTES_MAX)
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    try:
        return {str(name): str(value) for name, value in decoder.decode(block)}
    except (HPACKError, UnicodeDecodeError) as error:
        raise Violation(f"unreadable headers: {error!r}") from error


_remembered_answer = lru_cache(REMEMBERED)(_answer)
