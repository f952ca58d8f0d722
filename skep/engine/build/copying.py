"""What COPY and ADD do: which files their sources are, what is in them, and where they go.

Sources and destinations are trees with untrusted contents: a context, a container's file system.  No other process
changes them meanwhile.  A path is resolved inside of its tree as a process with the tree as its root would, then opened
without following any link; so nothing outside is reached even if the resolution were wrong.

Source: moby 20.10, builder/dockerfile/copy.go, copy_unix.go; pkg/archive (CopyWithTar).
"""

import errno
import hashlib
import os
import posixpath
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from skep.engine.build.patterns import Pattern, has_wildcards
from skep.engine.users import Identity
from skep.errors import InvalidArgument, ResourceExhausted, SkepError
from skep.linux.syscalls import open_without_links
from skep.linux.trees import remove_tree

_CHUNK_BYTES = 1 << 20
_LINKS_MAX = 255
_XATTRS = ("user.", "security.capability")
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


class Source(NamedTuple):
    """A file or directory to copy.  ``path``: as it was named; ``resolved``: without links."""

    root: Path
    path: str
    resolved: str
    is_directory: bool
    digest: str


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


# --- which files -----------------------------------------------------------------------------------------------------


def find(root: Path, names: Sequence[str], work: Work, *, is_context: bool) -> list[Source]:
    """What the sources of a COPY are, in their order.

    Raises: InvalidArgument: one is not there, or nothing is, in Docker's words; ResourceExhausted; Stopped; OSError.
    """
    found = []
    with Tree(root) as tree:
        for name in names:
            below = name.removeprefix("/").removeprefix("./")
            paths = _matching(tree, below, work) if has_wildcards(below) else [below]
            found += [_source(tree, path, work, is_context=is_context) for path in paths]
    return found


def _matching(tree: Tree, pattern: str, work: Work) -> list[str]:
    """Paths that a pattern means, sorted; no link on the way is followed."""
    found = [""]
    for part in posixpath.normpath(pattern).split("/"):
        matcher = Pattern(part)
        below = []
        for directory in found:
            try:
                names = tree.names(directory)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):  # no directory, or a link
                    raise
                continue
            work.count(entries=len(names))
            below += [posixpath.join(directory, name) for name in names if matcher.matches(name)]
        found = below
    return found


def _source(tree: Tree, path: str, work: Work, *, is_context: bool) -> Source:
    if posixpath.normpath(path).split("/")[0] == "..":
        raise InvalidArgument(f"forbidden path outside the build context: {path} ()")
    resolved = tree.resolve(path)
    status = tree.status(resolved)
    if status is None:
        where = "file not found in build context or excluded by .dockerignore: " if is_context else ""
        raise InvalidArgument(f"{where}stat {path}: file does not exist")
    if stat.S_ISDIR(status.st_mode):
        return Source(tree.root, path, resolved, True, f"dir:{_tree_digest(tree, resolved, work)}")
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape"))
    _add_entry(digest, tree, resolved, status, work)
    return Source(tree.root, path, resolved, False, f"file:{digest.hexdigest()}")


def _tree_digest(tree: Tree, top: str, work: Work) -> str:
    """Of everything below ``top``, with names relative to it."""
    total = hashlib.sha256()
    for path, status in entries(tree, top, work):
        total.update(os.fsencode(path) + b"\0")
        _add_entry(total, tree, posixpath.join(top, path), status, work)
    return total.hexdigest()


def _add_entry(digest: "hashlib._Hash", tree: Tree, path: str, status: os.stat_result, work: Work) -> None:
    """All that a copy of the entry depends on, but its time."""
    mode = status.st_mode
    digest.update(f"{mode:o} {status.st_uid} {status.st_gid} {status.st_rdev}\0".encode())
    directory, name = posixpath.split(path)
    if stat.S_ISLNK(mode):
        with tree.opened(directory) as parent:
            digest.update(os.fsencode(os.readlink(name, dir_fd=parent)) + b"\0")
    elif stat.S_ISREG(mode):
        with tree.opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
            for key, value in _xattrs(descriptor):
                digest.update(key.encode() + b"=" + value + b"\0")
            content = hashlib.sha256()
            while data := os.read(descriptor, _CHUNK_BYTES):
                content.update(data)
                work.count()
            digest.update(content.digest())


def entries(tree: Tree, top: str, work: Work) -> Iterator[tuple[str, os.stat_result]]:
    """Path below ``top`` and status of everything in it, each directory before what is in it."""
    pending = [""]
    while pending:
        directory = pending.pop()
        below = []
        with tree.opened(posixpath.join(top, directory)) as descriptor:
            for name in sorted(os.listdir(descriptor)):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                work.count(entries=1)
                path = posixpath.join(directory, name)
                yield path, status
                if stat.S_ISDIR(status.st_mode):
                    below.append(path)
        pending += below[::-1]


# --- where they go ---------------------------------------------------------------------------------------------------


class Ownership(msgspec.Struct, frozen=True, kw_only=True):
    """``owner`` None: each file keeps its own; ``mode`` None: likewise."""

    owner: Identity | None = None
    mode: int | None = None


class Copier:
    """Copies into one tree."""

    def __init__(self, target: Tree, ownership: Ownership, work: Work) -> None:
        self._target = target
        self._ownership = ownership
        self._work = work

    def copy(self, source: Source, destination: str) -> None:
        """A file or the content of a directory, to ``destination`` (absolute in the tree; a slash ends a directory).

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
                self.copy_tree(tree, source.resolved, place)
                return
            if is_directory or destination.endswith("/"):
                place = posixpath.join(place, posixpath.basename(source.path))
            self._make(posixpath.dirname(place))
            status = tree.status(source.resolved)
            assert status is not None, "it was there when its digest was made"
            self._entry(tree, source.resolved, status, place, {})

    def write(self, name: str, content: bytes, destination: str) -> None:
        """A here-document as a file."""
        place = self._target.resolve(destination)
        present = self._target.status(place)
        if destination.endswith("/") or (present is not None and stat.S_ISDIR(present.st_mode)):
            place = posixpath.join(place, name)
        self._make(posixpath.dirname(place))
        with self._place(place) as (parent, last):
            mode = 0o644 if self._ownership.mode is None else self._ownership.mode
            with self._new_file(parent, last) as descriptor:
                self._work.count(size=len(content), entries=1)
                _write_all(descriptor, content)
                owner = self._ownership.owner or Identity()
                os.fchown(descriptor, owner.uid, owner.gid)
                os.fchmod(descriptor, mode)
                os.utime(descriptor, ns=(0, 0))

    def copy_tree(self, tree: Tree, top: str, place: str) -> None:
        """Everything that is below ``top``, to below ``place``; directories that are there are merged."""
        links: dict[tuple[int, int], str] = {}
        directories: list[tuple[str, str]] = []
        for path, status in entries(tree, top, self._work):
            inside, outside = posixpath.join(top, path), posixpath.join(place, path)
            if stat.S_ISDIR(status.st_mode):
                directories.append((inside, outside))
                self._directory(outside)
            else:
                self._entry(tree, inside, status, outside, links)
        for inside, outside in reversed(directories):  # last: writing into a directory moves its time
            with tree.opened(inside) as old, self._target.opened(outside) as new:
                self._describe(new, os.fstat(old), _xattrs(old))

    def _directory(self, path: str) -> None:
        with self._place(path, keeps_directory=True) as (parent, name), suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)

    def _make(self, path: str) -> None:
        """The directory ``path`` and those above it that are missing, as Docker makes them.  Raises: OSError."""
        parts = path.split("/") if path else []
        for depth in range(1, len(parts) + 1):
            directory, name = "/".join(parts[: depth - 1]), parts[depth - 1]
            with self._target.opened(directory) as parent:
                try:
                    os.mkdir(name, 0o755, dir_fd=parent)
                except FileExistsError:
                    continue
                owner = self._ownership.owner or Identity()
                os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)
                os.chmod(name, 0o755, dir_fd=parent)  # whatever the umask is

    def _entry(
        self, tree: Tree, path: str, status: os.stat_result, place: str, links: dict[tuple[int, int], str]
    ) -> None:
        """Something that is no directory; what is at its place goes."""
        mode, key = status.st_mode, (status.st_dev, status.st_ino)
        if stat.S_ISSOCK(mode):
            return  # no archive has one, so neither has a copy in Docker
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
                raise InvalidArgument(f"{path} is no regular file any more")
            while data := os.read(old, _CHUNK_BYTES):
                self._work.count(size=len(data))
                _write_all(new, data)
            self._describe(new, status, _xattrs(old))

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
        """The directory of ``path`` and the name in it, where nothing is any more, or the directory that stays."""
        directory, name = posixpath.split(path)
        with self._target.opened(directory) as parent:
            try:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                status = None
            if status is not None and not (keeps_directory and stat.S_ISDIR(status.st_mode)):
                if stat.S_ISDIR(status.st_mode):
                    remove_tree(Path(f"/proc/self/fd/{parent}") / name)
                else:
                    os.unlink(name, dir_fd=parent)
            yield parent, name

    def _describe(self, descriptor: int, status: os.stat_result, xattrs: Sequence[tuple[str, bytes]]) -> None:
        """Owner, mode, attributes and times of a file or directory."""
        owner = self._ownership.owner
        os.fchown(
            descriptor, *((owner.uid, owner.gid) if owner is not None else (status.st_uid, status.st_gid))
        )
        os.fchmod(descriptor, self._mode(status))  # after the owner, which clears set-user-id
        for name, value in xattrs:
            try:
                os.setxattr(descriptor, name, value)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM):
                    raise
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _describe_name(self, parent: int, name: str, status: os.stat_result) -> None:
        """The same of what cannot be opened."""
        owner = self._ownership.owner
        uid, gid = (owner.uid, owner.gid) if owner is not None else (status.st_uid, status.st_gid)
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, self._mode(status), dir_fd=parent)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _mode(self, status: os.stat_result) -> int:
        return stat.S_IMODE(status.st_mode) if self._ownership.mode is None else self._ownership.mode


def destination_of(working_dir: str, requested: str) -> str:
    """Where a COPY goes, absolute; a slash at its end stays."""
    place = posixpath.normpath(posixpath.join("/", working_dir, requested))
    is_directory = requested.endswith("/") or posixpath.basename(requested) == "."
    return place.rstrip("/") + "/" if is_directory else place


def digest_of_sources(sources: Sequence[Source]) -> str:
    """How history and cache name them all."""
    if len(sources) == 1:
        return sources[0].digest
    total = hashlib.sha256(",".join(source.digest for source in sources).encode())
    return f"multi:{total.hexdigest()}"


def _xattrs(descriptor: int) -> list[tuple[str, bytes]]:
    try:
        names = os.listxattr(descriptor)
    except OSError:
        return []  # the file system has none
    found = []
    for name in names:
        if name.startswith(_XATTRS):
            with suppress(OSError):
                found.append((name, os.getxattr(descriptor, name)))
    return found


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
