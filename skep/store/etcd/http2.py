"""HTTP/2 as one gRPC client on a unix socket needs it: frames, and header blocks that stand for themselves.

A general HTTP/2 library spends most of a small call on what never differs here: the headers of a request are the same
each time, and so are those of the answers.  The peer is told to keep no table of headers (``SETTINGS``), so a block
means the same wherever it comes, and is encoded and decoded once (decision 13).

Source: RFC 9113 (frames, windows), RFC 7541 (header blocks), gRPC's PROTOCOL-HTTP2.md.
"""

from collections.abc import Mapping
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
_PADDED, _PRIORITY = 0x8, 0x20

CANCEL = 8
"""The error code of a stream that nobody waits for any more."""

HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 4, 5

WINDOW = 65_535
"""Of a stream and of a connection, until the peer says more."""

FRAME_BYTES = 16_384
"""The longest payload, until the peer allows more; we allow no more ourselves."""

STREAM_ID_MAX = 2**31 - 1

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD = Struct(">BHBBI")
_SETTING = Struct(">HI")


class Violation(Exception):
    """The peer does not speak HTTP/2 as agreed: nothing that follows can be understood."""


class Frame(NamedTuple):
    """One frame as it came."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def frame(kind: int, flags: int, stream_id: int, payload: bytes | memoryview = b"") -> bytes:
    """One frame as it is sent."""
    size = len(payload)
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id) + payload


def split(data: bytes) -> tuple[list[Frame], bytes]:
    """The whole frames at the beginning of ``data``, and what is left.  Raises: Violation."""
    frames = []
    start = 0
    while len(data) - start >= _HEAD.size:
        high, low, kind, flags, stream_id = _HEAD.unpack_from(data, start)
        size = (high << 16) + low
        if size > FRAME_BYTES:
            raise Violation(f"a frame of {size} bytes")
        begin = start + _HEAD.size
        if begin + size > len(data):
            break
        start = begin + size
        frames.append(Frame(kind, flags, stream_id & STREAM_ID_MAX, data[begin:start]))
    return frames, data[start:]


def content(frame: Frame) -> bytes:
    """The payload of a DATA or HEADERS frame without padding and priority.  Raises: Violation."""
    if not frame.flags & (_PADDED | _PRIORITY):
        return frame.payload
    start, end = 0, len(frame.payload)
    if frame.flags & _PADDED:
        if not frame.payload:
            raise Violation("padding without a length")
        start, end = 1, end - frame.payload[0]
    if frame.kind == HEADERS and frame.flags & _PRIORITY:
        start += 5
    if start > end:
        raise Violation("more padding than payload")
    return frame.payload[start:end]


def number(payload: bytes) -> int:
    """The number that is all of ``payload``: an increment or an error code.  Raises: Violation."""
    if len(payload) != 4:
        raise Violation(f"{len(payload)} bytes for a number of four")
    return int.from_bytes(payload, "big") & STREAM_ID_MAX


def settings_of(payload: bytes) -> Mapping[int, int]:
    """What a SETTINGS frame says.  Raises: Violation."""
    if len(payload) % _SETTING.size:
        raise Violation(f"settings of {len(payload)} bytes")
    return dict(_SETTING.iter_unpack(payload))


def greeting(stream_window: int, connection_window: int) -> bytes:
    """What a client sends first: it keeps no header table, wants no push, and takes in this much at once."""
    settings = {HEADER_TABLE_SIZE: 0, ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: stream_window}
    payload = b"".join(_SETTING.pack(*item) for item in settings.items())
    return _PREFACE + frame(SETTINGS, 0, 0, payload) + window_update(0, connection_window - WINDOW)


def window_update(stream_id: int, increment: int) -> bytes:
    """Lets the peer send so many bytes more; stream 0 means the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


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
