"""gRPC status codes and messages.  Source: gRPC's doc/statuscodes.md and doc/PROTOCOL-HTTP2.md."""

from enum import IntEnum
from urllib.parse import quote, unquote


class StatusCode(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_BY_NUMBER = {str(status.value): status for status in StatusCode}


class CallFailed(Exception):
    """A call ended with a status other than OK.  ``str`` is the status message.

    ``retry_after_s``: Seconds after which the call may be retried, or None if the server sent no delay.
    """

    def __init__(self, status: StatusCode, message: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


class Lost(ConnectionError):
    """The connection or the call ended without a status."""


def status_of(number: str) -> StatusCode:
    """Return the status with this number, or UNKNOWN for an undefined one, as gRPC's specification requires."""
    return _BY_NUMBER.get(number, StatusCode.UNKNOWN)


PUSHBACK = "grpc-retry-pushback-ms"
"""Trailer with the retry delay in milliseconds (gRPC proposal A6).  Peers without support ignore it."""


def parse_pushback(value: str | None) -> float | None:
    """Return the retry delay in seconds, or None if the trailer is absent or malformed."""
    if value is None or not (value.isascii() and value.isdigit()) or len(value) > 9:
        return None
    return int(value) / 1000


def encode_message(text: str) -> bytes:
    """Encode a status message as a header value: percent-encoded except for printable ASCII."""
    return quote(text, safe=_PRINTABLE, errors="replace").encode("ascii")


_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def decode_message(value: str) -> str:
    """Decode a status message.  Invalid UTF-8 is replaced."""
    return unquote(value, errors="replace")
