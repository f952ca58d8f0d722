"""Atomic replacement of files: a reader, or the next start, finds either the old or the new content."""

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

NEW_SUFFIX = ".new"
"""Suffix of unfinished files.  If a crash leaves such a file, the next write overwrites it."""


def replace_file(path: Path, content: bytes, *, mode: int = 0o644, is_durable: bool = True) -> None:
    """Write a temporary file, then rename it.  One writer at a time.

    Args:
        mode: File mode, set before the first byte is written, so that others can never read a secret.
        is_durable: Whether it survives a power loss.  False saves two syncs for files that a reboot discards anyway.
    """
    temporary = path.with_name(path.name + NEW_SUFFIX)
    try:
        write_new(temporary, content, mode=mode, is_synced=is_durable)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # on a full disk, the file would take the space of the next attempt
            temporary.unlink()
        raise
    if is_durable:
        sync_directory(path.parent)


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def is_no_file(error: OSError) -> bool:
    """Return whether the error means that the file does not exist.  Other errors say nothing about its content."""
    return error.errno in _NO_FILE


def file_exists(path: Path) -> bool:
    """Return whether there is a file or directory.

    Since Python 3.14, ``Path.exists`` also returns False where a disk that fails hides the file.

    Raises: OSError: that is not known.
    """
    try:
        path.stat()
    except OSError as error:
        if is_no_file(error):
            return False
        raise
    return True


def write_new(path: Path, content: bytes, *, mode: int, is_synced: bool = True) -> None:
    """Write a new file.  An existing file is removed first, because it would keep its mode."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # regardless of the umask
        file.write(content)
        file.flush()
        if is_synced:
            os.fsync(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a finished file durable.  Its name becomes durable with its directory."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Make names that were created in ``path`` durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FALLOC_FL_KEEP_SIZE = 1
"""Source: ``linux/falloc.h``."""


def allocate(descriptor: int, size: int) -> None:
    """Reserve space for ``size`` bytes of a file without changing its length.

    Raises: OSError: ENOSPC: the disk is full; EOPNOTSUPP: the file system cannot reserve space.
    """
    if size and ctypes.CDLL(None, use_errno=True).fallocate64(
        descriptor, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
