"""HAProxy in front of all nodes loses nothing; inside the cluster it follows a service's tasks by DNS alone."""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.integration.networks import haproxy
from tests.integration.networks.lab import (
    asking,
    in_place,
    outside,
    place_of,
    serve,
    tasks_of,
    wait_stopped,
)
from tests.integration.networks.traces import leaving_nothing
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    running,
    wait_running,
    wait_until,
)

pytestmark = [
    pytest.mark.needs("haproxy"),
    pytest.mark.timeout(240),
]

FRONT_PORT = 8888


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("proxy", managers=1, workers=2) as cluster, leaving_nothing(cluster):
        m1 = cluster.node("m1")
        m1.docker("network", "create", "-d", "overlay", "net1")
        words = (
            "--network",
            "net1",
            "-p",
            "8080:80",
            "--stop-grace-period",
            "30s",
            "--label",
            "skep.drain=10s",
        )
        serve(m1, "web", 2, *words, "--update-monitor", "100ms")
        wait_running(m1, "web", 2, 60)
        yield cluster


@pytest.mark.slow
def test_in_front_of_all_nodes_it_loses_no_request_with_fewer_replicas_than_nodes(
    cluster: TestCluster,
) -> None:
    m1, client = cluster.node("m1"), outside(cluster)
    addresses = [node["addr"] for node in cluster.description["nodes"]]
    front = in_place(client, own_address, addresses[0])
    with haproxy.running(client, haproxy.in_front_of(addresses, FRONT_PORT, 8080)):
        wait_until(partial(in_place, client, listens, front, FRONT_PORT), "it listens")
        with asking((client, ("strict_client.py", "--pause=0.002", f"http://{front}:{FRONT_PORT}/"))) as seen:
            before = tasks_of(m1)
            m1.docker("service", "update", "--detach", "--force", "web")
            wait_until(lambda: len(tasks_of(m1) - before) == 2, "all tasks are new", 90)
            wait_stopped(m1, before)
            for replicas in (4, 2):
                everyone = tasks_of(m1)
                m1.docker("service", "scale", "--detach", f"web={replicas}")
                wait_running(m1, "web", replicas, 60)
                wait_stopped(m1, everyone - tasks_of(m1))
    assert Counter(seen.failed) == Counter()
    assert len(seen.answered) >= 5, (
        "two at first, two by the update, and by scaling out one that had the time"
    )
    assert seen.count > 300


@pytest.mark.slow
def test_inside_the_cluster_it_follows_the_tasks_by_dns_alone(cluster: TestCluster, tmp_path: Path) -> None:
    m1 = cluster.node("m1")
    image = tmp_path / "haproxy.tar"
    image.write_bytes(asyncio.run(haproxy.archive()).data)
    cluster.skep("load", str(image))
    m1.docker("config", "create", "haproxy", "-", stdin=haproxy.following("tasks.web", 80, replicas_max=8))
    m1.docker(
        *("service", "create", "--detach", "--name", "proxy", "--network", "net1", "--no-resolve-image"),
        *("--config", f"source=haproxy,target={haproxy.CONFIGURATION}"),
        *("--constraint", "node.hostname==w1", haproxy.IMAGE),
    )
    wait_running(m1, "proxy", 1)
    proxy = place_of(cluster.node("w1"), "proxy")
    wait_until(partial(follows, m1, proxy), "it has found the tasks")
    with asking((proxy, ("strict_client.py", "--pause=0.002", "http://127.0.0.1:80/"))) as seen:
        for replicas in (6, 1, 4, 2):
            m1.docker("service", "scale", "--detach", f"web={replicas}")
            wait_running(m1, "web", replicas, 60)
            wait_until(partial(follows, m1, proxy), f"it asks all of the {replicas} tasks, and no other")
    assert Counter(seen.failed) == Counter()
    m1.docker("service", "rm", "proxy")
    m1.docker("config", "rm", "haproxy")


def follows(m1: TestNode, proxy: Path) -> bool:
    """Whether the proxy's backends are exactly web's tasks."""
    tasks = running(m1, "web")
    hosts = {task["Status"]["ContainerStatus"]["ContainerID"][:12] for task in tasks}
    try:
        return {in_place(proxy, server_by, "127.0.0.1") for _ in range(2 * len(hosts))} == hosts
    except URLError:
        return False


def server_by(address: str) -> str:
    """The name of the server that answers there.  Raises: URLError."""
    with urlopen(f"http://{address}:80/", timeout=10) as response:
        return str(response.read().split()[0].decode())


def own_address(peer: str) -> str:
    """The address that packets for ``peer`` leave from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


def listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=3).close()
    except OSError:
        return False
    return True
