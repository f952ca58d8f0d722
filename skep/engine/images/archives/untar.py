"""Worker that unpacks a tar stream: a separate process, chrooted into the directory that it fills.

Archives cannot be trusted, so they are unpacked in a chroot.  There, absolute names, ``..``, symbolic links to ``/etc``
and hard links lead only into the layer itself, in any combination, and no check is needed that could race.  Docker
works in the same way, so an archive that Docker accepts is accepted here.  ``confinement`` describes the other rights
that the process drops.

Nothing is imported after the chroot, because the archive could provide its own modules.  The module is run directly.
Its argument is a JSON object of settings, the stream is on stdin, and a JSON object of results is printed.

Source: moby, pkg/archive/archive.go (Unpack, createTarFile), archive_linux.go (whiteouts in overlay form).
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import resource
import signal
import stat
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from skep.engine.images.archives.confinement import Helper, confine
from skep.engine.images.archives.streams import MalformedArchive, plain_chunks
from skep.linux.own_user_namespace import is_in_user_namespace, is_overlay_mark
from skep.linux.trees import remove_tree, walk

_CHUNK_BYTES = 1 << 20
"""Bytes that are copied at a time."""
_SPACE_CHECK_BYTES = 64 << 20
"""Number of bytes written between two checks of the disk's free space."""
_MEMORY_BYTES_MAX = 2 << 30
"""Limit in bytes for the worker's address space, because it reads data from strangers."""
# Source: linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_HEADER_BYTES_MAX = 1 << 20
"""Limit in bytes for a long name or a PAX header, as in Go."""
_LONG_HEADERS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)
_TIME = re.compile(r"\+?([0-9]{1,12})(?:\.([0-9]*))?")

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_XATTR_RECORD = "SCHILY.xattr."
_HAS_NO_DEVICES = is_in_user_namespace()  # determined here, because the chroot has no /proc


class Duplicate(MalformedArchive):
    """Two members have the same name.  Docker refuses an archive that it could not reassemble byte for byte."""


class ArchiveTooLarge(Exception):
    """The archive is larger than this node accepts."""


@dataclass
class UntarSettings:
    """Settings of one run.

    Args:
        root: Directory to fill.
        is_layer: Whether whiteouts, devices and owners count.  Otherwise only plain files do.
        has_whiteouts: Whether names that start with ``.wh.`` are whiteouts.  In contexts of builds they are plain
            names, and the later of two members with one name counts.
        bytes_max: Largest size of both the plain tar and the written files.
        spare_bytes: Bytes to keep free on the file system.
        copy_to: File for the plain tar, zstd-compressed.  Empty for none.
    """

    root: str
    is_layer: bool
    bytes_max: int
    entries_max: int
    spare_bytes: int
    copy_to: str = ""
    has_whiteouts: bool = True


class PlainStream:
    """The plain tar as a stream that is decompressed, counted, hashed and copied while it is read.

    It is only read forward.  ``tarfile`` itself can read such streams (mode ``r|``), but copies the rest of its buffer
    for each header and file.
    """

    def __init__(self, source: BinaryIO, settings: UntarSettings) -> None:
        self._hash = hashlib.sha256()
        self._settings = settings
        self._chunks = plain_chunks(source)
        self._chunk = b""
        self._position = 0
        self._copy = _compressed_copy(settings.copy_to) if settings.copy_to else None
        self.bytes_read = 0

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, or fewer at the end."""
        pieces = []
        while size and self._has_more():
            pieces.append(self._chunk[self._position : self._position + size])
            self._position += len(pieces[-1])
            size -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def tell(self) -> int:
        """Return the position in the tar, in bytes."""
        return self.bytes_read - len(self._chunk) + self._position

    def seek(self, position: int) -> None:
        """Skip to ``position``, or to the end if that comes first.  Raises: tarfile.StreamError: it is behind."""
        distance = position - self.tell()
        if distance < 0:
            raise tarfile.StreamError("seeking backwards is not allowed")
        while distance and self._has_more():
            step = min(distance, len(self._chunk) - self._position)
            self._position += step
            distance -= step

    def _has_more(self) -> bool:
        """Return whether data is left, and read the next chunk if needed."""
        while self._position == len(self._chunk):
            chunk = next(self._chunks, b"")
            if not chunk:
                return False
            self.bytes_read += len(chunk)
            if self.bytes_read > self._settings.bytes_max:
                raise ArchiveTooLarge(f"unpacks to more than {self._settings.bytes_max} bytes")
            self._hash.update(chunk)
            if self._copy is not None:
                self._copy.write(chunk)
            self._chunk, self._position = chunk, 0
        return True

    def finish(self) -> str:
        """Read the data after the archive's end marker, which belongs to the digest, and return the digest."""
        while self._has_more():
            self._position = len(self._chunk)
        if self._copy is not None:
            self._copy.close()
        return "sha256:" + self._hash.hexdigest()


_Truncated = tarfile.TruncatedHeaderError  # type: ignore[attr-defined]
_Invalid = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
_Subsequent = tarfile.SubsequentHeaderError  # type: ignore[attr-defined]


class Header(tarfile.TarInfo):
    """A header that raises an error if it is invalid.

    The standard reader would take an invalid header for the archive's end.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """Read the next header.  Raises: MalformedArchive, in the words of Go's archive/tar."""
        try:
            return super().fromtarfile(tarfile)
        except _Truncated as error:
            raise MalformedArchive("unexpected EOF") from error
        except _Invalid as error:
            raise MalformedArchive("archive/tar: invalid tar header") from error
        except _Subsequent as error:  # a header after a long name; only the text tells the kind of error
            is_invalid = str(error) in ("bad checksum", "invalid header")
            raise MalformedArchive(
                "archive/tar: invalid tar header" if is_invalid else "unexpected EOF"
            ) from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        """Check a header's length, because the standard reader reads a header of any length into memory."""
        if self.type in _LONG_HEADERS and self.size > _HEADER_BYTES_MAX:
            raise MalformedArchive("archive/tar: header field too long")
        found: tarfile.TarInfo | None = super()._proc_member(archive)  # type: ignore[misc]
        return found


class Unpacker:
    """Writes the members of one archive below ``/`` (of the chroot)."""

    def __init__(self, settings: UntarSettings, helper: Helper) -> None:
        self._settings = settings
        self._helper = helper
        self._written_bytes = 0
        self._checked_bytes = 0
        self._names: set[str] = set()
        self._members = 0
        self._directories: list[tuple[str, tarfile.TarInfo]] = []

    def unpack(self, stream: PlainStream) -> None:
        """Unpack everything in ``stream``.  Raises: MalformedArchive, ArchiveTooLarge, OSError."""
        try:
            with tarfile.TarFile(
                fileobj=stream,  # type: ignore[arg-type]
                mode="r",
                tarinfo=Header,
                encoding="utf-8",
                errors="surrogateescape",
            ) as archive:
                last: tarfile.TarInfo | None = None
                while (member := _next_member(archive, stream, last)) is not None:
                    self._member(archive, member)
                    last = member
                    archive.members.clear()  # type: ignore[attr-defined]  # else a million headers stay in memory
        except tarfile.ReadError as error:
            if not self._names and str(error) == "empty file":
                return
            raise MalformedArchive("unexpected EOF") from error
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise MalformedArchive(f"archive/tar: invalid tar header ({error})") from error
        for path, member in reversed(self._directories):
            _set_times(path, member)  # last, because writing into a directory changes its time

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if "\0" in member.name or "\0" in member.linkname:
            raise MalformedArchive("archive/tar: invalid tar header")
        name = os.path.normpath(member.name)
        if name in self._names and self._settings.has_whiteouts:
            raise Duplicate
        self._names.add(name)
        self._members += 1
        if self._members > self._settings.entries_max:
            raise ArchiveTooLarge(f"holds more than {self._settings.entries_max} entries")
        path = os.path.normpath("/" + member.name.lstrip("/"))
        if path == "/":
            return  # Docker keeps the layer's own directory as it is
        if not os.path.lexists(os.path.dirname(path)):
            os.makedirs(os.path.dirname(path), mode=0o755)
        is_changes = self._settings.is_layer and self._settings.has_whiteouts
        if is_changes and self._whiteout(path, member):
            return
        _make_way(path, member)
        self._create(archive, member, path)

    def _whiteout(self, path: str, member: tarfile.TarInfo) -> bool:
        """Convert a whiteout to overlayfs's form.

        ``.wh.x`` removes "x", and ``.wh..wh..opq`` hides everything in the directory that lower layers have.
        """
        directory, name = os.path.split(path)
        if name == _OPAQUE:
            self._helper.mark_opaque(directory)
            return True
        if not name.startswith(_WHITEOUT):
            return False
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            place = os.path.normpath(os.path.join(directory, hidden))
            raise MalformedArchive(f'failed to mknod("{place}", S_IFCHR, 0): file exists')
        target = os.path.join(directory, hidden)
        if not os.path.lexists(target):
            os.mknod(target, stat.S_IFCHR, os.makedev(0, 0))
            os.chown(target, member.uid, member.gid, follow_symlinks=False)
        return True

    def _create(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        mode = member.mode & 0o7777
        if member.isdir():
            if not os.path.isdir(path):
                os.mkdir(path, 0o700)
            self._directories.append((path, member))
        elif member.isreg():
            self._write_file(archive, member, path)
        elif member.islnk():
            os.link(self._link_source(member), path, follow_symlinks=False)
            return  # the other name has owner, mode and times already
        elif member.issym():
            os.symlink(member.linkname, path)
        elif not self._settings.is_layer:
            return  # a missing file is reported where it is needed
        elif member.isfifo():
            os.mkfifo(path)
        elif member.ischr() or member.isblk():
            # The device file exists in the image, as in Docker.  The container's device rules decide on its use.
            # A user namespace has no device files, so there the image has none, as in rootless Docker.
            if _HAS_NO_DEVICES:
                return
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
        else:
            raise MalformedArchive(f"unhandled tar header type {ord(member.type)}")
        if not self._settings.is_layer:
            return
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
        _set_xattrs(path, member)
        if not member.issym():
            os.chmod(path, mode)  # after chown, which clears set-user-id
        if not member.isdir():
            _set_times(path, member)

    def _link_source(self, member: tarfile.TarInfo) -> str:
        """Return the path that a hard link refers to."""
        return os.path.normpath("/" + member.linkname)

    def _write_file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        content = archive.extractfile(member)
        assert content is not None, "a regular member has content"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        target = os.open(path, flags, 0o600)
        try:
            while chunk := content.read(_CHUNK_BYTES):
                self._account(len(chunk))
                view = memoryview(chunk)
                while view:
                    view = view[os.write(target, view) :]
        finally:
            os.close(target)

    def _account(self, size: int) -> None:
        """Count bytes before they are written, because a sparse member is small in the tar and large on the disk."""
        self._written_bytes += size
        if self._written_bytes > self._settings.bytes_max:
            raise ArchiveTooLarge(f"unpacks to more than {self._settings.bytes_max} bytes")
        if self._written_bytes - self._checked_bytes >= _SPACE_CHECK_BYTES:
            self._checked_bytes = self._written_bytes
            space = os.statvfs("/")
            if space.f_bavail * space.f_frsize < self._settings.spare_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _next_member(
    archive: tarfile.TarFile, stream: PlainStream, last: tarfile.TarInfo | None
) -> tarfile.TarInfo | None:
    """Return the member after ``last``, or None after the last one.

    An archive may end with the content of its last file, as it does from ``docker build -f -``: Go's reader requires
    neither the padding nor the end marker.
    """
    try:
        return archive.next()
    except tarfile.ReadError:
        if last is not None and stream.tell() >= last.offset_data + last.size:
            return None
        raise


def _compressed_copy(path: str) -> Any:
    import zstandard

    return zstandard.ZstdCompressor(level=1).stream_writer(open(path, "wb"))


def _make_way(path: str, member: tarfile.TarInfo) -> None:
    """Remove the entry that ``member`` replaces.  A directory replaced by a directory is kept and gets its metadata."""
    try:
        present = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(present.st_mode):
        os.unlink(path)
    elif not member.isdir():
        remove_tree(Path(path))


def _set_xattrs(path: str, member: tarfile.TarInfo) -> None:
    for record, value in member.pax_headers.items():
        if not record.startswith(_XATTR_RECORD):
            continue
        name = record.removeprefix(_XATTR_RECORD)
        if is_overlay_mark(name):  # a forged redirect would show a directory of another layer
            continue
        try:
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
        except OSError as error:
            # The file system does not support this kind.  Docker also ignores it.
            if error.errno not in (errno.ENOTSUP, errno.EPERM):
                raise


def _set_times(path: str, member: tarfile.TarInfo) -> None:
    modified_ns = _time_ns(member.pax_headers.get("mtime"))
    if modified_ns is None:
        modified_ns = _whole_seconds(member.mtime)
    accessed_ns = _time_ns(member.pax_headers.get("atime"))
    if accessed_ns is None:
        accessed_ns = modified_ns
    os.utime(path, ns=(accessed_ns, modified_ns), follow_symlinks=False)


def _time_ns(record: str | None) -> int | None:
    """Return the nanoseconds of a PAX record, or None without one.

    Values that are not decimal numbers, or not times of the kernel, become the epoch, as in Docker.  Numbers with an
    exponent are invalid in PAX.  With a large exponent, a short text would become a number of a million digits.
    """
    if record is None:
        return None
    time = _TIME.fullmatch(record)
    if time is None:
        return 0
    nanoseconds = int(time[1]) * 1_000_000_000 + int((time[2] or "")[:9].ljust(9, "0"))
    return nanoseconds if nanoseconds < 1 << 63 else 0


def _whole_seconds(seconds: float) -> int:
    """Return the plain header's time in nanoseconds."""
    return int(seconds) * 1_000_000_000 if 0 <= seconds < 9.2e9 else 0


def tree_bytes(root: str) -> int:
    """Return the size as Docker counts a layer: every inode except directories, once.

    Source: moby, pkg/directory/directory_unix.go.
    """
    total, seen = 0, set()
    for _, status in walk(Path(root)):
        if not stat.S_ISDIR(status.st_mode) and (status.st_nlink == 1 or status.st_ino not in seen):
            if status.st_nlink > 1:
                seen.add(status.st_ino)
            total += status.st_size
    return total


def _confine(root: str) -> Helper:
    """Enter ``root`` permanently, and prevent further imports."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES_MAX, _MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0)
    helper = confine(root)
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.path_hooks.clear()
    return helper


def _in_words(error: OSError) -> str:
    """Return the error of a failed call as Go would print it, if it is known which call failed."""
    reason = (error.strerror or str(error)).lower()
    if error.filename2:
        return f"link {os.fsdecode(error.filename)} {os.fsdecode(error.filename2)}: {reason}"
    return f"open {os.fsdecode(error.filename)}: {reason}" if error.filename else reason


def main() -> None:
    """Unpack stdin by the settings in the first argument, and print the result."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the worker must not outlive the node process
    settings = UntarSettings(**json.loads(sys.argv[1]))
    stream = PlainStream(sys.stdin.buffer, settings)
    result: dict[str, object]
    try:
        helper = _confine(settings.root)
        Unpacker(settings, helper).unpack(stream)
        digest = stream.finish()
        helper.close()
        result = {"digest": digest, "plain_bytes": stream.bytes_read, "size_bytes": tree_bytes("/")}
    except Duplicate:
        result = {"error": "duplicates of file paths not supported): ", "kind": "malformed"}
    except MalformedArchive as error:
        result = {"error": f"exit status 1): {error}", "kind": "malformed"}
    except ArchiveTooLarge as error:
        result = {"error": str(error), "kind": "limit"}
    except MemoryError:
        result = {"error": "needs more memory to unpack than is allowed", "kind": "limit"}
    except OSError as error:
        result = {"error": f"exit status 1): {_in_words(error)}", "kind": "io"}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
