"""Confines a process to a directory tree as its root, without access to the rest of the machine.

Used by processes that work on files written by a container: links cannot lead outside, devices cannot be opened, and
the mounts end with the process.  Needs Linux 5.12 (``mount_setattr``).
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from skep.linux import syscalls


class Bind(NamedTuple):
    """A file or directory of the machine that is visible at ``target``, an absolute path in the tree.

    ``below`` selects a path inside ``source``.  Links in it cannot lead outside.
    """

    source: str
    target: str
    read_only: bool = False
    below: str = ""


def enter(root: str, binds: Sequence[Bind] = (), *, read_only: bool = False) -> str:
    """Make ``root`` this process's root directory, in a new mount namespace, with ``binds`` mounted in it.

    Targets are resolved inside the tree, and missing ones are created.  The process must have only one thread.

    Args:
        read_only: Make everything below ``root`` read-only.

    Returns: The path of the tree from now on: ``/``, or ``root`` if the kernel does not let processes change their
    root.

    Raises: OSError: a source is missing, a target cannot be created, or permission is missing.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    # Slave propagation: mounts that the machine unmounts meanwhile are also unmounted here.
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    sources = [_cloned(bind) for bind in binds]
    tree = syscalls.clone_mount(root)
    syscalls.restrict_mount(tree)
    syscalls.move_mount(tree, root)
    for bind, source in zip(binds, sources, strict=True):
        syscalls.restrict_mount(source, recursive=True, read_only=bind.read_only)
        _bind(tree, source, bind.target)
        os.close(source)
    if read_only:
        syscalls.restrict_mount(tree, read_only=True)
    os.fchdir(tree)
    os.close(tree)
    try:
        syscalls.pivot_root(".", ".")
    except OSError:
        return root  # the machine's root is an initial RAM file system
    syscalls.unmount(".")
    os.chdir("/")
    return "/"


def _cloned(bind: Bind) -> int:
    if not bind.below:
        return syscalls.clone_mount(bind.source, recursive=True)
    part = syscalls.open_beneath(Path(bind.source), bind.below)
    try:
        return syscalls.clone_mount(f"/proc/self/fd/{part}", recursive=True)
    finally:
        os.close(part)


def _bind(tree: int, source: int, target: str) -> None:
    try:
        place = syscalls.open_in_directory(tree, target, os.O_PATH)
    except FileNotFoundError:
        _make(tree, target, is_directory=_is_directory(source))
        place = syscalls.open_in_directory(tree, target, os.O_PATH)
    try:
        syscalls.move_mount(source, place)
    finally:
        os.close(place)


def _is_directory(descriptor: int) -> bool:
    try:
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_PATH | os.O_DIRECTORY))
    except NotADirectoryError:
        return False
    return True


def _make(tree: int, path: str, *, is_directory: bool) -> None:
    """Create a file or directory with its parents, in a child process that has ``tree`` as its root."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.fchdir(tree)
            os.chroot(".")
            os.umask(0o022)
            os.makedirs(path if is_directory else os.path.dirname(path) or "/", exist_ok=True)
            if not is_directory:
                with suppress(FileExistsError):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            status = 0
        finally:
            os._exit(status)
    os.waitpid(child, 0)
