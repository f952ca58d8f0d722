"""A container's record on disk: one line of JSON per state.  The last complete line is valid.

Changes are appended, because writing a new file for each change would delay every start by milliseconds.  A new file
needs a new inode, which gets slower with every recently deleted inode on some file systems (ext4 without a journal).
And when a file is replaced by a rename, ext4 writes the data to disk immediately.

Each line starts with its line feed, so that an incomplete line (after a crash, or on a full disk) does not damage the
next one.  Nothing is synced, because no container runs after a power loss.
"""

import os
from pathlib import Path

import msgspec

from skep.engine.containers.container import Container
from skep.errors import Unavailable
from skep.linux.files import is_no_file
from skep.model.values.unknown import leniently

NAME = "record"
"""File name in the container's directory."""
BYTES_MAX = 64 << 10
"""Size at which a file is rewritten with only its last line.

Needed because health checks change a record again and again.
"""


def write(path: Path, container: Container) -> None:
    """Write ``container`` as the latest record at ``path``.  Raises: OSError."""
    line = b"\n" + msgspec.json.encode(container)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size <= BYTES_MAX:
            _write(descriptor, line)
            return
    finally:
        os.close(descriptor)
    temporary = path.with_suffix(".new")
    temporary.write_bytes(line)
    temporary.rename(path)


def read(path: Path) -> Container | None:
    """Return the newest record at ``path``, or None without a decodable one.

    Raises: Unavailable: the record exists but cannot be read now, so the container may be intact.
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
