"""Failover addresses on a playground: the block of the guide, and what clients see when the holder fails."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path

import pytest

from skep.manager.failover.decision import AWAY_S
from tests.integration.networks.lab import outside
from tests.support.harness.documents import shell_blocks
from tests.support.machines.lab import door_image
from tests.support.machines.playground_rig import SKEP, TestCluster, a_playground, wait_running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.needs("curl")]

MOVED_S_MAX = 3.0
"""Seconds that clients wait at most after the death of the holder."""
DRAINED_S_MAX = 0.2
CLIENT_S_MAX = 1.5
"""Seconds until a client that asks again every 0.3 s has an answer, on a busy machine."""
LOOK_S = 0.02
PAGE = "docs/guide/front-door.md"
NAME = "hello.example.com"


CONNECTIONS = """
import asyncio, sys
async def result():
    try:
        (await asyncio.wait_for(asyncio.open_connection(sys.argv[1], 80), 20))[1].close()
    except OSError as error:
        return str(error) or "timeout"
    return "opened"
async def main():
    print("ready", flush=True)
    sys.stdin.readline()
    results = []
    for _ in range(50):
        results.append(asyncio.create_task(result()))
        await asyncio.sleep(0.01)
    print(*{await one for one in results}, sep="; ")
asyncio.run(main())
"""
"""Opens 50 connections within half a second of a line of input."""


class Watch:
    """Requests to an address, and looks at which nodes have it.  Runs in threads of its own."""

    def __init__(self, cluster: TestCluster, address: str) -> None:
        self.cluster, self.address = cluster, address
        self.answers: list[float] = []
        """Times of answers."""
        self.twice: list[str] = []
        self._is_over = threading.Event()

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        threads = [threading.Thread(target=one) for one in (self._ask, self._look)]
        for one in threads:
            one.start()
        try:
            yield self
        finally:
            self._is_over.set()
            for one in threads:
                one.join(5)

    def _ask(self) -> None:
        inside = ["nsenter", f"--net={outside(self.cluster)}"]
        while not self._is_over.wait(LOOK_S):
            command = [
                *inside,
                "curl",
                "-s",
                "-f",
                "-m",
                "0.3",
                "-H",
                f"Host: {NAME}",
                f"http://{self.address}/hosts",
            ]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                self.answers.append(time.monotonic())

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_S):
            if len(having := holders(self.cluster, self.address)) > 1:
                # The first look may have been before a move, and the last one after it.
                having = sorted(set(having) & set(holders(self.cluster, self.address)))
                self.twice += [", ".join(having)] if len(having) > 1 else []

    def wait_holder(self, *but: str) -> str:
        """Wait until one node that is none of ``but`` has the address, and an answer came since."""
        found: list[str] = []

        def is_held() -> bool:
            found[:] = [name for name in holders(self.cluster, self.address) if name not in but]
            return len(found) == 1

        wait_until(is_held, f"another holder than {but}", within_s=30)
        since = time.monotonic()
        wait_until(lambda: bool(self.answers) and self.answers[-1] > since, "an answer", within_s=30)
        return found[0]

    def longest_gap_s(self) -> float:
        """Return the longest time without an answer."""
        return max(later - at for at, later in pairwise(self.answers))


def holders(cluster: TestCluster, address: str) -> list[str]:
    """Return the nodes whose kernel has an address."""
    found = []
    for one in cluster.nodes():
        command = ["nsenter", f"--net={one.description['netns']}", "ip", "-o", "addr", "show", "to", address]
        if subprocess.run(command, capture_output=True, text=True, check=False).stdout:
            found.append(one.name)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """A playground with the front door on its workers, and a service behind it on its manager."""
    with a_playground("failover", managers=1, workers=2) as made:
        m1 = made.node("m1")
        tarball = made.directory / "door.tar"
        tarball.write_bytes(door_image().data)
        m1.docker("load", "--quiet", "--input", str(tarball))
        words = ("door", "up", "--image", "skep-door:latest", "--constraint", "node.role==worker")
        environment = {"PATH": os.environ["PATH"], "DOCKER_HOST": m1.socket}
        subprocess.run([SKEP, *words], env=environment, timeout=60, check=True)
        m1.docker(
            *("service", "create", "-d", "--name", "hello", "--constraint", "node.role==manager"),
            *("--label", f"skep.http={NAME}", "busybox:1", "httpd", "-f", "-h", "/etc"),
        )
        wait_running(m1, "skep-door", 2, within_s=60)
        yield made


@pytest.fixture
def watch(cluster: TestCluster) -> Iterator[Watch]:
    """Requests to an address of the guide, which both workers could hold."""
    m1 = cluster.node("m1")
    wait_running(m1, "skep-door", 2, within_s=60)
    address = str(ip_address(m1.description["addr"]) + 80)
    (block,) = [one for one in shell_blocks(PAGE) if "skep cluster address" in one]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DOCKER_HOST": m1.socket,
        "FREE_ADDRESS": address,
    }
    run = ["bash", "-ec", block]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 or "already exists" in done.stderr, done.stderr
    with Watch(cluster, address).running() as made:
        made.wait_holder()
        yield made
        assert made.twice == []


@pytest.mark.parametrize(("fail", "mend"), [("kill", "start"), ("pause", "resume"), ("cut", "reconnect")])
def test_a_lost_holder_is_replaced_in_time(cluster: TestCluster, watch: Watch, fail: str, mend: str) -> None:
    node = watch.wait_holder()
    cluster.skep(fail, node)
    second = watch.wait_holder(node)
    assert watch.longest_gap_s() <= MOVED_S_MAX, "not in time"
    wait_until(lambda: node not in holders(cluster, watch.address), "the former holder has it no longer")
    cluster.skep(mend, node)
    wait_running(cluster.node("m1"), "skep-door", 2, within_s=60)
    assert watch.wait_holder() == second, "it does not return by itself"


def test_connections_that_begin_while_the_address_is_away_are_served(
    cluster: TestCluster, watch: Watch
) -> None:
    """As if the holder had no processor time for a second, so that its kernel dropped the address."""
    node = cluster.node(watch.wait_holder())
    client = subprocess.Popen(
        ["nsenter", f"--net={outside(cluster)}", sys.executable, "-c", CONNECTIONS, watch.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    drop = f"ip addr del {watch.address}/32 dev $(ip -o addr show to {watch.address} | cut -d' ' -f2)"
    inside = ["nsenter", f"--net={node.description['netns']}", "sh", "-ec", drop]
    subprocess.run(inside, check=True, timeout=10)
    assert client.communicate("now\n", timeout=60)[0] == "opened\n"
    assert watch.wait_holder() == node.name


def logged_at(cluster: TestCluster, event: str) -> float:
    """Return the last time at which any node has logged ``event`` (Unix time)."""
    logs = [line for one in cluster.nodes() for line in _log(cluster, one.name) if event in line]
    return max(datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp() for line in logs)


def _log(cluster: TestCluster, node: str) -> list[str]:
    return (cluster.directory / node / "skep.log").read_text().splitlines()


def is_willing(cluster: TestCluster) -> bool:
    """Return whether both workers may be named: they are ready, and none was silent a short time ago."""
    states = cluster.node("m1").docker("node", "ls", "--format", "{{.Status}}").stdout.split()
    moved_at = logged_at(cluster, "failover address has another node")
    return set(states) == {"Ready"} and time.time() - moved_at > AWAY_S


def test_a_drained_holder_gives_the_address_up_at_once(cluster: TestCluster, watch: Watch) -> None:
    """Measured in the logs, because a client that has sent a packet to the former holder waits for its timeout."""
    wait_until(lambda: is_willing(cluster), "the other node may be named", within_s=60)
    node = watch.wait_holder()
    cluster.node("m1").docker("node", "update", "--availability", "drain", node)
    watch.wait_holder(node)
    cluster.node("m1").docker("node", "update", "--availability", "active", node)
    began = logged_at(cluster, "failover address leaves its node")
    assert logged_at(cluster, "failover address held") - began <= DRAINED_S_MAX, "not in time"
    assert watch.longest_gap_s() <= CLIENT_S_MAX, "not in time"
