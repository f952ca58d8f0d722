"""Adapts bind mounts to crun, so that they have the same flags as under runc.

* runc keeps the flags of the source's mount (noexec, nosuid, nodev, read-only).  crun mounts again with the requested
  flags only, so they are requested explicitly.
* crun 1.8 makes only directories recursively read-only (``rro``).  A file has no mounts below, so ``ro`` is the same.

Source: crun 1.8.1, src/libcrun/linux.c (do_mount, do_mounts).
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

_FLAGS: Final = {
    os.ST_RDONLY: ("ro", "rw"),
    os.ST_NOSUID: ("nosuid", "suid"),
    os.ST_NODEV: ("nodev", "dev"),
    os.ST_NOEXEC: ("noexec", "exec"),
}
"""Options by flag of a mount: the option that sets the flag, and the option by which a user clears it."""


def adapt(mounts: Iterable[dict[str, Any]]) -> None:
    """Adapt the bind mounts of a runtime specification in place.  Blocks."""
    for mount in mounts:
        if mount["type"] == "bind":
            with suppress(OSError):  # crun reports a missing source
                _adapt(mount["source"], mount["options"])


def _adapt(source: str, options: list[str]) -> None:
    found = os.statvfs(source).f_flag
    for flag, (setting, clearing) in _FLAGS.items():
        if found & flag and setting not in options and clearing not in options:
            options.append(setting)
    if "rro" in options and not os.path.isdir(source):
        options.remove("rro")
