"""Many networks, and many services on one: names and addresses are right on other nodes, and nothing stays of them."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

from tests.integration.networks.lab import SERVE, hostname_of, in_place, place_of
from tests.integration.networks.resolving import ask_all
from tests.integration.networks.traces import leaving_nothing
from tests.support.machines.playground_rig import (
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    create,
    wait_running,
)

pytestmark = pytest.mark.timeout(1500)

LOOK_EVERY_S = 0.5
"""A list of hundreds of services costs the manager some of the time that it has for them."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("many", managers=1, workers=2) as cluster:
        # On a machine whose processors are all busy with starts no node is to be taken for dead.
        cluster.node("m1").docker("swarm", "update", "--dispatcher-heartbeat", "10s")
        yield cluster


def hostnames(addresses: Iterable[str]) -> dict[str, str]:
    """Address -> what the server there is called.

    Asked again once: the kernel keeps 1,024 neighbors for all namespaces of a machine (``gc_thresh3``), a playground's
    nodes together, and each connection between two containers takes two; when they are used up it waits seconds.
    """
    found = {}
    for address in addresses:
        try:
            found[address] = hostname_of(address)
        except TimeoutError:
            found[address] = hostname_of(address)
    return found


def create_many(m1: TestNode, networks: Mapping[str, str], replicas: int) -> None:
    """Services that say their name, by network: one task on each of ``replicas`` workers.  Until all run."""
    client = m1.client()
    for name, network in networks.items():
        client.services.create(
            IMAGE,
            list(SERVE),
            name=name,
            hostname=name,
            networks=[network],
            mode={"Replicated": {"Replicas": replicas}},
            maxreplicas=1 if replicas > 1 else None,
            constraints=["node.role==worker"],
            stop_grace_period=1_000_000_000,
        )
    deadline = time.monotonic() + 1200
    while missing := not_whole(client.api, networks, replicas):
        assert time.monotonic() < deadline, f"{len(missing)} services do not run: {sorted(missing)[:10]}"
        time.sleep(LOOK_EVERY_S)


def not_whole(api: Any, names: Iterable[str], replicas: int) -> set[str]:
    status = {one["Spec"]["Name"]: one["ServiceStatus"]["RunningTasks"] for one in api.services(status=True)}
    return {name for name in names if status.get(name) != replicas}


class Truth:
    """Names and addresses as the store has them."""

    def __init__(self, m1: TestNode) -> None:
        api = m1.client().api
        networks = {one["Id"]: one["Name"] for one in api.networks()}
        services = {one["ID"]: one for one in api.services()}
        self.virtual: dict[str, dict[str, str]] = {}
        """Network -> service -> its virtual address."""
        for service in services.values():
            for one in service["Endpoint"].get("VirtualIPs") or ():
                there = self.virtual.setdefault(networks[one["NetworkID"]], {})
                there[service["Spec"]["Name"]] = one["Addr"].partition("/")[0]
        self.tasks: dict[str, set[str]] = {}
        """Service -> its tasks' addresses."""
        for task in api.tasks(filters={"desired-state": "running"}):
            (place,) = task["NetworksAttachments"]
            addresses = self.tasks.setdefault(services[task["ServiceID"]]["Spec"]["Name"], set())
            addresses.add(place["Addresses"][0].partition("/")[0])


def names_are_right(responses: Mapping[str, tuple[str, ...]], truth: Truth, network: str) -> None:
    """``answers`` for each service of the network and ``tasks.`` each are what the store has."""
    wanted = {name: (address,) for name, address in truth.virtual[network].items()}
    wanted |= {f"tasks.{name}": tuple(sorted(truth.tasks[name])) for name in truth.virtual[network]}
    assert {name: tuple(sorted(response)) for name, response in responses.items()} == wanted


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_networks_with_a_service_each_know_their_own_alone_and_go_without_a_trace(
    cluster: TestCluster, count: int
) -> None:
    m1 = cluster.node("m1")
    with leaving_nothing(cluster):
        api = m1.client().api
        networks = {f"s{number}": f"net{number}" for number in range(count)}
        for network in networks.values():
            api.create_network(network, driver="overlay")
        create_many(m1, networks, replicas=2)
        truth = Truth(m1)
        all_virtual = [address for there in truth.virtual.values() for address in there.values()]
        assert len(set(all_virtual)) == count
        for name in ("w1", "w2"):
            for service, place in places(cluster.node(name)).items():
                network, other = networks[service], f"s{(int(service[1:]) + 1) % count}"
                responses = in_place(place, ask_all, (service, f"tasks.{service}", other))
                assert responses.pop(other) == ("NXDOMAIN",)
                names_are_right(responses, truth, network)
                reached = in_place(place, hostnames, (truth.virtual[network][service], *truth.tasks[service]))
                assert set(reached.values()) == {service}


def places(node: TestNode) -> dict[str, Any]:
    """Service -> the network namespace of its container here."""
    return {
        name: place_of(node, name)
        for name in (one["Labels"]["com.docker.swarm.service.name"] for one in node.client().api.containers())
    }


@pytest.mark.parametrize(
    ("count", "replicas"),
    [pytest.param(25, 2, marks=pytest.mark.slow), pytest.param(500, 1, marks=pytest.mark.slow)],
    ids=["25", "500"],
)
def test_services_on_one_network_are_found_from_another_node_and_go_without_a_trace(
    cluster: TestCluster, count: int, replicas: int
) -> None:
    m1 = cluster.node("m1")
    with leaving_nothing(cluster):
        m1.docker("network", "create", "-d", "overlay", "--subnet", "10.200.0.0/20", "wide")
        create(m1, "client", 1, "--network", "wide", "--constraint", "node.role==manager")
        wait_running(m1, "client", 1)
        names = [f"s{number}" for number in range(count)]
        create_many(m1, dict.fromkeys(names, "wide"), replicas)
        truth = Truth(m1)
        place = place_of(m1, "client")
        asked = [f"{prefix}{name}" for name in truth.virtual["wide"] for prefix in ("", "tasks.")]

        responses = in_place(place, ask_all, asked)
        reached = in_place(place, hostnames, [truth.virtual["wide"][name] for name in names])

        names_are_right(responses, truth, "wide")
        assert reached == {truth.virtual["wide"][name]: name for name in names}
        assert len(truth.tasks) == count + 1
        assert all(len(truth.tasks[name]) == replicas for name in names)
