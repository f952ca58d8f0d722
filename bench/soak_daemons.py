"""A node's daemons as a soak sees them: which processes they are, what memory and files they hold."""

import os
from pathlib import Path

import msgspec

from bench.machine import daemons

DAEMONS = ("skep-node", "skep-manager", "etcd", "skep-net", "conmon")
VICTIMS = (*DAEMONS, "wireguard-go")
"""What is killed; wireguard-go runs where an encrypted network is and the kernel has no WireGuard."""
GIVEN_UP = frozenset({"skep-manager", "etcd"})
"""What the node stops restarting after five ends within a minute, as it should."""
GIVEN_UP_KILLS_MAX = 3
"""Of those together, on one node within that minute."""
ETCD_MIB_MAX = 128
"""etcd keeps 5,000 entries of its log in memory and begins with none, so its growth by itself means nothing."""


class Held(msgspec.Struct, frozen=True):
    """What the daemons of one node hold; monitors of containers are left out."""

    skep_mib: float
    etcd_mib: float
    open_files: int
    each: str
    """For the log: every process with its memory."""


def pids(netns: Path, root_pids: list[int], comm: str) -> list[int]:
    """The node's processes with that command name."""
    found = []
    for pid in daemons(netns, root_pids):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == comm:
                found.append(pid)
        except OSError:
            continue
    return sorted(found)


def held(netns: Path, root_pids: list[int]) -> Held:
    """Memory is what each process has for itself or shares with one it was forked from, counted in full: a sum of
    shares would change with every restart, which leaves a process without those it shares with."""
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
    """A figure of /proc/<pid>/status."""
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024
