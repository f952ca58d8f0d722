"""Networks on the machines' own devices (macvlan): of plain containers, and of services on several nodes."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
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


def in_netns(node: TestNode) -> tuple[str, str]:
    """What runs a command in the network namespace of a node."""
    return "nsenter", f"--net={node.description['netns']}"


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


def test_the_network_with_the_highest_priority_is_the_way_out(m1: TestNode) -> None:
    words = ("-d", "macvlan", "--subnet", "10.76.0.0/24", "--gateway", "10.76.0.1", "-o", "parent=eth0")
    m1.docker("network", "create", *words, "lan")
    m1.docker("network", "create", "--subnet", "10.75.0.0/24", "front")
    api = m1.client().api
    try:
        for name, of_front, network in (("by-bridge", 1, "front"), ("by-lan", -1, "lan")):
            endpoints = {"lan": {}, "front": {"GwPriority": of_front}}
            host_config = api.create_host_config(network_mode="lan")
            api.create_container(
                IMAGE,
                list(IDLE),
                name=name,
                host_config=host_config,
                networking_config={"EndpointsConfig": endpoints},
            )
            api.start(name)
            routes = m1.docker("exec", name, "ip", "route").stdout.splitlines()
            (way_out,) = [line for line in routes if line.startswith("default")]
            assert ("via 10.76.0.1 dev eth0" in way_out) is (network == "lan"), routes
            priorities = {one: each["GwPriority"] for one, each in networks_of_api(api, name).items()}
            assert priorities == {"lan": 0, "front": of_front}
    finally:
        m1.docker("rm", "-f", "by-bridge", "by-lan", check=False)
        m1.docker("network", "rm", "lan", "front", check=False)


def networks_of_api(api: Any, container: str) -> dict[str, Any]:
    """The container's networks in the newest form of the API."""
    found: dict[str, Any] = api.inspect_container(container)["NetworkSettings"]["Networks"]
    return found


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
        lower = [] if kind == "dummy" else ["link", "skep-try"]
        words = ["ip", "link", "add", *lower, "name", "skep-try3", "type", kind]
        words += ["id", "10"] if kind == "vlan" else []
        return subprocess.run(words, check=False, capture_output=True).returncode == 0
    finally:
        for name in ("skep-try3", "skep-try"):
            subprocess.run(["ip", "link", "del", name], check=name == "skep-try", capture_output=True)


def links(node: TestNode) -> dict[str, dict[str, Any]]:
    """The network interfaces of a node, by name."""
    found = subprocess.check_output([*in_netns(node), "ip", "-d", "-j", "link"])
    return {one["ifname"]: one for one in json.loads(found)}


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
def test_a_vlan_is_made_with_its_network_and_goes_with_it(
    cluster: TestCluster, m1: TestNode, driver: str
) -> None:
    nodes = (m1, cluster.node("w1"))
    lan = ("-d", driver, "--subnet", "10.75.0.0/24", "--gateway", "10.75.0.1", "-o", "parent=eth0.10")
    if not has_devices("vlan"):
        refused = m1.docker("network", "create", *lan, "lan", check=False)
        words = "failed to create eth0.10 vlan link: the kernel of this node has no vlan devices"
        assert words in refused.stderr
        assert "lan" not in m1.docker("network", "ls", "--format", "{{.Name}}").stdout.split()
        return
    if not has_devices(driver):
        return
    ids: list[str] = []
    try:
        for number, node in enumerate(nodes, 1):
            node.docker("network", "create", *lan, "--ip-range", f"10.75.0.{64 * number}/26", "lan")
            made = links(node)["eth0.10"]
            assert (made["link"], made["linkinfo"]["info_data"]["id"]) == ("eth0", 10)
            assert "UP" in made["flags"]
            ids.append(node.docker("run", "-d", "--network", "lan", IMAGE, *IDLE).stdout.strip())
        there = networks_of(nodes[1], ids[1])["lan"]["IPAddress"]
        wait_until(lambda: pings(m1, ids[0], there), "a container of the other node answers by the VLAN")
        # Without the VLAN on the other side nothing answers; the node makes it again for its container.
        subprocess.run([*in_netns(nodes[1]), "ip", "link", "del", "eth0.10"], check=True)
        wait_until(lambda: "eth0.10" in links(nodes[1]), "the VLAN is made again")
        wait_until(lambda: pings(m1, ids[0], there), "the container answers again")
        other = "ipvlan" if driver == "macvlan" else "macvlan"
        words = ("-d", other, "--subnet", "10.74.0.0/24", "-o", "parent=eth0.10", "lan2")
        m1.docker("network", "create", *words)
        for node, id in zip(nodes, ids, strict=True):
            node.docker("rm", "-f", id)
            node.docker("network", "rm", "lan")
        assert "eth0.10" in links(m1), "another network is on it"
        assert "eth0.10" not in links(nodes[1])
        m1.docker("network", "rm", "lan2")
        assert "eth0.10" not in links(m1)
    finally:
        for node in nodes:
            for id in ids:
                node.docker("rm", "-f", id, check=False)
            node.docker("network", "rm", "lan", "lan2", check=False)


def test_a_vlan_of_the_machine_stays(m1: TestNode) -> None:
    if not has_devices("vlan"):
        return
    enter = (*in_netns(m1), "ip", "link")
    subprocess.run([*enter, "add", "link", "eth0", "name", "eth0.20", "type", "vlan", "id", "20"], check=True)
    try:
        words = ("-d", "macvlan", "--subnet", "10.75.0.0/24", "-o", "parent=eth0.20")
        m1.docker("network", "create", *words, "lan")
        m1.docker("network", "rm", "lan")
        assert "eth0.20" in links(m1)
    finally:
        subprocess.run([*enter, "del", "eth0.20"], check=True)


@pytest.mark.parametrize("driver", ["macvlan", "ipvlan"])
def test_a_network_without_a_parent_is_on_a_dummy_of_its_own(m1: TestNode, driver: str) -> None:
    words = ("network", "create", "-d", driver, "--subnet", "10.75.0.0/24", "alone")
    if not has_devices("dummy"):
        assert "link: the kernel of this node has no dummy devices" in m1.docker(*words, check=False).stderr
        return
    id = m1.docker(*words).stdout.strip()
    dummy = f"{'dm' if driver == 'macvlan' else 'di'}-{id[:12]}"
    try:
        assert links(m1)[dummy]["linkinfo"]["info_kind"] == "dummy"
        if not has_devices(driver):
            return
        for name in ("one", "two"):
            m1.docker("run", "-d", "--name", name, "--network", "alone", IMAGE, *IDLE)
        wait_until(lambda: pings(m1, "one", "two"), "containers of the network reach each other")
        assert "default" not in m1.docker("exec", "one", "ip", "route").stdout
    finally:
        m1.docker("rm", "-f", "one", "two", check=False)
        m1.docker("network", "rm", "alone")
    assert dummy not in links(m1)


@pytest.mark.parametrize("mode", ["l2", "l3"])
def test_tasks_are_on_ipvlan_devices_of_a_vlan_of_their_nodes(
    cluster: TestCluster, m1: TestNode, mode: str
) -> None:
    nodes = [m1, cluster.node("w1")]
    for number, node in enumerate(nodes, 1):
        subnet = ("--subnet", "10.73.0.0/24", "--ip-range", f"10.73.0.{64 * number}/26")
        words = (*subnet, "-o", "parent=eth0.30", "-o", f"ipvlan_mode={mode}")
        node.docker("network", "create", "--config-only", *words, "lanconf")
    m1.docker("network", "create", "-d", "ipvlan", "--scope", "swarm", "--config-from", "lanconf", "lan")
    try:
        create(m1, "web", 2, *SPREAD, "--network", "lan", "--constraint", "node.hostname!=w2", command=IDLE)
        if not has_devices("vlan"):
            words = "failed to create eth0.30 vlan link: the kernel of this node has no vlan devices"
            wait_until(lambda: words in m1.docker("service", "ps", "--no-trunc", "web").stdout, "the reason")
            return
        if not has_devices("ipvlan"):
            return
        wait_running(m1, "web", 2, within_s=120)
        (here,), (there,) = (containers(node, "web") for node in nodes)
        (shown,) = json.loads(m1.docker("inspect", here["Id"]).stdout)
        enter = ("nsenter", "-t", str(shown["State"]["Pid"]), "-n", "ip", "-d", "-j", "link", "show", "eth0")
        (link,) = json.loads(subprocess.check_output(enter))
        info = link["linkinfo"]
        assert (info["info_kind"], info["info_data"]["mode"]) == ("ipvlan", mode)
        route = m1.docker("exec", here["Id"], "ip", "route").stdout
        if mode == "l3":  # it routes by itself: between machines the network has to know the way
            assert "default dev eth0" in route
        else:
            address = networks_of(nodes[1], there["Id"])["lan"]["IPAddress"]
            wait_until(lambda: pings(m1, here["Id"], address), "the task on the other node answers")
        m1.docker("service", "rm", "web")
        wait_until(lambda: all("eth0.30" not in links(node) for node in nodes), "the VLANs go with the tasks")
    finally:
        remove_services(m1)
        m1.docker("network", "rm", "lan")
        for node in nodes:
            node.docker("network", "rm", "lanconf")
