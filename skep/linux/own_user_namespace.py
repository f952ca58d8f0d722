"""Facts about the user namespace of this process.

A rootless node runs inside RootlessKit: as root of a user namespace that belongs to an ordinary user, with mount,
network and process namespaces of its own.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_UID_MAP = Path("/proc/self/uid_map")
_ALL_IDS = str(2**32 - 1)
_STATE = "ROOTLESSKIT_STATE_DIR"
"""Variable that RootlessKit sets for its child.  Source: rootlesskit, pkg/child/child.go; moby, pkg/rootless."""
LOWEST_PORT = "SKEP_ROOTLESS_PORTS_FROM"
"""Variable with the machine's net.ipv4.ip_unprivileged_port_start, which its namespaces do not show."""


def is_in_user_namespace(uid_map: Path = _UID_MAP) -> bool:
    """Return whether this process runs in a user namespace.

    There, root and its containers may have only 200 keys together.  So the containers of such a node share a session
    keyring.  With a keyring for each, the two hundredth container would not start.
    """
    try:
        return uid_map.read_text().split() != ["0", "0", _ALL_IDS]
    except OSError:
        return False


@cache
def overlay_prefix() -> str:
    """Return the name prefix of overlayfs's own attributes, which the kernel reads for mounts of this process.

    Source: Linux, Documentation/filesystems/overlayfs.rst (userxattr), since 5.11.
    """
    return "user.overlay." if is_in_user_namespace() else "trusted.overlay."


def is_overlay_mark(attribute: str) -> bool:
    """Return whether overlayfs reads the attribute on some machine, so that no archive or copy may bring it."""
    return attribute.startswith(("trusted.overlay.", "user.overlay."))


def rootlesskit_state(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the directory of the RootlessKit around this process, with its ``api.sock``, or None without one."""
    directory = environment.get(_STATE, "")
    return Path(directory) if directory and is_in_user_namespace() else None


def lowest_port(environment: Mapping[str, str] = os.environ) -> int:
    """Return the lowest port of the machine that a rootless node may have, or 0 if this node is not rootless."""
    text = environment.get(LOWEST_PORT, "")
    return int(text) if is_rootless() and text.isascii() and text.isdecimal() else 0


def is_rootless() -> bool:
    """Return whether this process belongs to a rootless node."""
    return rootlesskit_state() is not None
