"""File tree as listed by a client: checks entries, and writes them below a new directory.

fsutil sends one entry after another in walk order: a directory, then everything in it, names sorted by their bytes.
The client is not trusted.  An entry is accepted only below a directory that was listed and is not complete, so no path
contains a symbolic link.  Files are created new (O_EXCL), relative to descriptors of directories created here.
Numbers, sizes and lengths are bounded.  Files that are unchanged since an earlier build of the same context are linked
from that build's tree.

Source: tonistiigi/fsutil, validator.go, diskwriter.go, receive.go.
"""

import os
import stat as modes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

import msgspec

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.errors import InvalidArgument, ResourceExhausted
from skep.linux.own_user_namespace import is_overlay_mark

# Bits of Go's os.FileMode, which are the same on every system.
_DIRECTORY, _SYMLINK, _DEVICE, _PIPE = 1 << 31, 1 << 27, 1 << 26, 1 << 25
# Bits of Go's os.FileMode, in which BuildKit sends modes.
_SOCKET, _SETUID, _SETGID, _STICKY, _IRREGULAR = 1 << 24, 1 << 23, 1 << 22, 1 << 20, 1 << 19
_CHARACTER_DEVICE = 1 << 21
_KINDS = _DIRECTORY | _SYMLINK | _DEVICE | _PIPE | _SOCKET | _IRREGULAR | _CHARACTER_DEVICE

_KEPT_ATTRIBUTES = ("user.", "security.capability")
"""Extended attributes that are written.  Others belong to the client's machine (SELinux labels, access lists)."""

_MAJORS, _MINORS = range(1 << 12), range(1 << 20)
"""Device numbers that the kernel accepts."""
_TIMES = range(-(1 << 62), 1 << 62)
"""Modification times that the kernel accepts, in nanoseconds."""


class TreeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one tree."""

    entries: int = 500_000
    bytes: int
    """Size of all files together."""
    name_bytes: int = 64 << 20
    """Size of all paths, link targets and attributes together."""
    depth: int = 256
    """Depth of nested directories.  A descriptor is open for each."""


class FileType(Enum):
    """Kind of an entry."""

    DIRECTORY = "directory"
    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    PIPE = "named pipe"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    SOCKET = "socket"
    """Not created, since a socket is useless without its process."""


def _is_kept(attribute: str) -> bool:
    return attribute.startswith(_KEPT_ATTRIBUTES) and not is_overlay_mark(attribute)


class TreeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted entry.  ``mode``: Permissions with setuid, setgid and sticky bits."""

    path: str
    kind: FileType
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: str
    attributes: Mapping[str, bytes]
    device: tuple[int, int] = (0, 0)
    """Major and minor number."""


class Listing:
    """Checks entries in their order, and keeps the accepted ones."""

    def __init__(self, limits: TreeLimits) -> None:
        self.entries: list[TreeEntry] = []
        self.bytes = 0
        """Size of the listed files."""
        self._limits = limits
        self._name_bytes = 0
        self._open: list[tuple[str, bytes]] = [("", b"")]
        """Directories from the root to the current one, each with the last name in it."""
        self._files: set[str] = set()

    def add(self, stat: pb.Stat) -> None:
        """Accept an entry.

        Raises:
            InvalidArgument: not below a listed directory, out of order, or of a kind that cannot be created.
            ResourceExhausted: the tree exceeds a limit.
        """
        self._name_bytes += len(stat.path) + len(stat.linkname)
        self._name_bytes += sum(len(name) + len(value) for name, value in stat.xattrs.items())
        if len(self.entries) >= self._limits.entries or self._name_bytes > self._limits.name_bytes:
            raise ResourceExhausted(f"the build context has more than {self._limits.entries} files")
        self._enter(os.fsdecode(stat.path))
        entry = self._entry(stat)
        if entry.kind is FileType.DIRECTORY:
            if len(self._open) > self._limits.depth:
                raise InvalidArgument(f"directories are too deep: {entry.path!r}")
            self._open.append((entry.path, b""))
        elif entry.kind is FileType.FILE:
            self._files.add(entry.path)
            self.bytes += entry.size
            if self.bytes > self._limits.bytes:
                raise ResourceExhausted(
                    f"the build context is larger than the {self._limits.bytes} bytes that this node accepts"
                )
        self.entries.append(entry)

    def _enter(self, path: str) -> None:
        """Leave directories until the parent of ``path`` is the current one.  Raises: InvalidArgument."""
        parent, _, name = path.rpartition("/")
        if not name or name in (".", "..") or "\0" in path or path.startswith("/"):
            raise InvalidArgument(f"invalid path in the build context: {path!r}")
        while len(self._open) > 1 and self._open[-1][0] != parent:
            self._open.pop()
        directory, last = self._open[-1]
        # Names in a directory ascend, so a directory cannot be entered twice, and no name repeats.
        if directory != parent or os.fsencode(name) <= last:
            raise InvalidArgument(f"changes out of order: {path!r} {directory + '/' + os.fsdecode(last)!r}")
        self._open[-1] = (directory, os.fsencode(name))

    def _entry(self, stat: pb.Stat) -> TreeEntry:
        path, link = os.fsdecode(stat.path), os.fsdecode(stat.linkname)
        kind = _kind(stat)
        if stat.size < 0 or stat.mod_time not in _TIMES or stat.uid == 0xFFFFFFFF or stat.gid == 0xFFFFFFFF:
            raise InvalidArgument(f"invalid file in the build context: {path!r}")
        if kind is FileType.HARD_LINK and link not in self._files:
            raise InvalidArgument(f"invalid link in the build context: {path!r} to {link!r}")
        if kind is FileType.SYMLINK and (not link or "\0" in link):
            raise InvalidArgument(f"invalid link in the build context: {path!r}")
        if kind in (FileType.CHARACTER_DEVICE, FileType.BLOCK_DEVICE) and not (
            stat.devmajor in _MAJORS and stat.devminor in _MINORS
        ):
            raise InvalidArgument(f"invalid device in the build context: {path!r}")
        return TreeEntry(
            path=path,
            kind=kind,
            mode=_permissions(stat.mode),
            uid=stat.uid,
            gid=stat.gid,
            size=stat.size if kind is FileType.FILE else 0,
            mtime_ns=stat.mod_time,
            link=link if kind in (FileType.HARD_LINK, FileType.SYMLINK) else "",
            device=(stat.devmajor, stat.devminor),
            attributes={k: bytes(v) for k, v in stat.xattrs.items() if _is_kept(k)},
        )


def _kind(stat: pb.Stat) -> FileType:
    kind = stat.mode & _KINDS
    if not kind:
        return FileType.HARD_LINK if stat.linkname else FileType.FILE
    kinds = {
        _DIRECTORY: FileType.DIRECTORY,
        _SYMLINK: FileType.SYMLINK,
        _PIPE: FileType.PIPE,
        _SOCKET: FileType.SOCKET,
        _DEVICE: FileType.BLOCK_DEVICE,
        _DEVICE | _CHARACTER_DEVICE: FileType.CHARACTER_DEVICE,
    }
    if kind not in kinds:
        raise InvalidArgument(f"unknown kind of file in the build context: {os.fsdecode(stat.path)!r}")
    return kinds[kind]


def _permissions(mode: int) -> int:
    bits = {_SETUID: modes.S_ISUID, _SETGID: modes.S_ISGID, _STICKY: modes.S_ISVTX}
    return (mode & 0o777) | sum(value for bit, value in bits.items() if mode & bit)


class KeptTree(msgspec.Struct, frozen=True):
    """Tree from an earlier build of the same context.  ``entries``: By path."""

    root: Path
    entries: Mapping[str, TreeEntry]


def write_tree(root: Path, entries: Sequence[TreeEntry], kept: KeptTree | None = None) -> Sequence[int]:
    """Create all ``entries`` below ``root``, a new empty directory.  Blocks.

    Returns the numbers of the files that still need their content, and are empty so far.  Raises: OSError.
    """
    needed: list[int] = []
    with _Writer(root, kept) as writer:
        for number, entry in enumerate(entries):
            if not writer.write(entry):
                needed.append(number)
    return needed


class _Writer:
    """Creates entries in the order of a ``Listing``, each in the descriptor of its directory."""

    def __init__(self, root: Path, kept: KeptTree | None) -> None:
        self._open: list[tuple[TreeEntry | None, int]] = [(None, _open_directory(root))]
        self._kept = kept
        self._kept_root = -1

    def __enter__(self) -> "_Writer":
        if self._kept is not None:
            with suppress(OSError):  # without it, every file is requested
                self._kept_root = _open_directory(self._kept.root)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            while len(self._open) > 1:
                self._leave(finishes=error is None)
        finally:
            for _entry, descriptor in self._open:
                os.close(descriptor)
            if self._kept_root >= 0:
                os.close(self._kept_root)

    def write(self, entry: TreeEntry) -> bool:
        """Create an entry.  Return whether it is complete, or a file without its content.  Raises: OSError."""
        parent, _, name = entry.path.rpartition("/")
        while (current := self._open[-1][0]) is not None and current.path != parent:
            self._leave(finishes=True)
        directory = self._open[-1][1]
        if entry.kind is FileType.DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=directory)
            self._open.append((entry, _open_directory(name, directory)))
            return True
        if entry.kind is FileType.SYMLINK:
            os.symlink(entry.link, name, dir_fd=directory)
            _finish_name(name, directory, entry)
        elif entry.kind is FileType.HARD_LINK:
            self._link(self._open[0][1], entry.link, name, directory)
        elif entry.kind is FileType.PIPE:
            os.mkfifo(name, 0o600, dir_fd=directory)
            descriptor = os.open(
                name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
            )
            with closed(descriptor):
                _finish(descriptor, entry)
        elif entry.kind in (FileType.CHARACTER_DEVICE, FileType.BLOCK_DEVICE):
            kind = modes.S_IFCHR if entry.kind is FileType.CHARACTER_DEVICE else modes.S_IFBLK
            os.mknod(name, kind | 0o600, os.makedev(*entry.device), dir_fd=directory)
            _finish_name(name, directory, entry)  # opening a device may have side effects
        elif entry.kind is FileType.FILE and not self._take_kept(entry, name, directory):
            descriptor = os.open(
                name,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=directory,
            )
            with closed(descriptor):
                if not entry.size:
                    _finish(descriptor, entry)
            return not entry.size
        return True

    def _take_kept(self, entry: TreeEntry, name: str, directory: int) -> bool:
        if self._kept_root < 0 or self._kept is None or self._kept.entries.get(entry.path) != entry:
            return False
        with suppress(OSError):
            self._link(self._kept_root, entry.path, name, directory)
            return True
        return False

    def _link(self, root: int, path: str, name: str, directory: int) -> None:
        os.link(path, name, src_dir_fd=root, dst_dir_fd=directory, follow_symlinks=False)

    def _leave(self, *, finishes: bool) -> None:
        entry, descriptor = self._open.pop()
        with closed(descriptor):
            if finishes and entry is not None:
                _finish(descriptor, entry)


@contextmanager
def closed(descriptor: int) -> Iterator[int]:
    """Close ``descriptor`` at the end of the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(path: Path | str, parent: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _finish(descriptor: int, entry: TreeEntry) -> None:
    """Set owner, mode, attributes and times of an entry, in an order in which no call undoes another."""
    os.fchown(descriptor, entry.uid, entry.gid)
    os.fchmod(descriptor, entry.mode)
    for name, value in entry.attributes.items():
        # BuildKit also skips attributes that the file system does not support.
        with suppress(OSError):
            os.setxattr(descriptor, name, value)
    os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))


def _finish_name(name: str, directory: int, entry: TreeEntry) -> None:
    """Set owner, mode and times of an entry that is not opened.  A link has no mode."""
    os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
    if entry.kind is not FileType.SYMLINK:
        os.chmod(name, entry.mode, dir_fd=directory)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=directory, follow_symlinks=False)


class Contents:
    """Writes the contents of the files that ``write_tree`` created empty."""

    def __init__(
        self, root: Path, entries: Sequence[TreeEntry], needed: Sequence[int], bytes_max: int
    ) -> None:
        self._root = root
        self._entries = entries
        self._bytes_left = bytes_max
        self._open: dict[int, tuple[int, int]] = {}
        """Descriptor and number of bytes written, by file number."""
        self._waiting = set(needed)
        self.requested: set[int] = set()
        self.changed: set[str] = set()
        """Paths of files whose length differs from the listing, since they changed during the transfer."""

    def request(self, number: int) -> None:
        """Record that the content of a file was requested."""
        self._waiting.remove(number)
        self.requested.add(number)

    def write(self, number: int, data: bytes) -> bool:
        """Write a piece of a file.  Blocks.

        Returns True after the empty piece, which ends the file.

        Raises: InvalidArgument: the file was not requested; ResourceExhausted; OSError.
        """
        if number not in self.requested:
            raise InvalidArgument(f"invalid file request {number}")
        entry = self._entries[number]
        descriptor, written = self._open.get(number) or (self._reopen(entry), 0)
        self._open[number] = descriptor, written + len(data)
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise ResourceExhausted("the build context is larger than this node accepts")
        if data:
            _write_all(descriptor, data)
            return False
        del self._open[number]
        self.requested.remove(number)
        with closed(descriptor):
            _finish(descriptor, entry)
        if written != entry.size:
            self.changed.add(entry.path)
        return True

    def _reopen(self, entry: TreeEntry) -> int:
        """Open the empty file.  All its parent directories were created here, so links are not followed."""
        directory = _open_directory(self._root)
        *parents, name = entry.path.split("/")
        try:
            for parent in parents:
                below = _open_directory(parent, directory)
                os.close(directory)
                directory = below
            return os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)

    @property
    def is_whole(self) -> bool:
        """Whether every file has its content."""
        return not self._waiting and not self.requested

    def close(self) -> None:
        """Close all open files."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
