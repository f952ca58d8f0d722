"""The kernel's table of neighbors overflows.  It belongs to the whole machine, so this runs in a virtual one only."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skep.dataplane.netns.kernel.namespaces import inside
from skep.dataplane.netns.kernel.neighbor_tables import at_machine, overflows
from tests.support.machines.playground_rig import SKEP, TestNode, a_playground, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("SKEP_VIRTUAL") != "1", reason="it would disturb this machine: docs/untested.md"
    ),
]

FOLDER = Path("/proc/sys/net/ipv4/neigh/default")
ROOM = {"gc_thresh1": 2, "gc_thresh2": 4, "gc_thresh3": 8}
"""Limits in the order in which they are lowered."""


@contextmanager
def a_small_table() -> Iterator[None]:
    before = {name: (FOLDER / name).read_text() for name in ROOM}
    for name, limit in ROOM.items():
        (FOLDER / name).write_text(str(limit))
    try:
        yield
    finally:
        for name, limit in reversed(before.items()):
            (FOLDER / name).write_text(limit)


def doctor(node: TestNode) -> str:
    words = [SKEP, "--host", node.socket, "doctor", "network"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout


def look_for_many() -> None:
    """Have the kernel look for sixty neighbors that do not exist.  It keeps an entry for each for seconds."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(100, 160):
            sender.sendto(b"", (f"192.168.100.{number}", 9))


def test_an_overflow_is_seen_within_half_a_minute_and_named_by_the_doctor() -> None:
    said = "the kernel's table of neighbors overflows"
    with a_playground("neighbors", managers=1) as cluster:
        m1 = cluster.node("m1")
        assert said not in doctor(m1)
        with a_small_table():
            before = at_machine(overflows)
            inside(Path(m1.description["netns"]), look_for_many)
            assert at_machine(overflows) > before, "the table was full"
        wait_until(lambda: said in doctor(m1), "the overflow is named", 60)
