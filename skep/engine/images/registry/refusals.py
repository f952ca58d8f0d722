"""Reads error responses of a registry, up to a size limit.

Source: OCI distribution-spec (Error codes); RFC 9110, 10.2.3 (Retry-After).
"""

from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from skep.errors import InvalidArgument

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of decoding a response that is not JSON of the expected form, or nested too deeply."""
_ERROR_BYTES_MAX = 64 << 10
"""Limit in bytes for reading a registry's error."""
_RETRY_AFTER_S_MAX = 60.0
"""Longest pause in seconds that a registry may request.  If it requests more, the pull fails with that reason."""


def status_text(status: int) -> str:
    """Return an HTTP status with its standard phrase."""
    return f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)


async def read_bounded(response: "aiohttp.ClientResponse", bytes_max: int) -> bytes:
    """Return the whole response.  Raises: InvalidArgument: it is larger than ``bytes_max``."""
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > bytes_max:
            raise InvalidArgument(f"{response.url}: the response is larger than {bytes_max} bytes")
    return bytes(content)


_UNEXPLAINED = {
    401: ("UNAUTHORIZED", "authentication required"),
    403: ("DENIED", "requested access to the resource is denied"),
    404: ("MANIFEST_UNKNOWN", "unexpected status 404"),
    429: ("TOOMANYREQUESTS", "too many requests"),
}
"""Codes and messages for responses without an error document, like those to HEAD."""


async def refusal_of(response: "aiohttp.ClientResponse") -> tuple[str, str]:
    """Return code and text of the registry's error, with the words of Docker's client.

    Source: distribution 2.8, registry/client/errors.go (HandleErrorResponse), registry/api/errcode/errors.go.
    """
    try:
        content = await read_bounded(response, _ERROR_BYTES_MAX)
    except InvalidArgument:  # too long for an error document, so probably the page of a proxy
        content = b""
    code, message = _first_error(content, response.status)
    if 'error="insufficient_scope"' in response.headers.get("WWW-Authenticate", ""):
        code, message = "DENIED", "requested access to the resource is denied"
    return code, f"{code.lower().replace('_', ' ')}: {message}"


def _first_error(content: bytes, status: int) -> tuple[str, str]:
    """Return code and message of the registry's error document, or a substitute."""
    try:
        document = msgspec.json.decode(content, type=dict[str, Any])
        first = document["errors"][0]
        return str(first.get("code", "UNKNOWN")), str(first.get("message", ""))
    except (*NOT_JSON, KeyError, IndexError, TypeError, AttributeError):
        return _UNEXPLAINED.get(status, ("UNKNOWN", f"unexpected status {status}"))


def retry_after(response: "aiohttp.ClientResponse") -> float:
    """Return the seconds of ``Retry-After``.  Limited, because the registry is not trusted.

    A date is relative to the response's own date, since the registry's clock may differ.
    """
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return min(float(value[:6]), _RETRY_AFTER_S_MAX)
    try:
        until, sent = (parsedate_to_datetime(date) for date in (value, response.headers.get("Date", "")))
        seconds = (until - sent).total_seconds()
    except (TypeError, ValueError):  # not dates, or one of them has no time zone
        return 0.0
    return min(max(seconds, 0.0), _RETRY_AFTER_S_MAX)
