"""The root file system of a container: the image's layers, read-only, below a writable directory.

mount(2) takes all lower directories of an overlay in one option string of at most a page (4 KiB).  Newer system calls
(Linux 6.8) take one directory at a time.  The older call is used if the string is short enough, because it works
everywhere.  If the string is too long, the newer calls are tried first.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from skep.engine.confinement.selinux import mount_option
from skep.errors import FailedPrecondition
from skep.linux.own_user_namespace import is_in_user_namespace
from skep.linux.syscalls import mount, mount_new
from skep.linux.user_namespaces import files_of, mapped_views, mapping
from skep.model.values.user_map import UserMap

_OPTIONS_BYTES_MAX = 4000  # a page, minus what the kernel adds
_REFUSED_BY_OLDER_KERNELS = (errno.ENOSYS, errno.EINVAL, errno.EPERM)


def mount_layers(
    layers: Sequence[Path],
    upper: Path,
    work: Path,
    target: Path,
    users: UserMap | None = None,
    label: str = "",
) -> None:
    """Mount ``layers`` (top first) with changes kept in ``upper``, which has the same parent as ``work``.

    With ``users``, files have the owners that the container's users are on the machine.  On the disk, they keep the
    container's own ids, so that images and changes are the same with and without a mapping.

    ``label`` is the SELinux label of all files, if it is not empty.

    Raises: OSError; FailedPrecondition: more layers than this kernel can take.
    """
    if users is None:
        _mount_layers(layers, upper, work, target, label)
        return
    place = target.with_name(f"{target.name}.views")
    views = mapped_views((upper.parent, *layers), mapping(users.kernel_text), place)
    # The kernel creates the overlay's own files as the user that mounts it.
    with views as (own, *lower), files_of(users.root):
        _mount_layers(lower, own / upper.name, own / work.name, target, label)


def _mount_layers(layers: Sequence[Path], upper: Path, work: Path, target: Path, label: str) -> None:
    options = _options(":".join(map(_escaped, layers)), upper, work, label)
    if len(os.fsencode(options)) <= _OPTIONS_BYTES_MAX:
        mount("overlay", target, "overlay", 0, options)
        return
    lower = [("lowerdir+", str(layer)) for layer in layers]
    others = [("upperdir", str(upper)), ("workdir", str(work)), *([("context", label)] if label else [])]
    try:
        mount_new(
            "overlay", target, [*lower, *others], flags=("userxattr",) if is_in_user_namespace() else ()
        )
    except OSError as error:
        if error.errno not in _REFUSED_BY_OLDER_KERNELS:
            raise
        _mount_relative(layers, upper, work, target, label)


def has(layer: Path, inside: str) -> bool:
    """Return whether a layer itself has a path.  A link in it does not count, because it may lead outside."""
    *parents, name = inside.split("/")
    directory = layer
    try:
        for parent in parents:
            directory /= parent
            if not stat.S_ISDIR(directory.lstat().st_mode):
                return False
        (directory / name).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _options(lower: str, upper: Path, work: Path, label: str) -> str:
    words = [f"lowerdir={lower}", f"upperdir={_escaped(upper)}", f"workdir={_escaped(work)}"]
    # Overlayfs with userxattr keeps its marks where root of a user namespace may write them.
    marks = "userxattr" if is_in_user_namespace() else ""
    return ",".join(filter(None, (*words, marks, mount_option(label))))


def _mount_relative(layers: Sequence[Path], upper: Path, work: Path, target: Path, label: str) -> None:
    """Mount many layers on older kernels: name each layer by a symbolic link with a short name in the parent of
    ``work``.
    """
    links = work.parent / "l"
    links.mkdir(exist_ok=True)
    for number, layer in enumerate(layers):
        link = links / str(number)
        link.unlink(missing_ok=True)
        link.symlink_to(layer)
    directory = os.open(links, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # /proc/self/fd/N shortens the absolute path without a change of the working directory.
        names = ":".join(f"/proc/self/fd/{directory}/{number}" for number in range(len(layers)))
        options = _options(names, upper, work, label)
        if len(options) > _OPTIONS_BYTES_MAX:
            raise FailedPrecondition(f"{len(layers)} layers are more than this kernel can mount")
        mount("overlay", target, "overlay", 0, options)
    finally:
        os.close(directory)


def _escaped(path: Path) -> str:
    """Escape a path for an option string, where colons and commas are separators."""
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
