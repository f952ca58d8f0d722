"""What users of plain containers and services expect of networks, names and mounts, on real nodes."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from skep.dataplane.netns.kernel import conntrack
from tests.integration.test_published_ports import in_namespace
from tests.support.clients.docker_calls import raw_post
from tests.support.machines.docker_engines import inside, wait_inside
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LABEL = ("--label", "ofnetworks")
ANSWER_S = 5.0
SERVER = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 9999))
while True:
    _, client = server.recvfrom(100)
    server.sendto(sys.argv[1].encode(), client)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("netofc", managers=1, workers=1) as made:
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    for id in node.docker("ps", "-aq", "--filter", "label=ofnetworks").stdout.split():
        node.docker("rm", "-f", "-v", id, check=False)
    remove_services(node)
    wait_until(
        lambda: node.docker("network", "prune", "-f", check=False).returncode == 0, "networks are pruned"
    )


def run(node: TestNode, name: str, *words: str, command: tuple[str, ...] = IDLE) -> str:
    return node.docker("run", "-d", "--name", name, *LABEL, *words, IMAGE, *command).stdout.strip()


def one_of(node: TestNode, service: str) -> str:
    """Id of the container of a service with one task on ``node``."""
    (found,) = containers(node, service)
    return str(found["Id"])


# --- UDP clients of published ports -----------------------------------------------------------------------------------


def serving(word: str) -> tuple[str, ...]:
    """A command that answers every datagram with ``word``, by the machine's own Python."""
    return ("chroot", "/machine", "/usr/bin/python3", "-c", SERVER, word)


@contextmanager
def a_client(node: TestNode, address: str, port: int) -> Iterator[socket.socket]:
    """A client that sends from one port for its whole life."""

    def opened() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(0.2)
        made.connect((address, port))
        return made

    with in_namespace(node.description["netns"], opened) as client:
        yield client


def wait_answer(client: socket.socket, word: str, within_s: float = ANSWER_S) -> None:
    """Send again and again, as such clients do, until ``word`` is the answer."""
    deadline, heard = time.monotonic() + within_s, ""
    while heard != word:
        assert time.monotonic() < deadline, f"{client}: no answer {word!r} within {within_s} s"
        with suppress(OSError):  # it is refused meanwhile
            client.send(b"x")
            heard = client.recv(100).decode()
        time.sleep(0.05)


def test_a_udp_client_is_answered_after_the_container_was_restarted_or_replaced(
    cluster: TestCluster, m1: TestNode
) -> None:
    address, port = m1.description["addr"], 29101
    published = ("--network", "front", "-p", f"{port}:9999/udp", "-v", "/:/machine:ro", "--stop-timeout", "1")
    m1.docker("network", "create", *LABEL, "front")
    run(m1, "one", *published, command=serving("one"))
    with a_client(m1, address, port) as local, a_client(cluster.node("w1"), address, port) as remote:
        for client in (local, remote):
            wait_answer(client, "one", 20)
        m1.docker("restart", "-t", "1", "one")
        for client in (local, remote):
            wait_answer(client, "one")
        m1.docker("rm", "-f", "one")
        run(m1, "taker", "--network", "front")  # so that the next container gets another address
        run(m1, "two", *published, command=serving("two"))
        for client in (local, remote):
            wait_answer(client, "two")
        m1.docker("rm", "-f", "two")


def test_udp_clients_of_the_same_port_at_another_address_keep_their_flows(m1: TestNode) -> None:
    address, port = m1.description["addr"], 29101
    run(m1, "bound", "-p", f"127.0.0.1:{port}:9999/udp", "-v", "/:/machine:ro", command=serving("bound"))
    with a_client(m1, "127.0.0.1", port) as client:
        wait_answer(client, "bound", 20)
        flows = flows_of(m1, port)
        run(m1, "beside", "-p", f"{address}:{port}:9999/udp", "-v", "/:/machine:ro", command=serving("other"))
        assert flows_of(m1, port) == flows != set()
        with a_client(m1, address, port) as other:
            wait_answer(other, "other", 20)


def flows_of(node: TestNode, port: int) -> set[bytes]:
    """What connection tracking of a node has for 127.0.0.1 at a UDP port, each with its id."""

    def found() -> set[bytes]:
        with conntrack.opened(5) as connection:
            return {
                flow.name
                for flow in conntrack.flows(connection, socket.AF_INET)
                if (flow.original.destination, flow.original.destination_port) == ("127.0.0.1", port)
            }

    return in_namespace(node.description["netns"], found)


@pytest.mark.parametrize("mode", ["host", "ingress"])
def test_a_udp_client_is_answered_after_the_task_of_a_service_was_replaced(
    cluster: TestCluster, m1: TestNode, mode: str
) -> None:
    address, port = m1.description["addr"], 29102
    options = (
        *("--constraint", "node.role==manager", "--stop-grace-period", "1s"),
        *("--mount", "type=bind,source=/,target=/machine,readonly"),
        *("--publish", f"published={port},target=9999,protocol=udp,mode={mode}"),
    )
    create(m1, "talker", 1, *options, command=serving("one"))
    wait_running(m1, "talker", 1)
    with a_client(m1, address, port) as local, a_client(cluster.node("w1"), address, port) as remote:
        for client in (local, remote):
            wait_answer(client, "one", 20)
        spec = m1.client().api.inspect_service("talker")
        spec["Spec"]["TaskTemplate"]["ContainerSpec"]["Args"] = list(serving("two"))
        raw_post(
            m1.client().api,
            "/services/{0}/update",
            "talker",
            data=spec["Spec"],
            params={"version": spec["Version"]["Index"]},
        )
        wait_answer(local, "two", 30)  # the update takes as long as it takes
        wait_answer(remote, "two")


# --- networks and addresses -------------------------------------------------------------------------------------------


def test_forty_networks_are_made_and_their_subnets_are_used_again(m1: TestNode) -> None:
    names = [f"many{number}" for number in range(40)]
    for name in names:
        m1.docker("network", "create", *LABEL, name)
    listed = json.loads(m1.docker("network", "inspect", *names).stdout)
    subnets = [IPv4Network(one["IPAM"]["Config"][0]["Subnet"]) for one in listed]
    routes = m1.docker("run", "--rm", "--network", "host", IMAGE, "ip", "-4", "route").stdout
    reached = [IPv4Network(word) for word in re.findall(r"^[0-9.]+/\d+", routes, re.MULTILINE)]
    for number, subnet in enumerate(subnets):
        assert not any(map(subnet.overlaps, (*subnets[:number], *reached)))
        assert subnet.num_addresses >= 16
    for name in (names[0], names[-1]):
        run(m1, f"in-{name}", "--network", name)
        run(m1, f"asks-{name}", "--network", name)
        wait_inside(m1, f"asks-{name}", " 0% packet loss", "ping", "-c", "1", "-W", "2", f"in-{name}")
    for name in (f"in-{names[0]}", f"asks-{names[0]}"):
        m1.docker("rm", "-f", name)
    m1.docker("network", "rm", names[0])
    m1.docker("network", "create", *LABEL, "again")
    (again,) = json.loads(m1.docker("network", "inspect", "again").stdout)
    assert again["IPAM"]["Config"][0]["Subnet"] == str(subnets[0])
    m1.docker("network", "rm", "again", *names[1:-1])


HOST = "host.docker.internal:host-gateway"


def test_the_host_gateway_leads_to_programs_of_the_node(m1: TestNode, tmp_path: Path) -> None:
    run(
        m1,
        "server",
        "--network",
        "host",
        command=("sh", "-c", "echo node >/tmp/i; exec httpd -f -p 29103 -h /tmp"),
    )
    ask = ("wget", "-q", "-O", "-", "http://host.docker.internal:29103/i")
    m1.docker("network", "create", *LABEL, "front")
    m1.docker("network", "create", *LABEL, "-d", "overlay", "wide")
    for network in ("bridge", "front", "host"):
        answer = m1.docker("run", "--rm", "--network", network, "--add-host", HOST, IMAGE, *ask)
        assert answer.stdout == "node\n", network
    here = ("--constraint", "node.role==manager", "--host", HOST)
    create(m1, "alone", 1, *here)
    create(m1, "overlaid", 1, *here, "--network", "wide")
    file = tmp_path / "stack.yml"
    file.write_text(
        f"services:\n  app:\n    image: {IMAGE}\n    command: {json.dumps(['sleep', '600'])}\n"
        f"    extra_hosts: ['{HOST}', 'db.example=10.9.8.7']\n"
        "    deploy: {placement: {constraints: [node.role == manager]}}\n"
    )
    m1.docker("stack", "deploy", "--detach=true", "-c", str(file), "gate")
    try:
        for service in ("alone", "overlaid", "gate_app"):
            wait_running(m1, service, 1)
            assert inside(m1, one_of(m1, service), *ask) == "node\n", service
        assert "10.9.8.7\tdb.example" in inside(m1, one_of(m1, "gate_app"), "cat", "/etc/hosts")
    finally:
        m1.docker("stack", "rm", "gate", check=False)


# --- names ------------------------------------------------------------------------------------------------------------


def test_host_names_and_short_ids_are_names_on_the_networks_of_users(
    cluster: TestCluster, m1: TestNode
) -> None:
    w1 = cluster.node("w1")
    m1.docker("network", "create", *LABEL, "front")
    m1.docker("network", "create", *LABEL, "-d", "overlay", "--attachable", "wide")
    here = run(m1, "plain", "--network", "front", "--hostname", "db.inner", "--network-alias", "store")
    far = w1.docker("run", "-d", "--name", "far", *LABEL, "--network", "wide", "-h", "farhost", IMAGE, *IDLE)
    try:
        run(m1, "asks", "--network", "front")
        run(m1, "asksfar", "--network", "wide")
        for name in ("plain", "db.inner", "store", here[:12]):
            wait_inside(m1, "asks", " 0% packet loss", "ping", "-c", "1", "-W", "2", name)
        for name in ("far", "farhost", far.stdout[:12]):
            wait_inside(m1, "asksfar", " 0% packet loss", "ping", "-c", "1", "-W", "2", name)
        (shown,) = json.loads(m1.docker("inspect", "plain").stdout)
        front = shown["NetworkSettings"]["Networks"]["front"]
        assert front["Aliases"] == ["store"]
        assert front["DNSNames"] == ["plain", "store", here[:12], "db.inner"]
        create(m1, "broker", 2, "--network", "wide", "--hostname", "kafka-{{.Task.Slot}}")
        wait_running(m1, "broker", 2)
        for name in ("kafka-1", "kafka-2"):
            wait_inside(m1, "asksfar", " 0% packet loss", "ping", "-c", "1", "-W", "2", name)
    finally:
        w1.docker("rm", "-f", "far", check=False)


def test_a_name_on_two_networks_has_the_addresses_of_both_ip_versions(m1: TestNode) -> None:
    m1.docker("network", "create", *LABEL, "four")
    m1.docker("network", "create", *LABEL, "--ipv6", "--subnet", "fd00:77::/64", "six")
    for name in ("p1", "asks"):
        run(m1, name, "--network", "four")
        m1.docker("network", "connect", "six", name)
    wait_inside(m1, "asks", "fd00:77::", "nslookup", "-type=aaaa", "p1", "127.0.0.11")


def test_an_interface_has_sysctls_of_its_own(m1: TestNode) -> None:
    m1.docker("network", "create", *LABEL, "four")
    option = "com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.log_martians=1"
    script = "cd /proc/sys/net/ipv4/conf; grep . */log_martians"
    said = m1.docker("run", "--rm", "--network", f"name=four,driver-opt={option}", IMAGE, "sh", "-c", script)
    assert [line for line in said.stdout.splitlines() if line.endswith("1")] == ["eth0/log_martians:1"]
    run(m1, "late")
    refused = m1.docker("network", "connect", "--driver-opt", option, "four", "late", check=False)
    assert "sysctls of an interface are set when the container starts" in refused.stderr


# --- mounts and limits ------------------------------------------------------------------------------------------------


def test_a_tmpfs_of_a_container_has_its_mode_at_every_start_and_of_a_service_too(m1: TestNode) -> None:
    stat = ("stat", "-c", "%a %u:%g", "/kept", "/new")
    options = ("--tmpfs", "/kept:mode=700,uid=1000,gid=1001", "--mount", "type=tmpfs,destination=/new")
    m1.docker("create", "--name", "again", *LABEL, *options, IMAGE, *stat)
    for _ in range(3):
        assert m1.docker("start", "-a", "again").stdout == "700 1000:1001\n1777 0:0\n"
    mounts = ("type=tmpfs,destination=/kept,tmpfs-mode=1770,tmpfs-size=65536", "type=tmpfs,destination=/new")
    create(m1, "spare", 1, "--constraint", "node.role==manager", *(f"--mount={one}" for one in mounts))
    wait_running(m1, "spare", 1)
    assert inside(m1, one_of(m1, "spare"), *stat) == "1770 0:0\n1777 0:0\n"
    assert "size=64k" in inside(m1, one_of(m1, "spare"), "grep", " /kept ", "/proc/mounts")
    said = m1.docker("run", "--rm", "--tmpfs", "/x:nonsense", IMAGE, "true", check=False).stderr
    assert 'invalid tmpfs option ["nonsense"]' in said


def test_soft_and_hard_ulimits_hold_in_containers_execs_and_services(m1: TestNode, tmp_path: Path) -> None:
    show = ("sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c")
    given = ("--ulimit", "nofile=700:800", "--ulimit", "core=0")
    assert m1.docker("run", "--rm", *given, IMAGE, *show).stdout == "700\n800\n0\n"
    run(m1, "limited", *given)
    # One of an exec's two limits follows within a moment.
    show = ("sh", "-c", "sleep 1; ulimit -Sn; ulimit -Hn; ulimit -c")
    assert inside(m1, "limited", *show) == "700\n800\n0\n"
    create(m1, "bounded", 1, "--constraint", "node.role==manager", *given)
    file = tmp_path / "stack.yml"
    file.write_text(
        f"services:\n  app:\n    image: {IMAGE}\n    command: {json.dumps(['sleep', '600'])}\n"
        "    ulimits: {nofile: {soft: 700, hard: 800}, core: 0}\n"
        "    deploy: {placement: {constraints: [node.role == manager]}}\n"
    )
    m1.docker("stack", "deploy", "--detach=true", "-c", str(file), "lim")
    try:
        for service in ("bounded", "lim_app"):
            wait_running(m1, service, 1)
            assert inside(m1, one_of(m1, service), *show) == "700\n800\n0\n", service
    finally:
        m1.docker("stack", "rm", "lim", check=False)
