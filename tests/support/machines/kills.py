"""Kills processes of a node, of one kind or of several kinds at once."""

import os
import signal
from itertools import combinations

from tests.support.machines.playground_rig import TestNode, wait_until

COMMANDS = {"node": "skep-node", "manager": "skep-manager", "etcd": "etcd", "conmon": "conmon"}
"""Command name of each kind.  There is one ``conmon`` per container."""

PAIRS = tuple(combinations(COMMANDS, 2))


def strike(node: TestNode, *kinds: str) -> dict[str, set[int]]:
    """Kill every process of these kinds, and wait until all have ended.  Return their pids by kind.

    All are stopped first, so that none sees another one end.  Children are killed before their parents, because the
    kernel wakes a stopped process that loses its parent.
    """
    struck = {kind: set(node.pids(COMMANDS[kind])) for kind in kinds}
    assert all(struck.values()), f"{struck} among {sorted(set(node.processes()))}"
    children_first = sorted(struck, key=list(COMMANDS).index, reverse=True)
    pids = [pid for kind in children_first for pid in struck[kind]]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    wait_until(
        lambda: not set(pids) & {pid for pid, _ in node.processes()}, f"{kinds} of {node.name} are gone"
    )
    return struck


def wait_started_again(node: TestNode, struck: dict[str, set[int]]) -> None:
    """Wait until each kind has a new process.  A monitor is not replaced, because its container keeps running."""
    for kind in set(struck) - {"conmon"}:
        wait_until(
            lambda kind=kind: set(node.pids(COMMANDS[kind])) - struck[kind],  # type: ignore[misc]
            f"{node.name} has a new {kind} process",
            within_s=60,
        )
