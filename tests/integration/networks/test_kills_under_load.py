"""Kill -9 of daemons, managers, tasks and machines while clients ask: what was led to the dead is all that is lost."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from skep.linux.detached import ProcessIdentity
from skep.model.values.ids import TaskId
from tests.integration.networks.lab import (
    Seen,
    addresses,
    asking,
    in_place,
    node_id,
    outside,
    place_of,
    serve,
    tasks_of,
    virtual_address,
)
from tests.integration.networks.resolving import ask_all
from tests.integration.networks.traces import leaving_nothing, run_directory, tables
from tests.support.machines.kills import strike, wait_started_again
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    ready,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(300)

LOOKUPS = REQUESTS = 1_000
CLIENTS = 4
"""Connections at any moment: two by the virtual address, two by the mesh."""
REPLICAS = 4
SERVERS = ("m2", "m3", "w1", "w2")
MARGIN_S = 0.5
"""The longest duration of a request on a busy machine, and of a node's reaction to a change."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("kill", managers=3, workers=2) as cluster:
        m1 = cluster.node("m1")
        with leaving_nothing(cluster):
            set_up(m1)
            yield cluster


def set_up(m1: TestNode) -> None:
    """A client on m1, web servers on all other nodes."""
    m1.docker("network", "create", "-d", "overlay", "net1")
    # The kernel keeps what a client that has gone had to say to a server that was killed for 97 s otherwise.
    short = ("--sysctl", "net.ipv4.tcp_orphan_retries=1")
    create(m1, "client", 1, "--network", "net1", "--constraint", "node.hostname==m1", *short)
    where = ("--constraint", "node.hostname!=m1", "--network", "net1", "-p", "8080:80")
    serve(m1, "web", REPLICAS, *where, "--restart-delay", "0s", "--stop-grace-period", "1s")
    wait_running(m1, "client", 1)
    wait_running(m1, "web", REPLICAS, 60)


@contextmanager
def load(cluster: TestCluster, *, at_least: int = 0) -> Iterator[tuple[Seen, Seen]]:
    """Names and requests, by the virtual address and by m1's published port, during the block: lookups, requests."""
    client = place_of(cluster.node("m1"), "client")
    virtual = virtual_address(cluster.node("m2"), "web", "net1")
    wait_until(lambda: answers_in(client) == expected_answers(cluster), "m1 knows all tasks")
    published = f"http://{cluster.node('m1').description['addr']}:8080/"
    words = (f"--at-least={at_least}", "--pause=0.002")
    with (
        asking((client, ("strict_names.py", f"--at-least={at_least}", "web", "tasks.web"))) as names,
        asking(
            (client, ("strict_client.py", *words, f"http://{virtual}:80/")),
            (outside(cluster), ("strict_client.py", *words, published)),
        ) as requests,
    ):
        yield names, requests


def answers_in(place: Path) -> set[str]:
    """As ``strict_names.py`` has them."""
    found = in_place(place, ask_all, ("web", "tasks.web"))
    return {f"{name}={','.join(sorted(response))}" for name, response in found.items()}


def expected_answers(cluster: TestCluster) -> set[str]:
    """As the store has them."""
    m2 = cluster.node("m2")
    tasks = ",".join(sorted(addresses(m2, "web", "net1")))
    return {f"web={virtual_address(m2, 'web', 'net1')}", f"tasks.web={tasks}"}


def wait_whole(cluster: TestCluster) -> None:
    """All of web runs, and m1's own manager says so."""
    m1 = cluster.node("m1")
    wait_until(lambda: m1.docker("service", "ls", check=False).returncode == 0, "m1's API answers")
    wait_running(m1, "web", REPLICAS, 60)


@pytest.mark.slow
def test_a_machines_daemons_die_at_once_and_no_lookup_and_no_request_is_lost(cluster: TestCluster) -> None:
    m1 = cluster.node("m1")
    with load(cluster, at_least=LOOKUPS) as (names, requests):
        struck = strike(m1, "node", "manager", "etcd")
        wait_started_again(m1, struck)
        wait_whole(cluster)

    assert Counter(names.failed) == Counter()
    assert Counter(requests.failed) == Counter()
    assert set(names.answered) == expected_answers(cluster)
    assert names.count >= LOOKUPS
    assert requests.count >= 2 * REQUESTS  # by each of both ways
    assert len(requests.answered) == REPLICAS


@pytest.mark.slow
def test_a_new_version_of_the_net_process_costs_no_lookup_and_no_request(cluster: TestCluster) -> None:
    m1 = cluster.node("m1")
    before = set(m1.pids("skep-net"))
    with load(cluster, at_least=LOOKUPS) as (names, requests):
        says_it_is_older(m1)
        wait_started_again(m1, strike(m1, "node"))
        wait_until(
            lambda: m1.pids("skep-net") and not before & set(m1.pids("skep-net")),
            "another net process has taken over",
            60,
        )
        wait_whole(cluster)

    assert Counter(names.failed) == Counter()
    assert Counter(requests.failed) == Counter()
    assert set(names.answered) == expected_answers(cluster)
    assert names.count >= LOOKUPS
    assert requests.count >= 2 * REQUESTS


def says_it_is_older(node: TestNode) -> None:
    """The running net process says that it is of another version: the next node process replaces it."""
    file = run_directory(node) / "net.pid"
    process = msgspec.json.decode(file.read_bytes(), type=ProcessIdentity)
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(process, version="0.0.1")))


@pytest.mark.slow
def test_the_leaders_manager_and_a_killed_net_process_cost_no_request(cluster: TestCluster) -> None:
    leader = wait_until(lambda: leader_of(cluster), "there is a leader")
    with load(cluster) as (_, requests):
        wait_started_again(leader, strike(leader, "manager"))
        wait_until(lambda: leader_of(cluster), "there is a leader")
        net = set(cluster.node("m1").pids("skep-net"))
        for pid in net:
            cluster.node("m1").kill(pid)
        wait_until(lambda: set(cluster.node("m1").pids("skep-net")) - net, "another net process")
        wait_whole(cluster)
    assert Counter(requests.failed) == Counter()


def leader_of(cluster: TestCluster) -> TestNode | None:
    shown = cluster.node("m2").docker(
        "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}", check=False
    )
    leading = [line.split()[0] for line in shown.stdout.splitlines() if line.endswith(" Leader")]
    return cluster.node(leading[0]) if leading else None


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_of_a_killed_task_only_what_was_led_to_it_is_lost(cluster: TestCluster, kills: int) -> None:
    with load(cluster) as (_, requests):
        led = [kill_one(cluster, number) for number in range(kills)]
    assert requests.count > kills * CLIENTS
    lost_otherwise = [
        words
        for words in requests.failed
        if not any(first <= float(words.split()[0]) <= last for first, last in led)
    ]
    assert not lost_otherwise, f"while requests were led to the killed: {led}"


def kill_one(cluster: TestCluster, number: int) -> tuple[float, float]:
    """Kill a task of web, wait for its replacement; from when until when requests were led to it and lost."""
    m1 = cluster.node("m1")
    before = tasks_of(m1)
    killed_at = time.time()
    os.kill(a_task(cluster, number), signal.SIGKILL)
    (killed,) = wait_until(lambda: before - tasks_of(m1), "the manager shows it")
    wait_until(lambda: not is_served_by(m1, killed), "m1 sends no more requests to it")
    known_at = time.time()
    wait_whole(cluster)
    return killed_at - MARGIN_S, known_at + MARGIN_S


def is_served_by(node: TestNode, task: str) -> bool:
    """Whether the node's kernel is to lead new connections to it, on any network."""
    endpoints = [table.endpoints.get(TaskId(task)) for table in tables(node).values()]
    return any(one is not None and one.is_serving for one in endpoints)


def a_task(cluster: TestCluster, number: int) -> int:
    """The process of one of web's tasks, another one each time."""
    pids = [pid for name in SERVERS for pid in container_pids(cluster.node(name), "web").values()]
    return pids[number % len(pids)]


@pytest.mark.slow
def test_of_a_lost_machine_only_what_was_led_to_it_is_lost(cluster: TestCluster) -> None:
    m1, w1 = cluster.node("m1"), cluster.node("w1")
    wait_whole(cluster)
    with load(cluster) as (_, requests):
        try:
            cluster.skep("cut", "w1")  # the kernel of a lost machine does not answer either
            cluster.skep("kill", "w1")
            wait_until(lambda: not on_node(m1, "w1"), "its tasks are not wanted any more")
            wait_whole(cluster)
        finally:
            cluster.skep("reconnect", "w1")
            cluster.skep("start", "w1")
        wait_until(lambda: "w1" in ready(m1), "w1 is back")
        wait_until(lambda: len(container_pids(w1, "web")) == len(on_node(m1, "w1")), "nothing is there twice")
    assert requests.count > 100 * CLIENTS
    assert len(requests.failed) <= 2 * CLIENTS, requests.failed


def on_node(m1: TestNode, name: str) -> list[str]:
    """Tasks of web that run there and are wanted."""
    there = node_id(m1, name)
    return [task["ID"] for task in running(m1, "web") if task["NodeID"] == there]
