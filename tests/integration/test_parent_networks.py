"""Networks on the machines' own devices (macvlan): of plain containers, and of services on several nodes."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.playground_rig import (
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    containers,
    create,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

SPREAD = ("--replicas-max-per-node", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("parents", managers=1, workers=2) as made:
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    remove_services(node)


def networks_of(node: TestNode, container: str) -> dict[str, Any]:
    (shown,) = json.loads(node.docker("inspect", container).stdout)
    found: dict[str, Any] = shown["NetworkSettings"]["Networks"]
    return found


def pings(node: TestNode, container: str, address: str) -> bool:
    return node.docker("exec", container, "ping", "-c", "1", "-W", "2", address, check=False).returncode == 0


def test_containers_of_two_nodes_meet_on_the_machines_own_network(cluster: TestCluster, m1: TestNode) -> None:
    w1, ids = cluster.node("w1"), []
    for node, part in ((m1, "10.77.0.64/26"), (w1, "10.77.0.128/26")):
        words = ("-d", "macvlan", "--subnet", "10.77.0.0/24", "--ip-range", part, "-o", "parent=eth0")
        words = (*words, "--gateway", "10.77.0.1")
        node.docker("network", "create", *words, "lan")
        ids.append(node.docker("run", "-d", "--network", "lan", IMAGE, *IDLE).stdout.strip())
    try:
        second = m1.docker("run", "-d", "--name", "near", "--network", "lan", IMAGE, *IDLE).stdout.strip()
        ids.append(second)
        there = networks_of(w1, ids[1])["lan"]["IPAddress"]
        assert there == "10.77.0.128"
        wait_until(lambda: pings(m1, ids[0], there), "a container of the other node answers")
        wait_until(lambda: pings(m1, ids[0], "near"), "a container of this node is found by its name")
        links = m1.docker("exec", ids[0], "ip", "-o", "link").stdout
        assert "eth0" in links
        assert "eth1" not in links  # no gateway bridge: the way out is the network's own
        assert "default via 10.77.0.1 dev eth0" in m1.docker("exec", ids[0], "ip", "route").stdout
        busy = m1.docker("network", "rm", "lan", check=False)
        assert "has active endpoints" in busy.stderr
        twice = ("-d", "macvlan", "--subnet", "10.78.0.0/24", "-o", "parent=eth0", "lan2")
        assert (
            "is already using parent interface eth0"
            in m1.docker("network", "create", *twice, check=False).stderr
        )
    finally:
        for node in (m1, w1):
            node.docker(
                "rm", "-f", *node.docker("ps", "-q", "--filter", "network=lan").stdout.split(), check=False
            )
            for id in ids:
                node.docker("rm", "-f", id, check=False)
            node.docker("network", "rm", "lan", check=False)


def test_tasks_of_a_service_are_on_the_nodes_own_network(cluster: TestCluster, m1: TestNode) -> None:
    nodes = [m1, cluster.node("w1")]
    for number, node in enumerate(nodes):
        part = ("--ip-range", f"10.79.0.{64 * (number + 1)}/26")
        words = ("--config-only", "--subnet", "10.79.0.0/24", *part, "-o", "parent=eth0")
        node.docker("network", "create", *words, "lanconf")
    m1.docker("network", "create", "-d", "macvlan", "--scope", "swarm", "--config-from", "lanconf", "lan")
    try:
        create(m1, "web", 2, *SPREAD, "--network", "lan", "--constraint", "node.hostname!=w2", command=IDLE)
        wait_running(m1, "web", 2, within_s=60)
        (here,), (there,) = (containers(node, "web") for node in nodes)
        address = networks_of(nodes[1], there["Id"])["lan"]["IPAddress"]
        assert address == "10.79.0.129"  # the first of its node's range is the gateway's, as in Docker
        wait_until(lambda: pings(m1, here["Id"], address), "the task on the other node answers")
        m1.docker("service", "rm", "web")

        # A node without the configuration rejects the task, in Docker's words.
        create(m1, "lost", 1, "--network", "lan", "--constraint", "node.hostname==w2", command=IDLE)
        words = 'configuration network "lanconf" does not exist'
        wait_until(lambda: words in m1.docker("service", "ps", "--no-trunc", "lost").stdout, "the rejection")
    finally:
        remove_services(m1)
        m1.docker("network", "rm", "lan")
        for node in nodes:
            node.docker("network", "rm", "lanconf")


def has_devices(kind: str) -> bool:
    """Whether this machine's kernel makes devices of ``kind``, tried on an interface of its own."""
    made = subprocess.run(
        ["ip", "link", "add", "skep-try", "type", "veth", "peer", "name", "skep-try2"], check=False
    )
    assert made.returncode == 0
    try:
        words = ["ip", "link", "add", "link", "skep-try", "name", "skep-try3", "type", kind]
        return subprocess.run(words, check=False, capture_output=True).returncode == 0
    finally:
        subprocess.run(["ip", "link", "del", "skep-try"], check=True)


@pytest.mark.parametrize(
    ("driver", "mode"),
    [
        *(("macvlan", mode) for mode in ("bridge", "private", "vepa", "passthru")),
        *(("ipvlan", mode) for mode in ("l2", "l3", "l3s")),
    ],
)
def test_a_mode_is_the_kernels_or_the_kernel_is_named(m1: TestNode, driver: str, mode: str) -> None:
    words = ("-d", driver, "--subnet", "10.76.0.0/24", "-o", "parent=eth0", "-o", f"{driver}_mode={mode}")
    m1.docker("network", "create", *words, "modal")
    try:
        run = m1.docker("run", "-d", "--name", "modal", "--network", "modal", IMAGE, *IDLE, check=False)
        if not has_devices(driver):
            assert f"the kernel of this node has no {driver} devices" in run.stderr
            return
        assert run.returncode == 0, run.stderr
        (shown,) = json.loads(m1.docker("inspect", "modal").stdout)
        enter = ("nsenter", "-t", str(shown["State"]["Pid"]), "-n")
        (link,) = json.loads(subprocess.check_output([*enter, "ip", "-d", "-j", "link", "show", "eth0"]))
        assert (link["linkinfo"]["info_kind"], link["linkinfo"]["info_data"]["mode"]) == (driver, mode)
    finally:
        m1.docker("rm", "-f", "modal", check=False)
        m1.docker("network", "rm", "modal")


@pytest.mark.parametrize("driver", ["macvlan", "ipvlan"])
def test_a_vlan_that_is_not_there_is_refused_by_name(m1: TestNode, driver: str) -> None:
    words = ("-d", driver, "--subnet", "10.76.0.0/24", "-o", "parent=eth0.10", "vlan")
    refused = m1.docker("network", "create", *words, check=False)
    assert refused.returncode != 0
    assert "make it first (ip link add link eth0 name eth0.10 type vlan id 10)" in refused.stderr
