"""``skep rebalance --apply`` on real nodes: tasks move to a node that returned, and none stops before its successor."""

import subprocess
from collections import Counter

import pytest

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def places(cluster: TestCluster, service: str) -> Counter[str]:
    names = {node["ID"]: name for name, node in nodes_by_name(cluster.node("m1")).items()}
    return Counter(names[task["NodeID"]] for task in running(cluster.node("m1"), service))


def test_tasks_move_to_a_node_that_returned_within_the_budget_and_data_stays() -> None:
    with a_playground("even", managers=1, workers=2) as cluster:
        m1 = cluster.node("m1")
        m1.docker("node", "update", "--availability", "drain", "w2")
        workers = ("--constraint", "node.role==worker")
        create(m1, "web", 4, *workers, "--label", "skep.min-available=100%", "--update-monitor", "100ms")
        create(m1, "db", 2, *workers, "--mount", "type=volume,source=data,target=/data")
        wait_running(m1, "web", 4, 60)
        wait_running(m1, "db", 2, 60)
        m1.docker("node", "update", "--availability", "active", "w2")
        planned = skep(m1, "rebalance")
        assert "2 moves would spread tasks more evenly" in planned
        assert "db." not in planned, "its data is on w1"
        assert places(cluster, "web") == {"w1": 4}, "nothing moves by itself"

        skep(m1, "rebalance", "--apply")
        seen: list[int] = []

        def is_even() -> bool:
            found = places(cluster, "web")
            seen.append(found.total())
            return found == {"w1": 2, "w2": 2}

        wait_until(is_even, "two tasks have moved", 90)
        assert min(seen) == 4, "a task stopped before its successor ran"
        assert places(cluster, "db") == {"w1": 2}
        wait_until(lambda: "No moves" in skep(m1, "rebalance"), "nothing is left to move", 60)
