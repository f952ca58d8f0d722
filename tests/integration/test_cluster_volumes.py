"""Cluster volumes on a real cluster, with a driver process on each node before one storage."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    remove_services,
    wait_running,
    wait_until,
)
from tests.support.storage.csi_driver import NAME
from tests.support.storage.csi_storage import Storage

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
WRITE_ONCE = ("sh", "-c", "[ -e /data/who ] || cat /etc/hostname >/data/who; exec sleep 1000")
OPTIONS = (
    *("--mount", "type=cluster,source=data,target=/data"),
    *("--constraint", "node.role == worker"),
    *("--restart-delay", "0s", "--stop-grace-period", "1s"),
)


class Disks:
    """The storage that all drivers share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def state(self) -> Storage:
        path = self.folder / "state.json"
        return Storage(json.loads(path.read_text()) if path.exists() else None)

    def published(self) -> list[str]:
        return self.state().published("data")

    def faults(self, **faults: Any) -> None:
        (self.folder / "faults.json").write_text(json.dumps(faults))


def _detach_loops(storage: Path) -> None:
    """What a failed test leaves of block volumes."""
    for loop in storage.glob("*.loop"):
        subprocess.run(["losetup", "--detach", loop.read_text()], check=False)
        loop.unlink()


@pytest.fixture(scope="module")
def trio() -> Iterator[TestCluster]:
    """m1, w1 and w2, with a driver each."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with a_playground("csi", managers=1, workers=2) as cluster, ExitStack() as stack:
        storage = cluster.directory / "storage"
        storage.mkdir()
        for node in cluster.nodes():
            pid = node.description["pids"][0]
            words = ("/run/skep/csi/disks.sock", str(storage), node.name)
            command = [
                "nsenter",
                f"--mount=/proc/{pid}/ns/mnt",
                sys.executable,
                "-m",
                "tests.support.storage.csi_driver",
            ]
            process = stack.enter_context(
                subprocess.Popen([*command, *words], stdout=subprocess.PIPE, env=environment)
            )
            stack.callback(process.kill)
            stack.callback(_detach_loops, storage)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        yield cluster


@pytest.fixture
def disks(trio: TestCluster) -> Iterator[Disks]:
    found = Disks(trio.directory / "storage")
    yield found
    assert found.state().violations == []


@pytest.fixture
def m1(trio: TestCluster, disks: Disks) -> Iterator[TestNode]:
    """The manager, with a volume ``data`` that its driver has made; without services and volumes afterwards."""
    node = trio.node("m1")
    wait_until(
        lambda: all(one["Description"].get("CSIInfo") for one in nodes_by_name(node).values()),
        "all nodes announce the driver",
    )
    node.docker("volume", "create", "--driver", NAME, "--type", "mount", "--sharing", "none", "data")
    wait_until(lambda: "Info" in cluster_volume(node), "the driver has made the volume")
    yield node
    disks.faults()
    for id in nodes_by_name(node).values():
        node.docker("node", "update", "--availability", "active", id["ID"])
    remove_services(node)
    if node.docker("volume", "inspect", "data", check=False).returncode == 0:
        wait_until(lambda: not cluster_volume(node).get("PublishStatus"), "nothing is published", 60)
        node.docker("volume", "rm", "data")
    wait_until(lambda: not disks.state().volumes, "the driver has deleted the volume")


def inspected(node: TestNode) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(node.docker("volume", "inspect", "data").stdout)
    return found[0]


def cluster_volume(node: TestNode) -> dict[str, Any]:
    return dict(inspected(node)["ClusterVolume"])


def node_of(m1: TestNode, task: dict[str, Any]) -> str:
    return next(name for name, node in nodes_by_name(m1).items() if node["ID"] == task["NodeID"])


def update(m1: TestNode, availability: str) -> None:
    m1.docker("volume", "update", "--availability", availability, "data")


def who(disks: Disks) -> str:
    (id,) = disks.state().volumes
    return (disks.folder / id / "who").read_text()


def wait_published(disks: Disks, *nodes: str) -> None:
    wait_until(lambda: disks.published() == list(nodes), f"it is published on {nodes}", 60)


def test_a_task_moves_to_another_node_with_its_data(m1: TestNode, disks: Disks) -> None:
    assert "data" in m1.docker("volume", "ls", "--cluster").stdout
    create(m1, "db", 1, *OPTIONS, command=WRITE_ONCE)
    (task,) = wait_running(m1, "db", 1)
    first = node_of(m1, task)
    wait_published(disks, first)
    written = wait_until(lambda: who(disks), "the task has written")
    m1.docker("node", "update", "--availability", "drain", first)
    other = {"w1": "w2", "w2": "w1"}[first]
    (task,) = wait_until(
        lambda: [one for one in wait_running(m1, "db", 1) if node_of(m1, one) == other],
        "it runs elsewhere",
        60,
    )
    wait_published(disks, other)
    assert who(disks) == written
    (status,) = cluster_volume(m1)["PublishStatus"]
    assert (status["NodeID"], status["State"]) == (task["NodeID"], "published")


def test_a_drained_volume_has_no_tasks_until_it_is_active_again(m1: TestNode, disks: Disks) -> None:
    create(m1, "db", 1, *OPTIONS, command=WRITE_ONCE)
    wait_running(m1, "db", 1)
    assert "volume is still in use" in m1.docker("volume", "rm", "data", check=False).stderr
    update(m1, "drain")
    wait_running(m1, "db", 0)
    wait_published(disks)
    words = "cannot fulfill requested CSI volume mounts"
    wait_until(lambda: words in m1.docker("service", "ps", "--no-trunc", "db").stdout, "it says why it waits")
    task = next(one for one in m1.client().api.tasks() if one["Status"]["State"] == "pending")
    explained = [SKEP, "--host", m1.socket, "explain", task["ID"]]
    said = subprocess.run(explained, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "cluster volume data has availability drain" in said
    update(m1, "active")
    wait_running(m1, "db", 1)


def test_a_volume_that_is_removed_with_force_is_given_up_by_its_node(m1: TestNode, disks: Disks) -> None:
    create(m1, "db", 1, *OPTIONS, command=WRITE_ONCE)
    (task,) = wait_running(m1, "db", 1)
    node = node_of(m1, task)
    wait_published(disks, node)
    m1.docker("volume", "rm", "--force", "data")
    assert m1.docker("volume", "ls", "--cluster", "--quiet").stdout == ""
    remove_services(m1)
    (volume,) = disks.state().volumes.values()
    wait_until(lambda: not next(iter(disks.state().volumes.values()))["mounted"], "it is not mounted", 60)
    assert volume["published"] == {node: 1}  # nobody unpublished it: what ``force`` is for
    m1.docker("volume", "create", "--driver", NAME, "--type", "mount", "--sharing", "none", "data")
    (path,) = disks.state().volumes
    state = disks.state()
    state.unpublish(path, node)
    (disks.folder / "state.json").write_text(state.dumped())


def test_a_driver_that_hangs_fails_its_task_and_holds_up_no_other(m1: TestNode, disks: Disks) -> None:
    disks.faults(
        ControllerPublishVolume={"hang": 3}, NodeStageVolume={"fail": 0.5}, NodePublishVolume={"fail": 0.5}
    )
    create(m1, "db", 1, *OPTIONS, command=WRITE_ONCE)
    began = time.monotonic()
    create(m1, "other", 1, "--constraint", "node.role == worker")
    wait_running(m1, "other", 1)
    assert time.monotonic() - began < 60
    wait_running(m1, "db", 1, 120)


def test_a_block_volume_is_a_device_in_its_tasks_and_moves_with_its_data(m1: TestNode, disks: Disks) -> None:
    m1.docker("volume", "rm", "data")
    wait_until(lambda: not disks.state().volumes, "the driver has deleted the volume")
    m1.docker("volume", "create", "--driver", NAME, "--type", "block", "--sharing", "none", "data")
    wait_until(lambda: "Info" in cluster_volume(m1), "the driver has made the volume")
    write_once = (
        "grep -q written /dev/data || { echo written by $(hostname) >/dev/data && sync; }; exec sleep 1000"
    )
    options = ("--mount", "type=cluster,source=data,target=/dev/data", *OPTIONS[2:])
    create(m1, "db", 1, *options, command=("sh", "-c", write_once))
    (task,) = wait_running(m1, "db", 1)
    first = node_of(m1, task)
    (id,) = disks.state().volumes
    disk = disks.folder / id / "disk"
    wait_until(lambda: disk.read_bytes().startswith(b"written by "), "the task has written to the device")
    written = disk.read_bytes()
    m1.docker("node", "update", "--availability", "drain", first)
    other = {"w1": "w2", "w2": "w1"}[first]
    (task,) = wait_until(
        lambda: [one for one in wait_running(m1, "db", 1) if node_of(m1, one) == other],
        "it runs elsewhere",
        60,
    )
    wait_published(disks, other)
    container = task["Status"]["ContainerStatus"]["ContainerID"]
    read = m1.cluster.node(other).docker("exec", container, "head", "-c", "11", "/dev/data").stdout
    assert read == "written by "
    assert disk.read_bytes() == written
    remove_services(m1)
    wait_until(lambda: not list(disks.folder.glob("*.loop")), "no node has the device")
