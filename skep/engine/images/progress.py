"""Progress of pulls and loads: messages in Docker's stream of JSON messages, and the blobs that pulls download now.

Source: moby 20.10, pkg/jsonmessage/jsonmessage.go, pkg/streamformatter/streamformatter.go.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from skep.engine.images.reference import Reference


class ProgressDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """Progress of a transfer in bytes.  ``total`` is 0 if unknown."""

    current: int = 0
    total: int = 0


class ErrorDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error in a stream of progress."""

    code: int = 0
    message: str = ""


class ProgressMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """One line of the stream.  ``id`` is the layer that ``status`` describes."""

    stream: str = ""
    status: str = ""
    progress_detail: ProgressDetail | None = None
    progress: str = ""
    id: str = ""
    aux: Any = None
    error_detail: ErrorDetail | None = None
    error: str = ""


Report = Callable[[ProgressMessage], None]
"""Receives a message without waiting.  Implementations limit the number of pending messages."""


def quiet(_: ProgressMessage) -> None:
    """Discard messages.  A ``Report``."""


def transfer(id: str, status: str, current: int, total: int) -> ProgressMessage:
    """Return a message about a layer's transfer.  ``status`` is Downloading, Extracting or Loading layer."""
    return ProgressMessage(
        id=id,
        status=status,
        progress_detail=ProgressDetail(current=current, total=total),
        progress=_bar(current, total),
    )


def step(id: str, status: str) -> ProgressMessage:
    """Return the message of a layer's new state.  Docker sends an empty detail with it."""
    return ProgressMessage(id=id, status=status, progress_detail=ProgressDetail())


def failure(message: str, code: int = 0) -> ProgressMessage:
    """Return the last line of a failed stream.

    ``code`` is the exit code of the failed command, or 0 without a command.
    """
    return ProgressMessage(error_detail=ErrorDetail(code=code, message=message), error=message)


_BAR_WIDTH = 50
"""Width of the docker command's bar."""


def _bar(current: int, total: int) -> str:
    if current <= 0 and total <= 0:
        return ""
    if total <= 0 or current > total:
        return f"{_human(current):>8}"
    filled = current * 100 // total // 2
    blank = max(_BAR_WIDTH - filled, 0)
    return f"[{'=' * filled}>{' ' * blank}] {_human(current):>8}/{_human(total)}"


def _human(size_bytes: float) -> str:
    """Return four significant digits in decimal units.  Source: docker/go-units, size.go."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size_bytes >= 1000 and len(units) > 1:
        size_bytes /= 1000
        units.pop(0)
    return f"{size_bytes:.4g}{units[0]}"


class Arriving:
    """Configurations and layers that running pulls download, by their digests in the registry."""

    def __init__(self) -> None:
        self._references: dict[str, list[Reference]] = {}
        self._downloaded: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        """Return whether the blob is being downloaded or unpacked."""
        return digest in self._downloaded

    def add(self, digest: str) -> None:
        """Record that the download of a blob has started."""
        self._downloaded.add(digest)

    def discard(self, digest: str) -> None:
        """Record that a blob is stored, or that its download has failed."""
        self._downloaded.discard(digest)

    def references(self, digest: str) -> Sequence[Reference]:
        """Return the references whose pulls need the blob."""
        return tuple(self._references.get(digest, ()))

    @contextmanager
    def expecting(self, digests: Iterable[str], references: Sequence[Reference]) -> Iterator[None]:
        """Record within the context that a pull of ``references`` needs these blobs."""
        expected = tuple(digests)
        for digest in expected:
            self._references.setdefault(digest, []).extend(references)
        try:
            yield
        finally:
            for digest in expected:
                left = self._references[digest]
                for reference in references:
                    left.remove(reference)
                if not left:
                    del self._references[digest]
