"""Nodes behind NAT in a real cluster: they can dial others, and nobody can dial them."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from skep.model.networks.data_planes import tunnel_address
from skep.model.networks.paths import MTU_MIN
from skep.model.values.ids import NodeId
from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    container_pids,
    containers,
    nodes_by_name,
    ready,
    remove_services,
    running,
    wait_running,
    wait_until,
)
from tests.support.networks.nat_rig import (
    OUTSIDE,
    change_address,
    far_apart,
    in_network_of,
    narrow_ways,
    nodes_behind_nat,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TAKEN_OVER_WITHIN_S = 10.0
"""A lost node is down after about three seconds, and its pairs get another relay within a second after that."""

ANOTHER = "192.168.100.203"
"""Another public address."""
NARROW_BYTES = 1300
"""Largest packet of a narrow way.  A tunnel's own is 60 bytes smaller."""

SERVE = ("sh", "-c", "echo begun; mkdir /w; hostname >/w/index.html; exec httpd -f -p 80 -h /w")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with nodes_behind_nat("nat") as playground:
        yield playground


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    remove_services(node)


def doctor(m1: TestNode) -> Mapping[tuple[str, str], Mapping[str, Any]]:
    """Return each path of ``skep doctor network``, by its two nodes."""
    command = [SKEP, "--host", m1.socket, "doctor", "network", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return {
        (node["Hostname"], path["Peer"]): path
        for node in json.loads(done.stdout)
        for path in node["Paths"]
        if path["PeerID"] != node["ID"]
    }


def round_trip_ms(m1: TestNode, *pair: str) -> float:
    """Return the shortest round trip between two nodes, or 0 if nothing was answered yet."""
    findings = doctor(m1).get((pair[0], pair[1]), {}).get("Findings", ())
    return min((one["RoundTripMs"] for one in findings if one.get("RoundTripMs")), default=0.0)


def wait_connected(m1: TestNode) -> None:
    def are_well() -> bool:
        found = doctor(m1)
        findings = [one for path in found.values() for one in path["Findings"]]
        return len(found) >= 5 * 4 and not any(one["Failing"] for one in findings)

    wait_until(are_well, "every node reaches every other", within_s=60)


def serve(m1: TestNode, name: str, host: str, *networks: str, page_kb: int = 0) -> None:
    """Run a web server on one node, with a page that has the name of its container, or zeros."""
    large = f"echo begun; mkdir /w; head -c {page_kb}k /dev/zero >/w/index.html; exec httpd -f -p 80 -h /w"
    command = ("sh", "-c", large) if page_kb else SERVE
    words = [word for network in networks for word in ("--network", network)]
    constraint = f"node.hostname=={host}"
    m1.docker(
        "service", "create", "--detach", "--name", name, *words, "--constraint", constraint, IMAGE, *command
    )
    wait_running(m1, name, 1)


def in_task(cluster: TestCluster, host: str, service: str, *command: str) -> str:
    """Run a command in the namespace of the service's container on a node, without the session of that node."""
    (pid,) = container_pids(cluster.node(host), service).values()
    words = ["nsenter", "-t", str(pid), "-n", *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout if done.returncode == 0 else ""


def fetches(cluster: TestCluster, host: str, service: str, name: str, *, page_kb: int = 0) -> bool:
    """Return whether a task gets the whole page of a service by its name, which leads to the virtual address."""
    listed = in_task(cluster, host, service, "busybox", "nslookup", name, "127.0.0.11")
    addresses = [line.split()[-1] for line in listed.splitlines() if line.startswith("Address")][1:]
    if not addresses:
        return False
    page = in_task(cluster, host, service, "curl", "-s", "-m", "10", f"http://{addresses[0]}/")
    return len(page) == page_kb << 10 if page_kb else bool(page)


def test_managers_find_out_which_nodes_are_behind_nat(cluster: TestCluster, m1: TestNode) -> None:
    wait_connected(m1)
    nodes = nodes_by_name(m1)
    assert nodes["w1"]["Status"]["Addr"] == OUTSIDE["101"]
    assert nodes["w2"]["Status"]["Addr"] == OUTSIDE["102"]
    ways = {pair: path["Way"] for pair, path in doctor(m1).items()}
    assert ways["m1", "w3"] == ways["w3", "m1"] == "direct"
    assert ways["m1", "w1"] == ways["w1", "m1"] == ways["w3", "w2"] == "tunnel"
    assert ways["w1", "w4"] == "tunnel", "they are behind the same NAT"
    assert ways["w1", "w2"] == ways["w2", "w1"]
    assert ways["w1", "w2"] in ("relay m1", "relay w3")


@pytest.mark.parametrize("encryption", [(), ("--opt", "encrypted")], ids=["plain", "encrypted"])
def test_tasks_behind_nat_reach_others_and_are_reached(
    cluster: TestCluster, m1: TestNode, encryption: tuple[str, ...]
) -> None:
    network = f"net{len(encryption)}"
    wait_connected(m1)
    m1.docker("network", "create", "-d", "overlay", *encryption, network)
    hosts = ("m1", "w1", "w2", "w4")
    for host in hosts:
        serve(m1, f"on-{host}", host, network)
    for source in hosts:
        for target in hosts:
            wait_until(
                lambda source=source, target=target: fetches(cluster, source, f"on-{source}", f"on-{target}"),
                f"{source} gets a page of {target}",
            )
    assert "begun" in m1.docker("service", "logs", "on-w1").stdout


def test_each_node_serves_ports_of_tasks_behind_nat(cluster: TestCluster, m1: TestNode) -> None:
    wait_connected(m1)
    publish = ("--publish", "8080:80", "--constraint", "node.hostname==w1")
    m1.docker("service", "create", "--detach", "--name", "shown", *publish, IMAGE, *SERVE)
    wait_running(m1, "shown", 1)
    for host in ("m1", "w1", "w2", "w3"):
        url = "http://127.0.0.1:8080/"
        wait_until(lambda host=host, url=url: _page(cluster.node(host), url), f"{host} serves the port")


def _page(node: TestNode, url: str) -> bool:
    try:
        return bool(in_network_of(node, "curl", "-s", "-m", "3", url))
    except AssertionError:
        return False


def test_only_ports_of_the_cluster_are_reached_at_an_address_in_the_tunnels(
    cluster: TestCluster, m1: TestNode
) -> None:
    """The port for images, from a node that others reach and from one behind another NAT."""
    wait_connected(m1)
    address = tunnel_address(NodeId(nodes_by_name(m1)["w1"]["ID"]))
    for host in ("m1", "w2"):
        in_network_of(cluster.node(host), sys.executable, "-c", CONNECT, address, "2374")
    words = ["nsenter", f"--net={cluster.node('w1').description['netns']}", sys.executable, "-c", LISTEN]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        local = cluster.node("w1").description["addr"]
        in_network_of(cluster.node("w4"), sys.executable, "-c", CONNECT, local, "7002")
        for host in ("m1", "w2"):
            with pytest.raises(AssertionError, match="timed out"):
                in_network_of(cluster.node(host), sys.executable, "-c", CONNECT, address, "7002")
        server.kill()


def test_a_lost_relay_is_replaced(cluster: TestCluster, m1: TestNode) -> None:
    wait_connected(m1)
    m1.docker("node", "update", "--label-add", "skep.relay=true", "w3")
    wait_until(lambda: doctor(m1)["w1", "w2"]["Way"] == "relay w3", "w3 relays")
    m1.docker("network", "create", "-d", "overlay", "relayed")
    serve(m1, "here", "w1", "relayed")
    serve(m1, "there", "w2", "relayed")
    (task,) = running(m1, "there")
    address = task["NetworksAttachments"][0]["Addresses"][0].partition("/")[0]

    def arrives() -> bool:
        return bool(in_task(cluster, "w1", "here", "busybox", "ping", "-c", "1", "-W", "1", address))

    def is_replaced() -> bool:
        return doctor(m1)["w1", "w2"]["Way"] != "relay w3"

    wait_until(arrives, "packets pass the relay")
    cluster.skep("cut", "w3")
    try:
        # On a busy machine, the next relay has taken over before a lost packet is seen.
        wait_until(lambda: not arrives() or is_replaced(), "the relay is lost")
        began = time.monotonic()
        wait_until(
            lambda: arrives() and is_replaced(), "another relay has taken over", within_s=TAKEN_OVER_WITHIN_S
        )
        print(f"taken over after {time.monotonic() - began:.1f} s")
    finally:
        cluster.skep("reconnect", "w3")
        m1.docker("node", "update", "--label-rm", "skep.relay", "w3")


def test_a_nat_gets_another_public_address(cluster: TestCluster, m1: TestNode) -> None:
    """Its nodes keep their tasks.  The others learn from the next packets where their tunnels lead."""
    wait_connected(m1)
    m1.docker("network", "create", "-d", "overlay", "moved")
    hosts = ("m1", "w1", "w2", "w4")
    for host in hosts:
        serve(m1, f"on-{host}", host, "moved")
    before = {host: running(m1, f"on-{host}")[0]["ID"] for host in hosts}
    pairs = [(source, target) for source in hosts for target in hosts]

    def wait_reached() -> None:
        for source, target in pairs:
            wait_until(
                lambda source=source, target=target: fetches(cluster, source, f"on-{source}", f"on-{target}"),
                f"{source} gets a page of {target}",
            )

    wait_reached()
    change_address(cluster, OUTSIDE["101"], ANOTHER)
    try:
        wait_until(
            lambda: {nodes_by_name(m1)[name]["Status"]["Addr"] for name in ("w1", "w4")} == {ANOTHER},
            "managers see the new address",
            60,
        )
        wait_reached()
        wait_until(lambda: doctor(m1)["w1", "w4"]["Way"] == "tunnel", "they are behind one NAT again")
        wait_connected(m1)
        assert {host: running(m1, f"on-{host}")[0]["ID"] for host in hosts} == before
    finally:
        change_address(cluster, ANOTHER, OUTSIDE["101"])
    wait_reached()


def test_overlays_fit_through_a_narrow_way(cluster: TestCluster, m1: TestNode) -> None:
    """Packets that are too large are dropped without an answer, so only probes find the size."""
    wait_connected(m1)
    m1.docker("network", "create", "-d", "overlay", "narrow")
    hosts = ("m1", "w1", "w2")
    for host in hosts:
        serve(m1, f"on-{host}", host, "narrow", page_kb=500)
    wide = doctor(m1)["m1", "w1"]["MTU"]
    with narrow_ways(cluster, NARROW_BYTES):
        for pair in (("m1", "w1"), ("w1", "m1"), ("w1", "w2")):
            wait_until(
                lambda pair=pair: MTU_MIN < doctor(m1)[pair]["MTU"] < NARROW_BYTES, f"the MTU of {pair}", 90
            )
        for source in hosts:
            for target in hosts:
                wait_until(
                    lambda source=source, target=target: fetches(
                        cluster, source, f"on-{source}", f"on-{target}", page_kb=500
                    ),
                    f"{source} gets a large page of {target}",
                    60,
                )
    wait_until(lambda: doctor(m1)["m1", "w1"]["MTU"] == wide, "the MTU is the old one again", 120)


def test_overlays_work_over_a_distance_with_lost_packets(cluster: TestCluster, m1: TestNode) -> None:
    """Between the nodes behind NAT and all others: 100 ms round trip, 1 % of the packets lost in each direction."""
    wait_connected(m1)
    m1.docker("network", "create", "-d", "overlay", "lossy")
    hosts = ("m1", "w1", "w2")
    for host in hosts:
        serve(m1, f"on-{host}", host, "lossy", page_kb=100)
    with far_apart(cluster, delay_ms=50, loss_percent=1):
        for pair in (("m1", "w1"), ("w2", "m1")):
            wait_until(lambda pair=pair: round_trip_ms(m1, *pair) > 90, f"{pair} are far from each other", 90)
        until = time.monotonic() + 20
        count = 0
        while time.monotonic() < until:
            for source in hosts:
                for target in hosts:
                    wait_until(
                        lambda source=source, target=target: fetches(
                            cluster, source, f"on-{source}", f"on-{target}", page_kb=100
                        ),
                        f"{source} gets a page of {target}",
                    )
                    count += 1
            assert ready(m1) == {"m1", "w1", "w2", "w3", "w4"}
        print(f"{count} pages")


def test_a_restarted_node_process_interrupts_nothing(cluster: TestCluster, m1: TestNode) -> None:
    wait_connected(m1)
    m1.docker("network", "create", "-d", "overlay", "kept")
    serve(m1, "near", "m1", "kept")
    serve(m1, "far", "w1", "kept")
    (task,) = running(m1, "far")
    address = task["NetworksAttachments"][0]["Addresses"][0].partition("/")[0]
    command = ("busybox", "ping", "-c", "1", "-W", "1", address)
    wait_until(lambda: bool(in_task(cluster, "m1", "near", *command)), "packets arrive")
    w1 = cluster.node("w1")
    before = w1.pids("wireguard-go")
    w1.kill(w1.pids("skep-node")[0])
    lost = 0
    until = time.monotonic() + 5
    while time.monotonic() < until:
        lost += not in_task(cluster, "m1", "near", *command)
    assert lost == 0
    assert w1.pids("wireguard-go") == before


def test_connections_stay_at_the_site_while_a_task_serves_there(cluster: TestCluster, m1: TestNode) -> None:
    wait_connected(m1)
    sites = {"m1": "cloud", "w3": "cloud", "w1": "home", "w4": "home"}
    for host, site in sites.items():
        m1.docker("node", "update", "--label-add", f"site={site}", host)
    m1.docker("network", "create", "-d", "overlay", "sites")
    near = ("--label", "skep.near=true", "--network", "sites", "--publish", "8081:80", "--mode", "global")
    m1.docker("service", "create", "--detach", "--name", "web", *near, IMAGE, *SERVE)
    wait_running(m1, "web", 5)
    serve(m1, "client", "w1", "sites")

    def served_by(host: str) -> set[str]:
        url = "http://127.0.0.1:8081/"
        return {in_network_of(cluster.node(host), "curl", "-s", "-m", "5", url).strip() for _ in range(12)}

    def names_of(*hosts: str) -> set[str]:
        return {one["Id"][:12] for host in hosts for one in containers(cluster.node(host), "web")}

    wait_until(lambda: served_by("m1") == names_of("m1", "w3"), "m1 connects to its own site")
    wait_until(lambda: served_by("w1") == names_of("w1", "w4"), "w1 connects to its own site")
    wait_until(lambda: served_by("w2") == names_of("m1", "w1", "w2", "w3", "w4"), "w2 has no site")
    listed = in_task(cluster, "w1", "client", "busybox", "nslookup", "tasks.web", "127.0.0.11")
    assert listed.count("Address: 10.") == 2
    for host in ("w1", "w4"):
        m1.docker("node", "update", "--availability", "drain", host)
    try:
        wait_until(lambda: served_by("w1") == names_of("m1", "w2", "w3"), "no task is left at its site")
    finally:
        for host in ("w1", "w4"):
            m1.docker("node", "update", "--availability", "active", host)
        for host in sites:
            m1.docker("node", "update", "--label-rm", "site", host)


CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3).close()
"""
LISTEN = """
import socket, time
with socket.create_server(("0.0.0.0", 7002)):
    print("listening", flush=True)
    time.sleep(120)
"""
SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
    own.bind((sys.argv[1], 0))
    own.sendto(sys.argv[1].encode(), (sys.argv[2], 7001))
"""
RECEIVE = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
    own.bind(("0.0.0.0", 7001))
    print("listening", flush=True)
    while True:
        print(own.recv(100).decode(), flush=True)
"""


def test_no_machine_sends_as_a_node_behind_nat_outside_of_the_tunnels(
    cluster: TestCluster, m1: TestNode
) -> None:
    """w3 is on the same network as m1, and gives itself the address of w1."""
    wait_connected(m1)
    stolen = tunnel_address(NodeId(nodes_by_name(m1)["w1"]["ID"]))
    w3, target = cluster.node("w3"), m1.description["addr"]
    words = ["nsenter", f"--net={m1.description['netns']}", sys.executable, "-c", RECEIVE]
    in_network_of(w3, "ip", "address", "add", f"{stolen}/32", "dev", "lo")
    try:
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "listening\n"
            in_network_of(w3, sys.executable, "-c", SEND, stolen, target)
            in_network_of(w3, sys.executable, "-c", SEND, w3.description["addr"], target)
            assert receiver.stdout.readline() == f"{w3.description['addr']}\n", "only the honest one arrives"
            receiver.kill()
    finally:
        in_network_of(w3, "ip", "address", "delete", f"{stolen}/32", "dev", "lo")


def test_a_node_that_leaves_keeps_nothing_of_its_tunnels(cluster: TestCluster, m1: TestNode) -> None:
    """The last test, because the node does not join again."""
    wait_connected(m1)
    w4 = cluster.node("w4")

    def what_is_left() -> str:
        rules = in_network_of(w4, "ip", "rule")
        tables = in_network_of(w4, "nft", "list", "tables")
        return f"{in_network_of(w4, 'ip', 'address')}{rules}{tables}"

    left = what_is_left()
    assert "skwg" in left or "skep-wg3" in left
    assert "lookup 1043" in left
    assert "skep_nat" in left
    w4.docker("swarm", "leave")

    def is_clean() -> bool:
        left = what_is_left()
        return not any(word in left for word in ("skwg", "skep-wg3", "lookup 1043", "skep_nat"))

    wait_until(is_clean, "device, address, rule and table are removed")
    wait_until(lambda: not w4.pids("wireguard-go"), "its process has ended")
