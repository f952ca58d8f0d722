"""A service on a volume that GlusterFS replicates: a node and its brick are lost, the service moves, and no data is."""

import asyncio
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from skep.playground.images.debian import unpack_with_libraries
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    remove_stacks,
    running,
    wait_running,
    wait_until,
)
from tests.support.machines.talks import deploy
from tests.support.storage.gluster import PACKAGES, VOLUME, GlusterNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKERS = ("w1", "w2", "w3")
STACK = """\
version: "3.8"
services:
  counter:
    image: busybox:1
    command: [sh, -c, "COMMAND"]
    volumes: ["numbers:/data"]
    ports: ["8080:80"]
    deploy:
      labels: {skep.volume-affinity: none}
      placement: {constraints: [node.role == worker]}
volumes:
  numbers:
    driver_opts: {type: none, o: bind, device: /srv/shared/app}
"""
# A number is served once it is on the disks of the bricks.
COMMAND = (
    "mkdir /w; (n=$$(tail -n 1 /data/log 2>/dev/null || echo 0);"
    " while sleep 0.05; do"
    " echo $$((n+1)) | dd of=/data/log oflag=append conv=notrunc,fsync 2>/dev/null || continue;"
    " n=$$((n+1)); echo $$n >/w/.new; mv /w/.new /w/index.html; done) & exec httpd -f -p 80 -h /w"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("gluster", managers=1, workers=3) as playground:
        yield playground


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    remove_stacks(node)


@pytest.fixture(scope="module")
def gluster(cluster: TestCluster) -> Iterator[dict[str, GlusterNode]]:
    """The volume, with a brick and a mount on each worker."""
    with tempfile.TemporaryDirectory(prefix="skep-gluster-", dir="/var/tmp") as name, ExitStack() as stack:
        place = Path(name)
        (place / "packages").mkdir()
        asyncio.run(unpack_with_libraries(place / "packages", *PACKAGES))
        nodes: dict[str, GlusterNode] = {}
        for worker in WORKERS:
            nodes[worker] = GlusterNode(cluster.node(worker), place / worker, place / "packages" / "root")
            stack.callback(nodes[worker].power_off)
        create_volume(list(nodes.values()))
        yield nodes


def create_volume(nodes: list[GlusterNode]) -> None:
    first, servers = nodes[0], [one.address for one in nodes]
    for one in nodes:
        one.start()
    for one in nodes[1:]:
        assert first.gluster("peer", "probe", one.address), first.said
    bricks = [f"{one.address}:{one.brick}" for one in nodes]
    words = ("volume", "create", VOLUME, "replica", str(len(nodes)), *bricks, "force")
    wait_until(lambda: first.gluster(*words), "the volume is created", 60)
    for option in (("network.ping-timeout", "3"), ("cluster.heal-timeout", "5")):
        assert first.gluster("volume", "set", VOLUME, *option), first.said
    assert first.gluster("volume", "start", VOLUME), first.said
    for one in nodes:
        one.mount(servers)
    (first.mounted / "app").mkdir()


def numbers(directory: Path) -> set[int]:
    """Return the complete lines of the service's file."""
    try:
        lines = (directory / "app" / "log").read_text().split("\n")[:-1]
    except OSError:
        return set()
    return {int(line) for line in lines if line.isdigit()}


def served(m1: TestNode) -> int:
    """Return the last number that the service says is stored, or 0 without a response."""
    command = [
        "nsenter",
        f"--net={m1.description['netns']}",
        "curl",
        "-sf",
        "-m",
        "2",
        "http://127.0.0.1:8080/",
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    return int(said) if said.isdigit() else 0


def place_of(m1: TestNode) -> str:
    (task,) = running(m1, "numbers_counter")
    names = {node["ID"]: name for name, node in nodes_by_name(m1).items()}
    return names[task["NodeID"]]


def test_a_task_is_rejected_where_the_volume_is_not_mounted(
    m1: TestNode, gluster: dict[str, GlusterNode], tmp_path: Path
) -> None:
    """Else it would write to the machine's own disk.  The directory exists only inside the volume."""
    gluster["w1"].unmount()
    file = STACK.replace("COMMAND", COMMAND).replace("node.role == worker", "node.hostname == w1")
    deploy(m1, tmp_path, "numbers", file)

    def error() -> str:
        return m1.docker("service", "ps", "--no-trunc", "--format", "{{.Error}}", "numbers_counter").stdout

    wait_until(lambda: "no such file or directory" in error(), "the reason is shown", 60)
    assert list(gluster["w1"].mounted.iterdir()) == []
    gluster["w1"].mount([gluster["w2"].address])
    wait_running(m1, "numbers_counter", 1, 60)


def test_a_service_moves_with_its_data_and_a_lost_brick_is_healed(
    cluster: TestCluster, m1: TestNode, gluster: dict[str, GlusterNode], tmp_path: Path
) -> None:
    deploy(m1, tmp_path, "numbers", STACK.replace("COMMAND", COMMAND))
    wait_running(m1, "numbers_counter", 1, 60)
    wait_until(lambda: served(m1) > 50, "numbers are stored", 60)
    first = lose_its_node(cluster, m1, gluster)
    assert max(numbers(gluster[first].brick)) < served(m1), "its brick is behind"

    cluster.skep("start", first)
    gluster[first].start()
    gluster[first].mount([one.address for one in gluster.values()])
    known = served(m1)
    wait_until(
        lambda: numbers(gluster[first].brick) >= {*range(1, known + 1)}, "its brick has what it missed", 120
    )
    wait_until(lambda: nodes_by_name(m1)[first]["Status"]["State"] == "ready", "its node is back", 60)

    second = lose_its_node(cluster, m1, gluster)
    assert second != first
    (third,) = {*WORKERS} - {first, second}
    last = served(m1)
    for name in (first, third):
        wait_until(
            lambda name=name: numbers(gluster[name].mounted) >= {*range(1, last + 1)},
            f"{name} reads all numbers",
        )
    cluster.skep("start", second)  # its tasks can be removed only there


def lose_its_node(cluster: TestCluster, m1: TestNode, gluster: dict[str, GlusterNode]) -> str:
    """Cut off the power of the service's node, and wait until it goes on elsewhere with all numbers."""
    lost, known = place_of(m1), served(m1)
    assert known > 0
    cluster.skep("kill", lost)
    gluster[lost].power_off()
    wait_until(lambda: served(m1) > known + 20, "it goes on elsewhere", 120)
    there = place_of(m1)
    assert there != lost
    assert numbers(gluster[there].mounted) >= {*range(1, known + 1)}
    return lost
