"""Formatting of times and numbers for people."""

from collections.abc import Iterator, Sequence

from skep.errors import InvalidArgument
from skep.model.values.times import SECOND_NS, Timestamp, unix_ns

_NAMED_MAX = 5
"""Further words are counted, so that a sentence stays one."""
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"))


def duration(seconds: float) -> str:
    """Format seconds in the two largest units: ``3 s``, ``4m 10s``, ``2h 5m``, ``3d 4h``."""
    whole = max(round(seconds), 0)
    for size, unit in _UNITS:
        if whole >= size:
            count, rest = divmod(whole, size)
            smaller = {"d": (3_600, "h"), "h": (60, "m"), "m": (1, "s")}[unit]
            second = rest // smaller[0]
            return f"{count}{unit} {second}{smaller[1]}" if second else f"{count}{unit}"
    return f"{whole} s"


def seconds_since(stamp: str, now: float) -> float | None:
    """Return the seconds from ``stamp`` to ``now``, negative if it is in the future, or None if it is not a time."""
    try:
        return now - unix_ns(Timestamp(stamp)) / SECOND_NS
    except InvalidArgument:
        return None


def age(stamp: str, now: float) -> str:
    """Format the time since ``stamp``: ``4m 10s``. Text that is not a time is returned unchanged."""
    seconds = seconds_since(stamp, now)
    return stamp if seconds is None else duration(seconds)


def size(count: int) -> str:
    """Format a number of bytes: ``0 B``, ``1.5 KiB``, ``512 MiB``, ``8 GiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def named(words: Sequence[str]) -> str:
    """Return the first few of ``words``, such as ``a, b and 2 more``."""
    more = len(words) - _NAMED_MAX
    return ", ".join(words[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
