"""Keeps the flags of a bind mount's source, where a runtime would drop them or the kernel would refuse the mount."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final

_MOUNT_FLAGS: Final = {
    os.ST_RDONLY: ("ro", "rw"),
    os.ST_NOSUID: ("nosuid", "suid"),
    os.ST_NODEV: ("nodev", "dev"),
    os.ST_NOEXEC: ("noexec", "exec"),
}
"""Options by flag of a mount: the option that sets the flag, and the option by which a user clears it."""


def _flags_at(path: str) -> int:
    """Return the flags of the mount that has ``path`` (``statvfs``).  Raises: OSError."""
    return os.statvfs(path).f_flag


def adapt_to_crun(mounts: Iterable[dict[str, Any]], flags_at: Callable[[str], int] = _flags_at) -> None:
    """Adapt bind mounts to crun in place, so that they have the same flags as under runc.  Blocks.

    runc keeps the flags of the source's mount (noexec, nosuid, nodev, read-only).  crun mounts again with the requested
    flags only, so they are requested explicitly.  crun 1.8 makes only directories recursively read-only (``rro``).  A
    file has no mounts below, so ``ro`` is the same.

    Source: crun 1.8.1, src/libcrun/linux.c (do_mount, do_mounts).
    """
    mounts = [mount for mount in mounts if mount["type"] == "bind"]
    request_flags(mounts, flags_at)
    for mount in mounts:
        if "rro" in mount["options"] and not os.path.isdir(mount["source"]):
            mount["options"].remove("rro")


def request_flags(mounts: Iterable[dict[str, Any]], flags_at: Callable[[str], int] = _flags_at) -> None:
    """Request the flags of the sources of bind mounts explicitly, in place.  Blocks.

    In a user namespace, a mount that was made outside keeps its flags: runc cannot make it read-only without them.

    Source: moby, daemon/oci_linux.go (getUnprivilegedMountFlags).
    """
    for mount in mounts:
        if mount["type"] != "bind":
            continue
        with suppress(OSError):  # the runtime reports a missing source
            found, options = flags_at(mount["source"]), mount["options"]
            for flag, (setting, clearing) in _MOUNT_FLAGS.items():
                if found & flag and setting not in options and clearing not in options:
                    options.append(setting)
