"""Writes the files of COPY and ADD with their owner, permissions and time.

The classic builder replaces a directory by a file and a file by a directory.  BuildKit refuses both.

Source: moby 20.10, builder/dockerfile/copy_unix.go, pkg/archive (CopyWithTar); tonistiigi/fsutil, copy/copy.go.
"""

import errno
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from skep.engine.build.dockerfile.modes import Mode
from skep.engine.build.files.sources import CopySource, PatternSelection, attributes_of, entries
from skep.engine.build.files.trees import Tree, Work
from skep.engine.confinement.users import ProcessUser
from skep.errors import InvalidArgument
from skep.linux.trees import remove_tree

_PIECE_BYTES = 8 << 20
"""Bytes of a file that are copied at once.  Small, so that cancellation and limits take effect within milliseconds."""


class Ownership(msgspec.Struct, frozen=True, kw_only=True):
    """Owner and permissions of copied files.  None keeps each file's own."""

    owner: ProcessUser | None = None
    mode: Mode | None = None


class Copier:
    """Copies into one tree."""

    def __init__(self, target: Tree, ownership: Ownership, work: Work, *, replaces: bool = True) -> None:
        """``replaces``: Whether an entry of another kind at the destination is removed.  Otherwise it is an error."""
        self._target = target
        self._ownership = ownership
        self._work = work
        self._replaces = replaces

    def copy(self, source: CopySource, destination: str) -> None:
        """Copy a file, or the content of a directory, to ``destination``.

        ``destination``: Absolute path in the tree.  A trailing slash marks a directory.

        Raises: InvalidArgument; ResourceExhausted; Stopped; OSError.
        """
        place = self._target.resolve(destination)
        present = self._target.status(place)
        is_directory = present is not None and stat.S_ISDIR(present.st_mode)
        with Tree(source.root) as tree:
            if source.is_directory:
                if present is not None and not is_directory:
                    raise InvalidArgument(f"cannot copy to non-directory: {destination}")
                self._make(place)
                self.copy_tree(tree, source.resolved, place, source.selection)
                return
            if is_directory or destination.endswith("/"):
                place = posixpath.join(place, posixpath.basename(source.path))
            self._make(posixpath.dirname(place))
            status = tree.status(source.resolved)
            assert status is not None, "it existed when its digest was computed"
            self._entry(tree, source.resolved, status, place, {})

    def write(self, name: str, content: bytes, destination: str) -> None:
        """Write a here-document as a file."""
        place = self._target.resolve(destination)
        present = self._target.status(place)
        if destination.endswith("/") or (present is not None and stat.S_ISDIR(present.st_mode)):
            place = posixpath.join(place, name)
        self._make(posixpath.dirname(place))
        with self._place(place) as (parent, last):
            chosen = self._ownership.mode
            mode = 0o644 if chosen is None else chosen.applied(0o644, is_directory=False)
            with self._new_file(parent, last) as descriptor:
                self._work.count(size=len(content), entries=1)
                _write_all(descriptor, content)
                owner = self._ownership.owner or ProcessUser()
                os.fchown(descriptor, owner.uid, owner.gid)
                os.fchmod(descriptor, mode)

    def copy_tree(self, tree: Tree, top: str, place: str, selection: PatternSelection | None = None) -> None:
        """Copy the selected entries below ``top`` to ``place``, merging with the directories that exist."""
        links: dict[tuple[int, int], str] = {}
        directories: list[tuple[str, str]] = []
        for path, status in entries(tree, top, self._work, selection):
            inside, outside = posixpath.join(top, path), posixpath.join(place, path)
            if stat.S_ISDIR(status.st_mode):
                directories.append((inside, outside))
                self._directory(outside)
            else:
                self._entry(tree, inside, status, outside, links)
        for inside, outside in reversed(directories):  # last, since writing into a directory changes its time
            with tree.opened(inside) as old, self._target.opened(outside) as new:
                self._describe(new, os.fstat(old), attributes_of(old))
        if not self._replaces:  # BuildKit sets the time of the destination to the source's, and nothing else
            with tree.opened(top) as old, self._target.opened(place) as new:
                _set_times(new, os.fstat(old))

    def _directory(self, path: str) -> None:
        with self._place(path, keeps_directory=True) as (parent, name), suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)

    def _make(self, path: str) -> None:
        """Create the directory ``path`` and its missing parents, as Docker does.  Raises: OSError."""
        parts = path.split("/") if path else []
        for depth in range(1, len(parts) + 1):
            directory, name = "/".join(parts[: depth - 1]), parts[depth - 1]
            with self._target.opened(directory) as parent:
                try:
                    os.mkdir(name, 0o755, dir_fd=parent)
                except FileExistsError:
                    if not self._replaces:
                        _require_directory(parent, name, path)
                    continue
                owner = self._ownership.owner or ProcessUser()
                os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)
                chosen = None if self._replaces else self._ownership.mode
                # Set the mode explicitly, whatever the umask is.
                os.chmod(name, chosen.of_new_directories if chosen else 0o755, dir_fd=parent)

    def _entry(
        self, tree: Tree, path: str, status: os.stat_result, place: str, links: dict[tuple[int, int], str]
    ) -> None:
        """Copy an entry other than a directory, and replace the entry at its place."""
        mode, key = status.st_mode, (status.st_dev, status.st_ino)
        if stat.S_ISSOCK(mode) and self._replaces:
            return  # The classic builder copies by an archive, which cannot have sockets.
        with self._place(place) as (parent, name):
            if status.st_nlink > 1 and key in links:
                self._link(links[key], parent, name)
                return
            if stat.S_ISREG(mode):
                self._file(tree, path, parent, name)
            elif stat.S_ISLNK(mode):
                directory, last = posixpath.split(path)
                with tree.opened(directory) as old:
                    os.symlink(os.readlink(last, dir_fd=old), name, dir_fd=parent)
            elif stat.S_ISFIFO(mode):
                os.mkfifo(name, 0o600, dir_fd=parent)
            elif stat.S_ISSOCK(mode):
                # BuildKit creates an empty file instead of a socket.
                os.mknod(name, stat.S_IFREG | 0o600, dir_fd=parent)
            else:
                os.mknod(name, stat.S_IFMT(mode) | 0o600, status.st_rdev, dir_fd=parent)
            if not stat.S_ISREG(mode):
                self._describe_name(parent, name, status)
        if status.st_nlink > 1:
            links[key] = place

    def _link(self, first: str, parent: int, name: str) -> None:
        directory, last = posixpath.split(first)
        with self._target.opened(directory) as old:
            os.link(last, name, src_dir_fd=old, dst_dir_fd=parent, follow_symlinks=False)

    def _file(self, tree: Tree, path: str, parent: int, name: str) -> None:
        with (
            tree.opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as old,
            self._new_file(parent, name) as new,
        ):
            status = os.fstat(old)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidArgument(f"{path} is no longer a regular file")
            self._content(old, new, status)
            self._describe(new, status, attributes_of(old))

    def _content(self, old: int, new: int, status: os.stat_result) -> None:
        """Copy a file's data.  Holes stay holes."""
        if status.st_blocks * 512 >= status.st_size:
            self._piece(old, new, 0, status.st_size)
            return
        at = 0
        while at < status.st_size and (begin := _data_from(old, at)) is not None:
            at = os.lseek(old, begin, os.SEEK_HOLE)
            os.lseek(new, begin, os.SEEK_SET)
            self._piece(old, new, begin, at)
        os.truncate(new, status.st_size)

    def _piece(self, old: int, new: int, at: int, end: int) -> None:
        while at < end and (sent := os.sendfile(new, old, at, min(_PIECE_BYTES, end - at))):
            at += sent
            self._work.count(size=sent)

    @contextmanager
    def _new_file(self, parent: int, name: str) -> Iterator[int]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _place(self, path: str, *, keeps_directory: bool = False) -> Iterator[tuple[int, str]]:
        """Remove the entry at ``path``, and yield its parent directory and its name.

        ``keeps_directory``: Whether a directory at ``path`` stays.
        """
        directory, name = posixpath.split(path)
        with self._target.opened(directory) as parent:
            try:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                status = None
            if status is not None and not (keeps_directory and stat.S_ISDIR(status.st_mode)):
                if not self._replaces:
                    _require_kind(path, status, is_directory=keeps_directory)
                if stat.S_ISDIR(status.st_mode):
                    remove_tree(Path(f"/proc/self/fd/{parent}") / name)
                else:
                    os.unlink(name, dir_fd=parent)
            yield parent, name

    def _describe(self, descriptor: int, status: os.stat_result, xattrs: Sequence[tuple[str, bytes]]) -> None:
        """Set owner, mode, attributes and times of a file or directory."""
        owner = self._ownership.owner
        os.fchown(
            descriptor, *((owner.uid, owner.gid) if owner is not None else (status.st_uid, status.st_gid))
        )
        os.fchmod(descriptor, self._mode(status))  # after chown, which clears set-user-id
        for name, value in xattrs:
            try:
                os.setxattr(descriptor, name, value)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM):
                    raise
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _describe_name(self, parent: int, name: str, status: os.stat_result) -> None:
        """Set owner, mode and times of an entry that cannot be opened."""
        owner = self._ownership.owner
        uid, gid = (owner.uid, owner.gid) if owner is not None else (status.st_uid, status.st_gid)
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, self._mode(status), dir_fd=parent)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _mode(self, status: os.stat_result) -> int:
        mode = self._ownership.mode
        if mode is None:
            return stat.S_IMODE(status.st_mode)
        return mode.applied(status.st_mode, is_directory=stat.S_ISDIR(status.st_mode))


def destination_of(working_dir: str, requested: str) -> str:
    """Return the absolute destination of a COPY.  A trailing slash is kept."""
    place = posixpath.normpath(posixpath.join("/", working_dir, requested))
    is_directory = requested.endswith("/") or posixpath.basename(requested) == "."
    return place.rstrip("/") + "/" if is_directory else place


def _data_from(descriptor: int, at: int) -> int | None:
    """Return the offset of the next data of a sparse file, or None if none follows ``at``."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def _require_directory(parent: int, name: str, path: str) -> None:
    """Check a parent of the destination.  Raises: InvalidArgument: it is not a directory."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise InvalidArgument(f"mkdir /{path}: not a directory")


def _require_kind(path: str, status: os.stat_result, *, is_directory: bool) -> None:
    """Refuse to replace a directory with a file, or another entry with a directory.  Raises: InvalidArgument."""
    if is_directory:
        raise InvalidArgument(f"cannot copy to non-directory: /{path}")
    if stat.S_ISDIR(status.st_mode):
        raise InvalidArgument(f"cannot replace to directory /{path} with file")


def _set_times(descriptor: int, status: os.stat_result) -> None:
    os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
