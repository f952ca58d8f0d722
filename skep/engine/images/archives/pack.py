"""Worker that writes a directory tree as a tar: a separate process in a chroot.

The tree belongs to a container, which may be running.  So names, links and devices in it cannot be trusted, and may
change meanwhile.  Because of the chroot, links cannot lead out of the tree.  The tree is mounted without devices, so if
a file is replaced by a device, the device cannot be read.  ``confinement`` describes the other rights that the process
drops.

The module is run directly.  Its argument is a JSON object of settings.  The tar is written to a file or stdout, and a
JSON object with the results to stderr.

Source: moby, pkg/archive/archive.go (FileInfoHeader, addTarFile), changes.go (ExportChanges).
"""

import ctypes
import errno
import hashlib
import json
import os
import resource
import signal
import stat
import sys
import tarfile
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from skep.engine.images.archives.confinement import Helper, confine
from skep.linux import confined_root
from skep.linux.own_user_namespace import is_overlay_mark

_CHUNK_BYTES = 1 << 20
"""Bytes that are copied at a time."""
_MEMORY_BYTES_MAX = 2 << 30
"""Limit in bytes for the worker's address space, because it reads data that users have written."""
# Source: linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_XATTR_RECORD = "SCHILY.xattr."
_XATTRS = ("user.", "security.capability", "system.posix_acl_")
"""Prefixes of extended attributes that are part of a file.  Others belong to the machine."""
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.ESTALE})
"""Errors of opening an entry that was removed, or replaced by a link or device."""


class TreeTooLarge(Exception):
    """The tree is larger than this node accepts."""


class UnpackableEntry(Exception):
    """An entry of the tree cannot be represented in a layer."""


@dataclass
class PackSettings:
    """Settings of one run.

    Args:
        root: The tree.
        content: File for the tar, zstd-compressed.
        is_changes: Whether the tree is the upper directory of an overlay, so that the tar is a layer with whiteouts for
            removed entries.
        without: Paths below the root to leave out.
        removes: Whether to remove these paths from the tree.
        bytes_max: Largest size of the tar.
        entries_max: Largest number of its members.
    """

    root: str
    content: str
    bytes_max: int
    entries_max: int
    is_changes: bool = True
    without: tuple[str, ...] = ()
    removes: bool = False


class TarWriter:
    """Writer of the plain tar: limits, counts, hashes and compresses it."""

    def __init__(self, write: Callable[[bytes], object], bytes_max: int) -> None:
        self._write = write
        self._hash = hashlib.sha256()
        self._bytes_max = bytes_max
        self.bytes_written = 0

    def require(self, size: int) -> None:
        """Check that ``size`` more bytes are within the limit.  Raises: TreeTooLarge."""
        if self.bytes_written + size > self._bytes_max:
            raise TreeTooLarge(f"holds more than {self._bytes_max} bytes")

    def write(self, data: bytes) -> None:
        """Write data.  Raises: TreeTooLarge; OSError."""
        self.require(len(data))
        self.bytes_written += len(data)
        self._hash.update(data)
        self._write(data)

    @property
    def digest(self) -> str:
        """Digest of the written data."""
        return "sha256:" + self._hash.hexdigest()


class Packer:
    """Writes everything below ``/`` (of the chroot) as members of one archive."""

    def __init__(
        self,
        output: TarWriter,
        *,
        entries_max: int,
        without: Collection[str] = (),
        removes: bool = False,
        mark_of: Callable[[int], int] | None = None,
        prefix: str | None = None,
    ) -> None:
        """Args:
        mark_of: Returns overlayfs's mark of a directory (``Helper.mark_of``).  None if it is not an overlay's.
        prefix: Name of the packed entry, which starts all names in it.  None names members by their paths below the
            directory, which itself is not a member.
        """
        self._output = output
        self._prefix = prefix
        self._top = ""
        self._entries_max = entries_max
        self._without = without
        self._removes = removes
        self._mark_of = mark_of
        self._entries = 0
        self._links: dict[tuple[int, int], str] = {}
        self.size_bytes = 0
        """Size of the files as Docker counts a layer: every inode except directories, once."""

    def pack(self, directory: str = "/") -> None:
        """Write everything below ``directory``, depth first, and the end of the archive.  Raises: see ``main``."""
        self._top = directory
        pending = [""]
        while pending:
            pending.extend(reversed(self._directory(pending.pop())))
        self._output.write(bytes(2 * tarfile.BLOCKSIZE))

    def pack_file(self, path: str) -> None:
        """Write one entry that is not a directory, with the name ``prefix``, and the end of the archive."""
        parent, name = os.path.split(path)
        descriptor = os.open(parent or "/", os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._file(descriptor, name, "", os.stat(name, dir_fd=descriptor, follow_symlinks=False))
        finally:
            os.close(descriptor)
        self._output.write(bytes(2 * tarfile.BLOCKSIZE))

    def _name(self, path: str) -> str:
        """Return the member's name for a path below the packed directory."""
        if self._prefix is None:
            return path
        return f"{self._prefix}/{path}" if path else self._prefix or "/"

    def _directory(self, path: str) -> list[str]:
        """Write a directory with its files, and return its subdirectories, sorted."""
        try:
            place = f"{self._top}/{path}" if path else self._top
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise
        try:
            names = sorted(os.listdir(descriptor))
            kept = [name for name in names if _joined(path, name) not in self._without]
            if self._removes:
                for name in set(names).difference(kept):
                    _remove(name, descriptor)
            if names and not kept:  # the directory holds only left out paths
                return []
            if path or self._prefix is not None:
                self._write_directory(path, descriptor)
            below = []
            for name in kept:
                inside = _joined(path, name)
                try:
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    below.append(inside)
                else:
                    self._file(descriptor, name, inside, status)
            return below
        finally:
            os.close(descriptor)

    def _write_directory(self, path: str, descriptor: int) -> None:
        member = self._member(path, os.fstat(descriptor), tarfile.DIRTYPE)
        _add_xattrs(member, descriptor)
        mark = self._mark_of(descriptor) if self._mark_of is not None else 0
        if mark == Helper.MOVED:
            raise UnpackableEntry(
                f"/{path}: the directory was renamed, and this node's file system does not record renames"
            )
        self._write_header(member)
        if mark == Helper.OPAQUE:
            self._write_header(_whiteout(_joined(path, _OPAQUE), member.mtime))

    def _file(self, directory: int, name: str, path: str, status: os.stat_result) -> None:
        """Write one entry of a directory that is not itself a directory."""
        mode = status.st_mode
        if self._mark_of is not None:
            if stat.S_ISCHR(mode) and status.st_rdev == 0:
                self._write_header(
                    _whiteout(_joined(os.path.dirname(path), _WHITEOUT + name), status.st_mtime)
                )
                return
            if name.startswith(_WHITEOUT):
                raise UnpackableEntry(
                    f'/{path}: a name that begins with "{_WHITEOUT}" marks a removed file in an image'
                )
        if stat.S_ISREG(mode):
            self._regular(directory, name, path)
            return
        if stat.S_ISLNK(mode):
            member = self._member(path, status, tarfile.SYMTYPE)
            try:
                member.linkname = os.readlink(name, dir_fd=directory)
            except OSError:
                return
        elif stat.S_ISFIFO(mode):
            member = self._member(path, status, tarfile.FIFOTYPE)
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            member = self._member(path, status, tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE)
            member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        else:
            return  # a tar cannot contain a socket, and a socket is useless without its process
        if not self._is_link(member, status):
            self.size_bytes += status.st_size
        self._write_header(member)

    def _regular(self, directory: int, name: str, path: str) -> None:
        try:
            # Do not block on a named pipe that replaced the file.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        except OSError as error:
            if error.errno in _GONE:
                return
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return
            member = self._member(path, status, tarfile.REGTYPE)
            if self._is_link(member, status):
                self._write_header(member)
                return
            member.size = status.st_size
            self.size_bytes += member.size
            self._output.require(member.size)
            _add_xattrs(member, descriptor)
            self._write_header(member)
            self._write_content(descriptor, member.size)
        finally:
            os.close(descriptor)

    def _write_content(self, descriptor: int, size: int) -> None:
        """Write ``size`` bytes of a file, even if it changes meanwhile.  Missing bytes become zeros."""
        left = size
        while left:
            data = os.read(descriptor, min(left, _CHUNK_BYTES)) or bytes(min(left, _CHUNK_BYTES))
            left -= len(data)
            self._output.write(data)
        if size % tarfile.BLOCKSIZE:
            self._output.write(bytes(tarfile.BLOCKSIZE - size % tarfile.BLOCKSIZE))

    def _member(self, path: str, status: os.stat_result, type: bytes) -> tarfile.TarInfo:
        member = tarfile.TarInfo(self._name(path))
        member.type, member.mode = type, stat.S_IMODE(status.st_mode)
        member.uid, member.gid = status.st_uid, status.st_gid
        member.mtime = max(int(status.st_mtime), 0)  # whole seconds, as in Docker
        return member

    def _is_link(self, member: tarfile.TarInfo, status: os.stat_result) -> bool:
        """Return whether the inode was already written under another name, and make ``member`` a link to it."""
        if status.st_nlink < 2:
            return False
        first = self._links.setdefault((status.st_dev, status.st_ino), member.name)
        if first == member.name:
            return False
        member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
        return True

    def _write_header(self, member: tarfile.TarInfo) -> None:
        self._entries += 1
        if self._entries > self._entries_max:
            raise TreeTooLarge(f"holds more than {self._entries_max} entries")
        self._output.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))


def _joined(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _remove(name: str, directory: int) -> None:
    """Remove an entry that is a file or an empty directory."""
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        with suppress(OSError):
            os.rmdir(name, dir_fd=directory)


def _whiteout(path: str, mtime: float) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.mode, member.mtime = 0, max(int(mtime), 0)
    return member


def _add_xattrs(member: tarfile.TarInfo, descriptor: int) -> None:
    try:
        names = os.listxattr(descriptor)
    except OSError:
        return  # the file system does not support them
    records = {}
    for name in names:
        if name.startswith(_XATTRS) and not is_overlay_mark(name):
            with suppress(OSError):
                value = os.getxattr(descriptor, name)
                records[_XATTR_RECORD + name] = value.decode("utf-8", "surrogateescape")
    member.pax_headers = records


def give_up_imports() -> None:
    """Prevent the import of further modules, and limit memory."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES_MAX, _MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0)
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.path_hooks.clear()


def _compressed(path: str) -> Any:
    import zstandard

    return zstandard.ZstdCompressor(level=1).stream_writer(open(path, "wb"))


def _packed(settings: PackSettings) -> dict[str, object]:
    content = _compressed(settings.content)
    output = TarWriter(content.write, settings.bytes_max)
    helper = confine(confined_root.enter(settings.root, read_only=not settings.removes))
    give_up_imports()
    packer = Packer(
        output,
        entries_max=settings.entries_max,
        without=frozenset(settings.without),
        removes=settings.removes,
        mark_of=helper.mark_of if settings.is_changes else None,
    )
    packer.pack()
    content.close()
    helper.close()
    return {"digest": output.digest, "plain_bytes": output.bytes_written, "size_bytes": packer.size_bytes}


def main() -> None:
    """Pack the tree by the settings in the first argument, and print the result."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the worker must not outlive the node process
    result: dict[str, object]
    try:
        result = _packed(PackSettings(**json.loads(sys.argv[1])))
    except UnpackableEntry as error:
        result = {"error": str(error), "kind": "malformed"}
    except TreeTooLarge as error:
        result = {"error": str(error), "kind": "limit"}
    except MemoryError:
        result = {"error": "needs more memory to pack than is allowed", "kind": "limit"}
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        result = {"error": f"{where}{(error.strerror or str(error)).lower()}", "kind": "io"}
    sys.stderr.write(json.dumps(result))


if __name__ == "__main__":
    main()
