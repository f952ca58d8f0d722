"""Which processes are a node's, and ending them all at once, as a power loss does."""

import os
import signal
from pathlib import Path

from skep.linux.processes import open_pidfd
from skep.playground import cgroups, names
from skep.playground.commands import wait_until
from skep.playground.underlay import NETNS_ROOT

_GONE_WITHIN_S = 20


def living_in(namespace: Path) -> set[int]:
    """Processes whose network namespace is the pinned one."""
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
    """Daemons, monitors and containers of a node: by its network namespace and by its cgroups."""
    here = living_in(NETNS_ROOT / names.namespace(playground, node))
    return (here | cgroups.members(playground, node)) - {os.getpid()}


async def kill_all(playground: str, node: str) -> None:
    """SIGKILL everything that lives on the node; returns when nothing does any more.

    What is found is killed again and again, since a process may start another just before it ends.
    Raises: Unavailable: something does not end (a process in an uninterruptible wait).
    """

    async def nobody_left() -> bool:
        pids = of_node(playground, node)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not pids

    await wait_until(nobody_left, f"every process of {node} ends", _GONE_WITHIN_S)


def kill_exactly(pid: int, started: int) -> None:
    """SIGKILL the process unless its pid belongs to a later one.  A pidfd closes the gap between the two."""
    descriptor = open_pidfd(pid, started)
    if descriptor is None:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)
