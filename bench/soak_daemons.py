"""A node's daemons in a soak: their processes, memory and open files."""

import os
from pathlib import Path

import msgspec

from bench.machine import daemons

DAEMONS = ("skep-node", "skep-manager", "etcd", "skep-net", "conmon")
VICTIMS = (*DAEMONS, "wireguard-go")
"""Processes to kill. wireguard-go runs on a node with an encrypted network if the kernel has no WireGuard."""
GIVEN_UP = frozenset({"skep-manager", "etcd"})
"""Processes that the node correctly stops restarting after five ends within a minute."""
GIVEN_UP_KILLS_MAX = 3
"""Limit for kills of those processes on one node within a minute."""
ETCD_MIB_MAX = 128
"""Limit in MiB for etcd's memory.

etcd keeps 5,000 entries of its log in memory and starts empty, so it always grows.
"""


class Held(msgspec.Struct, frozen=True):
    """Resources of one node's daemons, without the monitors of containers."""

    skep_mib: float
    etcd_mib: float
    open_files: int
    each: str
    """Every process with its memory, for the log."""


def pids(netns: Path, root_pids: list[int], comm: str) -> list[int]:
    """Return the node's processes with that command name."""
    found = []
    for pid in daemons(netns, root_pids):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == comm:
                found.append(pid)
        except OSError:
            continue
    return sorted(found)


def held(netns: Path, root_pids: list[int]) -> Held:
    """Return the daemons' resources.

    Memory is counted in full for each process, including pages shared with the process that forked it.  A
    sum of proportional shares would change with every restart, because a restarted process shares less.
    """
    files, skep, etcd, each = 0, 0.0, 0.0, []
    for pid in daemons(netns, root_pids):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name not in DAEMONS or name == "conmon":
                continue
            anonymous, mapped = (_mebibytes(status, field) for field in ("RssAnon", "RssFile"))
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError):
            continue  # it has just ended
        if name == "etcd":
            etcd += anonymous
        else:
            skep += anonymous
        each.append(f"{name} {pid} {anonymous:.1f} + {mapped:.1f} mapped")
    return Held(skep, etcd, files, ", ".join(each))


def _mebibytes(status: str, field: str) -> float:
    """Return a value of /proc/<pid>/status in MiB."""
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024
