"""The files of one container's output, as conmon writes them (``k8s-file``): reading, rotating, compressing.

conmon writes lines of ``TIME STREAM P|F TEXT``: F ends a line of output, P is a piece of a line that continues.
Pieces are joined and cut at 16 KiB, as Docker does, so an endless line costs no memory.

Rotation renames ``current`` to ``current.1`` (and that to ``.2``, ...) and then has conmon open
``current`` anew; until it does it writes to the renamed file, so nothing is lost.  A reader therefore stays
with the file it has open until there is a newer one, reads it to its end, and continues with the next newer
one.  Files that are complete may be compressed (``current.1.gz``).

What may take long, since files have any size, is ``SlicedWork``: no more than ``SLICE_BYTES`` are read between two
pauses.
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
from skep.engine.container import LogConfig, LogEntry, Stream
from skep.errors import InvalidArgument
from skep.linux.files import sync_file
from skep.model.times import unix_ns

PIECE_BYTES_MAX = 16 << 10
SLICE_BYTES = 256 << 10
"""Read at a time."""
_STREAMS = {b"stdout": Stream.STDOUT, b"stderr": Stream.STDERR}
_NUMBERED = re.compile(r"(.*?)(?:\.(\d+)(\.gz)?)?")
_SUFFIX = ".gz"
_FIRST_BYTES = 64
_UTC = b"+00:00"
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)
"""What reading a compressed file raises when it was cut off or changed."""


class Assembler:
    """Joins the pieces of a line, per stream."""

    def __init__(self) -> None:
        self._open: dict[Stream, LogEntry] = {}
        self._second = b""
        self._second_ns = 0

    @property
    def is_between_lines(self) -> bool:
        """Whether no line is begun."""
        return not self._open

    def feed(self, lines: Iterable[bytes]) -> list[LogEntry]:
        """The entries that end with ``lines``, which are those of conmon's file without their newlines.

        What is no line of conmon's (a torn end after a crash) is left out.
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
        """What was begun and never ended, as lines: the process ended first."""
        for entry in sorted(self._open.values()):
            yield entry._replace(data=entry.data + b"\n")
        self._open.clear()

    def _moment(self, stamp: bytes) -> int | None:
        if (
            len(stamp) == 35 and stamp[19] == 0x2E and stamp.endswith(_UTC)
        ):  # what conmon writes, most of the time
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


class Position(NamedTuple):
    """A place in a log.  ``first``: how the file begins, which no other file of the log does; ``offset``: in bytes."""

    first: bytes
    offset: int


class Files:
    """The files of one log, in the order in which they were written; one of them is open."""

    def __init__(self, current: Path) -> None:
        self._current = current
        self._file: IO[bytes] | None = None
        self._path = current
        self._rest = b""
        self._position = Position(b"", 0)
        self._held: list[IO[bytes]] | None = None
        self._packed = 0
        """The inode of the path that was opened; of a compressed file it is not that of the one that is read."""
        self._is_closed = False
        self.has_gap = False
        """Whether files were rotated away before they were read."""
        self.damage = ""
        """What is wrong with a compressed file of which only a part could be read; its reader clears it."""

    @property
    def is_open(self) -> bool:
        """Whether a file is open."""
        return self._file is not None

    @property
    def position(self) -> Position:
        """Behind the last line that was read."""
        return self._position

    def copy(self) -> "Files":
        """Another reader at the same place, of the same file even if that was renamed or removed.

        Only before anything was read.
        """
        other = Files(self._current)
        if self._file is not None:
            # Opened anew: a duplicate of the descriptor would share its offset.
            other._take(open(f"/proc/self/fd/{self._file.fileno()}", "rb", buffering=0))  # noqa: SIM115  # ``close`` does
            other._to(self._position)
            other._packed = self._packed
        return other

    def open_oldest(self) -> SlicedWork[None]:
        """Open the oldest file; nothing happens when there is none."""
        for path in generations(self._current):
            if (yield from self._open(path)):
                return

    def open_at(self, position: Position) -> bool:
        """Open behind what was read before; False: that file is gone, and nothing is open.  Without pauses."""
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
        """Open where about ``lines`` lines are left (never fewer, unless there are none); False: the log has fewer."""
        missing = lines
        for path in reversed(generations(self._current)):
            if not (yield from self._open(path)):
                continue
            assert self._file is not None, "it was opened"
            start, found = yield from _start_of_tail(self._file, missing)
            self._to(Position(b"", start))
            if found >= missing:
                return True
            missing -= found
        return False

    def read_lines(self) -> SlicedWork[list[bytes]]:
        """The next complete lines; empty at the end of what is written so far, and when this was closed."""
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
        """Close the file that is open; no further one is opened."""
        self._is_closed = True
        self._let_go()

    def _let_go(self) -> None:
        for file in (self._file, *(self._held or ())):
            if file is not None:
                file.close()
        self._file, self._held = None, None

    def hold(self) -> None:
        """Open everything that is there now, so that it can be read when the files are removed.  No other comes."""
        found: list[IO[bytes]] = []
        for path in self.newer() if self._file is not None else generations(self._current):
            with suppress(FileNotFoundError):
                found.append(open(path, "rb", buffering=0))  # noqa: SIM115  # unpacked when it is its turn
        self._held = found

    def newer(self) -> list[Path]:
        """The files after the one that is open, the oldest first; all, where that one was rotated away."""
        paths = generations(self._current)
        return paths[self._index(paths) + 1 :]

    def _note(self, first: bytes, read: int) -> None:
        beginning = self._position.first
        if not self._position.offset:
            beginning = first[:_FIRST_BYTES]
        self._position = Position(beginning, self._position.offset + read)

    def _index(self, paths: list[Path]) -> int:
        """The open file's in ``paths``; -1: it was rotated away."""
        assert self._file is not None, "one is open"
        status = os.fstat(self._file.fileno())
        inodes = [_inode(path) for path in paths]
        if status.st_ino in inodes:
            return inodes.index(status.st_ino)
        if not status.st_size and self._packed in inodes:  # an empty file has no beginning to be known by
            return inodes.index(self._packed)
        if status.st_size:
            own = _beginning(os.pread(self._file.fileno(), _FIRST_BYTES, 0))
            for index, path in enumerate(paths):
                if path.suffix == _SUFFIX and identity(path) == own:
                    return index
        return -1

    def _advance(self) -> SlicedWork[bool]:
        """Go on to the next newer file, once nothing more can come to this one."""
        assert self._file is not None, "one is open"
        held = self._held
        newer = [] if held is not None else self.newer()
        if not newer and not held:
            return False
        # The newer file exists only after conmon has left this one; what it wrote until then is read first.
        chunk = self._file.read(SLICE_BYTES)
        if chunk:
            self._file.seek(-len(chunk), os.SEEK_CUR)
            return True
        if held:
            yield from self._take_held(held)
            return True
        has_gap = self._index(generations(self._current)) < 0
        if not (yield from self._open(newer[0])):
            return False  # it was renamed since: the next attempt finds it
        self.has_gap = self.has_gap or has_gap
        return True

    def _open(self, path: Path) -> SlicedWork[bool]:
        """Go on with ``path``; False: it is not there, and what is open stays open."""
        try:
            file = yield from self._opened(path)
        except FileNotFoundError:
            return False
        self._take(file)
        self._packed = _inode(path)
        return True

    def _take_held(self, held: list[IO[bytes]]) -> SlicedWork[None]:
        """Go on with the first of ``held``, which stays there if it cannot be unpacked.  Raises: OSError."""
        file = held[0]
        if str(file.name).endswith(_SUFFIX):
            file.seek(0)
            self._take((yield from self._unpacked(file, Path(file.name))))
            file.close()
        else:
            self._take(file)
        del held[0]

    def _opened(self, path: Path) -> SlicedWork[IO[bytes]]:
        """Raises: as ``_unpacked``."""
        if path.suffix == _SUFFIX:
            return (yield from self._unpacked(path, path))
        return open(path, "rb", buffering=0)

    def _unpacked(self, packed: "Path | IO[bytes]", path: Path) -> SlicedWork[IO[bytes]]:
        """What can be unpacked, in a file without a name.

        Raises: FileNotFoundError; OSError: there is no room.
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
        """The next piece; nothing at the end, and where the rest is damaged."""
        try:
            return source.read1(SLICE_BYTES)
        except _DAMAGE as error:
            self.damage = f"{path.name}: {error}"
            return b""

    def _take(self, file: IO[bytes]) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._rest, self._position = file, b"", Position(b"", 0)

    def _to(self, position: Position) -> None:
        """Go on at ``position`` of the file that is open."""
        assert self._file is not None, "one is open"
        self._file.seek(position.offset)
        self._position = position


def generations(current: Path) -> list[Path]:
    """The existing files of a log, the oldest first."""
    numbered: dict[int, Path] = {}
    with suppress(FileNotFoundError):
        for entry in os.scandir(current.parent):
            match = _NUMBERED.fullmatch(entry.name)
            if match is not None and match[1] == current.name:
                number = int(match[2] or 0)
                if number not in numbered or not match[3]:  # while one is compressed there are both
                    numbered[number] = current.parent / entry.name
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def identity(path: Path) -> bytes:
    """How a file begins, its first line's time with it; empty: nothing is written, or it is not there."""
    try:
        with gzip.open(path) if path.suffix == _SUFFIX else open(path, "rb") as file:
            return _beginning(file.read(_FIRST_BYTES))
    except (OSError, *_DAMAGE):
        return b""


def rotate(current: Path, config: LogConfig, reopen: Callable[[], None]) -> bool:
    """Begin a new file when the present one has reached its size; whether one was begun.

    ``reopen`` makes conmon open ``current``; it is called after the renames.  A rotation that failed on its way is
    completed by the next one, which removes no file for a number that the failed one has left free.
    """
    if not config.max_size_bytes:
        return False
    numbered = {_number(path): path for path in generations(current)}
    if not numbered or (0 in numbered and current.stat().st_size < config.max_size_bytes):
        return False
    # conmon writes to this file first and renames it; where it cannot make it, it ends, and its container's output is
    # lost.  Made here, that is an error of this rotation.
    current.with_name(f"{current.name}.tmp").touch(mode=0o600)
    if 0 not in numbered:
        reopen()  # the last rotation failed after its renames
        return True
    free = next(number for number in count(1) if number not in numbered)
    for number, path in sorted(numbered.items(), reverse=True):  # the oldest first
        if number and path.suffix != _SUFFIX:
            _packed(path).unlink(missing_ok=True)  # of an attempt that was cut off
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
    """Compress the files that conmon has left.  Not beside a rotation."""
    paths = generations(current)
    if current not in paths:
        return  # conmon may still write to the newest of the others
    for path in paths:
        if path == current or path.suffix == _SUFFIX:
            continue
        beside = current.with_name("compressing")
        with open(path, "rb") as source, gzip.open(beside, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, SLICE_BYTES)
        sync_file(beside)  # else a power loss could leave an empty file in its place
        beside.replace(_packed(path))
        path.unlink()


def lines_in(path: Path) -> int:
    """Lines of a complete file; 0: it is not there."""
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
    """Offset at which the last ``lines`` lines begin, and how many there are from it on."""
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
