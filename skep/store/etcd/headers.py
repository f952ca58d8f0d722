"""What etcd's client says and hears at the beginning of connections and calls: header blocks that stand for themselves.

A general HTTP/2 library spends most of a small call on what never differs here: the headers of a request are the same
each time, and so are those of the answers.  The peer is told to keep no table of headers (``SETTINGS``), so a block
means the same wherever it comes, and is encoded and decoded once (decision 13).

Source: RFC 7541 (header blocks), gRPC's PROTOCOL-HTTP2.md.
"""

from collections.abc import Mapping
from functools import lru_cache

from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple

from skep.aio import http2
from skep.aio.http2 import Violation


def greeting(stream_window: int, connection_window: int) -> bytes:
    """What a client sends first: it keeps no header table, wants no push, and takes in this much at once."""
    settings = {http2.HEADER_TABLE_SIZE: 0, http2.ENABLE_PUSH: 0, http2.INITIAL_WINDOW_SIZE: stream_window}
    more = http2.window_update(0, connection_window - http2.WINDOW)
    return http2.PREFACE + http2.settings(settings) + more


@lru_cache(maxsize=256)
def request_block(path: str, timeout_s: float | None, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
    """The header block of a gRPC call."""
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *metadata,
    ]
    if timeout_s is not None:
        headers.append(("grpc-timeout", f"{max(1, round(timeout_s * 1000))}m"))
    # Never indexed: the peer could not read the block without those before it.
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(*header) for header in headers]))


@lru_cache(maxsize=256)
def headers_of(block: bytes) -> Mapping[str, str]:
    """What a header block of the peer says; it refers to none before it.  Raises: Violation."""
    decoder = Decoder()
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    try:
        return {str(name): str(value) for name, value in decoder.decode(block)}
    except (HPACKError, UnicodeDecodeError) as error:
        raise Violation(f"unreadable headers: {error!r}") from error
