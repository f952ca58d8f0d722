"""Progress of a pull or load: Docker's stream of JSON messages.

Source: moby 20.10, pkg/jsonmessage/jsonmessage.go, pkg/streamformatter/streamformatter.go.
"""

from collections.abc import Callable
from typing import Any

import msgspec


class ProgressDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a transfer has come, in bytes.  ``total`` 0: unknown."""

    current: int = 0
    total: int = 0


class ErrorDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error in a stream of progress."""

    code: int = 0
    message: str = ""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """One line of the stream.  ``id`` names the layer that ``status`` is about."""

    stream: str = ""
    status: str = ""
    progress_detail: ProgressDetail | None = None
    progress: str = ""
    id: str = ""
    aux: Any = None
    error_detail: ErrorDetail | None = None
    error: str = ""


Report = Callable[[Message], None]
"""Takes a message and never waits; its implementation bounds what is pending."""


def quiet(_: Message) -> None:
    """A ``Report`` that discards messages."""


def transfer(id: str, status: str, current: int, total: int) -> Message:
    """A layer on its way: ``status`` is Downloading, Extracting or Loading layer."""
    return Message(
        id=id,
        status=status,
        progress_detail=ProgressDetail(current=current, total=total),
        progress=_bar(current, total),
    )


def step(id: str, status: str) -> Message:
    """A layer that has come to a new step.  Docker sends an empty detail with it."""
    return Message(id=id, status=status, progress_detail=ProgressDetail())


def failure(message: str, code: int = 0) -> Message:
    """The last line of a stream that failed.  ``code``: of the command that did; 0: it was none."""
    return Message(error_detail=ErrorDetail(code=code, message=message), error=message)


_BAR_WIDTH = 50


def _bar(current: int, total: int) -> str:
    if current <= 0 and total <= 0:
        return ""
    if total <= 0 or current > total:
        return f"{_human(current):>8}"
    filled = current * 100 // total // 2
    blank = max(_BAR_WIDTH - filled, 0)
    return f"[{'=' * filled}>{' ' * blank}] {_human(current):>8}/{_human(total)}"


def _human(size_bytes: float) -> str:
    """Four significant digits in decimal units.  Source: docker/go-units, size.go."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size_bytes >= 1000 and len(units) > 1:
        size_bytes /= 1000
        units.pop(0)
    return f"{size_bytes:.4g}{units[0]}"
