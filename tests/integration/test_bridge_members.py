"""A running container is put on the node's bridge and taken off it, beside other networks."""

from collections.abc import Iterator

import pytest

from tests.support.machines.docker_engines import inside, wait_inside
from tests.support.machines.playground_rig import IDLE, IMAGE, TestNode, wait_until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def containers(m1: TestNode) -> Iterator[None]:
    m1.docker("network", "create", "front")
    try:
        for name, *network in (("one",), ("two",), ("own",), ("three", "--network", "front")):
            m1.docker("run", "-d", "--name", name, *network, IMAGE, *IDLE)
        yield
    finally:
        wait_until(lambda: serves(m1), "the node process serves")
        m1.docker("rm", "-f", "one", "two", "own", "three", check=False)
        m1.docker("network", "rm", "front")


def serves(node: TestNode) -> bool:
    return node.docker("ps", check=False).returncode == 0


def address(node: TestNode, container: str, network: str) -> str:
    path = f"{{{{(index .NetworkSettings.Networks {network!r}).IPAddress}}}}".replace("'", '"')
    return node.docker("inspect", container, "--format", path).stdout.strip()


@pytest.mark.usefixtures("containers")
def test_names_of_networks_are_found_by_a_container_of_the_bridge_unless_it_has_a_resolver_of_its_own(
    m1: TestNode,
) -> None:
    inside(m1, "own", "sh", "-c", "echo nameserver 192.0.2.1 > /etc/resolv.conf")
    for name in ("one", "own"):
        m1.docker("network", "connect", "front", name)
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", "three")
    assert inside(m1, "own", "cat", "/etc/resolv.conf") == "nameserver 192.0.2.1\n"
    assert address(m1, "one", "front") in inside(m1, "one", "cat", "/etc/hosts")


@pytest.mark.usefixtures("containers")
def test_a_container_that_left_the_bridge_reaches_no_other_there_also_under_the_next_node_process(
    m1: TestNode,
) -> None:
    other = address(m1, "two", "bridge")
    bridge = m1.docker("network", "inspect", "bridge", "--format", "{{.ID}}").stdout.strip()
    listed = m1.docker("ps", "--filter", f"network={bridge}", "--format", "{{.Names}}").stdout
    assert sorted(listed.split()) == ["one", "own", "two"]
    ping = ("ping", "-c", "1", "-W", "1", other)
    assert " 0% packet loss" in inside(m1, "one", *ping)
    m1.docker("network", "connect", "front", "one")
    m1.docker("network", "disconnect", "bridge", "one")
    assert " 0% packet loss" not in inside(m1, "one", *ping)
    m1.docker("network", "connect", "bridge", "three")
    assert " 0% packet loss" in inside(m1, "three", *ping)

    (before,) = m1.pids("skep-node")
    m1.kill(before)
    wait_until(lambda: before not in m1.pids("skep-node") and serves(m1), "the next node process serves")
    assert " 0% packet loss" not in inside(m1, "one", *ping)
    assert " 0% packet loss" in inside(m1, "three", *ping)
    m1.docker("network", "disconnect", "bridge", "three")
    assert " 0% packet loss" not in inside(m1, "three", *ping)
    assert address(m1, "three", "front")


@pytest.mark.usefixtures("containers")
def test_the_only_container_of_a_network_leaves_and_joins_it_again_at_once(m1: TestNode) -> None:
    api = m1.client().api
    for _ in range(5):
        api.disconnect_container_from_network("three", "front")
        api.connect_container_to_network("three", "front")
    ours = address(m1, "three", "front")
    assert f" {ours}/" in inside(m1, "three", "ip", "-4", "-o", "addr", "show", "dev", "eth0")
