"""Worker process that reads and writes a container's files, with the container's file system as its root directory.

The container may run and change its files meanwhile, for example replace a directory by a link.  Because of the root
directory, such a link leads only to the container's own files.  Archives to unpack are not trusted either.
``confinement`` lists the rights that the process drops.  Volumes and bind mounts are mounted as in the container,
read-only ones read-only.

The module is run directly.  Its argument is a JSON object of settings.  An archive is on stdin or stdout, and results
are lines of JSON on stderr.

Source: moby 20.10, daemon/archive.go, container/archive.go, pkg/archive/archive.go (Unpack).
"""

import ctypes
import errno
import json
import os
import posixpath
import signal
import stat
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skep.engine.images.archives.confinement import Helper, confine
from skep.engine.images.archives.pack import Packer, TarWriter, TreeTooLarge, give_up_imports
from skep.engine.images.archives.streams import MalformedArchive
from skep.engine.images.archives.untar import ArchiveTooLarge, PlainStream, Unpacker, UntarSettings
from skep.linux import confined_root
from skep.linux.trees import remove_tree

# Source: linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_GO_MODES = (
    (stat.S_ISDIR, 1 << 31),
    (stat.S_ISLNK, 1 << 27),
    (stat.S_ISFIFO, 1 << 25),
    (stat.S_ISSOCK, 1 << 24),
    (stat.S_ISBLK, 1 << 26),
    (stat.S_ISCHR, 1 << 26 | 1 << 21),
)
_GO_BITS = ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20))


class ImpossibleRequest(Exception):
    """The request is impossible.  The text is Docker's."""


@dataclass
class FilesWorkerSettings:
    """Settings of one worker process."""

    root: str
    """The container's file system."""
    action: str
    """``stat``, ``read``, ``write`` or ``export``."""
    bytes_max: int
    entries_max: int
    spare_bytes: int
    path: str = "/"
    """Path in the container, as requested."""
    binds: list[confined_root.Bind] = field(default_factory=list)
    """Mounts inside the root."""
    keeps_kinds: bool = False
    """Whether ``write`` refuses to replace a directory by a file, or a file by a directory."""
    owner: tuple[int, int] | None = None
    """Owner of all written files, or None for the archive's."""
    namespace: int | None = None
    """Descriptor of the container's kind of user namespace, or None if its users are the machine's."""
    volumes: list[tuple[str, bool]] = field(default_factory=list)
    """Mount points, and whether they are read-only."""
    read_only: bool = False
    """Whether the root file system is read-only."""


def absolute(path: str) -> str:
    """Return ``path`` as an absolute path without ``..``.

    A final slash or dot stays, because it means the target of a link.

    Source: moby, pkg/archive/copy.go (PreserveTrailingDotOrSeparator).
    """
    clean = "/" + posixpath.normpath("/" + path).lstrip("/")
    if posixpath.basename(path) == ".":
        return f"{clean.rstrip('/')}/."
    return f"{clean.rstrip('/')}/" if path.endswith("/") else clean


def base_of(path: str) -> str:
    """Return the last element of an absolute path, like Go's ``filepath.Base``: ``/`` for the root."""
    stripped = path.rstrip("/")
    return posixpath.basename(stripped) or "/"


def go_mode(mode: int) -> int:
    """Convert a file's mode to Go's ``os.FileMode``."""
    return (
        (mode & 0o777)
        | next((bits for is_kind, bits in _GO_MODES if is_kind(mode)), 0)
        | sum(bits for bit, bits in _GO_BITS if mode & bit)
    )


def status_of(path: str) -> dict[str, Any]:
    """Return the status of a path in the form that ``docker cp`` reads.  Raises: OSError."""
    status = os.lstat(path)
    target = os.path.realpath(path) if stat.S_ISLNK(status.st_mode) else ""
    return {
        "name": _shown(base_of(path)),
        "size": status.st_size,
        "mode": go_mode(status.st_mode),
        "mtime_ns": status.st_mtime_ns,
        "link_target": _shown(target),
    }


def _shown(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read(settings: FilesWorkerSettings, path: str) -> None:
    """Write the file or directory at ``path`` to stdout as an archive, named after the last element of its path."""
    packer = Packer(
        TarWriter(_write_all, settings.bytes_max),
        entries_max=settings.entries_max,
        prefix="" if base_of(path) == "/" else base_of(path),
    )
    if stat.S_ISDIR(os.lstat(path).st_mode):
        packer.pack(os.path.realpath(path))
    else:
        packer.pack_file(path)


def export(settings: FilesWorkerSettings) -> None:
    """Write the whole file system to stdout."""
    Packer(TarWriter(_write_all, settings.bytes_max), entries_max=settings.entries_max).pack()


def _write_all(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def write(settings: FilesWorkerSettings, path: str, helper: Helper) -> None:
    """Unpack stdin into the directory at ``path``.  Raises: ImpossibleRequest; MalformedArchive; ArchiveTooLarge;
    OSError.
    """
    target = os.path.realpath(path)
    if not stat.S_ISDIR(os.lstat(target).st_mode):
        raise ImpossibleRequest("extraction point is not a directory")
    inside = [read_only for place, read_only in settings.volumes if _is_below(target, place)]
    if any(inside):
        raise ImpossibleRequest("mounted volume is marked read-only")
    if settings.read_only and not inside:
        raise ImpossibleRequest("container rootfs is marked read-only")
    limits = UntarSettings(
        root="/",
        is_layer=True,
        bytes_max=settings.bytes_max,
        entries_max=settings.entries_max,
        spare_bytes=settings.spare_bytes,
    )
    stream = PlainStream(sys.stdin.buffer, limits)
    Extractor(limits, helper, target, keeps_kinds=settings.keeps_kinds, owner=settings.owner).unpack(stream)
    stream.finish()


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory.rstrip('/')}/")


class Extractor(Unpacker):
    """Extracts an archive's members into a directory that may already contain files."""

    def __init__(
        self,
        settings: UntarSettings,
        helper: Helper,
        target: str,
        *,
        keeps_kinds: bool,
        owner: tuple[int, int] | None,
    ) -> None:
        super().__init__(settings, helper)
        self._target = target
        self._keeps_kinds = keeps_kinds
        self._owner = owner
        self._entries = 0

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if "\0" in member.name or "\0" in member.linkname:
            raise MalformedArchive("archive/tar: invalid tar header")
        self._entries += 1
        if self._entries > self._settings.entries_max:
            raise ArchiveTooLarge(f"holds more than {self._settings.entries_max} entries")
        name = posixpath.normpath(member.name)
        path = posixpath.normpath(f"{self._target}/{name}")
        if not _is_below(path, self._target):
            raise MalformedArchive(f"{_quoted(name)} is outside of {_quoted(self._target)}")
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if self._owner is not None:
            member.uid, member.gid = self._owner
        self._check_link(member, path)
        if self._make_way(member, path, name):
            self._create(archive, member, path)

    def _make_way(self, member: tarfile.TarInfo, path: str, name: str) -> bool:
        """Remove the file that a member of the archive replaces.

        Return False for the target directory itself, which must stay.
        """
        try:
            is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            return True
        if self._keeps_kinds and is_directory and not member.isdir():
            what = f"directory {_quoted(path)} with non-directory"
            raise MalformedArchive(f"cannot overwrite {what} {_quoted(self._target)}")
        if self._keeps_kinds and not is_directory and member.isdir():
            what = f"non-directory {_quoted(path)} with directory"
            raise MalformedArchive(f"cannot overwrite {what} {_quoted(self._target)}")
        if is_directory and name in (".", "/"):
            return False
        if not is_directory:
            os.unlink(path)
        elif not member.isdir():
            remove_tree(Path(path))
        return True

    def _check_link(self, member: tarfile.TarInfo, path: str) -> None:
        """Refuse links out of the directory, as Docker does.

        This is only for compatibility: here, such links would lead to the container's own files.
        """
        if member.issym():
            leads_to = posixpath.normpath(f"{os.path.dirname(path)}/{member.linkname}")
            if not leads_to.startswith(self._target):
                raise MalformedArchive(f"invalid symlink {_quoted(path)} -> {_quoted(member.linkname)}")
        elif member.islnk():
            leads_to = self._link_source(member)
            if not leads_to.startswith(self._target):
                raise MalformedArchive(f"invalid hardlink {_quoted(leads_to)} -> {_quoted(member.linkname)}")

    def _link_source(self, member: tarfile.TarInfo) -> str:
        return posixpath.normpath(f"{self._target}/{member.linkname}")


def _quoted(text: str) -> str:
    """Quote a text like Go's ``%q``."""
    return json.dumps(_shown(text), ensure_ascii=False)


def _say(result: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(result) + "\n")
    sys.stderr.flush()


def _act(settings: FilesWorkerSettings) -> None:
    binds = [confined_root.Bind(*bind) for bind in settings.binds]
    is_reading = settings.action in ("stat", "read", "export")
    root = confined_root.enter(settings.root, binds, read_only=is_reading, namespace=settings.namespace)
    _end_with_parent()  # once more: a change of the user resets it
    helper = confine(root)
    give_up_imports()
    path = absolute(settings.path)
    match settings.action:
        case "stat":
            _say(status_of(path))
        case "read":
            _say(status_of(path))
            read(settings, path)
        case "export":
            export(settings)
        case _:
            write(settings, path, helper)
    helper.close()


def _end_with_parent() -> None:
    """Make the kernel end this process with the node process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Run the action of the settings in the first argument.  The last line on stderr is its result."""
    _end_with_parent()
    try:
        _act(FilesWorkerSettings(**json.loads(sys.argv[1])))
    except ImpossibleRequest as error:
        _say({"error": str(error), "kind": "refused"})
    except MalformedArchive as error:
        _say({"error": f"Error processing tar file(exit status 1): {error}", "kind": "refused"})
    except (ArchiveTooLarge, TreeTooLarge) as error:
        _say({"error": f"the archive {error}, the limit of this node", "kind": "limit"})
    except MemoryError:
        _say({"error": "the archive takes more memory than is allowed", "kind": "limit"})
    except OSError as error:
        is_missing = error.errno == errno.ENOENT
        where = f"{_shown(os.fsdecode(error.filename))}: " if error.filename else ""
        text = f"{where}{(error.strerror or str(error)).lower()}"
        _say({"error": text, "kind": "missing" if is_missing else "refused"})
    else:
        _say({"kind": "done"})


if __name__ == "__main__":
    main()
