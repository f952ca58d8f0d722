"""Points in time and durations as the Engine API writes them.

A ``Timestamp`` is RFC 3339 in UTC with up to nine decimals; a duration is an integer of nanoseconds.
Timestamps of different machines are shown, never subtracted (docs/architecture.md, rule 9).
"""

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, NewType

import msgspec

from skep.errors import InvalidArgument

Timestamp = NewType("Timestamp", str)
Nanoseconds = Annotated[int, msgspec.Meta(extra={"go": "time.Duration"})]

ZERO_TIME = Timestamp("0001-01-01T00:00:00Z")
"""Go's zero time, Docker's value for "never"."""

SECOND_NS = 1_000_000_000
"""Nanoseconds in a second, as in Go's ``time.Second``."""
MILLISECOND_NS = SECOND_NS // 1000
"""Nanoseconds in a millisecond."""

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNITS_NS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": SECOND_NS,
    "m": 60 * SECOND_NS,
    "h": 3600 * SECOND_NS,
}
_PATTERN = re.compile(
    r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(?:[Zz]|([+-])(\d\d):(\d\d))$", re.ASCII
)


def timestamp(unix_ns: int) -> Timestamp:
    """Return the time ``unix_ns`` nanoseconds after the epoch, without trailing zeros (Go's RFC3339Nano)."""
    seconds, nanoseconds = divmod(unix_ns, SECOND_NS)
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".") if nanoseconds else ""
    return Timestamp(f"{_second(seconds)}{fraction}Z")


@lru_cache(maxsize=16)
def _second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).replace(tzinfo=None).isoformat(timespec="seconds")


def minute(stamp: str) -> str:
    """Return the minute of a timestamp in words: ``2026-01-31 12:00 UTC``."""
    return f"{stamp[:16].replace('T', ' ')} UTC"


def moment(unix_ns: int) -> datetime:
    """Return the same time as a ``datetime`` in UTC; exact to the microsecond."""
    return datetime.fromtimestamp(unix_ns / SECOND_NS, UTC)


def unix_ns(stamp: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 timestamp.

    Raises:
        InvalidArgument: it is not one.
    """
    match = _PATTERN.fullmatch(stamp)
    if match is None:
        raise InvalidArgument(f"invalid timestamp {stamp!r}: expected RFC 3339, like 2026-01-31T12:00:00Z")
    text, fraction, sign, hours, minutes = match.groups()
    try:
        moment = datetime.fromisoformat(text.upper()).replace(tzinfo=UTC)
    except ValueError as error:
        raise InvalidArgument(f"invalid timestamp {stamp!r}: {error}") from error
    offset_s = (int(hours) * 60 + int(minutes)) * 60 * (1 if sign == "+" else -1) if sign else 0
    whole = round((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    return (whole - offset_s) * SECOND_NS + int((fraction or "").ljust(9, "0") or 0)


def exact_duration(ns: int) -> str:
    """Return nanoseconds in the largest unit that is exact, as in a Compose file: ``90s``, ``1500ms``."""
    for unit_ns, unit in ((SECOND_NS, "s"), (10**6, "ms"), (10**3, "us")):
        if ns % unit_ns == 0:
            return f"{ns // unit_ns}{unit}"
    return f"{ns}ns"


def duration_ns(text: str) -> int | None:
    """Return a Go duration (``1h30m``) in nanoseconds, less than 2**63, or None if it is invalid."""
    sign = -1 if text.startswith("-") else 1
    rest = text[1:] if text.startswith(("-", "+")) else text
    if rest == "0":
        return 0
    total, position = 0.0, 0
    for match in _DURATION.finditer(rest):
        if match.start() != position:
            return None
        position = match.end()
        total += float(match.group(1)) * _UNITS_NS[match.group(2)]
    is_whole = position and position == len(rest)
    return round(sign * total) if is_whole and total < 2**63 else None
