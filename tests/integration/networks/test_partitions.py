"""Nodes are cut off while services change, and are back: within seconds every node knows what the store has."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import docker
import pytest
import requests

from skep.linux.processes import borrowed
from skep.model.networks.tables import difference
from skep.playground.playground import Playground
from skep.store.etcd.process.deadlines import SILENT_S
from tests.integration.networks.lab import SERVE, addresses, hostname_of, in_place, place_of, virtual_address
from tests.integration.networks.resolving import ask_all
from tests.integration.networks.traces import leaving_nothing, tables
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    containers,
    create,
    nodes_by_name,
    ready,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(240)

NODES = ("m1", "m2", "m3", "w1", "w2", "w3")
HEALED_WITHIN_S = 20
"""From the return of the nodes to tables, names, virtual addresses and containers that are right everywhere."""
CAUGHT_UP_WITHIN_S = 10
"""A manager that was cut off answers again, with what the others decided."""
REQUESTS = 12
"""To each virtual address from each node: 72 in all, of which none may go to a task that is gone."""
RESPONSE_TIMEOUT_S = 0.9
"""Less than the kernel takes to send a lost SYN again: a look is short, and what it finds is of now."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("part", managers=3, workers=3) as cluster:
        yield cluster


@pytest.fixture
def services(cluster: TestCluster) -> Iterator[TestCluster]:
    """A client on each node, and two services that it can ask."""
    m1 = cluster.node("m1")
    with leaving_nothing(cluster):
        m1.docker("network", "create", "-d", "overlay", "net1")
        words = "--detach --name client --mode global --network net1 busybox:1 sleep 3600"
        m1.docker("service", "create", *words.split())
        create_serving(m1, "early", 3)
        create_serving(m1, "web", 6)
        for name, count in (("early", 3), ("web", 6), ("client", 6)):
            wait_running(m1, name, count)
        wait_right(cluster, NODES, m1, ("early", "web"), ("late",), 30)
        yield cluster


def create_serving(node: TestNode, name: str, replicas: int) -> None:
    words = ("--network", "net1", "--stop-grace-period", "1s", "--restart-delay", "0s")
    create(node, name, replicas, *words, command=SERVE)


async def together(
    cluster: TestCluster, verb: Callable[[Playground, str], Awaitable[None]], names: Sequence[str]
) -> None:
    """``cut`` or ``reconnect`` them at one moment."""
    playground = Playground(cluster.directory, cluster.name, lambda _: None)
    await asyncio.gather(*(verb(playground, name) for name in names))


@pytest.mark.parametrize(
    "cut",
    [pytest.param(("w1", "w2"), id="workers", marks=pytest.mark.slow), pytest.param(("m1",), id="a-manager")],
)
def test_after_a_partition_every_node_is_right_within_seconds(
    services: TestCluster, cut: tuple[str, ...]
) -> None:
    cluster = services
    m2, others = cluster.node("m2"), [name for name in NODES if name not in cut]
    asyncio.run(together(cluster, Playground.cut, cut))
    try:
        wait_until(lambda: answered(ready, m2) == set(others), "the others know who is away", 40)
        m2.docker("service", "rm", "early")
        create_serving(m2, "late", 3)
        m2.docker("service", "scale", "--detach", "web=8")
        for name, count in (("late", 3), ("web", 8)):
            wait_running(m2, name, count)
        wait_right(cluster, others, m2, ("late", "web"), ("early",), 30)
    finally:
        asyncio.run(together(cluster, Playground.reconnect, cut))
    wait_until(lambda: answered(ready, m2) == set(NODES), "all are back")
    wait_right(cluster, NODES, m2, ("late", "web"), ("early",), HEALED_WITHIN_S)
    for name in ("m1", "m2", "m3"):
        wait_until(
            partial(shows, cluster.node(name), "web", 8),
            f"{name} shows what the others do",
            CAUGHT_UP_WITHIN_S,
        )


def test_every_connection_between_the_managers_stores_has_a_deadline(cluster: TestCluster) -> None:
    for name in ("m1", "m2", "m3"):
        (etcd,) = cluster.node(name).pids("etcd")
        wait_until(lambda pid=etcd: set(deadlines_ms(pid)) == {SILENT_S * 1000}, f"the kernel knows {name}'s")  # type: ignore[misc]


def deadlines_ms(pid: int) -> list[int]:
    """Of the connections of a process that are established; 0: it has none."""
    found = []
    process = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=borrowed(process, int(name))) as one, suppress(OSError):
                    if one.family != socket.AF_UNIX and one.getpeername():
                        found.append(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    except OSError:  # one was closed meanwhile
        return []
    finally:
        os.close(process)
    return found


def shows(node: TestNode, service: str, count: int) -> bool:
    """Whether this manager, which may not have caught up yet, says that so many tasks run."""
    try:
        return len(running(node, service)) == count
    except (docker.errors.DockerException, requests.exceptions.RequestException):
        return False


def answered(question: Callable[[TestNode], set[str]], node: TestNode) -> set[str]:
    """Nothing, while the node's managers look for a leader."""
    try:
        return question(node)
    except (docker.errors.DockerException, requests.exceptions.RequestException):
        return set()


def wait_right(
    cluster: TestCluster,
    names: Sequence[str],
    manager: TestNode,
    present: Sequence[str],
    absent: Sequence[str],
    within_s: float,
) -> None:
    """Until tables, names, virtual addresses and containers of the nodes are what the store of ``manager`` has."""
    wrong: list[str] = []

    def is_right() -> bool:
        wrong[:] = [f"{name}: {what}" for name in names for what in wrong_on(cluster.node(name))]
        return not wrong

    def wrong_on(node: TestNode) -> Iterator[str]:
        wanted: dict[str, tuple[str, ...]] = dict.fromkeys(absent, ("NXDOMAIN",))
        try:
            for name in present:
                wanted[name] = (virtual_address(manager, name, "net1"),)
                wanted[f"tasks.{name}"] = tuple(sorted(addresses(manager, name, "net1")))
            place = place_of(node, "client")
            found = {name: tuple(sorted(said)) for name, said in in_place(place, ask_all, wanted).items()}
            if found != wanted:
                yield f"names {found} instead of {wanted}"
                return
            # Of an equal table one manager may say that it is as of a later revision than another does.
            here, there = tables(node)["net1"], tables(manager)["net1"]
            if change := difference(here, there):
                states = {task["ID"]: task["Status"] for task in manager.client().api.tasks()}
                yield (
                    f"its table lacks {change} and has {difference(there, here)} "
                    f"with {[states.get(one.task_id) for one in change.endpoints]}"
                )
            for name in present:
                tasks = running(manager, name)
                hosts = {task["Status"]["ContainerStatus"]["ContainerID"][:12] for task in tasks}
                reached = in_place(place, reached_by, wanted[name][0], REQUESTS)
                if not reached <= hosts:
                    yield f"{name} is answered by {reached - hosts}, which the store does not have"
                node_id = nodes_by_name(manager)[node.name]["ID"]
                wanted_here = {
                    task["Status"]["ContainerStatus"]["ContainerID"]
                    for task in tasks
                    if task["NodeID"] == node_id
                }
                if wanted_here != {one["Id"] for one in containers(node, name)}:
                    yield f"containers of {name} that are not requested"
        except (OSError, ValueError, KeyError, docker.errors.DockerException) as error:
            yield f"{type(error).__name__}: {error}"

    try:
        wait_until(is_right, "all nodes are right", within_s)
    except AssertionError:
        raise AssertionError(f"after {within_s} s: {wrong}") from None


def reached_by(address: str, count: int) -> set[str]:
    """The tasks that answer at a virtual address.  Raises: OSError: one does not answer at once."""
    return {hostname_of(address, within_s=RESPONSE_TIMEOUT_S) for _ in range(count)}
