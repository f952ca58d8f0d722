"""A worker that is kept busy by something foreign gets fewer of the new tasks, and keeps those that it has."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from skep.node.telemetry.load import TIME_CONSTANT_S
from skep.playground import cgroups, names
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    running,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.alone]

WORKERS = ("--constraint", "node.role==worker")
BUSY = 0.2
"""At least; how much of a machine that others use, too, the work gets is not for the test to say."""


@pytest.fixture
def trio() -> Iterator[TestCluster]:
    """m1, w1 and w2."""
    with a_playground("load", managers=1, workers=2) as cluster:
        yield cluster


@contextmanager
def foreign_work(cluster: TestCluster, node: str, processes: int) -> Iterator[None]:
    """Processes that do nothing but work, counted as work on ``node`` without the cluster's knowledge."""
    places = [
        hierarchy / names.cgroup(cluster.name, node) / "agent"
        for hierarchy in cgroups.hierarchies()
        if hierarchy == cgroups.ROOT or "cpuacct" in hierarchy.name.split(",")
    ]
    with ExitStack() as stack:
        for _ in range(processes):
            # A session of its own: the kernel shares the processors among sessions.
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
            )
            stack.callback(process.kill)
            for place in places:
                (place / "cgroup.procs").write_text(str(process.pid))
        yield


def load(seen_by: TestNode, node: str) -> float | None:
    """What ``GET /nodes`` shows; ``docker node inspect`` keeps to the fields that it knows."""
    found: float | None = nodes_by_name(seen_by)[node].get("Load")
    return found


def placed(seen_by: TestNode, services: range) -> Counter[str]:
    """How many tasks of new services of one task each worker gets."""
    for number in services:
        create(seen_by, f"s{number}", 1, *WORKERS)
    name_of = {node["ID"]: name for name, node in nodes_by_name(seen_by).items()}
    return Counter(name_of[wait_running(seen_by, f"s{number}", 1)[0]["NodeID"]] for number in services)


def test_a_worker_that_is_busy_with_foreign_work_gets_fewer_tasks_and_keeps_what_it_has(
    trio: TestCluster,
) -> None:
    m1 = trio.node("m1")
    for name in ("w1", "w2"):
        wait_until(lambda name=name: load(m1, name) is not None, f"{name} tells", TIME_CONSTANT_S + 30)
    create(m1, "before", 4, *WORKERS)
    before = {task["ID"]: task["NodeID"] for task in wait_running(m1, "before", 4)}
    assert set(Counter(before.values()).values()) == {2}
    with foreign_work(trio, "w1", processes=4):
        wait_until(lambda: (load(m1, "w1") or 0) >= BUSY, "w1 tells that it is busy", 4 * TIME_CONSTANT_S)
        status = subprocess.run(
            [SKEP, "--host", m1.socket, "status"], capture_output=True, text=True, check=False
        )
        assert re.search(r"^w1 +worker +ready .* [2-9]0%", status.stdout, re.MULTILINE), status.stdout
        counts = placed(m1, range(24))
        assert counts["w1"] < counts["w2"], (load(m1, "w1"), load(m1, "w2"))
        assert counts["w1"] > 0
    assert {task["ID"]: task["NodeID"] for task in running(m1, "before")} == before
