"""Containers outlive every daemon: whatever is killed, they go on, are adopted, and none is doubled."""

import time
from pathlib import Path

import docker
import pytest
import requests

from tests.support.machines.playground_rig import (
    TestNode,
    container_pids,
    containers,
    create,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(120)

DAEMONS = {"node": "skep-node", "manager": "skep-manager", "etcd": "etcd", "net": "skep-net"}


@pytest.mark.parametrize("victim", DAEMONS)
def test_containers_outlive_a_killed_daemon_and_are_adopted(m1: TestNode, victim: str) -> None:
    create(m1, "web", 3, "--restart-delay", "0s")
    wait_running(m1, "web", 3)
    before = container_pids(m1, "web")
    old = m1.pids(DAEMONS[victim])
    assert old, f"no process {DAEMONS[victim]} found among {sorted(set(m1.processes()))}"
    for pid in old:
        m1.kill(pid)

    wait_until(lambda: set(m1.pids(DAEMONS[victim])) - set(old), f"a new {victim} process")
    wait_until(lambda: _answers(m1), "the API answers again")
    assert {id: pid for id, pid in before.items() if Path(f"/proc/{pid}").exists()} == before
    wait_running(m1, "web", 3)
    assert container_pids(m1, "web") == before
    m1.docker("service", "scale", "--detach", "web=4")  # the whole chain works again
    wait_running(m1, "web", 4)
    assert before.items() <= container_pids(m1, "web").items()


def test_the_first_answer_of_a_new_node_process_names_every_container(m1: TestNode) -> None:
    create(m1, "web", 4, "--restart-delay", "0s")
    wait_running(m1, "web", 4)
    before = {container["Id"] for container in containers(m1, "web")}
    old = m1.pids("skep-node")
    for pid in old:
        m1.kill(pid)
    wait_until(lambda: not set(m1.pids("skep-node")) & set(old), "the killed process is gone")
    response = wait_until(lambda: _listing(m1), "the API answers again")
    assert response == [before]


def test_a_killed_conmon_does_not_take_its_container_along(m1: TestNode) -> None:
    create(m1, "web", 2, "--restart-delay", "0s")
    wait_running(m1, "web", 2)
    before = container_pids(m1, "web")
    monitors = m1.pids("conmon")
    assert monitors
    m1.kill(monitors[0])
    wait_until(lambda: monitors[0] not in m1.pids("conmon"), "conmon is gone")
    assert {pid for pid in before.values() if Path(f"/proc/{pid}").exists()} == set(before.values())
    m1.docker("service", "scale", "--detach", "web=3")
    wait_running(m1, "web", 3)
    assert before.items() <= container_pids(m1, "web").items()
    m1.docker("service", "scale", "--detach", "web=0")  # and it can still be stopped
    wait_until(lambda: not container_pids(m1, "web"), "the containers are stopped")


def test_a_power_loss_ends_in_the_wanted_state(own_m1: TestNode) -> None:
    create(own_m1, "web", 3, "--restart-delay", "0s")
    wait_running(own_m1, "web", 3)
    own_m1.cluster.skep("kill", "m1")
    assert not list(own_m1.processes())
    own_m1.cluster.skep("start", "m1")
    wait_until(lambda: _answers(own_m1), "its manager is back", within_s=60)
    wait_running(own_m1, "web", 3, within_s=60)
    wait_until(lambda: len(container_pids(own_m1, "web")) == 3, "three containers, none doubled")


def _listing(node: TestNode) -> list[set[str]]:
    """What the node lists, in a list; an empty one while it does not answer."""
    try:
        return [{container["Id"] for container in containers(node, "web")}]
    except (docker.errors.DockerException, requests.exceptions.ConnectionError):
        return []


def _answers(node: TestNode) -> bool:
    done = node.docker("service", "ls", check=False)
    if done.returncode:
        time.sleep(0.05)
    return done.returncode == 0
