"""File trees that COPY and ADD read and write: a context, or the file system of an image.

Their contents are not trusted, but no other process changes them.  A path is resolved as if the tree were the root,
then opened without following any link.  So a wrong resolution could not lead out of the tree either.
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
"""The limit of Go's ``filepath.EvalSymlinks``, which BuildKit follows.  It ends loops of links."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class BuildCancelled(SkepError):
    """The build was cancelled."""


class CopyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one step.  ``bytes_max``: Bytes written.  ``entries_max``: Files and directories visited."""

    bytes_max: int
    entries_max: int


class Work:
    """Remaining limits of one copy, and its stop signal.  Used in a thread."""

    def __init__(self, limits: CopyLimits) -> None:
        self._stop = threading.Event()
        self._limits = limits
        self._bytes = 0
        self._entries = 0

    def stop(self) -> None:
        """Make the copy end soon."""
        self._stop.set()

    def count(self, *, size: int = 0, entries: int = 0) -> None:
        """Count work.  Raises: BuildCancelled: the copy was stopped; ResourceExhausted: it exceeds a limit."""
        self._bytes += size
        self._entries += entries
        if self._stop.is_set():
            raise BuildCancelled("Build cancelled")
        if self._bytes > self._limits.bytes_max:
            raise ResourceExhausted(f"the copy holds more than {self._limits.bytes_max} bytes")
        if self._entries > self._limits.entries_max:
            raise ResourceExhausted(f"the copy holds more than {self._limits.entries_max} files")


class Tree:
    """A directory whose paths cannot lead out of it.  Leaving the ``with`` block closes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    @contextmanager
    def opened(self, path: str, flags: int = _DIRECTORY) -> Iterator[int]:
        """Open ``path``, which must not contain links."""
        descriptor = open_without_links(self.descriptor, path or ".", flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def status(self, path: str) -> os.stat_result | None:
        """Return the status of ``path``, or None if it does not exist.  Only its last name may be a link."""
        directory, name = posixpath.split(path)
        try:
            with self.opened(directory) as parent:
                return os.stat(name or ".", dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def resolve(self, path: str) -> str:
        """Return ``path`` without links and dots.  Names that do not exist are kept.

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
        """Return the sorted names in the directory ``path``."""
        with self.opened(path) as descriptor:
            return sorted(os.listdir(descriptor))
