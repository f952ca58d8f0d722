"""Removes and walks directory trees that a container has made, whatever their depth, size, names and mounts.

``shutil.rmtree`` and ``os.walk`` recurse (before Python 3.12 and 3.13), so a few hundred nested directories would end
the caller.  Here a removal has at most ``_LEVELS_MAX`` open directories, and deeper ones are moved to the top first and
removed from there.  Directories are never listed as a whole, no path is longer than a name, symbolic links are not
followed and mounts are not entered.
"""

import array
import ctypes
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LEVELS_MAX = 48
"""Directories open at one time, with two descriptors each."""
_GRAVE = ".skep-removed-"
"""Name prefix of directories that were moved to the top to be removed there."""

# Source: linux/fs.h, and the number of the system call openat2 with linux/openat2.h.
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_IMMUTABLE_OR_APPEND = 0x10 | 0x20
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_OPENAT2, _RESOLVE_NO_XDEV, _RESOLVE_NO_SYMLINKS = 437, 0x01, 0x04
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class NotRemoved(OSError):
    """Part of a tree could not be removed.  ``errno`` and the text are from the first failure."""

    def __init__(self, path: Path, name: str, error: OSError) -> None:
        super().__init__(error.errno, f"{name!r} cannot be removed: {error.strerror}", str(path))


class RemovalStopped(Exception):
    """The caller has stopped the removal."""


def remove_tree(path: Path, stop: threading.Event | None = None, keep: str = "") -> None:
    """Remove ``path`` with everything in it.  Does nothing if it does not exist.

    Immutable files are made removable and mounts are unmounted first, as far as permitted.

    Args:
        stop: Another thread sets this event to stop the removal soon.
        keep: Name of an entry of ``path`` that is removed last, so that an interrupted removal leaves it.

    Raises: NotRemoved: a part is left after everything else was removed; RemovalStopped; OSError: ``path`` cannot be
    opened.
    """
    try:
        parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _Removal(path, stop or threading.Event(), keep).remove(parent)
    except FileNotFoundError:
        return
    finally:
        os.close(parent)


class _Level:
    """A directory that is being emptied."""

    def __init__(self, descriptor: int, name: str, parent: int) -> None:
        self.descriptor = descriptor
        self.name = name
        self.parent = parent
        self.entries = os.scandir(descriptor)
        self.removed = 0

    def again(self) -> None:
        """Read the directory from the start again, because removals may have made the reading skip entries."""
        self.entries.close()
        self.entries = os.scandir(self.descriptor)
        self.removed = 0

    def close(self) -> None:
        self.entries.close()
        os.close(self.descriptor)


class _Removal:
    """One call of ``remove_tree``."""

    def __init__(self, path: Path, stop: threading.Event, keep: str) -> None:
        self._path = path
        self._stop = stop
        self._keep = keep
        self._refused: tuple[str, OSError] | None = None
        self._moved = 0

    def remove(self, parent: int) -> None:
        """Remove the tree.  ``parent`` is the directory that contains it."""
        name = self._path.name
        try:
            if self._remove_entry(parent, name):
                return
            top = _open_directory(parent, name)
            try:
                self._empty(os.dup(top))
                left = self._left(top)
                if self._keep and not left:
                    self._keep = ""
                    self._empty(os.dup(top))
                    left = self._left(top)
            finally:
                os.close(top)
            if not left and self._remove_entry(parent, name):
                return
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise
            raise NotRemoved(self._path, name, error) from error
        nobody_knows = OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        first, reason = self._refused or (name, nobody_knows)
        raise NotRemoved(self._path, first, reason) from reason

    def _left(self, top: int) -> bool:
        with os.scandir(top) as entries:
            return any(entry.name != self._keep for entry in entries)

    def _empty(self, top: int) -> None:
        """Remove the contents of the directory ``top``, whose descriptor is closed."""
        levels = [_Level(top, "", -1)]
        try:
            while levels:
                level = levels[-1]
                entry = next(level.entries, None)
                if self._stop.is_set():
                    raise RemovalStopped
                if entry is None:
                    self._leave(levels)
                elif not (len(levels) == 1 and entry.name == self._keep):
                    self._visit(levels, entry)
        finally:
            for level in levels:
                level.close()

    def _visit(self, levels: list[_Level], entry: "os.DirEntry[str]") -> None:
        """Remove an entry of the innermost directory.  If it is a directory with contents, start to remove these."""
        level = levels[-1]
        try:
            if self._remove_entry(level.descriptor, entry.name):
                level.removed += 1
            elif len(levels) < _LEVELS_MAX:
                inner = _open_directory(level.descriptor, entry.name)
                levels.append(_Level(inner, entry.name, level.descriptor))
            else:
                self._move_up(level.descriptor, entry.name, levels[0].descriptor)
                levels[0].removed += 1  # so that the top directory is read again
                level.removed += 1
        except FileNotFoundError:
            level.removed += 1
        except OSError as error:
            self._note(entry.name, error)

    def _leave(self, levels: list[_Level]) -> None:
        """Remove the innermost directory after it was read to its end.  If it is not empty, read it again."""
        level = levels[-1]
        if level.removed:
            level.again()
            return
        levels.pop().close()
        if levels:
            try:
                levels[-1].removed += self._remove_entry(level.parent, level.name)
            except OSError as error:
                self._note(level.name, error)

    def _remove_entry(self, parent: int, name: str) -> bool:
        """Remove a file or an empty directory, even if protected.  Return False if the directory is not empty."""

        def remove() -> bool:
            try:
                os.unlink(name, dir_fd=parent)
            except IsADirectoryError:
                try:
                    os.rmdir(name, dir_fd=parent)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        return False
                    raise
            return True

        return _unprotected(remove, parent, name)

    def _move_up(self, parent: int, name: str, top: int) -> None:
        """Move a deep directory to the top directory, where the removal finds it later."""

        def move() -> bool:
            self._moved += 1
            try:
                os.rename(name, f"{_GRAVE}{self._moved}", src_dir_fd=parent, dst_dir_fd=top)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # the name is taken
                    return False
                raise
            return True

        while not _unprotected(move, parent, name):
            pass

    def _note(self, name: str, error: OSError) -> None:
        if self._refused is None:
            self._refused = (name, error)


def _unprotected(act: Callable[[], bool], parent: int, name: str) -> bool:
    """Call ``act`` on an entry, after removing mounts and then flags that forbid it, and return its result."""
    for release in (_take_off_mount, _make_mutable):
        try:
            return act()
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EPERM, errno.EACCES):
                raise
        release(parent, name)
    return act()


def _open_directory(parent: int, name: str) -> int:
    """Open a directory.  A mount on it is removed first.  Raises: OSError: EXDEV: it cannot be removed."""
    try:
        return _open_here(parent, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    _take_off_mount(parent, name)
    return _open_here(parent, name)


def _open_here(parent: int, name: str) -> int:
    how = _OpenHow(flags=_DIRECTORY, mode=0, resolve=_RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS)
    descriptor: int = _libc.syscall(
        ctypes.c_long(_OPENAT2),
        ctypes.c_long(parent),
        os.fsencode(name),
        ctypes.byref(how),
        ctypes.c_long(ctypes.sizeof(how)),
    )
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


def _take_off_mount(parent: int, name: str) -> None:
    """Remove all mounts on an entry, if any."""
    path = os.fsencode(f"/proc/self/fd/{parent}/{name}")
    while _libc.umount2(path, _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        pass


def _make_mutable(parent: int, name: str) -> None:
    """Clear the flags ``immutable`` and ``append only`` of an entry and its directory, where permitted."""
    _clear_flags(parent)
    with suppress(OSError):
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return  # other kinds cannot be opened without effect, or have no flags
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        try:
            _clear_flags(descriptor)
        finally:
            os.close(descriptor)


def _clear_flags(descriptor: int) -> None:
    flags = array.array("l", [0])
    with suppress(OSError):
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
        if flags[0] & _IMMUTABLE_OR_APPEND:
            flags[0] &= ~_IMMUTABLE_OR_APPEND
            fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)


def directories(top: Path) -> list[Path]:
    """Return ``top`` and all directories below it, parents first, or nothing if ``top`` does not exist."""
    if not top.is_dir():
        return []
    return [top, *(top / path for path, status in walk(top) if stat.S_ISDIR(status.st_mode))]


def walk(top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each entry's path below ``top`` and its status, in arbitrary order.

    Symbolic links are not followed, even if one replaces a directory meanwhile, and mounts are not entered.  Iterative,
    with two open directories.  Entries that disappear meanwhile, or whose path is too long (4,096 bytes), are left out.
    """
    try:
        root = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        pending = [""]
        while pending:
            directory = pending.pop()
            with suppress(OSError), _listed(root, directory or ".") as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    path = f"{directory}/{entry.name}" if directory else entry.name
                    yield path, status
                    if stat.S_ISDIR(status.st_mode):
                        pending.append(path)
    finally:
        os.close(root)


def walk_open(top: int) -> Iterator[int]:
    """Yield an open descriptor (O_PATH) of each entry below the open directory ``top``, as ``walk`` finds them.

    It is closed afterwards.  It may be of a symbolic link.  Nothing is yielded if ``top`` is not a directory.
    """
    for path, _ in walk(Path(f"/proc/self/fd/{top}")):
        directory, _, name = path.rpartition("/")
        with suppress(OSError), _directory(top, directory or ".") as parent:
            descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                yield descriptor
            finally:
                os.close(descriptor)


@contextmanager
def _listed(root: int, path: str) -> "Iterator[Iterator[os.DirEntry[str]]]":
    """List the directory ``path`` below ``root``.  Raises: OSError: it cannot be listed, or is a link now."""
    with _directory(root, path) as descriptor, os.scandir(descriptor) as entries:
        yield entries


@contextmanager
def _directory(root: int, path: str) -> Iterator[int]:
    """Open the directory ``path`` below ``root``.  Raises: OSError: it is a link now, or a mount."""
    descriptor = _open_here(root, path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
