"""The worker that unpacks a tar stream: a process of its own, chrooted into the directory it fills.

Archives are hostile input, so they are unpacked inside a chroot: an absolute name, ``..``, a symbolic
link to ``/etc`` or a hard link can reach no further than the layer itself, however they are combined, and there is
no check that could race.  This is also how Docker confines them, hence what Docker accepts is accepted here.  What else
it gives up is in ``confinement``.

Nothing is imported after the chroot, or the archive could bring modules of its own.  The module is run by itself: one
JSON object of settings as argument, the stream on stdin, one JSON object of results on stdout.

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

from skep.engine.images.confinement import Helper, confine
from skep.engine.images.streams import Malformed, plain_chunks
from skep.linux.trees import remove_tree, walk

_CHUNK_BYTES = 1 << 20
_SPACE_CHECK_BYTES = 64 << 20
_MEMORY_BYTES_MAX = 2 << 30
_PR_SET_PDEATHSIG = 1
_HEADER_BYTES_MAX = 1 << 20
"""Of a long name or a PAX header, as in Go."""
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
_OVERLAY_XATTRS = "trusted.overlay."
"""What overlayfs itself reads: an archive may not forge it (a redirect shows another layer's directory)."""


class Duplicate(Malformed):
    """Two members have one name: Docker refuses what it could not put together again byte for byte."""


class LimitExceeded(Exception):
    """The archive is larger than this node takes."""


@dataclass
class Settings:
    """``root``: directory to fill.  ``is_layer``: whiteouts, devices and owners count; else plain files only.

    ``has_whiteouts``: a layer's; without, a name that begins with ``.wh.`` is one like others, and of two members with
    one name the later counts (contexts of builds).

    ``bytes_max`` bounds both the plain tar and what is written; ``spare_bytes`` stay free on the file system.
    ``copy_to``: a file that receives the plain tar, zstd-compressed (empty: none).
    """

    root: str
    is_layer: bool
    bytes_max: int
    entries_max: int
    spare_bytes: int
    copy_to: str = ""
    has_whiteouts: bool = True


class PlainStream:
    """The plain tar: decompressed whatever it came in, counted, hashed, and copied on the way.

    It is read forwards.  ``tarfile`` has a reader for such streams (mode ``r|``), which copies what is left of its
    buffer for each header and file.
    """

    def __init__(self, source: BinaryIO, settings: Settings) -> None:
        self._hash = hashlib.sha256()
        self._settings = settings
        self._chunks = plain_chunks(source)
        self._chunk = b""
        self._position = 0
        self._copy = _compressed_copy(settings.copy_to) if settings.copy_to else None
        self.bytes_read = 0

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end."""
        pieces = []
        while size and self._has_more():
            pieces.append(self._chunk[self._position : self._position + size])
            self._position += len(pieces[-1])
            size -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def tell(self) -> int:
        """How far the tar was read, in bytes."""
        return self.bytes_read - len(self._chunk) + self._position

    def seek(self, position: int) -> None:
        """Go on to ``position``, or to the end if that comes first.  Raises: tarfile.StreamError: it is behind."""
        distance = position - self.tell()
        if distance < 0:
            raise tarfile.StreamError("seeking backwards is not allowed")
        while distance and self._has_more():
            step = min(distance, len(self._chunk) - self._position)
            self._position += step
            distance -= step

    def _has_more(self) -> bool:
        """Whether there is a chunk with something left."""
        while self._position == len(self._chunk):
            chunk = next(self._chunks, b"")
            if not chunk:
                return False
            self.bytes_read += len(chunk)
            if self.bytes_read > self._settings.bytes_max:
                raise LimitExceeded(f"unpacks to more than {self._settings.bytes_max} bytes")
            self._hash.update(chunk)
            if self._copy is not None:
                self._copy.write(chunk)
            self._chunk, self._position = chunk, 0
        return True

    def finish(self) -> str:
        """Read what follows the archive's end marker (it belongs to the digest); the digest of it all."""
        while self._has_more():
            self._position = len(self._chunk)
        if self._copy is not None:
            self._copy.close()
        return "sha256:" + self._hash.hexdigest()


_Truncated = tarfile.TruncatedHeaderError  # type: ignore[attr-defined]
_Invalid = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
_Subsequent = tarfile.SubsequentHeaderError  # type: ignore[attr-defined]


class Header(tarfile.TarInfo):
    """A header that is right or an error: the standard reader takes a broken one for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """The next header.  Raises: Malformed, in the words of Go's archive/tar."""
        try:
            return super().fromtarfile(tarfile)
        except _Truncated as error:
            raise Malformed("unexpected EOF") from error
        except _Invalid as error:
            raise Malformed("archive/tar: invalid tar header") from error
        except _Subsequent as error:  # a header after a long name; only the text names the kind of error
            is_invalid = str(error) in ("bad checksum", "invalid header")
            raise Malformed("archive/tar: invalid tar header" if is_invalid else "unexpected EOF") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        """The standard reader reads a header's length into memory, however large."""
        if self.type in _LONG_HEADERS and self.size > _HEADER_BYTES_MAX:
            raise Malformed("archive/tar: header field too long")
        found: tarfile.TarInfo | None = super()._proc_member(archive)  # type: ignore[misc]
        return found


class Unpacker:
    """Writes the members of one archive below ``/`` (of the chroot)."""

    def __init__(self, settings: Settings, helper: Helper) -> None:
        self._settings = settings
        self._helper = helper
        self._written_bytes = 0
        self._checked_bytes = 0
        self._names: set[str] = set()
        self._members = 0
        self._directories: list[tuple[str, tarfile.TarInfo]] = []

    def unpack(self, stream: PlainStream) -> None:
        """Everything in ``stream``.  Raises: Malformed, LimitExceeded, OSError."""
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
            raise Malformed("unexpected EOF") from error
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise Malformed(f"archive/tar: invalid tar header ({error})") from error
        for path, member in reversed(self._directories):
            _set_times(path, member)  # last, since writing into a directory moves its time

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if "\0" in member.name or "\0" in member.linkname:
            raise Malformed("archive/tar: invalid tar header")
        name = os.path.normpath(member.name)
        if name in self._names and self._settings.has_whiteouts:
            raise Duplicate
        self._names.add(name)
        self._members += 1
        if self._members > self._settings.entries_max:
            raise LimitExceeded(f"holds more than {self._settings.entries_max} entries")
        path = os.path.normpath("/" + member.name.lstrip("/"))
        if path == "/":
            return  # Docker leaves the layer's own directory as it is
        if not os.path.lexists(os.path.dirname(path)):
            os.makedirs(os.path.dirname(path), mode=0o755)
        is_changes = self._settings.is_layer and self._settings.has_whiteouts
        if is_changes and self._whiteout(path, member):
            return
        _make_way(path, member)
        self._create(archive, member, path)

    def _whiteout(self, path: str, member: tarfile.TarInfo) -> bool:
        """``.wh.x`` becomes what overlayfs reads as "x is not here"; ``.wh..wh..opq`` hides all below."""
        directory, name = os.path.split(path)
        if name == _OPAQUE:
            self._helper.mark_opaque(directory)
            return True
        if not name.startswith(_WHITEOUT):
            return False
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            place = os.path.normpath(os.path.join(directory, hidden))
            raise Malformed(f'failed to mknod("{place}", S_IFCHR, 0): file exists')
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
            return  # the other name carries owner, mode and times
        elif member.issym():
            os.symlink(member.linkname, path)
        elif not self._settings.is_layer:
            return  # whatever needs it will not find it
        elif member.isfifo():
            os.mkfifo(path)
        elif member.ischr() or member.isblk():
            # As in Docker, the node exists in the image; the container's device rules decide on its use.
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
        else:
            raise Malformed(f"unhandled tar header type {ord(member.type)}")
        if not self._settings.is_layer:
            return
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
        _set_xattrs(path, member)
        if not member.issym():
            os.chmod(path, mode)  # after chown, which clears set-user-id
        if not member.isdir():
            _set_times(path, member)

    def _link_source(self, member: tarfile.TarInfo) -> str:
        """The path that a hard link gives another name."""
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
        """Count what is about to be written (a sparse member is small in the tar and large here)."""
        self._written_bytes += size
        if self._written_bytes > self._settings.bytes_max:
            raise LimitExceeded(f"unpacks to more than {self._settings.bytes_max} bytes")
        if self._written_bytes - self._checked_bytes >= _SPACE_CHECK_BYTES:
            self._checked_bytes = self._written_bytes
            space = os.statvfs("/")
            if space.f_bavail * space.f_frsize < self._settings.spare_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _next_member(
    archive: tarfile.TarFile, stream: PlainStream, last: tarfile.TarInfo | None
) -> tarfile.TarInfo | None:
    """The member after ``last``; None: there is none.

    An archive may end where the content of its last file does, as that of ``docker build -f -``, which is never closed:
    Go's reader misses neither the padding nor the end marker.
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
    """Remove what ``member`` replaces; a directory that meets a directory is kept and gets its metadata."""
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
        if name.startswith(_OVERLAY_XATTRS):
            continue
        try:
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
        except OSError as error:
            # The file system does not support this kind: Docker ignores it, too.
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
    """Nanoseconds of a PAX record; None: there is none.

    What is no decimal number, and what the kernel has no time for, becomes the epoch, as in Docker.  A number with an
    exponent is none in PAX; one of six digits would be worked out to a million.
    """
    if record is None:
        return None
    time = _TIME.fullmatch(record)
    if time is None:
        return 0
    nanoseconds = int(time[1]) * 1_000_000_000 + int((time[2] or "")[:9].ljust(9, "0"))
    return nanoseconds if nanoseconds < 1 << 63 else 0


def _whole_seconds(seconds: float) -> int:
    """Nanoseconds of the plain header's time."""
    return int(seconds) * 1_000_000_000 if 0 <= seconds < 9.2e9 else 0


def tree_bytes(root: str) -> int:
    """Size as Docker counts a layer: every inode that is no directory, once.

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
    """Enter ``root`` for good, able to import nothing more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES_MAX, _MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0)
    helper = confine(root)
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.path_hooks.clear()
    return helper


def _in_words(error: OSError) -> str:
    """A failed call as Go would print it, as far as it is known which one failed."""
    reason = (error.strerror or str(error)).lower()
    if error.filename2:
        return f"link {os.fsdecode(error.filename)} {os.fsdecode(error.filename2)}: {reason}"
    return f"open {os.fsdecode(error.filename)}: {reason}" if error.filename else reason


def main() -> None:
    """Unpack stdin as the settings in the first argument say; print the result."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no writer outlives the node process
    settings = Settings(**json.loads(sys.argv[1]))
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
    except Malformed as error:
        result = {"error": f"exit status 1): {error}", "kind": "malformed"}
    except LimitExceeded as error:
        result = {"error": str(error), "kind": "limit"}
    except MemoryError:
        result = {"error": "takes more memory to unpack than is allowed", "kind": "limit"}
    except OSError as error:
        result = {"error": f"exit status 1): {_in_words(error)}", "kind": "io"}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
