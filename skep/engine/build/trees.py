"""Trees of files that COPY and ADD read and write: a context, the file system of an image.

Their contents are not trusted.  No other process changes them meanwhile.  A path is resolved inside of its tree as a
process with the tree as its root would, then opened without following any link; so nothing outside is reached even if
the resolution were wrong.
"""

import os
import posixpath
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from skep.errors import InvalidArgument, ResourceExhausted, SkepError
from skep.linux.syscalls import open_without_links

_LINKS_MAX = 255
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Stopped(SkepError):
    """The build was cancelled."""


class CopyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """``bytes_max``: written by one step; ``entries_max``: files and directories that it looks at."""

    bytes_max: int
    entries_max: int


class Work:
    """One copy: what it may still do, and whether it is to end.  Used in a thread."""

    def __init__(self, limits: CopyLimits) -> None:
        self._stop = threading.Event()
        self._limits = limits
        self._bytes = 0
        self._entries = 0

    def stop(self) -> None:
        """Have it end soon."""
        self._stop.set()

    def count(self, *, size: int = 0, entries: int = 0) -> None:
        """Raises: Stopped; ResourceExhausted."""
        self._bytes += size
        self._entries += entries
        if self._stop.is_set():
            raise Stopped("Build cancelled")
        if self._bytes > self._limits.bytes_max:
            raise ResourceExhausted(f"the copy holds more than {self._limits.bytes_max} bytes")
        if self._entries > self._limits.entries_max:
            raise ResourceExhausted(f"the copy holds more than {self._limits.entries_max} files")


class Tree:
    """A directory whose files are reached below it only.  Close it by leaving the ``with`` block."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    @contextmanager
    def opened(self, path: str, flags: int = _DIRECTORY) -> Iterator[int]:
        """A descriptor of ``path``, which has no link in it."""
        descriptor = open_without_links(self.descriptor, path or ".", flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def status(self, path: str) -> os.stat_result | None:
        """Of ``path``, which has no link but perhaps at its end; None: there is nothing."""
        directory, name = posixpath.split(path)
        try:
            with self.opened(directory) as parent:
                return os.stat(name or ".", dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def resolve(self, path: str) -> str:
        """``path`` without links and dots; what is not there stays as it is named.

        Raises: InvalidArgument: there are too many links.

        Source: moby/sys, symlink/fs.go (FollowSymlinkInScope).
        """
        pending, done, links = path.split("/")[::-1], list[str](), 0
        while pending:
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                del done[-1:]
                continue
            here = "/".join((*done, part))
            status = self.status(here)
            if status is None or not stat.S_ISLNK(status.st_mode):
                done.append(part)
                continue
            links += 1
            if links > _LINKS_MAX:
                raise InvalidArgument(f"too many links in {path}")
            with self.opened("/".join(done)) as parent:
                target = os.readlink(part, dir_fd=parent)
            if target.startswith("/"):
                done = []
            pending += target.split("/")[::-1]
        return "/".join(done)

    def names(self, path: str) -> list[str]:
        """What is in the directory ``path``, sorted."""
        with self.opened(path) as descriptor:
            return sorted(os.listdir(descriptor))
