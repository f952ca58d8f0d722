"""Managers and workers at two sites, with 100 ms and lost packets between them."""

import subprocess
import time
from collections.abc import Iterator

import pytest
from docker.errors import DockerException

from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    nodes_by_name,
    ready,
    remove_services,
    running,
    wait_running,
    wait_until,
)
from tests.support.networks.distance import distant_subnets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE_BYTES = 200 << 10
"""Size of a page.  Some hundred packets: one or two of them are lost in each direction."""
SERVE = f"mkdir /w; head -c {PAGE_BYTES} /dev/zero >/w/index.html; exec httpd -f -p 80 -h /w"
STEADY_S = 20.0
"""Seconds for which nothing may change.  A session that does not hold is lost within a few heartbeats."""
WRITTEN_WITHIN_S = 5.0
"""A new leader needs the vote of a manager at the other site.  Measured: 1.4 s."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """m1, m3 and w2 are at one site, m2 and w1 at the other."""
    with a_playground("far", managers=3, workers=2, subnets=2) as playground:
        switch = f"skep-{playground.name}-net"
        with distant_subnets(switch, delay_ms=50, loss_percent=1):
            yield playground


def leaders(seen_by: TestNode) -> list[str]:
    nodes = nodes_by_name(seen_by)
    return [name for name, node in nodes.items() if node.get("ManagerStatus", {}).get("Leader")]


def write(node: TestNode, name: str) -> bool:
    try:
        node.client().secrets.create(name=name, data=b"x").remove()
    except DockerException:
        return False
    return True


def test_sessions_and_the_leader_last_at_a_distance(cluster: TestCluster) -> None:
    m1, m2 = cluster.node("m1"), cluster.node("m2")
    wait_until(lambda: ready(m1) == {"m1", "m2", "m3", "w1", "w2"}, "all nodes are ready")
    (leader,) = leaders(m1)
    until = time.monotonic() + STEADY_S
    number = 0
    while time.monotonic() < until:
        number += 1
        assert write(m2, f"far-{number}")
        assert write(m1, f"near-{number}")
        assert ready(m1) == {"m1", "m2", "m3", "w1", "w2"}
        assert leaders(m1) == [leader]


def test_an_overlay_reaches_over_the_distance(cluster: TestCluster) -> None:
    """By name, virtual address and published port, with whole pages."""
    m1, w1, w2 = (cluster.node(name) for name in ("m1", "w1", "w2"))
    m1.docker("network", "create", "-d", "overlay", "both")
    for host in ("w1", "w2"):
        where = ("--network", "both", "--constraint", f"node.hostname=={host}")
        create(m1, f"at-{host}", 1, *where, command=("sh", "-c", SERVE))
        wait_running(m1, f"at-{host}", 1, 60)
    m1.docker("service", "update", "--detach", "--publish-add", "8080:80", "at-w1")
    wait_until(lambda: page_at(w2, "http://127.0.0.1:8080/") == PAGE_BYTES, "the port at the other site", 60)

    def fetched(node: TestNode, service: str, other: str) -> int:
        for id in container_pids(node, service):
            command = ("sh", "-c", f"timeout 10 wget -q -O - http://{other}/ | wc -c")
            return int(node.docker("exec", id, *command, check=False).stdout or 0)
        return 0

    ways = ((w1, "at-w1", "at-w2"), (w2, "at-w2", "at-w1"))
    for node, service, other in ways:
        wait_until(
            lambda node=node, a=service, b=other: fetched(node, a, b) == PAGE_BYTES, f"{other} by name"
        )
    (before,) = {running(m1, "at-w2")[0]["ID"]}
    until = time.monotonic() + STEADY_S
    while time.monotonic() < until:
        for node, service, other in ways:
            assert fetched(node, service, other) == PAGE_BYTES
        assert page_at(w2, "http://127.0.0.1:8080/") == PAGE_BYTES
    assert running(m1, "at-w2")[0]["ID"] == before
    remove_services(m1)


def page_at(node: TestNode, url: str) -> int:
    """Return the size of the page that a node's own client gets."""
    command = ["nsenter", f"--net={node.description['netns']}", "curl", "-s", "-m", "15", url]
    return len(subprocess.run(command, capture_output=True, timeout=30, check=False).stdout)


def test_the_leader_is_lost_and_the_rest_is_at_two_sites(cluster: TestCluster) -> None:
    m1, m2, m3 = (cluster.node(name) for name in ("m1", "m2", "m3"))
    create(m2, "web", 4, "--constraint", "node.role==worker")
    wait_running(m2, "web", 4)
    cluster.skep("kill", "m1")
    try:
        began = time.monotonic()
        wait_until(lambda: write(m3, f"after-{time.monotonic()}"), "m3 accepts a write", WRITTEN_WITHIN_S)
        print(f"a write was accepted after {time.monotonic() - began:.1f} s")
        wait_running(m2, "web", 4)
        (leader,) = leaders(m3)
        until = time.monotonic() + STEADY_S
        while time.monotonic() < until:
            assert write(m2, f"one-{time.monotonic()}")
            assert ready(m3) >= {"m2", "m3", "w1", "w2"}
            assert leaders(m3) == [leader]
    finally:
        cluster.skep("start", "m1")
    wait_until(lambda: ready(m1) == {"m1", "m2", "m3", "w1", "w2"}, "m1 is back")
