"""A cluster whose nodes have addresses of IPv6 alone: managers, overlays, published ports."""

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_published_ports import in_namespace
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    containers,
    create,
    nodes_by_name,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

ADDRESSES = {"m1": "fd0c::11", "m2": "fd0c::12", "m3": "fd0c::13"}
CLIENT = "fd0c::1"
_SCRIPT = "#!/bin/sh\\necho; echo $HOSTNAME $REMOTE_ADDR\\n"
_SERVE = (
    f"mkdir -p /www/cgi-bin; cd /www/cgi-bin; printf '{_SCRIPT}' > whoami; chmod +x whoami; "
    "httpd -f -p [::]:80 -h /www"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """Three managers that know each other by IPv6 addresses; their links have none of IPv4 any more."""
    with a_playground("six", managers=1) as made:
        for name in ("m2", "m3"):
            made.skep("add", "manager", name)
        made.node("m1").docker("swarm", "leave", "--force")
        for name, address in ADDRESSES.items():
            netns = made.node(name).description["netns"]
            _ip(netns, "-4", "address", "flush", "dev", "eth0")
            _ip(netns, "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        _ip(switch_of(made), "address", "add", f"{CLIENT}/64", "dev", "br0", "nodad")
        m1 = made.node("m1")
        m1.docker("swarm", "init", "--advertise-addr", "fd0c::11", "--listen-addr", "[::]:2377")
        token = m1.docker("swarm", "join-token", "-q", "manager").stdout.strip()
        for name in ("m2", "m3"):
            words = ("--advertise-addr", ADDRESSES[name], "--listen-addr", "[::]:2377", "--token", token)
            made.node(name).docker("swarm", "join", *words, "[fd0c::11]:2377")
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    remove_services(node)


def _ip(netns: str, *words: str) -> None:
    subprocess.run(["nsenter", f"--net={netns}", "ip", *words], capture_output=True, timeout=20, check=True)


def switch_of(cluster: TestCluster) -> str:
    """The namespace of the playground's switch, which is no node."""
    return str(Path(cluster.node("m1").description["netns"]).parent / f"skep-{cluster.name}-net")


def fetch(address: str, port: int) -> str:
    """``<container> <client's address>`` as the task says it."""
    with socket.create_connection((address, port), timeout=3) as connection:
        connection.sendall(b"GET /cgi-bin/whoami HTTP/1.0\r\n\r\n")
        response = b""
        while piece := connection.recv(4096):
            response += piece
    return response.decode().strip().splitlines()[-1].replace("[", "").replace("]", "")


def a_socket(address: str, port: int) -> socket.socket:
    """A UDP socket of the present namespace."""
    made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    made.settimeout(2)
    made.bind((address, port))
    return made


def address_on(node: TestNode, network: str, field: str) -> str:
    """The address of the node's one task on a network."""
    (entry,) = json.loads(node.docker("network", "inspect", network).stdout)[0]["Containers"].values()
    return str(entry[field]).partition("/")[0]


def test_managers_join_and_agree_over_ipv6(cluster: TestCluster, m1: TestNode) -> None:
    def reachable() -> set[str]:
        found = nodes_by_name(m1).values()
        return {
            one["ManagerStatus"]["Addr"]
            for one in found
            if one["ManagerStatus"]["Reachability"] == "reachable"
        }

    wait_until(
        lambda: reachable() == {f"[{one}]:2377" for one in ADDRESSES.values()}, "all are reachable", 60
    )
    info: dict[str, Any] = cluster.node("m2").client().info()["Swarm"]
    assert info["NodeAddr"] == "fd0c::12"
    create(cluster.node("m3"), "agreed", 3, "--replicas-max-per-node", "1", command=IDLE)
    for name in ADDRESSES:  # each manager has it
        wait_running(cluster.node(name), "agreed", 3, within_s=60)


def test_a_service_answers_across_nodes_and_published_ports_show_the_clients_address(
    cluster: TestCluster, m1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--ipv6", "back")
    spread = ("--replicas-max-per-node", "1", "--network", "back")
    create(m1, "web", 3, *spread, "--publish", "8080:80", command=("sh", "-c", _SERVE))
    wait_running(m1, "web", 3, within_s=60)
    (here,) = containers(m1, "web")

    for name in ("m2", "m3"):
        for version, field in (("-4", "IPv4Address"), ("-6", "IPv6Address")):
            address = address_on(cluster.node(name), "back", field)

            def answers(version: str = version, address: str = address) -> bool:
                words = ("exec", here["Id"], "ping", version, "-c", "1", "-W", "2", address)
                return m1.docker(*words, check=False).returncode == 0

            wait_until(answers, f"the task on {name} answers at {address}", 60)
    for address in ADDRESSES.values():

        def found(address: str = address) -> set[str]:
            try:
                return {in_namespace(switch_of(cluster), fetch, address, 8080) for _ in range(12)}
            except OSError:
                return set()

        told = wait_until(lambda: got if len(got := found()) == 3 else set(), f"{address} answers", 60)
        assert {response.split()[1] for response in told} == {CLIENT}


def test_udp_over_ipv6_reaches_a_task_from_every_node_and_keeps_the_clients_address(
    cluster: TestCluster, m1: TestNode
) -> None:
    m1.docker("service", "create", "-d", "--name", "udp", "--publish", "9000:9000/udp", IMAGE, *IDLE)
    wait_running(m1, "udp", 1, within_s=60)
    (node,) = [one for name in ADDRESSES if containers(one := cluster.node(name), "udp")]
    (pid,) = container_pids(node, "udp").values()
    with (
        in_namespace(f"/proc/{pid}/ns/net", a_socket, "::", 9000) as server,
        in_namespace(switch_of(cluster), a_socket, CLIENT, 9999) as client,
    ):
        for address in ADDRESSES.values():

            def seen(address: str = address) -> tuple[str, bytes]:
                """The client's address as the task sees it, and what comes back."""
                try:
                    client.sendto(b"hello", (address, 9000))
                    data, peer = server.recvfrom(100)
                    server.sendto(data.upper(), peer)
                    return str(peer[0]), client.recvfrom(100)[0]
                except OSError:
                    return "", b""

            wait_until(lambda: seen() == (CLIENT, b"HELLO"), f"{address} answers by UDP", 60)
