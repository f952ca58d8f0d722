"""A container's output, as conmon writes it (``k8s-file``) and as docker reads it.

conmon writes lines of ``TIME STREAM P|F TEXT``: F ends a line of output, P is a piece of a line that continues.
Pieces are joined up to 16 KiB, as Docker's own json-file does, so an endless line costs no memory.

Rotation renames ``current`` to ``current.1`` (and that to ``.2``, ...) and then has conmon open
``current`` anew; until it does it writes to the renamed file, so nothing is lost.  A reader therefore stays
with the file it has open until there is a newer one, reads it to its end, and continues with the next newer
one.
"""

import asyncio
import os
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from skep.aio.clock import Clock
from skep.aio.failures import log_error
from skep.aio.race import wait_first
from skep.engine.bundle import Bundles
from skep.engine.container import Container, LogConfig, LogEntry, LogFilter, Stream
from skep.errors import InvalidArgument
from skep.linux.filewatch import FileWatch
from skep.model.ids import ContainerId
from skep.model.times import unix_ns

PIECE_BYTES_MAX = 16 << 10
CHECK_S = 1.0
"""Between two checks of sizes; a log may grow past its bound for so long."""
_CHUNK_BYTES = 64 << 10
_ENTRIES_AT_ONCE = 512
_STREAMS = {b"stdout": Stream.STDOUT, b"stderr": Stream.STDERR}


class Assembler:
    """Joins the pieces of a line, per stream."""

    def __init__(self) -> None:
        self._open: dict[Stream, LogEntry] = {}

    def feed(self, line: bytes) -> LogEntry | None:
        """One line of conmon's file without its newline; gives a finished entry, or None.

        What is no line of conmon's (a torn end after a crash) is left out.
        """
        parts = line.split(b" ", 3)
        if len(parts) != 4 or parts[1] not in _STREAMS:
            return None
        try:
            moment = unix_ns(parts[0].decode("ascii", "replace"))
        except InvalidArgument:
            return None
        stream, text = _STREAMS[parts[1]], parts[3]
        started = self._open.pop(stream, None)
        if started is not None:
            moment, text = started.timestamp_ns, started.data + text
        if parts[2][:1] == b"F":
            return LogEntry(moment, stream, text + b"\n")
        if len(text) >= PIECE_BYTES_MAX:
            return LogEntry(moment, stream, text)
        self._open[stream] = LogEntry(moment, stream, text)
        return None

    def finish(self) -> Iterator[LogEntry]:
        """What was begun and never ended, as lines: the process ended first."""
        for entry in sorted(self._open.values()):
            yield entry._replace(data=entry.data + b"\n")
        self._open.clear()


class Files:
    """The files of one log, in the order in which they were written; one of them is open."""

    def __init__(self, current: Path) -> None:
        self._current = current
        self._file: BinaryIO | None = None
        self._rest = b""

    def open_oldest(self) -> None:
        """Open the oldest file; nothing happens when there is none."""
        self._open(next(iter(generations(self._current)), None))

    def open_for_tail(self, lines: int) -> None:
        """Open where about ``lines`` lines are left (never fewer, unless there are none)."""
        chosen, missing = None, lines
        for path in reversed(generations(self._current)):
            with suppress(FileNotFoundError), open(path, "rb") as file:
                chosen = path
                start, found = _start_of_tail(file, missing)
                if found >= missing:
                    self._open(path)
                    if self._file is not None:
                        self._file.seek(start)
                    return
                missing -= found
        self._open(chosen)

    def read_lines(self) -> list[bytes]:
        """The next complete lines; empty at the end of what is written so far."""
        while True:
            if self._file is None:
                self.open_oldest()
                if self._file is None:
                    return []
            chunk = self._file.read(_CHUNK_BYTES)
            if chunk:
                lines = (self._rest + chunk).split(b"\n")
                self._rest = lines.pop()
                if lines:
                    return lines
            elif not self._advance():
                return []

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _advance(self) -> bool:
        """Go on to the next newer file, once nothing more can come to this one."""
        assert self._file is not None
        own = os.fstat(self._file.fileno()).st_ino
        paths = generations(self._current)
        inodes = [_inode(path) for path in paths]
        # Where it was rotated away, the oldest that is left follows.
        newer = inodes.index(own) + 1 if own in inodes else 0
        if newer >= len(paths):
            return False
        # The newer file exists only after conmon has left this one; what it wrote until then is read first.
        chunk = self._file.read(_CHUNK_BYTES)
        if chunk:
            self._rest += chunk
            return True
        self._open(paths[newer])
        return True

    def _open(self, path: Path | None) -> None:
        self.close()
        if path is not None:
            with suppress(FileNotFoundError):
                self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # kept open; ``close`` closes it


async def read(
    current: Path,
    filter: LogFilter,
    *,
    has_ended: Callable[[], bool],
    wait_ended: Callable[[], Coroutine[Any, Any, object]],
) -> AsyncGenerator[LogEntry, None]:
    """Entries of the log whose newest file is ``current``.

    Args:
        has_ended: whether its writer has ended; what was not ended by a newline is given out then.
        wait_ended: returns when it has; used only to follow.
    """
    source = _Source(current, filter)
    watch = FileWatch(current.parent) if filter.follow else None
    try:
        tail = await asyncio.to_thread(source.start)
        for entry in tail:
            yield entry
        while not source.is_over:
            ended = has_ended()  # evaluated first: what was written before the end is read below
            entries = await asyncio.to_thread(source.next)
            for entry in entries:
                yield entry
            if entries or source.has_more:
                continue
            if watch is None or ended:
                break
            await wait_first(watch.wait_changed(), wait_ended())
        if has_ended() and not source.is_over:
            for entry in source.finish():
                yield entry
    finally:
        source.close()
        if watch is not None:
            watch.close()


class _Source:
    """Reads and filters; runs in a thread, one call at a time."""

    def __init__(self, current: Path, filter: LogFilter) -> None:
        self._files = Files(current)
        self._assembler = Assembler()
        self._filter = filter
        self.has_more = True
        self.is_over = False

    def start(self) -> list[LogEntry]:
        """With a tail: its entries.  Otherwise nothing: everything comes by ``next``."""
        tail = self._filter.tail
        if tail is None:
            self._files.open_oldest()
            return []
        # Lines of the unwanted stream and pieces count as well in the file, so a first guess may be too short.
        wanted = max(tail, 1)
        while True:
            self._files.open_for_tail(wanted)
            entries, seen = self._read_to_end(tail)
            if len(entries) >= tail or seen < wanted or tail == 0:
                return entries
            self._assembler = Assembler()
            wanted *= 4

    def next(self) -> list[LogEntry]:
        """A bounded number of further entries; empty and ``has_more`` False at the present end."""
        entries: list[LogEntry] = []
        while len(entries) < _ENTRIES_AT_ONCE and not self.is_over:
            lines = self._files.read_lines()
            if not lines:
                self.has_more = False
                return entries
            entries.extend(self._entries(lines))
        self.has_more = not self.is_over
        return entries

    def finish(self) -> list[LogEntry]:
        return [entry for entry in self._assembler.finish() if self._is_wanted(entry)]

    def close(self) -> None:
        self._files.close()

    def _read_to_end(self, tail: int) -> tuple[list[LogEntry], int]:
        entries: deque[LogEntry] = deque(maxlen=tail)
        seen = 0
        while lines := self._files.read_lines():
            seen += len(lines)
            entries.extend(self._entries(lines))
        return list(entries), seen

    def _entries(self, lines: Sequence[bytes]) -> Iterator[LogEntry]:
        for line in lines:
            entry = self._assembler.feed(line)
            if entry is None:
                continue
            if self._filter.until_ns and entry.timestamp_ns > self._filter.until_ns:
                self.is_over = True
                return
            if self._is_wanted(entry):
                yield entry

    def _is_wanted(self, entry: LogEntry) -> bool:
        return entry.stream in self._filter.streams and entry.timestamp_ns >= self._filter.since_ns


def generations(current: Path) -> list[Path]:
    """The existing files of a log, the oldest first."""
    numbered = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(current.parent):
            match = _NUMBERED.fullmatch(entry.name)
            if match is not None and match.group(1) == current.name:
                numbered.append((int(match.group(2) or 0), current.parent / entry.name))
    return [path for _, path in sorted(numbered, reverse=True)]


_NUMBERED = re.compile(r"(.*?)(?:\.(\d+))?")


def rotate(current: Path, config: LogConfig, reopen: Callable[[], None]) -> bool:
    """Begin a new file when the present one has reached its size; whether one was begun.

    ``reopen`` makes conmon open ``current``; it is called after the renames.
    """
    if not config.max_size_bytes:
        return False
    try:
        if current.stat().st_size < config.max_size_bytes:
            return False
    except FileNotFoundError:
        return False
    for path in generations(current):  # the oldest first
        number = int(path.suffix.removeprefix(".")) if path != current else 0
        if number + 1 >= config.max_files:
            if path != current:
                path.unlink(missing_ok=True)
        else:
            path.rename(current.with_name(f"{current.name}.{number + 1}"))
    if config.max_files <= 1:
        current.unlink(missing_ok=True)
    reopen()
    return True


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _start_of_tail(file: BinaryIO, lines: int) -> tuple[int, int]:
    """Offset at which the last ``lines`` lines begin, and how many there are from it on."""
    position = file.seek(0, os.SEEK_END)
    found = 0
    while position > 0:
        size = min(_CHUNK_BYTES, position)
        position -= size
        file.seek(position)
        chunk = file.read(size)
        end = len(chunk)
        while (newline := chunk.rfind(b"\n", 0, end)) >= 0:
            if found == lines:
                return position + newline + 1, found
            found += 1
            end = newline
    return 0, found


class LogRotation:
    """Rotates the logs of running containers that have a bound.  ``reopen``: has conmon open its log file anew."""

    def __init__(
        self,
        bundles: Bundles,
        reopen: Callable[[ContainerId], None],
        clock: Clock,
        containers: Callable[[], Iterable[Container]],
    ) -> None:
        self._bundles = bundles
        self._reopen = reopen
        self._clock = clock
        self._containers = containers

    async def run(self) -> None:
        """Check the sizes of all logs every second until cancelled."""
        while True:
            await self._clock.sleep(CHECK_S)
            for container in self._containers():
                if container.is_running and container.config.log.max_size_bytes:
                    self.rotate(container)

    def rotate(self, container: Container) -> None:
        """Begin a new file, if the present one has reached its size."""
        current = self._bundles.log(container.id)
        try:
            rotate(current, container.config.log, lambda: self._reopen(container.id))
        except Exception as error:  # one container's error does not reach others
            log_error(error, "log not rotated", container=container.id)
