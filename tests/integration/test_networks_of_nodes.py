"""Networks with tasks on two nodes: what each node lists, shows and reaches, in both versions of IP."""

import ipaddress
import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    containers,
    create,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

SPREAD = ("--replicas-max-per-node", "1")
OVERLAYS = ("network", "ls", "--filter", "driver=overlay", "--format", "{{.Name}}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("netnodes", managers=1, workers=1) as made:
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    remove_services(node)
    node.docker("network", "prune", "-f")


@pytest.fixture
def w1(cluster: TestCluster) -> TestNode:
    return cluster.node("w1")


def inspected(node: TestNode, name: str, *words: str) -> dict[str, Any]:
    (network,) = json.loads(node.docker("network", "inspect", *words, name).stdout)
    assert isinstance(network, dict)
    return network


def overlays(node: TestNode) -> list[str]:
    return sorted(node.docker(*OVERLAYS).stdout.split())


def test_a_worker_lists_an_overlay_only_while_a_task_of_its_own_uses_it(m1: TestNode, w1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "back")
    assert overlays(m1) == ["back", "ingress"]
    assert overlays(w1) == []
    here = ("--constraint", "node.hostname==m1")
    create(m1, "near", 1, "--network", "back", *here, command=IDLE)
    wait_running(m1, "near", 1)
    assert overlays(w1) == []
    create(m1, "far", 1, "--network", "back", "--constraint", "node.hostname==w1", command=IDLE)
    wait_running(m1, "far", 1)
    assert overlays(w1) == ["back"]
    seen = inspected(w1, "back")
    assert seen["IPAM"] == inspected(m1, "back")["IPAM"]
    (entry,) = seen["Containers"].values()
    assert entry["Name"].startswith("far.1.")
    m1.docker("service", "rm", "far")
    wait_until(lambda: overlays(w1) == [], "the worker has forgotten the network")
    refused = m1.docker("network", "rm", "back", check=False)
    assert "(service near)" in refused.stderr


def test_inspect_shows_the_containers_of_a_network(m1: TestNode, w1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--subnet", "10.60.0.0/24", "back")
    create(m1, "web", 2, "--network", "back", *SPREAD, command=IDLE)
    wait_running(m1, "web", 2)
    shown = inspected(m1, "back", "--verbose")
    assert {peer["Name"]: peer["IP"] for peer in shown["Peers"]} == {
        node: one.description["addr"] for node, one in (("m1", m1), ("w1", w1))
    }
    web = shown["Services"]["web"]
    tasks = {task["Name"]: (task["EndpointIP"], task["Info"]["Host IP"]) for task in web["Tasks"]}
    assert {host for _, host in tasks.values()} == {peer["IP"] for peer in shown["Peers"]}
    of_worker = inspected(w1, "back", "--verbose")
    assert {peer["IP"] for peer in of_worker["Peers"]} == {peer["IP"] for peer in shown["Peers"]}
    assert {task["EndpointIP"] for task in of_worker["Services"]["web"]["Tasks"]} == {
        address for address, _ in tasks.values()
    }
    for node in (m1, w1):
        ((id, entry),) = inspected(node, "back")["Containers"].items()
        address, host = tasks[entry["Name"]]
        assert (f"{address}/24", node.description["addr"]) == (entry["IPv4Address"], host)
        assert entry["MacAddress"] in node.docker("exec", id, "ip", "link").stdout
    assert ipaddress.ip_address(web["VIP"]) in ipaddress.ip_network("10.60.0.0/24")


def test_containers_of_two_nodes_meet_in_both_versions_of_ip(m1: TestNode, w1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--ipv6", "dual")
    create(m1, "web", 2, "--network", "dual", *SPREAD, command=IDLE)
    wait_running(m1, "web", 2)
    entries = [next(iter(inspected(node, "dual")["Containers"].items())) for node in (m1, w1)]
    (here, _), (_, there) = entries
    for version, field in (("-4", "IPv4Address"), ("-6", "IPv6Address")):
        address = there[field].partition("/")[0]

        def answers(version: str = version, address: str = address) -> bool:
            words = ("exec", here, "ping", version, "-c", "1", "-W", "2", address)
            return m1.docker(*words, check=False).returncode == 0

        wait_until(answers, f"{address} answers")


def test_a_plain_container_has_the_addresses_that_it_asks_for(m1: TestNode, w1: TestNode) -> None:
    subnets = ("--ipv6", "--subnet", "10.61.0.0/24", "--subnet", "fd00:61::/64")
    m1.docker("network", "create", "-d", "overlay", "--attachable", *subnets, "mine")
    asked = ("--network", "mine", "--ip", "10.61.0.77", "--ip6", "fd00:61::77")
    w1.docker("run", "-d", "--name", "box", *asked, IMAGE, *IDLE)
    try:
        (shown,) = json.loads(w1.docker("inspect", "box").stdout)
        mine = shown["NetworkSettings"]["Networks"]["mine"]
        assert (mine["IPAddress"], mine["GlobalIPv6Address"]) == ("10.61.0.77", "fd00:61::77")
        outside = ("run", "--rm", "--network", "mine", "--ip6", "fd00:62::1", IMAGE, "true")
        refused = w1.docker(*outside, check=False).stderr
        assert "Invalid address fd00:62::1: It does not belong to any of this network's subnets" in refused
    finally:
        w1.docker("rm", "-f", "box")


def test_a_service_whose_health_needs_its_peers_finds_them_before_they_are_healthy(
    m1: TestNode, w1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--subnet", "10.62.0.0/24", "quorum")
    two = "test $(nslookup tasks.peers 127.0.0.11 | grep -c 'Address.*10[.]62[.]') -ge 2"
    health = ("--health-cmd", two, "--health-interval", "1s", "--health-retries", "120")
    label = ("--label", "skep.publish-not-ready=true")
    create(m1, "peers", 2, "--network", "quorum", *label, *health, *SPREAD, command=IDLE)
    wait_running(m1, "peers", 2, within_s=90)  # each is healthy, as it has found the other


def test_networks_are_added_to_and_removed_from_a_service(m1: TestNode, w1: TestNode) -> None:
    """By effect: the tasks' interfaces, and what names resolve to."""
    for name, subnet in (("front", "10.63.0.0/24"), ("back", "10.64.0.0/24")):
        m1.docker("network", "create", "-d", "overlay", "--subnet", subnet, name)
    create(m1, "db", 1, "--network", "back", command=IDLE)
    soon = ("--update-monitor", "500ms")
    create(m1, "web", 1, *soon, "--network", "front", "--constraint", "node.hostname==m1", command=IDLE)
    wait_running(m1, "db", 1)
    wait_running(m1, "web", 1)

    def subnets() -> set[str]:
        (container,) = containers(m1, "web") or [{"Id": ""}]
        shown = m1.docker("exec", container["Id"], "ip", "-4", "-o", "addr", check=False).stdout
        return {subnet for subnet in ("10.63.0.", "10.64.0.") if subnet in shown}

    def finds_db() -> bool:
        (container,) = containers(m1, "web")
        return m1.docker("exec", container["Id"], "nslookup", "db", "127.0.0.11", check=False).returncode == 0

    assert subnets() == {"10.63.0."}
    assert not finds_db()
    m1.docker("service", "update", "--quiet", "--network-add", "back", "web")
    wait_until(
        lambda: len(containers(m1, "web")) == 1 and subnets() == {"10.63.0.", "10.64.0."}, "it is on both"
    )
    wait_until(finds_db, "web resolves db")
    m1.docker("service", "update", "--quiet", "--network-rm", "front", "web")
    wait_until(lambda: len(containers(m1, "web")) == 1 and subnets() == {"10.64.0."}, "it is on back alone")
    again = m1.docker("service", "update", "--quiet", "--network-add", "back", "web", check=False)
    assert "service is already attached to network back" in again.stderr
    missing = m1.docker("service", "update", "--quiet", "--network-add", "nowhere", "web", check=False)
    assert re.search(
        "network nowhere not found|No such network: nowhere", missing.stderr
    )  # clients before 23


def test_address_pools_change_after_the_beginning(m1: TestNode, w1: TestNode) -> None:
    def skep(*words: str) -> subprocess.CompletedProcess[str]:
        command = [SKEP, "--host", m1.socket, "cluster", "pools", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def subnet(network: str) -> str:
        return str((inspected(m1, network)["IPAM"]["Config"] or [{"Subnet": ""}])[0]["Subnet"])

    assert "10.0.0.0/8, in subnets of /24" in skep().stdout
    changed = skep("--add", "172.31.8.0/29", "--size", "29")
    assert changed.returncode == 0, changed.stderr
    refused = skep("--remove", "10.0.0.0/8")
    assert "address pool 10.0.0.0/8 is in use by networks: ingress" in refused.stderr
    try:
        m1.docker("network", "create", "-d", "overlay", "small")
        wait_until(lambda: subnet("small").endswith("/29"), "the network has a subnet of the new size")
    finally:
        m1.docker("network", "rm", "small", check=False)
        restored = skep("--remove", "172.31.8.0/29", "--size", "24")
    assert restored.stdout == "10.0.0.0/8, in subnets of /24\n", restored.stderr


def test_a_full_network_goes_on_in_the_subnet_it_is_given(m1: TestNode, w1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--subnet", "10.61.0.0/30", "tiny")
    create(m1, "web", 2, "--network", "tiny", "--endpoint-mode", "dnsrr", *SPREAD, command=IDLE)

    def errors() -> str:
        return m1.docker("service", "ps", "web", "--no-trunc", "--format", "{{.Error}}").stdout

    wait_until(lambda: "no available IPv4 addresses" in errors(), "the second task says why it waits")
    grow = (SKEP, "-H", m1.socket, "network", "update", "--subnet-add", "10.61.1.0/29", "tiny")
    subprocess.run(grow, capture_output=True, timeout=30, check=True)
    wait_running(m1, "web", 2)
    found = [next(iter(inspected(node, "tiny")["Containers"].values())) for node in (m1, w1)]
    assert sorted(entry["IPv4Address"].rpartition(".")[0] for entry in found) == ["10.61.0", "10.61.1"]


def test_ingress_is_removed_and_made_again_with_another_subnet(m1: TestNode, w1: TestNode) -> None:
    def removed(check: bool = True) -> str:
        return m1.docker("network", "rm", "ingress", stdin="y\n", check=check).stderr

    create(m1, "web", 2, "--publish", "8085:80", *SPREAD, command=IDLE)
    wait_running(m1, "web", 2)
    assert "depends on it" in removed(check=False)
    m1.docker("service", "rm", "web")
    removed()
    assert "ingress" not in overlays(m1)
    words = ("service", "create", "-d", "--publish", "8085:80", "--name", "none", "busybox:1")
    refused = m1.docker(*words, check=False)
    assert "service needs ingress network, but no ingress network is present" in refused.stderr
    m1.docker("network", "create", "-d", "overlay", "--ingress", "--subnet", "10.62.0.0/24", "mesh")
    create(m1, "web", 2, "--publish", "8085:80", *SPREAD, command=IDLE)
    wait_running(m1, "web", 2)
    tasks = m1.client().api.tasks({"service": "web", "desired-state": "running"})
    given = [one["Addresses"][0] for task in tasks for one in task.get("NetworksAttachments") or ()]
    assert len(given) == 2
    assert all(ipaddress.ip_interface(one).network == ipaddress.ip_network("10.62.0.0/24") for one in given)
