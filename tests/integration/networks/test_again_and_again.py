"""A service that comes and goes many times, and one that is asked many times who it is."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from tests.integration.networks.lab import (
    SERVE,
    addresses,
    hostname_of,
    in_place,
    outside,
    place_of,
    virtual_address,
)
from tests.integration.networks.resolving import ask, ask_all
from tests.integration.networks.traces import leaving_nothing, run_directory
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)

NODES = ("m1", "w1", "w2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("again", managers=1, workers=2) as cluster, leaving_nothing(cluster):
        m1 = cluster.node("m1")
        m1.docker("network", "create", "-d", "overlay", "net1")
        words = "--detach --name client --mode global --network net1 busybox:1 sleep 3600"
        m1.docker("service", "create", *words.split())
        wait_running(m1, "client", len(NODES))
        yield cluster


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_service_that_is_made_and_removed_again_and_again_is_resolved_rightly(
    cluster: TestCluster, times: int
) -> None:
    m1 = cluster.node("m1")
    places = [place_of(cluster.node(name), "client") for name in NODES]
    for _ in range(times):
        create(m1, "again", 2, "--network", "net1", "--stop-grace-period", "1s", command=SERVE)
        wait_running(m1, "again", 2)
        wanted = {
            "again": (virtual_address(m1, "again", "net1"),),
            "tasks.again": tuple(sorted(addresses(m1, "again", "net1"))),
        }
        for place in places:
            wait_until(partial(answers, place, wanted), f"the names are {wanted}", 10)
            wait_until(partial(serves, place, *wanted["again"]), "it listens", 10)
        m1.docker("service", "rm", "again")
        # A name of two labels may be an external one, and there is no upstream server.
        gone = {"again": ("NXDOMAIN",), "tasks.again": ("SERVFAIL",)}
        for place in places:
            wait_until(partial(answers, place, gone), "the names are gone", 10)


def serves(place: Path, address: str) -> bool:
    """Whether it does by now: a task runs before its server listens."""
    try:
        return bool(in_place(place, hostname_of, address))
    except ConnectionRefusedError:
        return False


def answers(place: Path, wanted: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether those are the answers there, in whatever order."""
    found = in_place(place, ask_all, wanted)
    return {name: tuple(sorted(response)) for name, response in found.items()} == wanted


def test_requests_to_the_name_and_to_the_published_port_rotate_over_all_replicas(
    cluster: TestCluster,
) -> None:
    m1 = cluster.node("m1")
    create(m1, "whoami", 3, "--network", "net1", "-p", "8080:80", command=SERVE)
    hosts = {task["Status"]["ContainerStatus"]["ContainerID"][:12] for task in wait_running(m1, "whoami", 3)}
    for name in NODES:
        inside, published = place_of(cluster.node(name), "client"), cluster.node(name).description["addr"]
        for ask_who in (
            partial(in_place, inside, by_name, "whoami"),
            partial(in_place, outside(cluster), by_address, published, 8080),
        ):
            wait_until(partial(lead_to, ask_who, hosts), f"{name} leads to all")
            found = ask_who(150)
            assert found.keys() == hosts
            # Each is drawn at random: fewer than 21 of 150, where 50 are expected, is five deviations away.
            assert min(found.values()) > 20, found


def test_a_canary_gets_its_share_of_the_connections_to_the_name_and_to_the_published_port(
    cluster: TestCluster,
) -> None:
    m1 = cluster.node("m1")
    labels = ("skep.update=canary", "skep.update.steps=5%", "skep.update.step-time=30m")
    words = [word for label in labels for word in ("--label", label)]
    create(m1, "staged", 3, "--network", "net1", "-p", "8081:80", *words, command=SERVE)
    old = {task["ID"] for task in wait_running(m1, "staged", 3)}
    m1.docker("service", "update", "--detach", "--quiet", "--env-add", "N=1", "staged")
    tasks = wait_running(m1, "staged", 4)
    (canary,) = (
        one["Status"]["ContainerStatus"]["ContainerID"][:12] for one in tasks if one["ID"] not in old
    )
    for name in NODES:
        inside, published = place_of(cluster.node(name), "client"), cluster.node(name).description["addr"]
        for ask_who in (
            partial(in_place, inside, by_name, "staged"),
            partial(in_place, outside(cluster), by_address, published, 8081),
        ):
            wait_until(lambda ask=ask_who: ask(40)[canary] > 0, f"{name} leads to the canary", 60)
            # 15 are expected of 300, and 75 without a share: each bound is five deviations away.
            assert 0 < ask_who(300)[canary] < 35
    m1.docker("service", "rm", "staged")


def lead_to(ask_who: Callable[[int], Counter[str]], hosts: set[str]) -> bool:
    """Whether exactly ``hosts`` answer; false while one refuses."""
    try:
        return ask_who(12).keys() == hosts
    except OSError:
        return False


def by_name(name: str, count: int) -> Counter[str]:
    """Who answers at the name, which is asked for each time."""
    return Counter(hostname_of(ask(name)[0]) for _ in range(count))


def by_address(address: str, port: int, count: int) -> Counter[str]:
    """Who answers at the published port."""
    return Counter(hostname_of(address, port) for _ in range(count))


def test_tasks_that_are_replaced_before_they_start_leave_no_namespace_and_hold_no_address(
    cluster: TestCluster,
) -> None:
    m1 = cluster.node("m1")
    words = ("--network", "net1", "--update-parallelism", "0", "--stop-grace-period", "10m")
    create(m1, "ready", 6, *words, command=("sleep", "3600"))  # SIGTERM does not end it
    wait_running(m1, "ready", 6, 60)
    replaced: set[str] = set()
    for number in range(2):
        m1.docker("service", "update", "--detach", "--quiet", "--env-add", f"N={number}", "ready")
        # Prepared, and not started as long as their predecessors run.
        prepared = wait_until(partial(six_prepared, m1, "ready", replaced), "six tasks are prepared", 60)
        replaced |= prepared
    # Listed before the first is killed: its successor starts at once, perhaps on another node.
    running = [
        (cluster.node(name), container)
        for name in NODES
        for container in container_pids(cluster.node(name), "ready")
    ]
    for node, container in running:
        node.client().api.kill(container)
    tasks = wait_running(m1, "ready", 6, 120)
    assert {task["ID"] for task in tasks} == prepared
    assert len(addresses(m1, "ready", "net1")) == 6
    for name in NODES:
        node = cluster.node(name)
        wait_until(partial(is_tidy, node), f"{name} has no namespace without a container", 60)


def six_prepared(node: TestNode, service: str, earlier: Collection[str]) -> set[str]:
    """Ids of the tasks that are ready to be started, other than ``earlier``; empty: not six."""
    tasks = node.client().api.tasks(filters={"service": service})
    found = {task["ID"] for task in tasks if task["Status"]["State"] == task["DesiredState"] == "ready"}
    return found - set(earlier) if len(found - set(earlier)) == 6 else set()


def is_tidy(node: TestNode) -> bool:
    """Whether each namespace of a container belongs to one that runs."""
    pinned = {path.name for path in (run_directory(node) / "netns").iterdir()}
    return pinned == {one["Id"] for one in node.client().api.containers()}
