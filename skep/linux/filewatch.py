"""Waits for changes in a directory, with inotify, or by polling if inotify is unavailable.

A user may have 128 inotify instances (``fs.inotify.max_user_instances``).  Root in every container counts as the same
user as this process, so the instances may be used up, and polling must work too.
"""

import asyncio
import ctypes
import os
from pathlib import Path

import structlog

log = structlog.get_logger()

_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
# Source: linux/inotify.h: IN_MOVED_FROM and IN_MOVED_TO together are IN_MOVED.
_IN_MODIFY, _IN_CREATE, _IN_MOVED = 0x2, 0x100, 0xC0
_LOOK_S = 0.25
"""Seconds between two polls without inotify."""
_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Reports when a file in a directory is written, created or renamed.  Close it after use."""

    def __init__(self, directory: Path) -> None:
        self._descriptor: int | None = None
        try:
            self._descriptor = _watching(directory)
        except OSError as error:
            log.info("inotify unavailable, directory polled", path=str(directory), reason=str(error))

    async def wait_changed(self) -> None:
        """Return when something has or may have changed since the last return, or since the watch was created."""
        if self._descriptor is None:
            await asyncio.sleep(_LOOK_S)
            return
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._descriptor)
        while True:  # drain: many changes are reported once
            try:
                os.read(self._descriptor, 4096)
            except BlockingIOError:
                return

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def _watching(directory: Path) -> int:
    """Return an inotify descriptor.  Raises: OSError: no such directory, or the limit is reached."""
    descriptor: int = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if descriptor < 0:
        _raise("inotify_init1")
    mask = _IN_MODIFY | _IN_CREATE | _IN_MOVED
    if _libc.inotify_add_watch(descriptor, os.fsencode(directory), mask) < 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        ctypes.set_errno(number)
        _raise(f"inotify_add_watch {directory}")
    return descriptor


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
