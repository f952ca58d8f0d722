"""Networks as the docker command makes them, on the nodes of a playground."""

import ipaddress
import json
import re
import subprocess
from typing import Any

import pytest

from tests.support.machines.daemon_rig import daemon_rig
from tests.support.machines.directories import a_directory
from tests.support.machines.playground_rig import (
    CLIS,
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    create,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)


def inspected(node: TestNode, name: str) -> dict[str, Any]:
    (network,) = json.loads(node.docker("network", "inspect", name).stdout)
    assert isinstance(network, dict)
    return network


def subnets(node: TestNode, name: str) -> list[str]:
    return [config["Subnet"] for config in inspected(node, name)["IPAM"]["Config"]]


def wait_subnets(node: TestNode, name: str) -> list[str]:
    return wait_until(lambda: subnets(node, name), f"{name} has a subnet")


def in_netns(node: TestNode, *command: str) -> str:
    netns = node.description["netns"]
    done = subprocess.run(
        ("nsenter", f"--net={netns}", *command), capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout


def test_a_full_network_says_so_on_its_tasks_and_goes_on_when_it_has_more_room(m1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--subnet", "10.200.0.0/29", "tiny")
    wait_subnets(m1, "tiny")
    try:
        m1.docker(
            "service", "create", "-d", "--name", "many", "--replicas", "7", "--network", "tiny", IMAGE, *IDLE
        )

        def waiting() -> list[str]:
            shown = m1.docker("service", "ps", "many", "--no-trunc", "--format", "{{.Error}}").stdout
            return [line for line in shown.splitlines() if "no available IPv4 addresses" in line]

        # five addresses: one is the service's own, four are tasks'
        wait_until(lambda: len(waiting()) == 3, "three tasks have no address")
        assert "tiny" in waiting()[0]
        (warning,) = inspected(m1, "tiny")["Warnings"]
        assert warning.startswith("5 of 5 addresses are in use")
        done = subprocess.run(
            (SKEP, "-H", m1.socket, "network", "update", "--subnet-add", "10.200.1.0/28", "tiny"),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert done.stdout == "tiny\n"
        wait_until(lambda: not waiting(), "every task has an address")
        assert subnets(m1, "tiny") == ["10.200.0.0/29", "10.200.1.0/28"]
        refused = m1.docker("network", "rm", "tiny", check=False)
        assert re.search(r"network \w+ is in use by service \w+ \(service many\)", refused.stderr)
    finally:
        m1.docker("service", "rm", "many")
        m1.docker("network", "rm", "tiny")  # at once: who uses it is going


def test_several_networks_are_removed_by_name_and_by_the_beginning_of_an_id(m1: TestNode) -> None:
    ids = [
        m1.docker("network", "create", "-d", "overlay", name).stdout.strip() for name in ("r1", "r2", "r3")
    ]
    done = m1.docker("network", "rm", "r1", ids[1][:10], "nosuch", "r3", check=False)
    assert (done.returncode, done.stdout.split()) == (1, ["r1", ids[1][:10], "r3"])
    assert re.search("network nosuch not found|No such network: nosuch", done.stderr)  # by release
    assert m1.docker("network", "ls", "-q", "--filter", "name=^r").stdout == ""


def test_a_refused_network_leaves_nothing_behind(m1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--subnet", "10.201.0.0/24", "first")
    before = m1.docker("network", "ls").stdout
    try:
        for words, message in (
            (("--subnet", "10.201.0.0/16"), "10.201.0.0/16 and 10.201.0.0/24 of network first"),
            (("--opt", "com.docker.network.driver.mtu=9"), "invalid MTU value: 9"),
            (("--subnet", "127.0.0.0/8"), "invalid subnet 127.0.0.0/8"),
            (("--subnet", "10.202.0.0/31"), "has no addresses for containers"),
            (("--opt", "skep.data-plane=both"), "skep.data-plane is docker or skep"),
        ):
            done = m1.docker("network", "create", "-d", "overlay", *words, "second", check=False)
            assert done.returncode == 1
            assert message in done.stderr
            assert m1.docker("network", "ls").stdout == before
    finally:
        m1.docker("network", "rm", "first")


def test_both_versions_of_ip_on_one_network(m1: TestNode) -> None:
    words = ("--ipv6", "--subnet", "10.203.0.0/24", "--subnet", "2001:db8:7::/64")
    m1.docker("network", "create", "-d", "overlay", *words, "dual")
    m1.docker("network", "create", "-d", "overlay", "--ipv6", "own")
    try:
        wait_subnets(m1, "dual")
        wait_subnets(m1, "own")
        assert subnets(m1, "dual") == ["10.203.0.0/24", "2001:db8:7::/64"]
        four, six = (ipaddress.ip_network(text) for text in subnets(m1, "own"))
        assert (four.version, six.version) == (4, 6)
        assert six.is_private
        m1.docker("service", "create", "-d", "--name", "web", "--network", "dual", IMAGE, *IDLE)

        def addresses() -> list[str]:
            (task,) = m1.client().api.tasks({"service": "web"}) or [{}]
            return [one for part in task.get("NetworksAttachments") or () for one in part["Addresses"]]

        wait_until(addresses, "the task has its addresses")
        assert [ipaddress.ip_interface(one).network for one in addresses()] == [
            ipaddress.ip_network("10.203.0.0/24"),
            ipaddress.ip_network("2001:db8:7::/64"),
        ]
        (service,) = json.loads(m1.docker("service", "inspect", "web").stdout)
        assert [":" in one["Addr"] for one in service["Endpoint"]["VirtualIPs"]] == [False, True]
    finally:
        m1.docker("service", "rm", "web", check=False)
        m1.docker("network", "rm", "dual", "own")


def test_the_gateway_bridge_takes_the_subnet_it_is_made_again_with(own_cluster: TestCluster) -> None:
    m1 = own_cluster.node("m1")
    create(m1, "web", 1, command=IDLE)
    wait_running(m1, "web", 1)
    refused = m1.docker("network", "rm", "docker_gwbridge", check=False)
    assert "has active endpoints" in refused.stderr
    m1.docker("service", "rm", "web")
    wait_until(lambda: not m1.client().api.containers(all=True), "its container is gone")
    m1.docker("network", "rm", "docker_gwbridge")
    assert "docker_gwbridge" not in m1.docker("network", "ls").stdout
    address = m1.description["addr"]
    own = ipaddress.ip_interface(f"{address}/24").network
    clash = m1.docker("network", "create", "--subnet", str(own), "docker_gwbridge", check=False)
    assert "Pool overlaps with other one on this address space" in clash.stderr
    m1.docker("network", "create", "--subnet", "172.29.7.0/24", "docker_gwbridge")
    assert "172.29.7.1/24" in in_netns(m1, "ip", "-4", "address", "show")
    create(m1, "web", 1, command=IDLE)
    wait_running(m1, "web", 1)
    (container,) = m1.client().api.containers()
    shown = m1.docker("exec", container["Id"], "ip", "-4", "address", "show").stdout
    assert re.search(r"172\.29\.7\.\d+/24", shown)
    (entry,) = inspected(m1, "docker_gwbridge")["Containers"].values()
    assert entry["IPv4Address"] in shown


@pytest.mark.slow
def test_networks_avoid_what_machines_reach_and_refuse_it_by_name(own_cluster: TestCluster) -> None:
    m1 = own_cluster.node("m1")
    first, second = wait_subnets(m1, "ingress")[0], "10.0.1.0/24"
    assert first == "10.0.0.0/24"
    in_netns(m1, "ip", "link", "add", "lan0", "type", "bridge")
    in_netns(m1, "ip", "address", "add", "10.0.1.5/24", "dev", "lan0")
    in_netns(m1, "ip", "link", "set", "lan0", "up")

    def reported() -> bool:
        (node,) = json.loads(m1.docker("node", "inspect", "self").stdout)
        return f"{second}=lan0" in node["Description"]["Engine"]["Labels"]["skep.routes"]

    wait_until(reported, "the node has reported its new route", within_s=90)
    m1.docker("network", "create", "-d", "overlay", "auto")
    assert wait_subnets(m1, "auto") == ["10.0.2.0/24"]
    refused = m1.docker("network", "create", "-d", "overlay", "--subnet", "10.0.0.0/20", "named", check=False)
    assert refused.returncode == 1
    words = ("create", "-d", "overlay", "--subnet", "10.0.1.0/25")
    refused = m1.docker("network", *words, "named", check=False)
    assert "10.0.1.0/25 overlaps with 10.0.1.0/24 on lan0 of node m1" in refused.stderr
    m1.docker("network", *words, "--label", "skep.allow-overlap=true", "named")
    (warning,) = wait_until(lambda: inspected(m1, "named").get("Warnings"), "the clash is shown")
    assert warning.startswith("10.0.1.0/25 overlaps with 10.0.1.0/24 on lan0 of node m1")


@pytest.mark.parametrize(
    "words", [("ls",), ("inspect", "bridge", "host", "none", "docker_gwbridge", "ingress")]
)
def test_what_docker_predefines_is_there(m1: TestNode, words: tuple[str, ...]) -> None:
    before = m1.docker("network", *words).stdout
    for name in ("bridge", "host", "none", "docker_gwbridge", "ingress"):
        assert name in before
    assert m1.docker("network", *words).stdout == before


def test_the_first_networks_of_a_cluster_avoid_what_its_machine_has() -> None:
    with a_directory("skep-") as directory, daemon_rig(directory) as rig:
        rig.start()
        assert rig.process is not None
        for words in (
            "link add lan0 type bridge",
            "address add 10.0.0.5/24 dev lan0",
            "link set lan0 up",
        ):
            command = ("nsenter", "-t", str(rig.process.pid), "-n", "ip", *words.split())
            subprocess.run(command, check=True, timeout=20)
        docker = (CLIS[-1], "-H", f"unix://{rig.run / 'skep.sock'}")
        subprocess.run((*docker, "swarm", "init", "--advertise-addr", "10.0.0.5"), check=True, timeout=60)

        def subnet() -> str:
            shown = subprocess.run(
                (*docker, "network", "inspect", "ingress"), capture_output=True, check=True, timeout=20
            )
            (network,) = json.loads(shown.stdout)
            return "".join(config["Subnet"] for config in network["IPAM"]["Config"])

        assert wait_until(subnet, "ingress has a subnet") == "10.0.1.0/24"
