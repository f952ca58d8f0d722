"""The record of a container on disk: one line of JSON for each state it has been in, and the last whole one counts.

A change is appended.  A new file each time would be an inode made and one deleted, which on some file systems costs
more with every inode deleted a moment ago (ext4 without a journal reads each of them); to replace a file by rename
makes ext4 write the data out at once.  Both delay every start by milliseconds.

A line begins with the line feed, so that one torn by the end of the process (or a full disk) spoils no later one.
Nothing is synced: after a loss of power no container runs.
"""

import os
from pathlib import Path

import msgspec

from skep.engine.container import Container
from skep.errors import Unavailable
from skep.linux.files import is_no_file
from skep.model.unknown import leniently

NAME = "record"
"""Of the file in the container's directory."""
_BYTES_MAX = 64 << 10
"""A longer file is written anew with its last line: health checks change a record for as long as it lives."""


def write(path: Path, container: Container) -> None:
    """Make ``container`` the record at ``path``.  Raises: OSError."""
    line = b"\n" + msgspec.json.encode(container)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size <= _BYTES_MAX:
            _write(descriptor, line)
            return
    finally:
        os.close(descriptor)
    beside = path.with_suffix(".new")
    beside.write_bytes(line)
    beside.rename(path)


def read(path: Path) -> Container | None:
    """The newest record at ``path``, None when there is none, or nothing in it can be decoded.

    Raises: Unavailable: it exists and cannot be read now; its container may be intact.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        if is_no_file(error):
            return None
        raise Unavailable(f"the record {path} cannot be read: {error.strerror}") from error
    for line in reversed(lines):
        try:
            return leniently(line, Container)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return None


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
