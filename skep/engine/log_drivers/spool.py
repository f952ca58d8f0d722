"""Reads messages from the files of a container's output, from the last sent position on, and counts losses."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.aio.time_slices import run_at_once
from skep.engine.log_drivers.message import LogMessage, Pieces
from skep.engine.logs.log_files import Assembler, LogPosition, LogReader, generations, identity, lines_in
from skep.linux.files import is_no_file, replace_file

POSITION = "sent"
"""File next to the log files with the position up to which the output was sent."""


class _Saved(msgspec.Struct, frozen=True):
    first: bytes
    offset: int


class Spool:
    """Reader of one container's output.  Blocking, for the sender process."""

    def __init__(self, current: Path) -> None:
        self._current = current
        self._files = LogReader(current)
        self._assembler = Assembler()
        self._pieces = Pieces()
        self._waiting: dict[bytes, int] = {}
        """Number of lines in each complete file that was not read yet.  Files are identified by their start."""
        self.lost = 0
        """Number of lines, as far as known, in files that were rotated away before they were read."""

    @property
    def position(self) -> LogPosition | None:
        """Position after the last read line.  None if a line was read in part, or nothing was read."""
        position = self._files.position
        return position if self._assembler.is_between_lines and position.first else None

    def open(self) -> None:
        """Continue at the saved position, else at the start.  Raises: OSError: it may be called again."""
        saved = self._saved()
        if saved is None or not self._files.open_at(LogPosition(saved.first, saved.offset)):
            run_at_once(self._files.open_oldest())

    def read(self) -> Sequence[LogMessage]:
        """Return more messages, or none at the current end.  Raises: OSError: it may be called again."""
        found: list[LogMessage] = []
        while not found and (lines := run_at_once(self._files.read_lines())):
            found = list(self._pieces.messages(self._assembler.feed(lines)))
        if self._files.has_gap:
            with suppress(OSError):  # counted with the next messages, because these would be lost
                self._count_lost()
                self._files.has_gap = False
        return found

    def take_damage(self) -> str:
        """Return and clear the error of a file that could be read only in part, or an empty text."""
        damage, self._files.damage = self._files.damage, ""
        return damage

    def finish(self) -> Sequence[LogMessage]:
        """Return the unfinished lines of a container that has ended, as pieces of lines whose last piece is missing."""
        entries = [entry._replace(data=entry.data[:-1]) for entry in self._assembler.finish()]
        return list(self._pieces.messages(entries))

    def look(self) -> None:
        """Count the lines of files that were not read yet, because rotation may remove the files before."""
        for path in self._files.newer() if self._files.is_open else ():
            if path != self._current and (first := identity(path)) not in self._waiting:
                self._waiting[first] = lines_in(path)

    def hold(self) -> None:
        """Keep the files open until they were read, because they are about to be removed."""
        if not self._files.is_open:
            with suppress(OSError):  # otherwise it is read from the oldest file on
                self.open()
        self._files.hold()

    def save(self, position: LogPosition) -> None:
        """Record that everything before ``position`` was sent.  Raises: OSError."""
        content = msgspec.json.encode(_Saved(position.first, position.offset))
        replace_file(self._current.with_name(POSITION), content, is_durable=False)

    def count_rest(self) -> int:
        """Read the remaining messages and return their number."""
        found = 0
        while messages := self.read():
            found += len(messages)
        return found

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _count_lost(self) -> None:
        present = {identity(path) for path in generations(self._current)}
        for first in [first for first in self._waiting if first not in present]:
            self.lost += self._waiting.pop(first)

    def _saved(self) -> _Saved | None:
        """Return the saved position, or None if nothing was sent.  Raises: OSError: it cannot be read now."""
        try:
            return msgspec.json.decode(self._current.with_name(POSITION).read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and not is_no_file(error):
                raise  # otherwise everything would be sent again
            return None
