"""Linux system calls that Python 3.11 does not have: mounts, namespaces, opening below a root.

Every function raises OSError with the kernel's error number.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from skep.errors import Unimplemented

# Source: linux/mount.h, linux/fs.h (umount flags) and linux/sched.h.
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000


class _Call(IntEnum):
    """Numbers of system calls.  Above 423, they are the same on every architecture."""

    OPEN_TREE = 428
    MOVE_MOUNT = 429
    FSOPEN = 430
    FSCONFIG = 431
    FSMOUNT = 432
    OPENAT2 = 437
    MOUNT_SETATTR = 442


# Source: linux/mount.h: OPEN_TREE_*, MOUNT_ATTR_*.
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOSYMFOLLOW = 1, 2, 4, 0x200000
_MOUNT_ATTR_IDMAP = 0x100000
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
# Source: linux/mount.h, linux/fcntl.h (AT_*) and linux/openat2.h.
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_RESOLVE_IN_ROOT, _RESOLVE_BENEATH, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS = 0x10, 0x08, 0x02, 0x04
_TRIES_MAX = 100
"""Attempts of openat2(2), which fails with EAGAIN after a concurrent rename."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _MountAttributes(ctypes.Structure):
    _fields_ = [
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    ]


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(
    source: str, target: str | Path, type: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    """Call mount(2)."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if type is None else type.encode(),
        ctypes.c_ulong(flags),
        None if data is None else os.fsencode(data),
    )
    _checked(result, f"mount {source} on {target}")


def unmount(target: str | Path, flags: int = MNT_DETACH) -> None:
    """Call umount2(2).  By default the mount disappears immediately and is freed when its last user has ended."""
    _checked(_libc.umount2(os.fsencode(target), flags), f"unmount {target}")


def mount_new(type: str, target: Path, options: Sequence[tuple[str, str]], flags: Sequence[str] = ()) -> None:
    """Mount with fsopen(2) and related calls.

    They take each option separately, so the options together may be longer than a page.  ``flags`` are options without
    a value.
    """
    context = _syscall(_Call.FSOPEN, type.encode(), _FSOPEN_CLOEXEC)
    try:
        for flag in flags:
            _syscall(_Call.FSCONFIG, context, _FSCONFIG_SET_FLAG, flag.encode(), None, 0)
        for key, value in options:
            _syscall(_Call.FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
        _syscall(_Call.FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mounted = _syscall(_Call.FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        _syscall(_Call.MOVE_MOUNT, mounted, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(mounted)


def clone_mount(path: str, *, recursive: bool = False) -> int:
    """Return a descriptor of a detached bind mount of ``path``, with the mounts below it if ``recursive``."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _syscall(_Call.OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def restrict_mount(
    mounted: int, *, recursive: bool = False, read_only: bool = False, follows_links: bool = True
) -> None:
    """Disable devices and set-user-id on an open mount, and writing if ``read_only``.

    Without ``follows_links`` no path can pass a symbolic link inside the mount (ELOOP).  That needs Linux 5.14.
    """
    flags = _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOSUID
    flags |= (_MOUNT_ATTR_RDONLY if read_only else 0) | (0 if follows_links else _MOUNT_ATTR_NOSYMFOLLOW)
    _set_attributes(mounted, _MountAttributes(set=flags), recursive=recursive)


def map_mount(mounted: int, namespace: int) -> None:
    """Map the owners of files on a detached mount by a user namespace.  Raises: OSError: EINVAL: not supported."""
    _set_attributes(mounted, _MountAttributes(set=_MOUNT_ATTR_IDMAP, user_namespace=namespace))


def follow_machine(mounted: int) -> None:
    """Let the mounts of an open tree follow the machine's (slave propagation), which never follow them."""
    _set_attributes(mounted, _MountAttributes(propagation=MS_SLAVE), recursive=True)


def make_read_only(mounted: int, *, recursive: bool = False) -> None:
    """Make an open mount read-only, and the mounts below it if ``recursive``."""
    _set_attributes(mounted, _MountAttributes(set=_MOUNT_ATTR_RDONLY), recursive=recursive)


def _set_attributes(mounted: int, attributes: _MountAttributes, *, recursive: bool = False) -> None:
    where = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    size = ctypes.sizeof(attributes)
    _syscall(_Call.MOUNT_SETATTR, mounted, b"", where, ctypes.byref(attributes), size)


def move_mount(mounted: int, target: str | int) -> None:
    """Attach an open mount to a path, or to an open file or directory."""
    if isinstance(target, int):
        flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
        _syscall(_Call.MOVE_MOUNT, mounted, b"", target, b"", flags)
    else:
        _syscall(_Call.MOVE_MOUNT, mounted, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def pivot_root(new: str, old: str) -> None:
    """Call pivot_root(2)."""
    _checked(_libc.pivot_root(os.fsencode(new), os.fsencode(old)), f"pivot_root {new}")


def unshare(flags: int) -> None:
    """Call unshare(2) for the calling thread."""
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Call setns(2) for the calling thread."""
    _checked(_libc.setns(descriptor, kind), "setns")


def open_in_root(root: Path, path: str, flags: int = os.O_RDONLY) -> int:
    """Open ``path`` as a process with ``root`` as its root directory would.

    Symbolic links, even absolute ones, are followed inside ``root`` and never lead outside.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_in_directory(directory, path, flags)
    finally:
        os.close(directory)


def open_in_directory(directory: int, path: str, flags: int = os.O_RDONLY) -> int:
    """Open ``path`` as ``open_in_root`` does, with an open directory as the root."""
    return _opened(directory, path, flags, _RESOLVE_IN_ROOT)


def open_beneath(root: Path, path: str) -> int:
    """Open ``path`` below ``root``.  Symbolic links are followed if they do not lead outside.

    Raises: OSError: EXDEV: a link (always if absolute) or the path itself leads outside.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _opened(directory, path, os.O_PATH, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    finally:
        os.close(directory)


def open_without_links(directory: int, path: str, flags: int) -> int:
    """Open ``path`` below a directory.  Raises: OSError: ELOOP: it has a symbolic link; EXDEV: it leads outside."""
    return _opened(directory, path, flags, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS)


def _opened(directory: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=0, resolve=resolve)
    for left in reversed(range(_TRIES_MAX)):
        try:
            return _syscall(
                _Call.OPENAT2, directory, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)
            )
        except BlockingIOError:  # a concurrent rename prevented the check
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def _syscall(number: _Call, *arguments: object) -> int:
    if platform.machine() not in ("x86_64", "aarch64", "riscv64", "ppc64le", "s390x", "armv7l"):
        raise Unimplemented(f"system calls of {platform.machine()} are not known here")
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *converted), number.name.lower())


def unmount_if_mounted(target: Path) -> None:
    """Unmount everything at ``target``.  Does nothing if nothing is mounted there.

    ``os.path.ismount`` compares devices and misses a bind mount within one file system, so the kernel decides.
    """
    while True:
        try:
            unmount(target, MNT_DETACH | _UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            if error.errno == errno.EPERM and not os.path.ismount(target):
                return  # without privileges umount2(2) fails before it looks at the path
            raise
