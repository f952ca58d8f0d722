"""Machines become swarms and cease to be, containers are watched and attached to: by the docker command."""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.machines.playground_rig import (
    CLIS,
    IMAGE,
    TestCluster,
    TestNode,
    create,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(120), pytest.mark.parametrize("cli", CLIS)]


@pytest.fixture(scope="module")
def machines(cluster: TestCluster) -> tuple[TestNode, TestNode]:
    """Two machines on the shared playground's network that belong to no swarm."""
    names = [cluster.skep("add", role).stdout.split()[0] for role in ("manager", "worker")]
    first, second = map(cluster.node, names)
    return first, second


@pytest.fixture
def fresh(machines: tuple[TestNode, TestNode], cli: str) -> Iterator[tuple[TestNode, TestNode]]:
    """The two machines; they belong to no swarm afterwards either."""
    yield machines
    for machine in machines:
        machine.docker("swarm", "leave", "--force", cli=cli, check=False)


def local_state(node: TestNode) -> str:
    return node.docker("info", "--format", "{{.Swarm.LocalNodeState}}").stdout.strip()


def test_a_swarm_is_founded_joined_updated_and_left(fresh: tuple[TestNode, TestNode], cli: str) -> None:
    manager, worker = fresh
    said = manager.docker("swarm", "init", "--advertise-addr", manager.description["addr"], cli=cli).stdout
    assert re.search(r"Swarm initialized: current node \([0-9a-z]{25}\) is now a manager\.", said)
    command = re.search(r"^ +docker (swarm join --token \S+ \S+)$", said, re.MULTILINE)
    assert command is not None
    assert "docker swarm join-token manager" in said
    shown = manager.docker("swarm", "join-token", "worker", cli=cli).stdout
    assert command[1] in shown

    joined = worker.docker(*command[1].split(), cli=cli).stdout
    assert joined == "This node joined a swarm as a worker.\n"
    states = ("node", "ls", "--format", "{{.Hostname}} {{.Status}}")
    wait_until(
        lambda: f"{worker.name} Ready" in manager.docker(*states, cli=cli).stdout, "the worker is ready"
    )
    refused = worker.docker("node", "ls", cli=cli, check=False)
    assert "This node is not a swarm manager. Worker nodes can't be used" in refused.stderr

    manager.docker("swarm", "update", "--task-history-limit", "2", "--dispatcher-heartbeat", "3s", cli=cli)
    kept = "{{.Swarm.Cluster.Spec.Orchestration.TaskHistoryRetentionLimit}}"
    assert manager.docker("info", "--format", kept, cli=cli).stdout == "2\n"

    last = manager.docker("swarm", "leave", cli=cli, check=False)
    assert "You are attempting to leave the swarm on a node that is participating as a manager" in last.stderr
    assert worker.docker("swarm", "leave", cli=cli).stdout == "Node left the swarm.\n"
    wait_until(lambda: f"{worker.name} Down" in manager.docker(*states, cli=cli).stdout, "the worker is down")
    manager.docker("node", "rm", worker.name, cli=cli)
    assert manager.docker(*states, cli=cli).stdout == f"{manager.name} Ready\n"
    # Docker kills tasks on the way out: no grace period is waited for.
    ignores = ("sh", "-c", "trap '' TERM; sleep 3600 & wait; wait")
    patient = ("--detach", "--name", "patient", "--stop-grace-period", "1h", IMAGE)
    manager.docker("service", "create", *patient, *ignores, cli=cli)
    wait_running(manager, "patient", 1)
    assert manager.docker("swarm", "leave", "--force", cli=cli).stdout == "Node left the swarm.\n"
    assert manager.client().api.containers(all=True) == []
    assert [local_state(machine) for machine in fresh] == ["inactive", "inactive"]


def test_events_of_the_cluster_and_of_containers_come_in_one_stream(m1: TestNode, cli: str) -> None:
    since = m1.docker("info", "--format", "{{.SystemTime}}", cli=cli).stdout.strip()
    create(m1, "web", 1)
    (task,) = wait_running(m1, "web", 1)
    container = task["Status"]["ContainerStatus"]["ContainerID"]
    m1.docker("service", "rm", "web", cli=cli)
    wait_until(lambda: not m1.client().api.containers(all=True), "the container is removed")
    until = m1.docker("info", "--format", "{{.SystemTime}}", cli=cli).stdout.strip()
    form = "{{.Type}} {{.Action}} {{.Actor.ID}}"
    reported = m1.docker("events", "--since", since, "--until", until, "--format", form, cli=cli).stdout
    lines = reported.splitlines()
    for wanted in (
        f"service create {task['ServiceID']}",
        f"container create {container}",
        f"container start {container}",
        f"service remove {task['ServiceID']}",
        f"container die {container}",
        f"container destroy {container}",
    ):
        assert wanted in lines
    only = ("--filter", "type=service", "--filter", "event=create")
    assert m1.docker(
        "events", "--since", since, "--until", until, *only, "--format", form, cli=cli
    ).stdout.splitlines() == [lines[0]]


def test_a_container_of_a_task_is_attached_to(m1: TestNode, cli: str) -> None:
    create(m1, "web", 1, command=("sh", "-c", "trap 'echo hung up; exit 0' HUP; while :; do sleep 0.1; done"))
    (task,) = wait_running(m1, "web", 1)
    container = task["Status"]["ContainerStatus"]["ContainerID"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": m1.socket}
    attached = subprocess.Popen(
        [cli, "attach", "--no-stdin", "--sig-proxy=false", container],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        form = ("--filter", f"container={container}", "--filter", "event=attach", "--since", "10m", "--until")
        wait_until(
            lambda: m1.docker("events", *form, _now(m1), cli=cli).stdout, "the container is attached to"
        )
        m1.docker("kill", "--signal", "HUP", container, cli=cli)
        output, _ = attached.communicate(timeout=30)
    finally:
        attached.kill()
        attached.wait(10)
    assert output == "hung up\n"


def test_an_image_is_saved_removed_loaded_and_used(m1: TestNode, cli: str) -> None:
    archive = m1.cluster.directory / "images" / "busybox.tar"
    m1.docker("tag", IMAGE, "kept:1", cli=cli)
    m1.docker("rmi", "--force", "busybox:latest", cli=cli)
    assert "busybox:latest" not in m1.docker("images", "--format", "{{.Repository}}:{{.Tag}}", cli=cli).stdout
    loaded = m1.docker("load", "--input", str(archive), cli=cli).stdout
    assert "Loaded image: busybox:" in loaded
    assert "busybox:latest" in m1.docker("images", "--format", "{{.Repository}}:{{.Tag}}", cli=cli).stdout
    m1.docker("rmi", "kept:1", cli=cli)


def _now(node: TestNode) -> str:
    return node.docker("info", "--format", "{{.SystemTime}}").stdout.strip()
