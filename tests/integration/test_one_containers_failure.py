"""What a container leaves on the disk, and a disk that is full, hurt no node process."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    wait_until,
)
from tests.support.machines.playground_rig import containers as listed
from tests.unit.linux.test_trees import nest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NEST = "cd {0} && i=0; while [ $i -lt 1500 ]; do mkdir a && cd a; i=$((i+1)); done; exit 1"


def home(node: TestNode) -> Path:
    return Path(node.description["state_dir"])


def processes(node: TestNode) -> dict[str, list[int]]:
    return {name: node.pids(name) for name in ("skep-node", "skep-manager", "skep-net", "etcd")}


def containers_on_disk(node: TestNode) -> list[str]:
    return os.listdir(home(node) / "containers")


def ended(node: TestNode, service: str) -> bool:
    tasks = node.client().api.tasks(filters={"service": service})
    return bool(tasks) and all(task["Status"]["State"] == "failed" for task in tasks)


def service(node: TestNode, name: str, *words: str) -> None:
    node.docker("service", "create", "--detach", "--name", name, *words)


def test_a_thousand_nested_directories_hurt_nothing() -> None:
    with a_playground("deep") as cluster:
        m1 = cluster.node("m1")
        before = processes(m1)
        assert all(before.values()), before
        once = ("--restart-condition", "none")
        service(m1, "web", IMAGE, *IDLE)
        service(m1, "root", *once, IMAGE, "sh", "-c", NEST.format("/"))
        service(m1, "volume", *once, "--mount", "type=volume,dst=/v", IMAGE, "sh", "-c", NEST.format("/v"))
        for name in ("root", "volume"):
            wait_until(lambda name=name: ended(m1, name), f"{name} has made its directories", 60)
            m1.docker("service", "rm", name)
        wait_until(lambda: len(containers_on_disk(m1)) == 1, "all of it is removed", 60)
        assert processes(m1) == before

        service(m1, "root", *once, IMAGE, "sh", "-c", NEST.format("/"))
        wait_until(lambda: ended(m1, "root"), "it has made its directories", 60)
        nest(home(m1) / "containers" / ("0" * 64), 1500)
        (home(m1) / "containers" / "odd").touch()
        (home(m1) / "tasks" / "odd.json").mkdir()
        (home(m1) / "images" / "configs" / "odd").mkdir()
        nest(home(m1) / "images" / "tmp" / "layer-odd", 1500)
        m1.kill(before["skep-node"][0])
        wait_until(lambda: m1.pids("skep-node") not in ([], before["skep-node"]), "another node process")
        wait_until(lambda: ("0" * 64) not in containers_on_disk(m1), "the untracked container is removed", 60)
        wait_until(lambda: listed(m1, "web"), "what ran before is known")
        left = processes(m1)
        assert left == before | {"skep-node": left["skep-node"]}
        assert "odd" in containers_on_disk(m1), "what is no container's is left alone"
        directory = home(m1)
    assert not directory.exists(), "down has removed all of it"


@pytest.fixture
def small_disk() -> Iterator[tuple[TestCluster, TestNode, TestNode]]:
    """A manager, and a worker whose disk has 48 MB."""
    with a_playground("full", workers=1) as cluster:
        m1, w1 = cluster.node("m1"), cluster.node("w1")
        cluster.skep("kill", "w1")
        state = home(w1)
        with tempfile.TemporaryDirectory(dir="/var/tmp") as kept:
            subprocess.run(["cp", "-a", f"{state}/.", kept], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "skep-disk", state], check=True)
            subprocess.run(["cp", "-a", f"{kept}/.", state], check=True)
        try:
            cluster.skep("start", "w1")
            yield cluster, m1, w1
        finally:
            cluster.skep("kill", "w1", check=False)
            subprocess.run(["umount", "--lazy", state], check=True)


def message(m1: TestNode, name: str) -> str:
    (node,) = (one for one in m1.client().api.nodes() if one["Description"]["Hostname"] == name)
    return str(node["Status"].get("Message", ""))


def status(node: TestNode) -> str:
    """``skep status`` as this node shows it; its exit code is that of the cluster."""
    command = [SKEP, "--host", node.socket, "status"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def full(said: object) -> bool:
    return "No space left on device" in str(said)


def running(m1: TestNode, *names: str) -> bool:
    api = m1.client().api
    return all(
        any(
            task["Status"]["State"] == "running" and task["DesiredState"] == "running"
            for task in api.tasks(filters={"service": name})
        )
        for name in names
    )


def test_a_container_that_fills_the_disk_ends_no_node_process_and_all_is_well_when_it_has_gone(
    small_disk: tuple[TestCluster, TestNode, TestNode],
) -> None:
    _, m1, w1 = small_disk
    here = ("--constraint", "node.hostname==w1", "--restart-delay", "500ms", "--stop-grace-period", "0s")
    others = ("a", "b", "c")
    for name in others:
        service(m1, name, *here, IMAGE, *IDLE)
    wait_until(lambda: running(m1, *others), "three run", 60)
    before = w1.pids("skep-node"), w1.pids("skep-net")
    flood = "yes & i=0; while :; do dd if=/dev/zero of=/f$i bs=64k; i=$((i+1)); sleep 0.1; done"
    service(m1, "flood", *here, IMAGE, "sh", "-c", flood)
    wait_until(lambda: "No space left on device" in message(m1, "w1"), "the node says what is wrong", 90)
    wait_until(lambda: full(w1.client().info()["Warnings"]), "its docker info says so", 30)
    for node in (w1, m1):
        wait_until(lambda node=node: full(status(node)), f"skep status of {node.name} says so", 30)
    for name in others:
        m1.docker("service", "update", "--detach", "--force", name)
    m1.docker("service", "scale", "--detach", "c=0")
    wait_until(
        lambda: not m1.client().api.tasks(filters={"service": "c", "desired-state": "running"}),
        "it is scaled down",
    )
    assert (w1.pids("skep-node"), w1.pids("skep-net")) == before
    m1.docker("service", "rm", "flood")
    m1.docker("service", "scale", "--detach", "c=1")
    wait_until(lambda: running(m1, *others), "all run again", 90)
    wait_until(lambda: "No space" not in message(m1, "w1"), "the node says nothing any more", 90)
    wait_until(lambda: not full(w1.client().info()["Warnings"]), "nor does its docker info", 30)
    assert (w1.pids("skep-node"), w1.pids("skep-net")) == before
