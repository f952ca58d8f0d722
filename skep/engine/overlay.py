"""The root file system of a container: the image's layers, read-only, under a directory of its own.

overlayfs takes the lower directories in one option string of at most a page (4 KiB) by mount(2); the newer
calls take one directory at a time (Linux 6.8).  The newer way is tried first for many layers, the older one
otherwise, since it works everywhere.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from skep.errors import FailedPrecondition
from skep.linux.syscalls import mount, mount_new

_OPTIONS_BYTES_MAX = 4000  # a page, less what the kernel adds
_REFUSED_BY_OLDER_KERNELS = (errno.ENOSYS, errno.EINVAL, errno.EPERM)


def mount_layers(layers: Sequence[Path], upper: Path, work: Path, target: Path) -> None:
    """Mount ``layers`` (top first) with changes kept in ``upper``.

    Raises: OSError; FailedPrecondition: more layers than this kernel can take.
    """
    options = (
        f"lowerdir={':'.join(map(_escaped, layers))},upperdir={_escaped(upper)},workdir={_escaped(work)}"
    )
    if len(os.fsencode(options)) <= _OPTIONS_BYTES_MAX:
        mount("overlay", target, "overlay", 0, options)
        return
    lower = [("lowerdir+", str(layer)) for layer in layers]
    try:
        mount_new("overlay", target, [*lower, ("upperdir", str(upper)), ("workdir", str(work))])
    except OSError as error:
        if error.errno not in _REFUSED_BY_OLDER_KERNELS:
            raise
        _mount_relative(layers, upper, work, target)


def _mount_relative(layers: Sequence[Path], upper: Path, work: Path, target: Path) -> None:
    """The way of older kernels: short names by symbolic links in ``work``'s parent, one digit set per layer."""
    links = work.parent / "l"
    links.mkdir(exist_ok=True)
    for number, layer in enumerate(layers):
        link = links / str(number)
        link.unlink(missing_ok=True)
        link.symlink_to(layer)
    directory = os.open(links, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # /proc/self/fd/N is a way to a short absolute path without changing the working directory.
        names = ":".join(f"/proc/self/fd/{directory}/{number}" for number in range(len(layers)))
        options = f"lowerdir={names},upperdir={_escaped(upper)},workdir={_escaped(work)}"
        if len(options) > _OPTIONS_BYTES_MAX:
            raise FailedPrecondition(f"{len(layers)} layers are more than this kernel can mount")
        mount("overlay", target, "overlay", 0, options)
    finally:
        os.close(directory)


def _escaped(path: Path) -> str:
    """A path in an option string, where colons and commas separate."""
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
