"""Finds a node's processes, and ends them all at once, like a power loss."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from skep.linux.processes import open_pidfd, stat_of
from skep.playground import cgroups, names
from skep.playground.commands import wait_until
from skep.playground.underlay import NETNS_ROOT

_GONE_WITHIN_S = 20
"""Seconds to wait for processes that were killed or stopped.  An uninterruptible wait in the kernel may delay them."""


def living_in(namespace: Path) -> set[int]:
    """Return the processes in the network namespace that is pinned at the path ``namespace``."""
    try:
        wanted = f"net:[{namespace.stat().st_ino}]"
    except FileNotFoundError:
        return set()
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.readlink(f"/proc/{entry}/ns/net") == wanted:
                found.add(int(entry))
        except OSError:
            continue  # ended meanwhile, or a zombie
    return found


def of_node(playground: str, node: str) -> set[int]:
    """Return a node's daemons, monitors and containers, by its network namespace and by its cgroups."""
    here = living_in(NETNS_ROOT / names.namespace(playground, node))
    return (here | cgroups.members(playground, node)) - {os.getpid()}


async def kill_all(playground: str, node: str) -> None:
    """Send SIGKILL to every process of the node until none is left.

    Repeats this, because a process may start another one just before it ends.
    Raises: Unavailable: a process does not end (in an uninterruptible wait).
    """

    async def nobody_left() -> bool:
        pids = of_node(playground, node)
        _signal(pids, signal.SIGKILL)
        cgroups.thaw(playground, node)
        return not pids

    await wait_until(nobody_left, f"every process of {node} ends", _GONE_WITHIN_S)


async def pause_all(playground: str, node: str) -> None:
    """Send SIGSTOP to every process of the node.  Return when all have stopped.

    Raises: Unavailable: a process does not stop.
    """

    async def nobody_moves() -> bool:
        moving = [pid for pid in of_node(playground, node) if not _is_stopped(pid)]
        _signal(moving, signal.SIGSTOP)
        return not moving

    await wait_until(nobody_moves, f"every process of {node} stands still", _GONE_WITHIN_S)


def resume_all(playground: str, node: str) -> None:
    """Send SIGCONT to every process of the node."""
    _signal(of_node(playground, node), signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    stat = stat_of(pid)
    return stat is None or stat.has_ended or stat.state == "T"


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill_exactly(pid: int, started: int) -> None:
    """Send SIGKILL to the process, unless its pid now belongs to another process.  A pidfd prevents races."""
    descriptor = open_pidfd(pid, started)
    if descriptor is None:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)
