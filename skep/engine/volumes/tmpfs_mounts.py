"""Mounts memory file systems of containers (``--tmpfs``, ``--mount type=tmpfs``) on the node, for runc to bind-mount.

runc does not mount them itself, because the tmpfs would get the mode of the directory that it covers.  (Since
1.1.9, it does so only if no mode was requested.)  At a container's second start, that directory always exists, because
runc has created it at the first start.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from skep.engine.confinement import selinux
from skep.engine.containers.container import Container, MountPoint
from skep.errors import FailedPrecondition, InvalidArgument
from skep.linux import syscalls
from skep.linux.mounting import parse_options
from skep.model.values.user_map import UserMap

DEFAULT_MODE: Final = 0o1777
"""Mode of a tmpfs if no mode is requested and the image does not have the directory."""

_TYPE = "tmpfs"
_PROPAGATIONS: Final = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
_FLAGS: Final = frozenset(
    {
        *(
            "defaults",
            "ro",
            "rw",
            "suid",
            "nosuid",
            "dev",
            "nodev",
            "exec",
            "noexec",
            "sync",
            "async",
            "dirsync",
        ),
        *("mand", "nomand", "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime"),
        *("strictatime", "nostrictatime"),
    }
)
_VALUES: Final = frozenset({"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"})


def check_options(words: Iterable[str]) -> None:
    """Raise InvalidArgument, in Docker's words, for invalid options, and for options such as ``bind`` that would make
    it another kind of mount.

    Source: moby/sys, mount (MergeTmpfsOptions).
    """
    for word in words:
        name, separator, _ = word.partition("=")
        if not (name in _VALUES if separator else name in (*_FLAGS, *_PROPAGATIONS)):
            parts = " ".join(f'"{part}"' for part in word.split("=", 1))
            raise InvalidArgument(f"invalid tmpfs option [{parts}]")


def placed(point: MountPoint, number: int, place: Path) -> MountPoint:
    """Return ``point`` for runc, with its source replaced by the path at which ``mount_all`` mounts the tmpfs.

    runc's bind mount has the flags of its source, including read-only, unless other flags are given to runc.
    """
    chosen = [word for word in point.options if word in _PROPAGATIONS]
    return MountPoint(
        type="bind",
        destination=point.destination,
        source=str(place / str(number)),
        propagation=chosen[-1] if chosen else "",
        internal=True,
    )


def mount_all(container: Container, place: Path, mode_of: Callable[[str], int]) -> None:
    """Mount the memory file systems among the container's mounts, each empty and by its number below ``place``.

    Args:
        mode_of: Returns the mode for a mount point without a mode option.

    Raises: OSError; FailedPrecondition: the kernel refuses the options.
    """
    users, label = container.users, selinux.mount_option(container.config.mount_label)
    for number, point in enumerate(container.config.mounts):
        if point.type != _TYPE:
            continue
        target = place / str(number)
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        syscalls.unmount_if_mounted(target)  # left by a failed start
        words = [word for word in point.options if word not in _PROPAGATIONS]
        if not any(word.startswith("mode=") for word in words):
            words.append(f"mode={mode_of(point.destination):o}")
        if point.read_only:
            words.append("ro")
        if users is not None:
            words = owned_words(words, users)
        flags, data = parse_options(",".join(words))
        try:
            syscalls.mount(_TYPE, target, _TYPE, flags, ",".join(filter(None, (data, label))))
        except OSError as error:
            raise FailedPrecondition(
                f"cannot mount a tmpfs on {point.destination} with the options {','.join(words)}: {error.strerror}"
            ) from error


def owned_words(words: Sequence[str], users: UserMap) -> list[str]:
    """Return mount options whose owner is the container's: its root unless the options name another one."""
    owner = {"uid": 0, "gid": 0}
    for word in words:
        name, _, value = word.partition("=")
        if name in owner and value.isascii() and value.isdigit():
            owner[name] = int(value)
    others = [word for word in words if word.partition("=")[0] not in owner]
    return [*others, f"uid={users.uid(owner['uid'])}", f"gid={users.gid(owner['gid'])}"]
