"""Confines a process to a directory tree as its root, without access to the rest of the machine.

Used by processes that work on files written by a container: links cannot lead outside, devices cannot be opened, and
the mounts end with the process.  Needs Linux 5.12 (``mount_setattr``).
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from skep.linux import syscalls, user_namespaces


class Bind(NamedTuple):
    """A file or directory of the machine that is visible at ``target``, an absolute path in the tree.

    ``below`` selects a path inside ``source``.  Links in it cannot lead outside.  ``is_mapped`` maps the owners of its
    files by the user namespace of ``enter``, if its file system supports that.
    """

    source: str
    target: str
    read_only: bool = False
    below: str = ""
    is_mapped: bool = False


def enter(
    root: str, binds: Sequence[Bind] = (), *, read_only: bool = False, namespace: int | None = None
) -> str:
    """Make ``root`` this process's root directory, in a new mount namespace, with ``binds`` mounted in it.

    Targets are resolved inside the tree, and missing ones are created.  The process must have only one thread.

    Args:
        read_only: Make everything below ``root`` read-only.
        namespace: A user namespace in whose ids ``root`` has its owners.  The process enters it as its root.

    Returns: The path of the tree from now on: ``/``, or ``root`` if the kernel does not let processes change their
    root.

    Raises: OSError: a source is missing, a target cannot be created, or permission is missing.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    # Slave propagation: mounts that the machine unmounts meanwhile are also unmounted here.
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    sources = [_cloned(bind, namespace) for bind in binds]
    tree = syscalls.clone_mount(root)
    syscalls.restrict_mount(tree)
    syscalls.move_mount(tree, root)
    for bind, source in zip(binds, sources, strict=True):
        syscalls.restrict_mount(source, recursive=True, read_only=bind.read_only)
        _bind(tree, source, bind.target, namespace)
        os.close(source)
    if read_only:
        syscalls.restrict_mount(tree, read_only=True)
    os.fchdir(tree)
    os.close(tree)
    try:
        syscalls.pivot_root(".", ".")
    except OSError:
        place = root  # the machine's root is an initial RAM file system
    else:
        syscalls.unmount(".")
        os.chdir("/")
        place = "/"
    if namespace is not None:
        user_namespaces.enter(namespace)
    return place


def _cloned(bind: Bind, namespace: int | None) -> int:
    wanted = namespace if bind.is_mapped else None
    if not bind.below:
        return _clone(bind.source, wanted)
    part = syscalls.open_beneath(Path(bind.source), bind.below)
    try:
        return _clone(f"/proc/self/fd/{part}", wanted)
    finally:
        os.close(part)


def _clone(path: str, namespace: int | None) -> int:
    if namespace is not None:
        with suppress(OSError):  # its file system cannot be mapped: the container sees it as it is
            return user_namespaces.mapped_mount(path, namespace, recursive=True)
    return syscalls.clone_mount(path, recursive=True)


def _bind(tree: int, source: int, target: str, namespace: int | None) -> None:
    try:
        place = syscalls.open_in_directory(tree, target, os.O_PATH)
    except FileNotFoundError:
        _make(tree, target, namespace, is_directory=_is_directory(source))
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


def _make(tree: int, path: str, namespace: int | None, *, is_directory: bool) -> None:
    """Create a file or directory with its parents, in a child process that has ``tree`` as its root."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.fchdir(tree)
            os.chroot(".")
            if namespace is not None:
                user_namespaces.enter(namespace)
            os.umask(0o022)
            os.makedirs(path if is_directory else os.path.dirname(path) or "/", exist_ok=True)
            if not is_directory:
                with suppress(FileExistsError):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            status = 0
        finally:
            os._exit(status)
    os.waitpid(child, 0)
