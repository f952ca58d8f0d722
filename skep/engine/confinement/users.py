"""Resolves ``user[:group]`` of a container's process with the image's passwd and group files.

Source: moby, daemon/oci_linux.go (getUser), and moby/sys, user (GetExecUser).  A number needs no entry in the files,
but a name does.  If no group is given, the group of the user's entry is used, or 0.  Entries with invalid or too large
numbers are skipped.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.errors import InvalidArgument
from skep.linux.syscalls import open_in_root

_FILE_BYTES_MAX = 4 << 20
"""Limit in bytes for reading a passwd or group file.  Needed because the container can make the file any size."""
_ID_MAX = (1 << 31) - 1
"""Highest user or group id, as in Docker."""


class ProcessUser(msgspec.Struct, frozen=True):
    """User and groups of a process.  ``home`` is from the user's entry in passwd, or ``/`` without an entry."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


def identity(root: Path, user: str, extra_groups: Iterable[str] = ()) -> ProcessUser:
    """Look up ``user`` (``""``, ``name``, ``uid``, ``user:group``) in the file system at ``root``.

    Raises: InvalidArgument: ``unable to find user x: no matching entries in passwd file``, or for its group.
    """
    return resolve(user, extra_groups, _read(root, "etc/passwd"), _read(root, "etc/group"))


def resolve(user: str, extra_groups: Iterable[str], passwd: str, group: str) -> ProcessUser:
    """Look up the user in the contents of the two files.  Raises: as ``identity``."""
    wanted_user, has_group, wanted_group = user.partition(":")
    wanted_user = wanted_user or "0"
    uid = _number(wanted_user)
    gid, home, name = 0, "/", None
    for entry in _entries(passwd, 7):
        # A number is always an id, or an image could make the name 1000 mean root.
        if entry[0] == wanted_user if uid is None else _id_of(entry[2]) == uid:
            name, uid, gid, home = entry[0], _number(entry[2]) or 0, _number(entry[3]) or 0, entry[5] or "/"
            break
    if uid is None:
        raise InvalidArgument(f"unable to find user {wanted_user}: no matching entries in passwd file")
    groups = _entries(group, 4)
    if has_group and wanted_group:
        gid = _group_id(wanted_group, groups)
        supplementary: list[int] = []
    else:
        supplementary = [
            number
            for entry in groups
            if name is not None and name in entry[3].split(",") and (number := _id_of(entry[2])) is not None
        ]
    supplementary += [_group_id(one, groups) for one in extra_groups]
    return ProcessUser(
        uid, gid, tuple(dict.fromkeys(number for number in supplementary if number != gid)), home
    )


def _group_id(wanted: str, groups: list[list[str]]) -> int:
    number = _number(wanted)
    if number is not None:
        return number
    for entry in groups:
        if entry[0] == wanted and (number := _number(entry[2])) is not None:
            return number
    raise InvalidArgument(f"unable to find group {wanted}: no matching entries in group file")


def _id_of(word: str) -> int | None:
    """Return the id of an entry, or None if it is invalid."""
    try:
        return _number(word)
    except InvalidArgument:
        return None


def _number(word: str) -> int | None:
    """Return a user or group id, or None for a name.  Raises: InvalidArgument: the number is out of range."""
    if not (word.isascii() and word.isdigit()):
        return None
    # Check the length first: Python converts thousands of digits slowly, and refuses more than 4,300.
    digits = word.lstrip("0") or "0"
    if len(digits) > len(str(_ID_MAX)) or (number := int(digits)) > _ID_MAX:
        raise InvalidArgument(f"uids and gids must be in range 0-{_ID_MAX}")
    return number


def _entries(text: str, fields: int) -> list[list[str]]:
    """Return the lines of a passwd-like file with at least ``fields`` fields, and skip the others."""
    entries = []
    for line in text.splitlines():
        parts = line.strip().split(":")
        if len(parts) >= fields and not line.startswith("#"):
            entries.append(parts)
    return entries


def _read(root: Path, path: str) -> str:
    """Return a file of the image, or "" if it does not exist.  Links never lead outside the image."""
    with suppress(OSError):
        place = open_in_root(root, path, os.O_PATH)
        try:
            # The container may have put a FIFO or device there, and opening it may block or have side effects.
            if stat.S_ISREG(os.fstat(place).st_mode):
                with open(f"/proc/self/fd/{place}", "rb") as file:
                    return file.read(_FILE_BYTES_MAX).decode(errors="replace")
        finally:
            os.close(place)
    return ""
