"""HTTP/2 frames (RFC 9113, sections 4 and 6), as Skep's gRPC clients and servers send and receive them."""

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

# Types and flags of frames, RFC 9113, section 6.
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0,
    1,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
)

END_STREAM = ACK = 0x1
# Flags, RFC 9113, section 6.
END_HEADERS = 0x4
_PADDED, _PRIORITY = 0x8, 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 2, 3, 4
"""Settings.  Source: RFC 9113, section 6.5.2."""
MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 5, 6
"""Settings.  Source: RFC 9113, section 6.5.2."""

WINDOW = 65_535
"""Default window of a stream and of a connection, in bytes."""
WINDOW_MAX = 2**31 - 1
"""Source: RFC 9113, section 6.9.1."""

FRAME_BYTES = 16_384
"""Default limit for the size of a payload.  Skep never announces a larger one."""

STREAM_ID_MAX = 2**31 - 1
"""Source: RFC 9113, section 5.1.1."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""The first bytes of a client connection."""

_HEAD = struct.Struct(">BHBBI")
_NUMBER = struct.Struct(">I")
_SETTING = struct.Struct(">HI")


class Code(IntEnum):
    """HTTP/2 error codes."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Violation(Exception):
    """The peer violated HTTP/2 or a limit.  The rest of the connection cannot be parsed."""

    def __init__(self, reason: str, code: Code = Code.PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.code = code


class Frame(NamedTuple):
    """A received frame.  Ignore frames of an unknown ``kind``."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def frame(kind: int, flags: int, stream_id: int, payload: bytes | memoryview = b"") -> bytes:
    """Return an encoded frame."""
    size = len(payload)
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id) + payload


def split(data: bytes) -> tuple[list[Frame], bytes]:
    """Return the complete frames at the start of ``data``, and the remaining bytes.  Raises: Violation."""
    frames = []
    start = 0
    while len(data) - start >= _HEAD.size:
        high, low, kind, flags, stream_id = _HEAD.unpack_from(data, start)
        size = (high << 16) + low
        if size > FRAME_BYTES:
            raise Violation(f"a frame of {size} bytes", Code.FRAME_SIZE_ERROR)
        begin = start + _HEAD.size
        if begin + size > len(data):
            break
        start = begin + size
        frames.append(Frame(kind, flags, stream_id & STREAM_ID_MAX, data[begin:start]))
    return frames, data[start:]


def content(frame: Frame) -> bytes:
    """Return the payload of a DATA or HEADERS frame without padding and priority.  Raises: Violation."""
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
    """Decode a payload that is one number: a window increment or an error code.  Raises: Violation."""
    if len(payload) != 4:
        raise Violation(f"{len(payload)} bytes instead of a number of four bytes", Code.FRAME_SIZE_ERROR)
    return int.from_bytes(payload, "big") & STREAM_ID_MAX


def settings_of(payload: bytes) -> Mapping[int, int]:
    """Decode the values of a SETTINGS frame.  Raises: Violation."""
    if len(payload) % _SETTING.size:
        raise Violation(f"settings of {len(payload)} bytes", Code.FRAME_SIZE_ERROR)
    return dict(_SETTING.iter_unpack(payload))


def settings(values: Mapping[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame.  Stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def reset(stream_id: int, code: Code) -> bytes:
    """Return a RST_STREAM frame, which ends a stream."""
    return frame(RST_STREAM, 0, stream_id, _NUMBER.pack(code))


def goaway(last_stream_id: int, code: Code) -> bytes:
    """Return a GOAWAY frame, which ends a connection.  Streams after ``last_stream_id`` were not handled."""
    return frame(GOAWAY, 0, 0, _NUMBER.pack(last_stream_id) + _NUMBER.pack(code))
