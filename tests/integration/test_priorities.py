"""Services of different priority on a node with too little room, with the docker command and skep's."""

import subprocess

import pytest

from tests.support.machines.playground_rig import IDLE, IMAGE, SKEP, TestNode, wait_running, wait_until

pytestmark = pytest.mark.timeout(180)


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def create(node: TestNode, name: str, replicas: int, memory_bytes: int, *words: str) -> None:
    room = ("--reserve-memory", str(memory_bytes), "--replicas", str(replicas))
    node.docker("service", "create", "--detach", "--name", name, *room, *words, IMAGE, *IDLE)


def listed(node: TestNode, name: str) -> str:
    return node.docker("service", "ps", "--no-trunc", name).stdout


def test_the_important_service_gets_the_room_of_others_where_the_cluster_allows_it(m1: TestNode) -> None:
    has = m1.client().info()["MemTotal"]
    create(m1, "batch", 2, has * 2 // 5)
    wait_running(m1, "batch", 2)
    create(m1, "shop", 1, has // 2, "--label", "skep.priority=10")
    held = "tasks of batch, priority 0, hold the resources on m1; preemption is off (skep cluster preemption)"
    wait_until(lambda: held in skep(m1, "explain", "shop"), "what holds the room is named")
    assert skep(m1, "cluster", "preemption").strip() == "off"

    assert skep(m1, "cluster", "preemption", "on").strip() == "on"
    wait_running(m1, "shop", 1)
    words = "preempted by a task of shop, priority 10"
    wait_until(lambda: words in listed(m1, "batch"), "docker service ps names the cause")
    assert listed(m1, "batch").count(words) == 1, "no more than needed"
    wait_running(m1, "batch", 1)
    wait_until(lambda: "its own priority is 0" in skep(m1, "explain", "batch"), "what waits says for which")
    assert "tasks of shop, priority 10, hold the resources on m1" in skep(m1, "explain", "batch")
    wait_until(lambda: f"is replaced: it was {words}" in skep(m1, "history"), "the history has the reason")

    m1.docker("service", "scale", "--detach", "shop=0")
    wait_running(m1, "batch", 2)


def test_a_priority_that_is_no_number_is_refused(m1: TestNode) -> None:
    done = m1.docker("service", "create", "--label", "skep.priority=high", IMAGE, check=False)
    assert "invalid label skep.priority=high: expected a whole number from -1000 to 1000" in done.stderr
