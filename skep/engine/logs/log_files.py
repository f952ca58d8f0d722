"""Log files of one container, as conmon writes them (``k8s-file``): reading, rotation and compression.

conmon writes lines of the form ``TIME STREAM P|F TEXT``.  F marks the end of a line of output, and P a piece of a line
that continues.  Pieces are joined and cut at 16 KiB, as in Docker, so an endless line needs no memory.

A rotation renames ``current`` to ``current.1`` (and ``current.1`` to ``current.2``, ...), and then makes conmon reopen
``current``.  Until conmon has done so, it writes to the renamed file, so no output is lost.  A reader therefore keeps
its file open until a newer file exists, then reads the open file to its end and continues with the next newer one.
Complete files may be compressed (``current.1.gz``).

Files may have any size, so long operations are ``SlicedWork``: they read at most ``SLICE_BYTES`` between two pauses.
"""

import gzip
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, NamedTuple

from skep.aio.time_slices import SlicedWork, run_at_once
from skep.engine.containers.container import LogConfig, LogEntry, StandardStream
from skep.errors import InvalidArgument
from skep.linux.files import sync_file
from skep.model.values.times import unix_ns

PIECE_BYTES_MAX = 16 << 10
"""Size in bytes of a piece of a long line, as in Docker."""
SLICE_BYTES = 256 << 10
"""Number of bytes that are read at a time."""
_STREAMS = {b"stdout": StandardStream.STDOUT, b"stderr": StandardStream.STDERR}
_NUMBERED = re.compile(r"(.*?)(?:\.(\d+)(\.gz)?)?")
_SUFFIX = ".gz"
_FIRST_BYTES = 64
"""Number of bytes at the start of a file that identify the file.  They include the first line's time in nanoseconds."""
_UTC = b"+00:00"
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)
"""Errors that are raised when a compressed file was cut off or changed."""


class Assembler:
    """Joins the pieces of a line, per stream."""

    def __init__(self) -> None:
        self._open: dict[StandardStream, LogEntry] = {}
        self._second = b""
        self._second_ns = 0

    @property
    def is_between_lines(self) -> bool:
        """Whether no partial line is pending."""
        return not self._open

    def feed(self, lines: Iterable[bytes]) -> list[LogEntry]:
        """Return the entries that end with ``lines``, which are lines of conmon's file without their newlines.

        Skips lines that are not in conmon's format, such as a torn end after a crash.
        """
        found: list[LogEntry] = []
        for line in lines:
            parts = line.split(b" ", 3)
            if len(parts) != 4 or (stream := _STREAMS.get(parts[1])) is None:
                continue
            moment = self._moment(parts[0])
            if moment is None:
                continue
            text = parts[3]
            if self._open and (begun := self._open.pop(stream, None)) is not None:
                moment, text = begun.timestamp_ns, begun.data + text
            while len(text) >= PIECE_BYTES_MAX:
                found.append(LogEntry(moment, stream, text[:PIECE_BYTES_MAX]))
                text = text[PIECE_BYTES_MAX:]
            if parts[2][:1] == b"F":
                found.append(LogEntry(moment, stream, text + b"\n"))
            elif text:
                self._open[stream] = LogEntry(moment, stream, text)
        return found

    def finish(self) -> Iterator[LogEntry]:
        """Return pending partial lines as whole lines, for a process that ended before it finished them."""
        for entry in sorted(self._open.values()):
            yield entry._replace(data=entry.data + b"\n")
        self._open.clear()

    def _moment(self, stamp: bytes) -> int | None:
        if len(stamp) == 35 and stamp[19] == 0x2E and stamp.endswith(_UTC):
            # Conmon writes this format most of the time.
            second, fraction = stamp[:19], stamp[20:29]
            if second != self._second:
                try:
                    self._second_ns = unix_ns(second.decode("ascii", "replace") + "Z")
                except InvalidArgument:
                    return None
                self._second = second
            return self._second_ns + int(fraction) if fraction.isdigit() else None
        try:
            return unix_ns(stamp.decode("ascii", "replace"))
        except InvalidArgument:
            return None


class LogPosition(NamedTuple):
    """A place in a log."""

    first: bytes
    """The start of the file, which identifies the file, because no other file of the log starts in the same way."""
    offset: int
    """Bytes from the start of the file."""


class LogReader:
    """Reader of the files of one log, in the order in which they were written.  At most one file is open."""

    def __init__(self, current: Path) -> None:
        self._current = current
        self._file: IO[bytes] | None = None
        self._path = current
        self._rest = b""
        self._position = LogPosition(b"", 0)
        self._held: list[IO[bytes]] | None = None
        self._packed = 0
        """Inode of the path that was opened.

        For a compressed file, the open file is its unpacked copy and has another inode.
        """
        self._is_closed = False
        self.has_gap = False
        """Whether files were rotated away before they were read."""
        self.damage = ""
        """Error of a compressed file that could only be read in part.  The caller clears it."""

    @property
    def is_open(self) -> bool:
        """Whether a file is open."""
        return self._file is not None

    @property
    def position(self) -> LogPosition:
        """Position after the last line that was read."""
        return self._position

    def copy(self) -> "LogReader":
        """Return another reader at the same place in the same file, even if the file was renamed or removed.

        Call it only before anything was read.
        """
        other = LogReader(self._current)
        if self._file is not None:
            # Reopen the file, because a duplicate of the descriptor would share its offset.
            other._take(open(f"/proc/self/fd/{self._file.fileno()}", "rb", buffering=0))  # noqa: SIM115  # ``close`` does
            other._to(self._position)
            other._packed = self._packed
        return other

    def open_oldest(self) -> SlicedWork[None]:
        """Open the oldest file, if any."""
        for path in generations(self._current):
            if (yield from self._open(path)):
                return

    def open_at(self, position: LogPosition) -> bool:
        """Open at ``position`` and return True.

        Return False, with no file open, if that file was removed.  Does not pause between slices.
        """
        for path in generations(self._current):
            if identity(path) == position.first and run_at_once(self._open(path)):
                assert self._file is not None, "it was opened"
                if self._file.seek(0, os.SEEK_END) < position.offset:
                    continue
                self._to(position)
                return True
        self._let_go()
        return False

    def open_for_tail(self, lines: int) -> SlicedWork[bool]:
        """Open at a place with about ``lines`` lines left, but not fewer.  Return False if the whole log is shorter."""
        missing = lines
        for path in reversed(generations(self._current)):
            if not (yield from self._open(path)):
                continue
            assert self._file is not None, "it was opened"
            start, found = yield from _start_of_tail(self._file, missing)
            self._to(LogPosition(b"", start))
            if found >= missing:
                return True
            missing -= found
        return False

    def read_lines(self) -> SlicedWork[list[bytes]]:
        """Return the next complete lines.  Returns none at the end of the output so far, and after ``close``."""
        while True:
            if self._is_closed:
                return []
            if self._file is None:
                if self._held:
                    yield from self._take_held(self._held)
                else:
                    yield from self.open_oldest()
                if self._file is None:
                    return []
            chunk = self._file.read(SLICE_BYTES)
            if chunk:
                lines = (self._rest + chunk).split(b"\n")
                rest, self._rest = self._rest, lines.pop()
                if lines:
                    self._note(lines[0], len(rest) + len(chunk) - len(self._rest))
                    return lines
                yield
            elif not (yield from self._advance()):
                return []

    def close(self) -> None:
        """Close the open file.  No other file is opened after that."""
        self._is_closed = True
        self._let_go()

    def _let_go(self) -> None:
        for file in (self._file, *(self._held or ())):
            if file is not None:
                file.close()
        self._file, self._held = None, None

    def hold(self) -> None:
        """Open all existing files, so that they can be read after their removal.  Later files are not read."""
        found: list[IO[bytes]] = []
        for path in self.newer() if self._file is not None else generations(self._current):
            with suppress(FileNotFoundError):
                found.append(open(path, "rb", buffering=0))  # noqa: SIM115  # unpacked when it is its turn
        self._held = found

    def newer(self) -> list[Path]:
        """Return the files after the open one, oldest first, or all files if the open one was rotated away."""
        paths = generations(self._current)
        return paths[self._index(paths) + 1 :]

    def _note(self, first: bytes, read: int) -> None:
        beginning = self._position.first
        if not self._position.offset:
            beginning = first[:_FIRST_BYTES]
        self._position = LogPosition(beginning, self._position.offset + read)

    def _index(self, paths: list[Path]) -> int:
        """Return the index of the open file in ``paths``, or -1 if it was rotated away."""
        assert self._file is not None, "one is open"
        status = os.fstat(self._file.fileno())
        inodes = [_inode(path) for path in paths]
        if status.st_ino in inodes:
            return inodes.index(status.st_ino)
        if not status.st_size and self._packed in inodes:  # an empty file cannot be identified by its start
            return inodes.index(self._packed)
        if status.st_size:
            own = _beginning(os.pread(self._file.fileno(), _FIRST_BYTES, 0))
            for index, path in enumerate(paths):
                if path.suffix == _SUFFIX and identity(path) == own:
                    return index
        return -1

    def _advance(self) -> SlicedWork[bool]:
        """Continue with the next newer file if the open file is complete."""
        assert self._file is not None, "one is open"
        held = self._held
        newer = [] if held is not None else self.newer()
        if not newer and not held:
            return False
        # The newer file exists only after conmon has closed this one.  So read the rest of this one first.
        chunk = self._file.read(SLICE_BYTES)
        if chunk:
            self._file.seek(-len(chunk), os.SEEK_CUR)
            return True
        if held:
            yield from self._take_held(held)
            return True
        has_gap = self._index(generations(self._current)) < 0
        if not (yield from self._open(newer[0])):
            return False  # the file was renamed meanwhile, and the next attempt finds it
        self.has_gap = self.has_gap or has_gap
        return True

    def _open(self, path: Path) -> SlicedWork[bool]:
        """Continue with ``path``.  Return False and keep the open file if ``path`` does not exist."""
        try:
            file = yield from self._opened(path)
        except FileNotFoundError:
            return False
        self._take(file)
        self._packed = _inode(path)
        return True

    def _take_held(self, held: list[IO[bytes]]) -> SlicedWork[None]:
        """Continue with the first of ``held``.  If it cannot be unpacked, it stays in the list.  Raises: OSError."""
        file = held[0]
        if str(file.name).endswith(_SUFFIX):
            file.seek(0)
            self._take((yield from self._unpacked(file, Path(file.name))))
            file.close()
        else:
            self._take(file)
        del held[0]

    def _opened(self, path: Path) -> SlicedWork[IO[bytes]]:
        """Open a file, unpacked.  Raises: as ``_unpacked``."""
        if path.suffix == _SUFFIX:
            return (yield from self._unpacked(path, path))
        return open(path, "rb", buffering=0)

    def _unpacked(self, packed: "Path | IO[bytes]", path: Path) -> SlicedWork[IO[bytes]]:
        """Unpack as much as possible into an unnamed temporary file.

        Raises: FileNotFoundError; OSError: the disk is full.
        """
        with gzip.open(packed) as source:
            target = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # ``_take`` closes it
            try:
                while data := self._whole(source, path):
                    target.write(data)
                    yield
            except BaseException:
                target.close()
                raise
            target.seek(0)
            return target

    def _whole(self, source: gzip.GzipFile, path: Path) -> bytes:
        """Return the next piece, or b"" at the end and before damaged data."""
        try:
            return source.read1(SLICE_BYTES)
        except _DAMAGE as error:
            self.damage = f"{path.name}: {error}"
            return b""

    def _take(self, file: IO[bytes]) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._rest, self._position = file, b"", LogPosition(b"", 0)

    def _to(self, position: LogPosition) -> None:
        """Seek to ``position`` in the open file."""
        assert self._file is not None, "one is open"
        self._file.seek(position.offset)
        self._position = position


def generations(current: Path) -> list[Path]:
    """Return the existing files of a log, oldest first."""
    numbered: dict[int, Path] = {}
    with suppress(FileNotFoundError):
        for entry in os.scandir(current.parent):
            match = _NUMBERED.fullmatch(entry.name)
            if match is not None and match[1] == current.name:
                number = int(match[2] or 0)
                if number not in numbered or not match[3]:  # both exist while a file is being compressed
                    numbered[number] = current.parent / entry.name
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def identity(path: Path) -> bytes:
    """Return the start of a file, including the first line's time.  Empty if the file is empty, missing or damaged.

    Raises: OSError: it cannot be read now.  It may be the file of a saved position, whose lines must not be sent again.
    """
    try:
        with gzip.open(path) if path.suffix == _SUFFIX else open(path, "rb") as file:
            return _beginning(file.read(_FIRST_BYTES))
    except (FileNotFoundError, *_DAMAGE):
        return b""


def rotate(current: Path, config: LogConfig, reopen: Callable[[], None]) -> bool:
    """Start a new file if the current file has reached its maximum size.  Return whether a new file was started.

    ``reopen`` makes conmon open ``current``.  It is called after the renames.  If a rotation fails halfway, the next
    one completes it, and removes no file if a number is still free.
    """
    if not config.max_size_bytes:
        return False
    numbered = {_number(path): path for path in generations(current)}
    if not numbered or (0 in numbered and current.stat().st_size < config.max_size_bytes):
        return False
    # conmon first creates this file and renames it.  If it cannot, conmon ends and the container's output is lost.  So
    # create the file here first: then the rotation fails instead.
    current.with_name(f"{current.name}.tmp").touch(mode=0o600)
    if 0 not in numbered:
        reopen()  # the last rotation has failed after its renames
        return True
    free = next(number for number in count(1) if number not in numbered)
    for number, path in sorted(numbered.items(), reverse=True):  # the oldest first
        if number and path.suffix != _SUFFIX:
            _packed(path).unlink(missing_ok=True)  # left by an interrupted compression
        if number and (number >= config.max_files or (number + 1 == config.max_files and free > number)):
            path.unlink(missing_ok=True)
        elif number < free and config.max_files > 1:
            suffix = _SUFFIX if path.suffix == _SUFFIX else ""
            path.rename(current.with_name(f"{current.name}.{number + 1}{suffix}"))
    if config.max_files <= 1:
        current.unlink(missing_ok=True)
    reopen()
    return True


def compress(current: Path) -> None:
    """Compress the files to which conmon no longer writes.  Must not run at the same time as a rotation."""
    paths = generations(current)
    if current not in paths:
        return  # conmon may still write to the newest of the other files
    for path in paths:
        if path == current or path.suffix == _SUFFIX:
            continue
        temporary = current.with_name("compressing")
        with open(path, "rb") as source, gzip.open(temporary, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, SLICE_BYTES)
        sync_file(temporary)  # otherwise a power loss could leave an empty file
        temporary.replace(_packed(path))
        path.unlink()


def lines_in(path: Path) -> int:
    """Return the number of lines of a complete file, or 0 if it does not exist."""
    try:
        with gzip.open(path) if path.suffix == _SUFFIX else open(path, "rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(partial(file.read, SLICE_BYTES), b""))
    except (OSError, *_DAMAGE):
        return 0


def _packed(path: Path) -> Path:
    return path.with_name(path.name + _SUFFIX)


def _number(path: Path) -> int:
    match = _NUMBERED.fullmatch(path.name)
    assert match is not None, "one of the generations"
    return int(match[2] or 0)


def _beginning(data: bytes) -> bytes:
    line, newline, _ = data.partition(b"\n")
    return line if newline or len(data) >= _FIRST_BYTES else b""


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _start_of_tail(file: IO[bytes], lines: int) -> SlicedWork[tuple[int, int]]:
    """Return the offset at which the last ``lines`` lines start, and the number of lines from there on."""
    position = file.seek(0, os.SEEK_END)
    found = 0
    while position > 0:
        size = min(SLICE_BYTES, position)
        position -= size
        file.seek(position)
        chunk = file.read(size)
        end = len(chunk)
        while (newline := chunk.rfind(b"\n", 0, end)) >= 0:
            if found == lines:
                return position + newline + 1, found
            found += 1
            end = newline
        yield
    return 0, found
