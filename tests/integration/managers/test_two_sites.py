"""Managers and workers at two sites, with 100 ms and lost packets between them."""

import time
from collections.abc import Iterator

import pytest
from docker.errors import DockerException

from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    ready,
    wait_running,
    wait_until,
)
from tests.support.networks.distance import distant_subnets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

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
