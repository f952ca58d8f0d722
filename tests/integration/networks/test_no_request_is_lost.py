"""While tasks come and go, clients without retries get every answer: by a virtual address, a name and the mesh."""

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.networks.lab import (
    asking,
    in_place,
    node_id,
    place_of,
    serve,
    tasks_of,
    wait_stopped,
)
from tests.integration.networks.resolving import ask
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("lost", managers=1, workers=2) as cluster:
        m1 = cluster.node("m1")
        m1.docker("network", "create", "-d", "overlay", "net1")
        create(m1, "client", 1, "--network", "net1", "--constraint", "node.hostname==w1")
        words = (
            "--network",
            "net1",
            "-p",
            "8080:80",
            "--stop-grace-period",
            "90s",
            "--label",
            "skep.drain=5s",
        )
        serve(m1, "web", 4, *words, "--update-parallelism", "2", "--update-monitor", "100ms")
        wait_running(m1, "client", 1)
        wait_running(m1, "web", 4)
        yield cluster


@pytest.mark.parametrize(
    ("rounds", "requests"),
    [(1, 1_500), pytest.param(6, 10_000, marks=pytest.mark.slow)],
    ids=["one-round", "ten-thousand"],
)
def test_no_request_is_lost_during_update_scaling_and_drain(
    cluster: TestCluster, rounds: int, requests: int
) -> None:
    m1 = cluster.node("m1")
    w1, w2 = cluster.node("w1"), cluster.node("w2")
    client = place_of(w1, "client")
    (virtual,) = in_place(client, ask, "web")
    with asking(
        (client, ("strict_client.py", f"http://{virtual}:80/")),
        (Path(w1.description["netns"]), ("strict_client.py", f"http://{w2.description['addr']}:8080/")),
    ) as seen:
        for _ in range(rounds):
            change_everything(m1)

    assert Counter(seen.failed) == Counter()
    assert seen.count >= requests
    assert len(seen.answered) >= 8  # four at first, four by the update


def change_everything(m1: TestNode) -> None:
    """Update, scale in and out, drain a node; each until what was to stop has stopped."""
    before = tasks_of(m1)
    update(m1)
    wait_until(lambda: len(tasks_of(m1) - before) == 4, "all tasks are new", 90)
    wait_stopped(m1, before)

    everyone = tasks_of(m1)
    m1.docker("service", "scale", "--detach", "web=2")
    wait_running(m1, "web", 2, 60)
    wait_stopped(m1, everyone - tasks_of(m1))
    m1.docker("service", "scale", "--detach", "web=4")
    wait_running(m1, "web", 4, 60)

    leaving = tasks_on(m1, "w2")
    drain(m1)
    wait_until(lambda: len(tasks_of(m1) - leaving) == 4, "four tasks elsewhere", 60)
    wait_stopped(m1, leaving)
    m1.docker("node", "update", "--availability", "active", "w2")


def update(m1: TestNode) -> None:
    m1.docker("service", "update", "--detach", "--force", "web")


def scale_in(m1: TestNode) -> None:
    m1.docker("service", "scale", "--detach", "web=1")


def drain(m1: TestNode) -> None:
    m1.docker("node", "update", "--availability", "drain", "w2")


def test_a_service_with_one_task_loses_no_request_while_its_node_is_drained(cluster: TestCluster) -> None:
    """Docker stops the task before its replacement runs.  The update order is Docker's default, stop-first."""
    m1 = cluster.node("m1")
    serve(
        m1,
        "alone",
        1,
        "--network",
        "net1",
        "-p",
        "8081:80",
        "--stop-grace-period",
        "90s",
        "--label",
        "skep.drain=5s",
    )
    wait_running(m1, "alone", 1, 60)
    names = {node_id(m1, name): name for name in ("m1", "w1", "w2")}
    client = place_of(cluster.node("w1"), "client")
    (virtual,) = in_place(client, ask, "alone")
    mesh = m1.description["addr"]
    wait_until(lambda: in_place(client, accepts, virtual, 80), "its virtual address is served")
    wait_until(lambda: in_place(Path(m1.description["netns"]), accepts, mesh, 8081), "its port is served")
    with asking(
        (client, ("strict_client.py", f"http://{virtual}:80/")),
        (Path(m1.description["netns"]), ("strict_client.py", f"http://{mesh}:8081/")),
    ) as seen:
        for _ in range(3):
            (task,) = wait_running(m1, "alone", 1, 60)
            home = names[task["NodeID"]]
            m1.docker("node", "update", "--availability", "drain", home)
            wait_until(lambda old=task["ID"]: old not in tasks_of(m1, "alone"), "another task serves", 60)
            wait_stopped(m1, {task["ID"]})
            m1.docker("node", "update", "--availability", "active", home)
    m1.docker("service", "rm", "alone")

    assert Counter(seen.failed) == Counter()
    assert seen.count >= 300
    assert len(seen.answered) == 4, "the first task and three replacements"


def accepts(address: str, port: int) -> bool:
    """Return whether a connection is accepted."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def web(cluster: TestCluster) -> Iterator[TestCluster]:
    """Four tasks on all nodes, before and after; with time enough for the last connection of each."""
    m1 = cluster.node("m1")
    m1.docker("service", "update", "--detach", "--label-add", "skep.drain=90s", "web")
    yield cluster
    m1.docker("node", "update", "--availability", "active", "w2")
    m1.docker("service", "update", "--detach", "--label-add", "skep.drain=5s", "web")
    m1.docker("service", "scale", "--detach", "web=4")
    wait_running(m1, "web", 4, 60)


@pytest.mark.parametrize(
    ("cause", "seconds"),
    [
        (update, 10),
        pytest.param(update, 60, marks=pytest.mark.slow),
        pytest.param(scale_in, 60, marks=pytest.mark.slow),
        pytest.param(drain, 60, marks=pytest.mark.slow),
    ],
)
def test_a_stop_waits_for_the_last_request_and_no_longer(
    web: TestCluster, cause: Callable[[TestNode], None], seconds: int
) -> None:
    m1 = web.node("m1")
    spread_out(m1)
    before = tasks_of(m1)
    with slow_requests(web, 8, seconds) as requests:
        cause(m1)
        wait_until(lambda: before - tasks_of(m1), "tasks are to stop", 60)
        responses = [one.communicate(timeout=seconds + 60)[0] for one in requests]
        answered_at = time.monotonic()

    assert all(one.returncode == 0 for one in requests), responses
    # The last are stopped only when they get no more requests.
    assert {response.split()[2] for response in responses} == {"serving"}
    if cause is update:
        wait_until(lambda: len(tasks_of(m1) - before) == 4, "all tasks are new", 60)
    wait_stopped(m1, before - tasks_of(m1))
    assert time.monotonic() - answered_at < 30, (
        "with 90 s allowed, it is the connections that were waited for"
    )


@pytest.mark.slow
def test_a_stop_waits_for_connections_no_longer_than_the_service_says(web: TestCluster) -> None:
    m1 = web.node("m1")
    m1.docker("service", "update", "--detach", "--label-add", "skep.drain=1s", "web")
    with slow_requests(web, 8, 10) as requests:
        scale_in(m1)
        responses = [one.communicate(timeout=60)[0] for one in requests]
    states = [response.split()[2] for response in responses]
    assert states.count("stopping") > 0, "stopped in the middle of a request, which it then finished"


@contextmanager
def slow_requests(cluster: TestCluster, count: int, seconds: int) -> Iterator[list["subprocess.Popen[str]"]]:
    """Requests that take so long, each on a connection of its own; all have been accepted when the block begins."""
    client = place_of(cluster.node("w1"), "client")
    (virtual,) = in_place(client, ask, "web")
    script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=120).read().decode())"
    command = [
        "nsenter",
        f"--net={client}",
        sys.executable,
        "-c",
        script,
        f"http://{virtual}:80/slow/{seconds}",
    ]
    requests = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(count)
    ]
    try:
        wait_until(lambda: connections(cluster) >= count, "all are being answered")
        yield requests
    finally:
        for request in requests:
            request.kill()
            request.wait()


def spread_out(m1: TestNode) -> None:
    """Four tasks, at least one of them on w2, and no update under way.

    One that is signalled before its server has a handler continues until the grace period ends: the
    kernel drops such signals for the first process of a PID namespace.
    """
    wait_running(m1, "web", 4, 60)
    if not tasks_on(m1, "w2"):
        before = tasks_of(m1)
        update(m1)
        wait_until(lambda: len(tasks_of(m1) - before) == 4 and tasks_on(m1, "w2"), "tasks are on w2 too", 90)
        wait_stopped(m1, before)


def tasks_on(m1: TestNode, node: str) -> set[str]:
    there = node_id(m1, node)
    return {task["ID"] for task in running(m1, "web") if task["NodeID"] == there}


def connections(cluster: TestCluster) -> int:
    """Requests that servers have accepted."""
    found = 0
    for name in ("m1", "w1", "w2"):
        for pid in container_pids(cluster.node(name), "web").values():
            try:
                lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
            except (FileNotFoundError, ProcessLookupError):  # its task has ended meanwhile
                continue
            found += sum(line.split()[3] == "01" and line.split()[1].endswith(":0050") for line in lines)
    return found
