"""A removed node says that it was removed, and stops the tasks that the cluster has replaced."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.integration.networks.lab import SERVE, hostname_of, in_place, outside
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    nodes_by_name,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """m1, w1, w2 and w3, with a task of ``web`` on each worker, a plain container on w1, and a published server."""
    with a_playground("removed", managers=1, workers=3) as cluster:
        m1 = cluster.node("m1")
        create(m1, "web", 3, "--constraint", "node.role==worker", "--replicas-max-per-node", "3")
        create(m1, "www", 1, "--constraint", "node.role==manager", "--publish", "8080:80", command=SERVE)
        wait_running(m1, "web", 3)
        wait_running(m1, "www", 1)
        cluster.node("w1").docker("run", "--detach", "--name", "plain", IMAGE, *IDLE)
        yield cluster


def skep(node: TestNode, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SKEP, "--host", node.socket, *words], capture_output=True, text=True, timeout=60, check=False
    )


def swarm_error(node: TestNode) -> str:
    return str(node.client().info()["Swarm"]["Error"])


def is_published(cluster: TestCluster, name: str) -> bool:
    """Whether the server responds at its published port on a node."""
    try:
        in_place(outside(cluster), hostname_of, cluster.node(name).description["addr"], 8080)
    except ConnectionRefusedError:
        return False
    return True


def is_stopped(node: TestNode) -> bool:
    return node.docker("ps", "-q", "--filter", "name=web").stdout == ""


def test_an_evicted_worker_says_what_happened_and_stops_what_was_replaced(cluster: TestCluster) -> None:
    m1, w1 = cluster.node("m1"), cluster.node("w1")
    wait_until(lambda: is_published(cluster, "w1"), "it publishes the port")
    done = skep(m1, "node", "evict", "--yes", "w1")
    assert done.returncode == 0, done.stderr
    assert "It stops its containers when it reaches a manager" in done.stdout
    wait_until(lambda: "this node was removed from the cluster at 20" in swarm_error(w1), "it knows it")
    wait_running(m1, "web", 3)
    wait_until(lambda: is_stopped(w1), "its tasks have stopped")
    assert w1.docker("ps", "--format", "{{.Names}}").stdout.split() == ["plain"]
    wait_until(lambda: not is_published(cluster, "w1"), "it publishes nothing")
    assert is_published(cluster, "m1")
    assert container_pids(w1, "web") == {}
    status = skep(w1, "status")
    assert status.returncode == 3
    assert "docker swarm leave --force" in status.stdout
    assert "Error: this node was removed from the cluster" in w1.docker("info", check=False).stdout
    refused = w1.docker("node", "ls", check=False)
    assert "docker swarm leave --force" in refused.stderr
    w1.docker("swarm", "leave", "--force")
    assert swarm_error(w1) == ""
    assert w1.docker("ps", "--all", "--format", "{{.Names}}").stdout.split() == ["plain"]


def test_a_live_node_that_is_removed_by_force_while_cut_off_stops_when_it_is_back(
    cluster: TestCluster,
) -> None:
    m1, w2 = cluster.node("m1"), cluster.node("w2")
    cluster.skep("cut", "w2")
    m1.docker("node", "rm", "--force", nodes_by_name(m1)["w2"]["ID"])
    wait_running(m1, "web", 3)
    assert not is_stopped(w2)
    assert "removed" not in swarm_error(w2)
    cluster.skep("reconnect", "w2")
    wait_until(lambda: "this node was removed" in swarm_error(w2), "it knows it")
    wait_until(lambda: is_stopped(w2), "its tasks have stopped")


def test_containers_are_kept_where_that_was_asked_for(cluster: TestCluster) -> None:
    m1, w3 = cluster.node("m1"), cluster.node("w3")
    done = skep(m1, "node", "evict", "--yes", "--keep", "w3")
    assert "Its containers keep running until you run docker swarm leave" in done.stdout, done.stderr
    wait_until(lambda: "its containers keep running" in swarm_error(w3), "it knows it")
    with pytest.raises(AssertionError, match="not within 5 s"):
        wait_until(lambda: is_stopped(w3), "its tasks have stopped", within_s=5)
