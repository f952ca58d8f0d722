"""Published ports of a real cluster: every node answers, and the task sees who asks."""

import asyncio
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from skep.dataplane.netns.kernel.namespaces import Namespaces
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    nodes_by_name,
    remove_services,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)
T = TypeVar("T")

NODES = ("m1", "w1", "w2")
_SCRIPT = "#!/bin/sh\\necho; echo $HOSTNAME $REMOTE_ADDR\\n"
_SERVE = f"mkdir -p /www/cgi-bin; cd /www/cgi-bin; printf '{_SCRIPT}' > whoami; chmod +x whoami; httpd -f -p 80 -h /www"
WHOAMI = ("sh", "-c", _SERVE)


@pytest.fixture(scope="module")
def mesh_cluster() -> Iterator[TestCluster]:
    with a_playground("mesh", managers=1, workers=2) as cluster:
        yield cluster


@pytest.fixture
def nodes(mesh_cluster: TestCluster) -> Iterator[dict[str, TestNode]]:
    found = {name: mesh_cluster.node(name) for name in NODES}
    yield found
    remove_services(found["m1"])


def in_namespace(path: Path | str, call: Callable[..., T], *arguments: object) -> T:
    """Call it there and come back."""

    async def inside() -> T:
        namespaces = Namespaces(Path("/nonexistent"), Path(path))
        try:
            return await namespaces.run(Path(path), call, *arguments)
        finally:
            namespaces.close()

    return asyncio.run(inside())


def fetch(address: str, port: int) -> str:
    """``<container> <client's address>`` as the task says it."""
    with socket.create_connection((address, port), timeout=3) as connection:
        connection.sendall(b"GET /cgi-bin/whoami HTTP/1.0\r\n\r\n")
        response = b""
        while piece := connection.recv(4096):
            response += piece
    return response.decode().strip().splitlines()[-1].replace("[::ffff:", "").replace("]", "")


def client_of(cluster: TestCluster) -> tuple[str, str]:
    """The namespace of the playground's switch, which is no node, and its address on the nodes' network."""
    path = Path(cluster.node("m1").description["netns"]).parent / f"skep-{cluster.name}-net"
    subnet = cluster.node("m1").description["addr"].rpartition(".")[0]
    shown = subprocess.run(
        ["nsenter", f"--net={path}", "ip", "-o", "-4", "addr"], capture_output=True, text=True, check=True
    ).stdout
    address = next(word.partition("/")[0] for word in shown.split() if word.startswith(f"{subnet}."))
    return str(path), address


def publish(nodes: dict[str, TestNode], *options: str, replicas: int = 3) -> None:
    nodes["m1"].docker(
        "service",
        "create",
        "--detach",
        "--name",
        "web",
        "--replicas",
        str(replicas),
        "--stop-grace-period",
        "1s",
        *options,
        IMAGE,
        *WHOAMI,
    )
    wait_running(nodes["m1"], "web", replicas)


def served(node: TestNode, client: str, port: int, wanted: Callable[[set[str]], bool]) -> set[str]:
    """Answers of several requests, as soon as they are as ``wanted``."""

    def answers() -> set[str]:
        try:
            found = {in_namespace(client, fetch, node.description["addr"], port) for _ in range(12)}
        except OSError:
            return set()
        return found if wanted(found) else set()

    return wait_until(answers, f"{node.name} answers as it should")


def test_every_node_answers_and_rotates_over_all_tasks_with_the_clients_own_address(
    mesh_cluster: TestCluster, nodes: dict[str, TestNode]
) -> None:
    client, own_address = client_of(mesh_cluster)
    publish(nodes, "--publish", "8080:80")
    for node in nodes.values():
        answers = served(node, client, 8080, lambda found: len(found) == 3)
        assert {response.split()[1] for response in answers} == {own_address}
        for address in ("127.0.0.1", "::1", node.description["addr"]):
            wait_until(partial(_answers, node, address), f"{node.name} answers itself at {address}")
    nodes["m1"].docker("service", "rm", "web")
    for node in nodes.values():
        wait_until(partial(_refuses, client, node, 8080), f"{node.name} refuses")


def test_a_node_without_a_task_leads_to_it_and_so_it_does_when_the_task_has_moved(
    mesh_cluster: TestCluster, nodes: dict[str, TestNode]
) -> None:
    client, own_address = client_of(mesh_cluster)
    publish(nodes, "--publish", "8080:80", "--constraint", "node.hostname==w2", replicas=1)
    for node in nodes.values():
        (response,) = served(node, client, 8080, lambda found: len(found) == 1)
        assert response.split()[1] == own_address
    before = {one["ID"] for one in running(nodes["m1"], "web")}
    words = ("--constraint-rm", "node.hostname==w2", "--constraint-add", "node.hostname==w1")
    nodes["m1"].docker("service", "update", "--detach", *words, "web")
    wait_until(
        lambda: (
            {one["ID"] for one in running(nodes["m1"], "web")}.isdisjoint(before)
            and running(nodes["m1"], "web")
        ),
        "the task has moved",
    )
    moved = {pid[:12] for pid in container_pids(nodes["w1"], "web")}
    for node in nodes.values():
        answers = served(node, client, 8080, lambda found: {one.split()[0] for one in found} == moved)
        assert {response.split()[1] for response in answers} == {own_address}


def test_udp_keeps_the_clients_own_address(mesh_cluster: TestCluster, nodes: dict[str, TestNode]) -> None:
    client, own_address = client_of(mesh_cluster)
    where = ("--constraint", "node.hostname==w2")
    publish(nodes, "--publish", "published=5353,target=53,protocol=udp", *where, replicas=1)
    (pid,) = container_pids(nodes["w2"], "web").values()

    def server() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.settimeout(3)
        opened.bind(("0.0.0.0", 53))
        return opened

    def exchange(node: TestNode, serving: socket.socket) -> str:
        """The client's address as the task sees it; the client gets the task's answer."""

        def talk() -> bytes:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                asking.settimeout(3)
                asking.connect((node.description["addr"], 5353))
                asking.send(b"hello")
                _, peer = serving.recvfrom(100)
                serving.sendto(peer[0].encode(), peer)
                return asking.recv(100)

        try:
            return in_namespace(client, talk).decode()
        except OSError:
            return ""

    with in_namespace(f"/proc/{pid}/ns/net", server) as serving:
        for node in nodes.values():
            assert wait_until(partial(exchange, node, serving), f"{node.name} answers") == own_address


def test_labels_say_on_which_address_and_how_a_port_answers(
    mesh_cluster: TestCluster, nodes: dict[str, TestNode]
) -> None:
    client, _ = client_of(mesh_cluster)
    refused = nodes["m1"].docker(
        "service",
        "create",
        "--label",
        "skep.publish.8080.host-ip=nowhere",
        "-p",
        "8080:80",
        IMAGE,
        check=False,
    )
    assert "invalid label skep.publish.8080.host-ip=nowhere: expected an IP address" in refused.stderr
    publish(nodes, "-p", "8080:80", "-p", "8081:80", "--label", "skep.publish.8080.host-ip=127.0.0.1")
    for node in nodes.values():
        served(node, client, 8081, lambda found: len(found) == 3)
        assert _refuses(client, node, 8080)
        assert in_namespace(node.description["netns"], fetch, "127.0.0.1", 8080)


def test_published_ports_answer_while_node_process_and_manager_are_killed(
    mesh_cluster: TestCluster, nodes: dict[str, TestNode]
) -> None:
    client, _ = client_of(mesh_cluster)
    publish(nodes, "--publish", "8080:80")
    node = nodes["m1"]
    served(node, client, 8080, lambda found: len(found) == 3)
    victims = [pid for pid, name in node.processes() if name in ("skep", "etcd", "skep-manager", "python")]
    assert victims
    for pid in victims:
        with suppress(ProcessLookupError):  # one of them may have ended with its parent
            node.kill(pid)
    for _ in range(200):
        assert in_namespace(client, fetch, node.description["addr"], 8080)
    wait_until(lambda: len(running(node, "web")) == 3, "the manager is back")


def test_a_flushed_ruleset_is_back_within_5_s(mesh_cluster: TestCluster, nodes: dict[str, TestNode]) -> None:
    client, _ = client_of(mesh_cluster)
    publish(nodes, "--publish", "8080:80")
    node = nodes["w1"]
    served(node, client, 8080, lambda found: len(found) == 3)
    inside = ("nsenter", f"--net={node.description['netns']}", "nft")
    subprocess.run([*inside, "flush", "ruleset"], check=True)

    def are_back() -> bool:
        tables = subprocess.run(
            [*inside, "list", "tables"], capture_output=True, text=True, check=True
        ).stdout
        return {"table ip skep", "table ip skep_ingress", "table ip6 skep_ingress"} <= set(
            tables.splitlines()
        )

    wait_until(are_back, "our tables are back", within_s=5)
    assert in_namespace(client, fetch, node.description["addr"], 8080)


def test_docker_info_names_a_port_that_the_nodes_own_server_has(nodes: dict[str, TestNode]) -> None:
    node = nodes["w2"]
    with in_namespace(node.description["netns"], socket.create_server, ("0.0.0.0", 8083)):
        publish(nodes, "--publish", "8083:80", replicas=1)
        words = "Bind for 0.0.0.0:8083 failed: port is already allocated"

        def warnings() -> str:
            return str(node.client().api.info().get("Warnings"))

        wait_until(lambda: words in warnings(), "the warning")
    wait_until(lambda: words not in warnings(), "the port is published when it is free")


def test_a_task_is_not_placed_where_a_plain_container_publishes_its_port(nodes: dict[str, TestNode]) -> None:
    m1, w1 = nodes["m1"], nodes["w1"]
    w1.docker("run", "-d", "--name", "plain", "-p", "8091:80", IMAGE, "sleep", "1000")
    try:
        wait_until(lambda: "8091" in used_ports(m1, "w1"), "the node has reported the port")
        port = ("--publish", "mode=host,target=80,published=8091")
        m1.docker("service", "create", "-d", "--name", "host", "--mode", "global", *port, IMAGE, *IDLE)
        wait_running(m1, "host", 2)
        m1.docker("service", "rm", "host")
        m1.docker("service", "create", "-d", "--name", "web", "--replicas", "3", *port, IMAGE, *IDLE)
        wait_running(m1, "web", 2)
        explained = "host-mode port already in use on 3 nodes"
        wait_until(lambda: explained in m1.docker("service", "ps", "--no-trunc", "web").stdout, "the reason")
    finally:
        w1.docker("rm", "-f", "plain")
    wait_running(m1, "web", 3)


def used_ports(seen_by: TestNode, name: str) -> str:
    labels = nodes_by_name(seen_by)[name]["Description"]["Engine"].get("Labels") or {}
    return str(labels.get("skep.ports", ""))


def test_no_container_gets_a_port_of_the_daemon_before_the_daemon_uses_it(nodes: dict[str, TestNode]) -> None:
    """No overlay network exists, so nothing is bound to the port of the data path."""
    m1, w1 = nodes["m1"], nodes["w1"]
    refused = w1.docker("run", "-d", "-p", "4789:80/udp", IMAGE, "sleep", "1000", check=False)
    assert "Bind for 0.0.0.0:4789 failed: port is reserved for overlay networks" in refused.stderr
    port = ("--publish", "mode=host,target=80,published=4789,protocol=udp")
    m1.docker("service", "create", "-d", "--name", "host", *port, IMAGE, "sleep", "1000")
    explained = "host-mode port already in use on 3 nodes"
    wait_until(lambda: explained in m1.docker("service", "ps", "--no-trunc", "host").stdout, "the reason")
    m1.docker("service", "create", "-d", "--name", "mesh", "-p", "4799:80/udp", IMAGE, "sleep", "1000")
    words = "Bind for 0.0.0.0:4799 failed: port is reserved for encrypted networks"
    wait_until(lambda: words in str(w1.client().api.info().get("Warnings")), "the warning")


def test_two_services_cannot_have_one_port(nodes: dict[str, TestNode]) -> None:
    publish(nodes, "--publish", "8080:80", replicas=1)
    refused = nodes["m1"].docker(
        "service", "create", "-d", "--name", "api", "-p", "8080:80", IMAGE, check=False
    )
    assert "port '8080' is already in use by service 'web'" in refused.stderr


def _answers(node: TestNode, address: str) -> bool:
    try:
        return bool(in_namespace(node.description["netns"], fetch, address, 8080))
    except OSError:
        return False


def _refuses(client: str, node: TestNode, port: int) -> bool:
    try:
        in_namespace(client, fetch, node.description["addr"], port)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
