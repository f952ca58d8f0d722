"""The files of a container's output as a source of messages: from where the last sender stopped; loss is counted."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.aio.time_slices import run_at_once
from skep.engine.log_drivers.message import Message, Pieces
from skep.engine.log_files import Assembler, Files, Position, generations, identity, lines_in
from skep.linux.files import is_no_file, replace_file

POSITION = "sent"
"""File beside the output: how far it was sent."""


class _Saved(msgspec.Struct, frozen=True):
    first: bytes
    offset: int


class Spool:
    """Reads one container's output.  Blocking, for a process that does nothing else."""

    def __init__(self, current: Path) -> None:
        self._current = current
        self._files = Files(current)
        self._assembler = Assembler()
        self._pieces = Pieces()
        self._waiting: dict[bytes, int] = {}
        """Lines of complete files that were not read yet, by how these begin."""
        self.lost = 0
        """Lines in files that were rotated away before they were read, as far as they were counted."""

    @property
    def position(self) -> Position | None:
        """How far was read; None: in the middle of a line, or nothing was."""
        position = self._files.position
        return position if self._assembler.is_between_lines and position.first else None

    def open(self) -> None:
        """Go on where the last sender stopped, else at the beginning.  Raises: OSError: may be called again."""
        saved = self._saved()
        if saved is None or not self._files.open_at(Position(saved.first, saved.offset)):
            run_at_once(self._files.open_oldest())

    def read(self) -> Sequence[Message]:
        """Further messages; empty: there are none at present.  Raises: OSError: may be called again."""
        found: list[Message] = []
        while not found and (lines := run_at_once(self._files.read_lines())):
            found = list(self._pieces.messages(self._assembler.feed(lines)))
        if self._files.has_gap:
            self._files.has_gap = False
            self._count_lost()
        return found

    def take_damage(self) -> str:
        """What was wrong with a file of which only a part was read; empty: nothing, or it was taken."""
        damage, self._files.damage = self._files.damage, ""
        return damage

    def finish(self) -> Sequence[Message]:
        """What was begun and never ended, as pieces that are not the last: the container has ended."""
        entries = [entry._replace(data=entry.data[:-1]) for entry in self._assembler.finish()]
        return list(self._pieces.messages(entries))

    def look(self) -> None:
        """Count the lines of files that wait to be read: they may be rotated away first."""
        for path in self._files.newer() if self._files.is_open else ():
            if path != self._current and (first := identity(path)) not in self._waiting:
                self._waiting[first] = lines_in(path)

    def hold(self) -> None:
        """The files are going to be removed: keep them open until they were read."""
        if not self._files.is_open:
            with suppress(OSError):  # then from the oldest one
                self.open()
        self._files.hold()

    def save(self, position: Position) -> None:
        """Remember that everything before ``position`` was sent.  Raises: OSError."""
        content = msgspec.json.encode(_Saved(position.first, position.offset))
        replace_file(self._current.with_name(POSITION), content, is_durable=False)

    def count_rest(self) -> int:
        """How many messages there are still, which are read with this."""
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
        """None: nothing was sent.  Raises: OSError: that cannot be read now."""
        try:
            return msgspec.json.decode(self._current.with_name(POSITION).read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and not is_no_file(error):
                raise  # everything would be sent again
            return None
