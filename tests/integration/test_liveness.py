"""Managers and workers that die, are cut off and come back, with real processes: exactly what has to move moves."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    nodes_by_name,
    ready,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

WORKERS = ("w1", "w2", "w3")
ON_WORKERS = ("--constraint", "node.role==worker", "--restart-delay", "0s")


@pytest.fixture(scope="module")
def three() -> Iterator[TestCluster]:
    """Three managers and three workers, shared by tests that leave it whole."""
    with a_playground("three", managers=3, workers=len(WORKERS)) as cluster:
        yield cluster


@pytest.fixture
def m1(three: TestCluster) -> Iterator[TestNode]:
    node = three.node("m1")
    wait_until(lambda: ready(node) == {"m1", "m2", "m3", *WORKERS}, "all nodes are ready")
    yield node
    remove_services(node)


def tasks_on(m: TestNode, service: str, node: str) -> dict[str, dict[str, Any]]:
    """Tasks of a service on a node that are to run, by id."""
    id = nodes_by_name(m)[node]["ID"]
    tasks = m.client().api.tasks(filters={"service": service})
    return {
        task["ID"]: task for task in tasks if task.get("NodeID") == id and task["DesiredState"] == "running"
    }


def all_pids(cluster: TestCluster, service: str) -> dict[str, int]:
    """Containers of a service on all workers."""
    return {id: pid for name in WORKERS for id, pid in container_pids(cluster.node(name), service).items()}


def test_a_dead_worker_is_down_its_tasks_are_unknown_and_only_they_move(
    three: TestCluster, m1: TestNode
) -> None:
    create(m1, "web", 6, *ON_WORKERS)
    wait_running(m1, "web", 6)
    lost = tasks_on(m1, "web", "w1")
    others = {name: container_pids(three.node(name), "web") for name in ("w2", "w3")}
    assert lost
    three.skep("kill", "w1")
    try:
        wait_until(lambda: nodes_by_name(m1)["w1"]["Status"]["State"] == "down", "w1 is down")
        states = {
            task["ID"]: task["Status"]
            for task in m1.client().api.tasks(
                filters={"service": "web", "node": nodes_by_name(m1)["w1"]["ID"]}
            )
        }
        assert {states[id]["State"] for id in lost} == {"unknown"}
        assert all("is down; the task was last known to be running" in states[id]["Message"] for id in lost)
        wait_running(m1, "web", 6)
        for name, before in others.items():
            assert before.items() <= container_pids(three.node(name), "web").items()
    finally:
        three.skep("start", "w1")
    wait_until(lambda: "w1" in ready(m1), "w1 is back")
    wait_until(lambda: len(all_pids(three, "web")) == 6, "six containers, none doubled")


@pytest.mark.slow
def test_the_loss_of_a_manager_moves_nothing_that_ran_elsewhere(three: TestCluster, m1: TestNode) -> None:
    create(m1, "web", 6, *ON_WORKERS)
    wait_running(m1, "web", 6)
    before = all_pids(three, "web")
    leader = next(
        name for name, node in nodes_by_name(m1).items() if node.get("ManagerStatus", {}).get("Leader")
    )
    other = three.node(next(name for name in ("m1", "m2", "m3") if name != leader))
    three.skep("kill", leader)
    try:
        wait_until(
            lambda: answers(other) and nodes_by_name(other)[leader]["Status"]["State"] == "down",
            f"{leader} is down",
        )
        assert set(WORKERS) <= ready(other)
        assert all_pids(three, "web") == before
        other.docker("service", "scale", "--detach", "web=7")  # the whole chain works again
        wait_running(other, "web", 7)
        assert before.items() <= all_pids(three, "web").items()
    finally:
        three.skep("start", leader)
    wait_until(lambda: leader in ready(other), f"{leader} is back")
    assert before.items() <= all_pids(three, "web").items()


def answers(node: TestNode) -> bool:
    return node.docker("node", "ls", check=False).returncode == 0


def test_a_partition_that_a_service_sits_out_changes_nothing(three: TestCluster, m1: TestNode) -> None:
    create(m1, "kept", 3, *ON_WORKERS, "--label", "skep.on-disconnect=keep")
    create(m1, "moved", 3, *ON_WORKERS)
    wait_running(m1, "kept", 3)
    wait_running(m1, "moved", 3)
    before = all_pids(three, "kept")
    kept, moved = tasks_on(m1, "kept", "w2"), tasks_on(m1, "moved", "w2")
    assert kept
    assert moved
    three.skep("cut", "w2")
    try:
        wait_until(lambda: "w2" not in ready(m1), "w2 is down")
        wait_running(m1, "moved", 3)
        assert tasks_on(m1, "kept", "w2").keys() == kept.keys()
        assert not tasks_on(m1, "moved", "w2")
    finally:
        three.skep("reconnect", "w2")
    wait_until(lambda: "w2" in ready(m1), "w2 is back")
    wait_running(m1, "kept", 3)
    assert all_pids(three, "kept") == before
    wait_until(lambda: len(all_pids(three, "moved")) == 3, "what survived of the moved service is gone")


def test_killed_node_processes_move_nothing(three: TestCluster, m1: TestNode) -> None:
    ends_of_node_processes_move_nothing(three, m1, signal.SIGKILL)


def test_planned_restarts_of_node_processes_move_nothing(three: TestCluster, m1: TestNode) -> None:
    ends_of_node_processes_move_nothing(three, m1, signal.SIGTERM)


def ends_of_node_processes_move_nothing(three: TestCluster, m1: TestNode, how: signal.Signals) -> None:
    create(m1, "web", 6, *ON_WORKERS)
    tasks = {task["ID"] for task in wait_running(m1, "web", 6)}
    before = all_pids(three, "web")
    for name in WORKERS:
        old = three.node(name).pids("skep-node")
        for pid in old:
            os.kill(pid, how)
        wait_until(
            lambda name=name, old=old: set(three.node(name).pids("skep-node")) - set(old), "a new process"
        )  # type: ignore[misc]
    wait_until(
        lambda: all(three.node(name).docker("ps", check=False).returncode == 0 for name in WORKERS),
        "all workers answer",
    )
    wait_until(lambda: all_pids(three, "web") == before, "the same containers, adopted")
    m1.docker("service", "scale", "--detach", "web=7")  # the whole chain works again
    wait_running(m1, "web", 7)
    assert before.items() <= all_pids(three, "web").items()
    assert tasks < {task["ID"] for task in wait_running(m1, "web", 7)}


def test_every_manager_gives_the_logs_of_every_node(three: TestCluster, m1: TestNode) -> None:
    create(m1, "talker", 6, *ON_WORKERS, command=("sh", "-c", "echo I am $HOSTNAME; sleep 3600"))
    wait_running(m1, "talker", 6)
    for name in ("m1", "m2", "m3"):
        wait_until(
            lambda name=name: three.node(name).docker("service", "logs", "talker").stdout.count("I am") == 6,  # type: ignore[misc]
            f"six lines at {name}",
        )
