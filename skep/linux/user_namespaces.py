"""User namespaces, and mounts on which files have other owners (id-mapped mounts).

An id-mapped mount shows a file of the disk's user 0 with the owner to which a user namespace maps its user 0, and a
file that this owner creates has the owner 0 on the disk.  Overlays can have such mounts as layers since Linux 5.19.
A process may create files there only if its own user is mapped, which root is not.

Source: mount_setattr(2), user_namespaces(7).
"""

import ctypes
import errno
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

from skep.linux import syscalls

KernelText = tuple[str, str]
"""The contents of ``uid_map`` and ``gid_map``."""

CLONE_NEWUSER: Final = 0x10000000
"""Source: linux/sched.h."""
_CAPABILITY_VERSION_3: Final = 0x20080522
"""Source: linux/capability.h."""
_PROBE: Final = ("0 100000 65536\n", "0 100000 65536\n")
"""Any mapping, to find out whether a file system can be mapped."""
_UNSUPPORTED: Final = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def process_in(text: KernelText, *, has_network: bool = False, joined: str = "") -> Iterator[int]:
    """Yield the pid of a process in a new user namespace with these ids.

    Args:
        has_network: Whether it is also in a new network namespace, which belongs to its user namespace.
        joined: Path of an existing user namespace that it joins instead.

    Raises: OSError: the kernel refuses, or ``unshare`` is missing.
    """
    enter_users = ("nsenter", f"--user={joined}", "unshare") if joined else ("unshare", "--user")
    command = (*enter_users, *(["--net"] if has_network else []), "sh", "-c", "echo; read line")
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PATH": _PATH},
    ) as process:
        assert process.stdin is not None, "it ends with this pipe"
        assert process.stdout is not None, "it writes a line once it has its namespaces"
        assert process.stderr is not None, "it writes why it has none"
        if not process.stdout.readline():
            reason = process.stderr.read(1000).decode(errors="replace").strip()
            raise OSError(errno.EPERM, f"no user namespace: {reason}")
        for name, ids in zip(("uid_map", "gid_map"), text, strict=True) if not joined else ():
            Path(f"/proc/{process.pid}/{name}").write_text(ids)
        yield process.pid
        process.stdin.close()


_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@cache
def mapping(text: KernelText) -> int:
    """Return a descriptor of a user namespace with these ids, which this process keeps.  Raises: OSError."""
    with process_in(text) as pid:
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def mapped_mount(path: str, namespace: int, *, recursive: bool = False) -> int:
    """Return a descriptor of a detached id-mapped mount of ``path``.

    Mounts below it are there if ``recursive``, and are not mapped.

    Raises: OSError: EINVAL: its file system does not support that.
    """
    mounted = syscalls.clone_mount(path, recursive=recursive)
    try:
        syscalls.map_mount(mounted, namespace)
    except BaseException:
        os.close(mounted)
        raise
    return mounted


def open_mapped_if_possible(path: str, namespace: int) -> tuple[int, bool]:
    """Return a descriptor of a detached mount of ``path``, id-mapped if its file system can be, and whether it is.

    It has the mounts below ``path``, with the owners that they have on the machine.  Raises: OSError.
    """
    try:
        return mapped_mount(path, namespace, recursive=True), True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return syscalls.clone_mount(path, recursive=True), False


@contextmanager
def mapped_views(paths: Sequence[Path], namespace: int, place: Path) -> Iterator[list[Path]]:
    """Mount each path id-mapped below ``place`` for the block, and yield the mount points.  Raises: OSError."""
    with ExitStack() as stack:
        found = []
        for number, path in enumerate(paths):
            target = place / str(number)
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            syscalls.unmount_if_mounted(target)  # left by a killed process
            mounted = mapped_mount(str(path), namespace)
            try:
                syscalls.move_mount(mounted, str(target))
            finally:
                os.close(mounted)
            stack.callback(syscalls.unmount_if_mounted, target)
            found.append(target)
        yield found


@contextmanager
def files_of(owner: tuple[int, int]) -> Iterator[None]:
    """Let this thread create files as ``owner`` (user, group) in the block, with root's other rights.

    Raises: OSError.
    """
    uid, gid = owner
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        _raise_capabilities()  # a change of the user from root drops those about files
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


def enter(namespace: int) -> None:
    """Enter a user namespace as its root.  The process must have only one thread.  Raises: OSError."""
    syscalls.setns(namespace, CLONE_NEWUSER)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def mapping_problem(directory: Path) -> str:
    """Return why containers with mapped users cannot have their files below ``directory``, or "".

    Tries an overlay with id-mapped layers there.  Blocks.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".idmap-") as name:
            place = Path(name)
            for part in ("lower", "own/upper", "own/work", "root"):
                (place / part).mkdir(parents=True)
            owner = tuple(int(ids.split()[1]) for ids in _PROBE)
            with mapped_views((place / "lower", place / "own"), mapping(_PROBE), place / "views") as views:
                options = f"lowerdir={views[0]},upperdir={views[1]}/upper,workdir={views[1]}/work"
                with files_of((owner[0], owner[1])):
                    syscalls.mount("overlay", place / "root", "overlay", 0, options)
            try:
                if (place / "root").stat().st_uid != owner[0]:
                    return "the kernel does not map the layers of overlays"
                if os.statvfs(place / "root").f_flag & os.ST_RDONLY:
                    return "overlays are read-only"
            finally:
                syscalls.unmount_if_mounted(place / "root")
                with suppress(OSError):
                    (place / "own" / "work" / "work").rmdir()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _raise_capabilities() -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)
    if _libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    _, low, low_inherited, _, high, high_inherited = struct.unpack("=6I", sets.raw)
    raised = struct.pack("=6I", low, low, low_inherited, high, high, high_inherited)
    if _libc.capset(header, ctypes.create_string_buffer(raised)):
        raise OSError(ctypes.get_errno(), "capset")
