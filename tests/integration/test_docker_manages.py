"""A whole skep node as a worker of a real Docker manager: what it runs there, and what the manager sees of it."""

from collections.abc import Iterator

import pytest

from tests.support.machines.playground_rig import (
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    containers,
    wait_running,
    wait_until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "dockerd"),
    pytest.mark.timeout(180),
]

ON_SKEP = ("--detach", "--constraint", "node.hostname==w1", "--no-resolve-image")
WAITS = "trap 'exit 0' TERM; while :; do sleep 1; done"


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """A Docker Engine that manages a swarm of its own, with the skep node w1 as its worker."""
    with a_playground("dm", managers=1) as cluster:
        cluster.skep("add", "--docker", "worker", "d1")
        cluster.skep("add", "worker", "w1")
        manager, worker = cluster.node("d1"), cluster.node("w1")
        address = manager.description["addr"]
        manager.docker("swarm", "init", "--advertise-addr", address)
        token = manager.docker("swarm", "join-token", "-q", "worker").stdout.strip()
        worker.docker("swarm", "join", "--token", token, f"{address}:2377")
        yield cluster


@pytest.fixture
def manager(cluster: TestCluster) -> TestNode:
    return cluster.node("d1")


def test_the_manager_sees_a_ready_worker(manager: TestNode, cluster: TestCluster) -> None:
    def shown() -> str:
        return manager.docker("node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}").stdout

    wait_until(lambda: "w1 Ready" in shown(), "the skep node is ready")
    info = cluster.node("w1").docker("info", "--format", "{{.Swarm.LocalNodeState}}").stdout
    assert info.strip() == "active"


def test_a_service_of_the_docker_manager_has_its_secrets_configs_and_logs(
    manager: TestNode, cluster: TestCluster
) -> None:
    manager.docker("secret", "create", "s1", "-", stdin="topsecret")
    manager.docker("config", "create", "c1", "-", stdin="plain")
    command = f"echo begun; {WAITS}"
    manager.docker(
        *("service", "create", *ON_SKEP, "--name", "web", "--secret", "s1"),
        *("--config", "source=c1,target=/etc/c1", "--env", "A={{.Service.Name}}", IMAGE, "sh", "-c", command),
    )
    wait_running(manager, "web", 1)
    (container,) = containers(cluster.node("w1"), "web")
    shown = cluster.node("w1").docker(
        "exec", container["Id"], "sh", "-c", "cat /run/secrets/s1 /etc/c1; echo $A"
    )
    assert shown.stdout == "topsecretplainweb\n"
    wait_until(
        lambda: manager.docker("service", "logs", "--raw", "web").stdout == "begun\n",
        "the manager has the line",
    )
    manager.docker("service", "rm", "web")
    wait_until(lambda: not containers(cluster.node("w1"), "web"), "its container is gone")


def test_an_unhealthy_task_is_replaced_by_the_docker_manager(manager: TestNode, cluster: TestCluster) -> None:
    manager.docker(
        *("service", "create", *ON_SKEP, "--name", "sick", "--restart-delay", "0s"),
        *("--health-cmd", "test ! -e /tmp/sick", "--health-interval", "200ms", "--health-retries", "1"),
        *(IMAGE, "sh", "-c", WAITS.replace("exit 0", "exit 7")),
    )
    (first,) = wait_running(manager, "sick", 1)
    (container,) = containers(cluster.node("w1"), "sick")
    cluster.node("w1").docker("exec", container["Id"], "touch", "/tmp/sick")
    wait_until(
        lambda: [task["ID"] for task in wait_running(manager, "sick", 1)] != [first["ID"]],
        "the task is replaced",
    )
    ended = manager.client().api.inspect_task(first["ID"])
    assert ended["Status"]["Err"] == "task: non-zero exit (7): dockerexec: unhealthy container"
    manager.docker("service", "rm", "sick")


def test_an_update_and_a_drain_reach_the_skep_node(manager: TestNode, cluster: TestCluster) -> None:
    manager.docker("service", "create", *ON_SKEP, "--name", "web", IMAGE, "sh", "-c", WAITS)
    (first,) = wait_running(manager, "web", 1)
    manager.docker("service", "update", "--detach", "--env-add", "A=1", "web")
    wait_until(
        lambda: [task["ID"] for task in wait_running(manager, "web", 1)] != [first["ID"]],
        "the task is updated",
    )
    w1 = cluster.node("w1")
    (container,) = wait_until(lambda: containers(w1, "web"), "one container is left")
    assert "A=1" in w1.client().api.inspect_container(container["Id"])["Config"]["Env"]
    manager.docker("node", "update", "--availability", "drain", "w1")
    wait_until(lambda: not containers(w1, "web"), "the node is drained")
    manager.docker("node", "update", "--availability", "active", "w1")
    manager.docker("service", "rm", "web")
