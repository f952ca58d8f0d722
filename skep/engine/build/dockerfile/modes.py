"""Permissions of ``--chmod``: octal numbers and the symbols of chmod(1).

Source: buildkit, frontend/dockerfile/dockerfile2llb/convert_copy.go; tonistiigi/dchapes-mode, mode.go, which reads the
symbols as BSD's chmod does with an umask of 0.
"""

import re
from collections.abc import Iterator

import msgspec

from skep.errors import InvalidArgument

_CLASSES = {"u": 0o4700, "g": 0o2070, "o": 0o007, "a": 0o6777}
"""Bits that a clause for a class of users may change."""
_SHIFTS = {"u": 6, "g": 3, "o": 0}
_PERMISSIONS = {"r": 0o444, "w": 0o222, "x": 0o111, "s": 0o6000, "t": 0o1000}
_STANDARD = 0o6777
"""Bits that ``=`` without a class clears: all but the sticky bit."""
_OCTAL = re.compile(r"[0-7]{1,11}")
_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=][rwxXstugo]*)+)")
_ACTION = re.compile(r"([-+=])([rwxXstugo]*)")


class ModeChange(msgspec.Struct, frozen=True):
    """One change to permissions.

    ``kind``: ``+`` sets ``bits``, ``-`` clears them.  ``X`` sets them for directories and executable files.  ``u``,
    ``g`` and ``o`` copy the permissions of that class to the classes in ``bits``, as ``operator`` says.
    """

    kind: str
    bits: int
    operator: str = ""

    def applied(self, mode: int, *, may_execute: bool) -> int:
        """Return ``mode`` after this change.  ``may_execute``: Whether ``X`` applies."""
        if self.kind == "+" or (self.kind == "X" and may_execute):
            return mode | self.bits
        if self.kind == "-":
            return mode & ~self.bits
        if self.kind == "X":
            return mode
        copied = (mode >> _SHIFTS[self.kind] & 0o7) * 0o111 & self.bits
        if self.operator == "-":
            return mode & ~copied
        return (mode & ~self.bits if self.operator == "=" else mode) | copied


class Mode(msgspec.Struct, frozen=True):
    """Permissions for copied files.  If ``number`` is None, ``changes`` modify the permissions that each file has."""

    number: int | None = None
    changes: tuple[ModeChange, ...] = ()

    @property
    def of_new_directories(self) -> int:
        """Return the permissions of missing parent directories of a destination."""
        return 0o755 if self.number is None else self.number & 0o777

    def applied(self, mode: int, *, is_directory: bool) -> int:
        """Return the permissions for a file that has ``mode``."""
        if self.number is not None:
            return self.number
        result, may_execute = mode & 0o7777, is_directory or bool(mode & 0o111)
        for change in self.changes:
            result = change.applied(result, may_execute=may_execute)
        return result


def parse_mode(text: str) -> Mode:
    """Read the value of ``--chmod``.  Raises: InvalidArgument."""
    if text[:1].isdigit():
        if not _OCTAL.fullmatch(text) or int(text, 8) > 0o7777:
            raise InvalidArgument(
                f"invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777"
            )
        return Mode(number=int(text, 8))
    changes: list[ModeChange] = []
    for clause in text.split(","):
        found = _CLAUSE.fullmatch(clause)
        if found is None:
            raise InvalidArgument(f"invalid chmod parameter: '{text}': invalid syntax")
        who = 0
        for letter in found[1]:
            who |= _CLASSES[letter]
        for operator, letters in _ACTION.findall(found[2]):
            changes += _changes(who, operator, letters)
    return Mode(changes=tuple(changes))


def _changes(who: int, operator: str, letters: str) -> Iterator[ModeChange]:
    """Changes of one action.  ``who``: bits of the classes that its clause names, 0 for none."""
    mask, set_bits, executes = who or 0o7777, 0, False
    copied = [letter for letter in letters if letter in _SHIFTS]
    for letter in letters:
        if letter in "st" and who and not who & ~0o007:
            continue  # the class "others" has no set-id bit and no sticky bit
        if letter == "t":
            mask |= 0o1000
        if letter == "X" and operator != "-":
            executes = True
        else:
            set_bits |= _PERMISSIONS.get(letter.lower(), 0)
    if operator == "=" and (set_bits or not copied):
        yield ModeChange("-", who or _STANDARD)
    if set_bits:
        yield ModeChange("-" if operator == "-" else "+", set_bits & mask)
    if executes:
        yield ModeChange("X", 0o111 & mask)
    for letter in copied:
        yield ModeChange(letter, mask & 0o777, operator)
