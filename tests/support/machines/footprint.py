"""Finds traces of a playground on the machine: before it starts, while it is up, and afterwards."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from skep.linux.processes import start_ticks_of

CGROUPS = Path("/sys/fs/cgroup")


class Machine(NamedTuple):
    """All kinds of objects that a playground could leave on a machine, without those of other playgrounds."""

    interfaces: frozenset[str]
    namespaces: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    rules: str
    files: frozenset[str]

    def more_than(self, other: "Machine") -> dict[str, object]:
        """Return the entries that ``other`` does not have, by kind. Empty without such entries."""
        more: dict[str, object] = {
            kind: sorted(getattr(self, kind) - getattr(other, kind))
            for kind in ("interfaces", "namespaces", "mounts", "cgroups", "files")
        }
        more["rules"] = self.rules if self.rules != other.rules else ""
        return {kind: found for kind, found in more.items() if found}


def machine(playground: str, *directories: Path) -> Machine:
    """Return the machine's current state.  ``directories``: where to look for files."""
    return Machine(
        interfaces=frozenset(line.split(": ")[1] for line in _output("ip", "-o", "link").splitlines()),
        namespaces=frozenset(
            _ours(os.listdir("/run/netns"), playground) if Path("/run/netns").exists() else ()
        ),
        mounts=frozenset(_ours(_mounts(), playground)),
        cgroups=frozenset(_ours(_cgroups(), playground)),
        rules=_output("nft", "list", "ruleset"),
        files=frozenset(
            str(path) for directory in directories if directory.exists() for path in directory.rglob("*")
        ),
    )


def _ours(names: "list[str]", playground: str) -> list[str]:
    """Return the names without the names of other playgrounds and concurrent tests, which may change meanwhile."""
    others = ("skep-", "/pytest-")
    return [name for name in names if playground in name or not any(other in name for other in others)]


def _mounts() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _cgroups() -> list[str]:
    return [directory for directory, _, _ in os.walk(CGROUPS) if "skep-playground/" in directory]


def _output(*command: str) -> str:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30, env={**os.environ, "PATH": path}
    )
    return done.stdout


class Inhabitants(NamedTuple):
    """Processes by pid and start time, and their namespaces."""

    processes: frozenset[tuple[int, int]]
    namespaces: frozenset[str]
    seen_at: int
    """Clock ticks since boot."""


def inhabitants(playground: str) -> Inhabitants:
    """Return all processes on the nodes of a playground: in their namespaces, their cgroups, and holders."""
    seen_at = int(float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK"))
    own = {os.readlink(link) for link in Path("/proc/self/ns").iterdir()}
    netns = {
        f"net:[{(Path('/run/netns') / name).stat().st_ino}]"
        for name in (os.listdir("/run/netns") if Path("/run/netns").exists() else ())
        if name.startswith(f"skep-{playground}-")
    }
    processes, namespaces = set(), set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = {os.readlink(link) for link in Path(f"/proc/{pid}/ns").iterdir()}
            cgroup = Path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            continue
        if links & netns or f"/skep-playground/{playground}-" in cgroup:
            if started := start_ticks_of(int(pid)):
                processes.add((int(pid), started))
            namespaces |= links - own
    return Inhabitants(frozenset(processes), frozenset(namespaces), seen_at)


def survivors(before: Inhabitants) -> Inhabitants:
    """Return the processes that still exist, and the namespaces that still have one of them.

    The kernel reuses the number of a deleted namespace, possibly for another test's.
    """
    processes = {(pid, started) for pid, started in before.processes if start_ticks_of(pid) == started}
    alive = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        started = start_ticks_of(int(pid))
        if started is None or started > before.seen_at:
            continue
        try:
            alive |= {os.readlink(link) for link in Path(f"/proc/{pid}/ns").iterdir()}
        except OSError:
            continue
    return Inhabitants(frozenset(processes), before.namespaces & alive, before.seen_at)
