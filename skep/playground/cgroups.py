"""The cgroups of a playground's nodes, in every hierarchy: v1, hybrid and v2.

The nodes have no cgroup namespaces.  Instead, each node has a parent cgroup.  It is created before the daemon starts,
and removed bottom-up after the node's last process has ended.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from skep.linux.trees import directories
from skep.playground import names
from skep.playground.commands import wait_until

ROOT = Path("/sys/fs/cgroup")

_GONE_WITHIN_S = 10
"""Seconds to wait for a cgroup, which stays busy for a moment after its last process has ended."""


def hierarchies() -> list[Path]:
    """Return the mounted hierarchies: /sys/fs/cgroup itself on v2, its directories on v1 and hybrid."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return sorted(
        path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink() and _is_cgroup(path)
    )


def make(playground: str, node: str) -> list[Path]:
    """Create the node's cgroup and its ``agent`` in each hierarchy.  Return the ``agent`` directories."""
    made = []
    for hierarchy in hierarchies():
        parent = hierarchy / names.cgroup(playground, node)
        agent = parent / "agent"
        agent.mkdir(parents=True, exist_ok=True)
        for directory in (hierarchy, parent.parent, parent):
            _delegate(directory)
        made.append(agent)
        _inherit_cpus(hierarchy, agent)
    return made


def members(playground: str, node: str) -> set[int]:
    """Return every process in the node's cgroups, including the processes of its containers."""
    pids: set[int] = set()
    for hierarchy in hierarchies():
        for directory in directories(hierarchy / names.cgroup(playground, node)):
            if (directory / "cgroup.procs").exists():
                pids |= set(_pids(directory / "cgroup.procs"))
    return pids


def thaw(playground: str, node: str) -> None:
    """Thaw the processes of paused containers.  With cgroup v1, frozen processes do not react to SIGKILL."""
    for directory in directories(ROOT / "freezer" / names.cgroup(playground, node)):
        with suppress(OSError):  # it was removed
            (directory / "freezer.state").write_text("THAWED")


def nodes(playground: str) -> list[str]:
    """Return the nodes of ``playground`` that have a cgroup somewhere."""
    found = set()
    for hierarchy in hierarchies():
        top = hierarchy / names.CGROUP_TOP
        for directory in os.listdir(top) if top.exists() else ():
            if node := names.node_of_cgroup(playground, directory):
                found.add(node)
    return sorted(found)


async def remove(playground: str, node: str) -> None:
    """Remove the node's cgroups bottom-up.  The common parent of all playgrounds is removed with the last one.

    A cgroup stays busy for a moment after its last process has ended.
    Raises: Unavailable: a cgroup stays busy for too long.
    """
    for hierarchy in hierarchies():
        top = hierarchy / names.cgroup(playground, node)

        async def is_gone(top: Path = top) -> bool:
            for directory in reversed(directories(top)):
                with suppress(OSError):
                    directory.rmdir()
            return not top.exists()

        await wait_until(is_gone, f"{top} can be removed", _GONE_WITHIN_S)
        try:
            (hierarchy / names.CGROUP_TOP).rmdir()
        except OSError:
            continue  # another playground uses the common parent, or it was never created here


def _is_cgroup(path: Path) -> bool:
    return (path / "cgroup.procs").exists()


def _pids(path: Path) -> Iterator[int]:
    try:
        text = path.read_text()
    except OSError:
        return
    yield from (int(word) for word in text.split())


def _delegate(directory: Path) -> None:
    """On v2, enable every controller of ``directory`` for its children too, so that they can have limits."""
    try:
        controllers = (directory / "cgroup.controllers").read_text().split()
    except FileNotFoundError:
        return
    for controller in controllers:
        try:
            (directory / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            continue  # the kernel refuses some (realtime scheduling); the executor reports missing ones


def _inherit_cpus(hierarchy: Path, leaf: Path) -> None:
    """On v1, copy the parent's cpuset values level by level, because a cgroup with an empty cpuset accepts no
    process.
    """
    if not (hierarchy / "cpuset.cpus").exists() or (hierarchy / "cgroup.controllers").exists():
        return
    for directory in reversed([leaf, *leaf.parents][: len(leaf.relative_to(hierarchy).parts)]):
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not (directory / file).read_text().strip():
                (directory / file).write_text((directory.parent / file).read_text())
