"""Identifies the container behind a connection to the node's own API socket.

A container can reach that socket even if it does not mount the socket itself, through a directory or volume that
contains it.  The kernel reports the process that connected, and the process's control group names its container.
"""

import os
import re
import select
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import Enum
from functools import cache
from pathlib import Path

from skep.linux.unix_sockets import credentials_of
from skep.model.values.ids import ContainerId

_SO_PEERPIDFD = 77
"""Socket option of Linux 6.5.  On older kernels, the reported pid could have been reused since the process connected.
"""
_GROUP = re.compile(r"(/ctr)?/([0-9a-f]{64})(?=/|$)", re.MULTILINE)


class ConnectionPeer(Enum):
    """The other end of a connection, if it is not a container of this node."""

    MACHINE = "machine"
    """A process of this machine, or of the host if this machine is a container."""
    GONE = "gone"
    """The process has ended and cannot be identified.  Another process may now hold its connection."""


def peer_of(
    connected: socket.socket,
    is_known: Callable[[ContainerId], bool],
    with_mounts: Callable[[str], ContainerId | None] | None = None,
) -> ContainerId | ConnectionPeer:
    """Return which container or process connected.

    Args:
        is_known: Tells whether a container belongs, or may belong, to this node.
        with_mounts: Returns the container with a mount namespace.  Given on a node without control groups.  There, the
            processes of the machine are outside the node's process namespace, so any other process is not theirs.
    """
    pid = credentials_of(connected).pid
    # A process of the surrounding pid namespace has pid 0 here.  It is not in one of our containers.
    if pid in (0, os.getpid()):
        return ConnectionPeer.MACHINE
    try:
        mounts = os.readlink(f"/proc/{pid}/ns/mnt")
        if mounts == _own_mounts():
            found: ContainerId | ConnectionPeer = ConnectionPeer.MACHINE
        elif with_mounts is not None:
            found = with_mounts(mounts) or ConnectionPeer.GONE
        else:
            groups = Path(f"/proc/{pid}/cgroup").read_text()
            found = container_in(groups, is_known, _surrounding()) or ConnectionPeer.MACHINE
    except OSError:  # the process has ended, or must not be inspected
        return ConnectionPeer.GONE
    return ConnectionPeer.GONE if _has_ended(connected) else found


def container_in(
    groups: str, is_known: Callable[[ContainerId], bool], surrounding: Collection[ContainerId] = ()
) -> ContainerId | None:
    """Return the container of a process whose /proc/PID/cgroup contains ``groups``.

    ``surrounding`` are the containers in which this node itself runs: their processes are processes of its machine.
    The first other match counts, because a container can create groups with any name below its own.  With
    ``--cgroup-parent`` a container's group may be anywhere, even next to a Docker Engine's groups.
    """
    for match in _GROUP.finditer(groups):
        id = ContainerId(match[2])
        if id not in surrounding and (match[1] or is_known(id)):
            return id
    return None


@cache
def _surrounding() -> Collection[ContainerId]:
    groups = Path("/proc/self/cgroup").read_text()
    return frozenset(ContainerId(match[2]) for match in _GROUP.finditer(groups))


@cache
def _own_mounts() -> str:
    return os.readlink("/proc/self/ns/mnt")


def _has_ended(connected: socket.socket) -> bool:
    """Return whether the process that connected has ended.  Before Linux 6.5 this is unknown, and False is returned."""
    try:
        descriptor = connected.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        looking = select.poll()
        looking.register(descriptor, select.POLLIN)
        return bool(looking.poll(0))
    finally:
        with suppress(OSError):
            os.close(descriptor)
