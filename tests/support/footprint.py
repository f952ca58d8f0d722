"""What of a playground can be seen on the machine: before, while it is up, and after."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from skep.linux.processes import start_ticks_of

CGROUPS = Path("/sys/fs/cgroup")


class Machine(NamedTuple):
    """What a playground could leave on a machine.  Entries of other playgrounds are left out."""

    interfaces: frozenset[str]
    namespaces: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    rules: str
    files: frozenset[str]

    def more_than(self, other: "Machine") -> dict[str, object]:
        """What is here and not in ``other``, by kind; empty if nothing is."""
        more: dict[str, object] = {
            kind: sorted(getattr(self, kind) - getattr(other, kind))
            for kind in ("interfaces", "namespaces", "mounts", "cgroups", "files")
        }
        more["rules"] = self.rules if self.rules != other.rules else ""
        return {kind: found for kind, found in more.items() if found}


def machine(playground: str, *directories: Path) -> Machine:
    """The machine now.  ``directories``: where files are looked for."""
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
    """Without what other playgrounds and tests beside this one made, which may come and go meanwhile."""
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
    """Processes by pid and start time, and the namespaces that they live in."""

    processes: frozenset[tuple[int, int]]
    namespaces: frozenset[str]
    seen_at: int
    """Clock ticks since boot."""


def inhabitants(playground: str) -> Inhabitants:
    """Everything that lives on the nodes of a playground: in their namespaces, their cgroups, and holders."""
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
    """Which of those processes still exist, and which of those namespaces still have one of their processes.

    The kernel gives the number of a namespace that has gone to the next one, which may be another test's.
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
