"""Waiting for changes in a directory (inotify), without polling."""

import asyncio
import ctypes
import os
from pathlib import Path

_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_IN_MODIFY, _IN_CREATE, _IN_MOVED = 0x2, 0x100, 0xC0
_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Tells that a file in a directory was written to, made or renamed.  Close it."""

    def __init__(self, directory: Path) -> None:
        """Raises: OSError: no such directory, or the user's limit of inotify instances is reached."""
        self._descriptor = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._descriptor < 0:
            _raise("inotify_init1")
        mask = _IN_MODIFY | _IN_CREATE | _IN_MOVED
        if _libc.inotify_add_watch(self._descriptor, os.fsencode(directory), mask) < 0:
            os.close(self._descriptor)
            _raise(f"inotify_add_watch {directory}")

    async def wait_changed(self) -> None:
        """Return when something changed since the last return (or since the watch was made)."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._descriptor)
        while True:  # many changes are one
            try:
                os.read(self._descriptor, 4096)
            except BlockingIOError:
                return

    def close(self) -> None:
        os.close(self._descriptor)


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
