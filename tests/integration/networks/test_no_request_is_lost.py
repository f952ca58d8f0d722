"""While tasks come and go, clients without retries get every answer: by a virtual address, a name and the mesh."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    running,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.point("5-5"), pytest.mark.point("5-correctness"), pytest.mark.timeout(300)]

HERE = Path(__file__).parent
PYTHON = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
PLACES = sorted({"/usr", "/lib", "/lib64", sys.base_prefix, str(HERE)})
"""What the machine's Python needs, shown to containers that have nothing but busybox."""
LISTENS = "import socket; socket.create_connection(('127.0.0.1', 80), 5)"


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("lost", managers=1, workers=2) as cluster:
        m1 = cluster.node("m1")
        m1.docker("network", "create", "-d", "overlay", "net1")
        mounts = [
            word
            for place in PLACES
            if Path(place).exists()
            for word in ("--mount", f"type=bind,source={place},target={place},readonly")
        ]
        create(m1, "client", 1, "--network", "net1", "--constraint", "node.hostname==w1")
        create(
            m1,
            "web",
            4,
            *("--network", "net1", "-p", "8080:80", "--stop-grace-period", "30s", *mounts),
            # Until it listens, nobody is sent to it.
            *("--health-cmd", f'{PYTHON} -c "{LISTENS}"', "--health-interval", "300ms"),
            *("--update-parallelism", "2", "--update-monitor", "100ms", "--label", "skep.drain=5s"),
            command=(PYTHON, str(HERE / "graceful_server.py"), "80"),
        )
        wait_running(m1, "client", 1)
        wait_running(m1, "web", 4)
        yield cluster


@contextmanager
def asking(cluster: TestCluster) -> Iterator[dict[str, Any]]:
    """Strict clients on both ways for as long as the block runs; then what they saw."""
    w1 = cluster.node("w1")
    (inside,) = container_pids(w1, "client").values()
    node = f"http://{cluster.node('w2').description['addr']}:8080/"
    virtual = f"http://{looked_up(w1, 'web')}:80/"
    clients = [
        subprocess.Popen(
            ["nsenter", *where, sys.executable, str(HERE / "strict_client.py"), url],
            stdout=subprocess.PIPE,
            text=True,
        )
        for where, url in (
            (["-t", str(inside), "-n"], virtual),
            ([f"--net={w1.description['netns']}"], node),
        )
    ]
    seen: dict[str, Any] = {"answered": {}, "failed": []}
    try:
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "asking\n"
        yield seen
    finally:
        for client in clients:
            client.send_signal(signal.SIGTERM)
            said = json.loads(client.communicate(timeout=30)[0] or "{}")
            seen["failed"] += said.get("failed", ["the client ended"])
            for server, count in said.get("answered", {}).items():
                seen["answered"][server] = seen["answered"].get(server, 0) + count


def looked_up(node: TestNode, name: str) -> str:
    """The address of ``name``, asked for in the client's container as its programs do."""
    (container,) = container_pids(node, "client")
    said = node.docker("exec", container, "busybox", "nslookup", name).stdout
    return said.split("Name:")[1].split("Address:")[1].split()[0]


def tasks_of(node: TestNode) -> set[str]:
    return {task["ID"] for task in running(node, "web")}


def wait_stopped(node: TestNode, tasks: set[str]) -> None:
    """Until each of ``tasks`` has ended on its node."""

    def ended() -> bool:
        shown = {task["ID"]: task["Status"]["State"] for task in node.client().api.tasks()}
        return all(shown.get(id, "shutdown") not in ("running", "starting", "ready") for id in tasks)

    wait_until(ended, "what is to stop has stopped", 90)


@pytest.mark.parametrize(
    ("rounds", "requests"),
    [(1, 1_500), pytest.param(6, 10_000, marks=pytest.mark.slow)],
    ids=["one-round", "ten-thousand"],
)
def test_no_request_is_lost_during_update_scaling_and_drain(
    cluster: TestCluster, rounds: int, requests: int
) -> None:
    m1 = cluster.node("m1")
    with asking(cluster) as seen:
        for _ in range(rounds):
            change_everything(m1)

    assert Counter(seen["failed"]) == Counter()
    assert sum(seen["answered"].values()) >= requests
    assert len(seen["answered"]) >= 8  # four at first, four by the update


def change_everything(m1: TestNode) -> None:
    """Update, scale in and out, drain a node; each until what was to stop has stopped."""
    before = tasks_of(m1)
    m1.docker("service", "update", "--detach", "--force", "web")
    wait_until(lambda: len(tasks_of(m1) - before) == 4, "all tasks are new", 90)
    wait_stopped(m1, before)

    everyone = tasks_of(m1)
    m1.docker("service", "scale", "--detach", "web=2")
    wait_running(m1, "web", 2, 60)
    wait_stopped(m1, everyone - tasks_of(m1))
    m1.docker("service", "scale", "--detach", "web=4")
    wait_running(m1, "web", 4, 60)

    leaving = {task["ID"] for task in running(m1, "web") if task["NodeID"] == node_id(m1, "w2")}
    m1.docker("node", "update", "--availability", "drain", "w2")
    wait_until(lambda: len(tasks_of(m1) - leaving) == 4, "four tasks elsewhere", 60)
    wait_stopped(m1, leaving)
    m1.docker("node", "update", "--availability", "active", "w2")


def test_a_request_of_ten_seconds_outlives_the_stop_of_its_task(cluster: TestCluster) -> None:
    m1, w1 = cluster.node("m1"), cluster.node("w1")
    wait_running(m1, "web", 4, 60)
    m1.docker("service", "update", "--detach", "--label-add", "skep.drain=20s", "web")
    (inside,) = container_pids(w1, "client").values()
    url = f"http://{looked_up(w1, 'web')}:80/slow/10"
    script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=60).read().decode())"
    slow = [
        subprocess.Popen(
            ["nsenter", "-t", str(inside), "-n", sys.executable, "-c", script, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(8)
    ]
    before = tasks_of(m1)
    wait_until(lambda: connections(cluster) >= 8, "all are being answered")
    m1.docker("service", "update", "--detach", "--force", "web")

    answers = [one.communicate(timeout=90)[0] for one in slow]

    assert all(one.returncode == 0 for one in slow), answers
    wait_until(lambda: len(tasks_of(m1) - before) == 4, "all tasks are new", 120)


def connections(cluster: TestCluster) -> int:
    """Requests that servers have accepted."""
    found = 0
    for name in ("m1", "w1", "w2"):
        for pid in container_pids(cluster.node(name), "web").values():
            lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
            found += sum(line.split()[3] == "01" and line.split()[1].endswith(":0050") for line in lines)
    return found


def node_id(node: TestNode, name: str) -> str:
    return str(node.client().api.inspect_node(name)["ID"])
