"""Encrypted networks of a real cluster: the talk's sniff test, and what is killed while traffic goes on."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.model.networks.paths import PROBE_VNI
from tests.integration.test_overlay_networks import addresses, create_global, fetches, inside, kernel
from tests.support.encryption.encrypted_traffic import captured_in, udp_to
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    containers,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

VXLAN, WIREGUARD, PROCESS = 4789, 4799, "wireguard-go"
PROBE_HEADER = b"\x08\0\0\0" + PROBE_VNI.to_bytes(3, "big") + b"\0"
"""The nodes' own probes on VXLAN do not count as traffic of containers."""
SAID = b"GET /hosts HTTP/1.1"
"""What containers say to each other in these tests."""


@pytest.fixture(scope="module")
def trio() -> Iterator[TestCluster]:
    with a_playground("enc", managers=1, workers=2) as playground:
        yield playground


@pytest.fixture
def m1(trio: TestCluster) -> TestNode:
    return trio.node("m1")


def start(manager: TestNode, network: str, *options: str) -> dict[str, str]:
    """A container of a service on each node, attached to a new network; their addresses by node."""
    manager.docker("network", "create", "-d", "overlay", *options, network)
    create_global(manager, f"on-{network}", "--network", network)
    wait_running(manager, f"on-{network}", 3)
    return addresses(manager, f"on-{network}", network)


def end(manager: TestNode, network: str) -> None:
    remove_services(manager)
    manager.docker("network", "rm", network)


def underlay_device(node: TestNode) -> str:
    links = json.loads(kernel(node, "ip", "-j", "-4", "address"))
    return next(link["ifname"] for link in links if link["ifname"].startswith("eth"))


def sniffed(trio: TestCluster, service: str, address: str) -> list[bytes]:
    """All that passes the underlay of w2 while w1's container asks the one at ``address``, three times."""
    w1, w2 = trio.node("w1"), trio.node("w2")
    with captured_in(Path(w2.description["netns"]), underlay_device(w2)) as seen:
        for _ in range(3):
            assert fetches(w1, service, address)
    return seen


def test_a_sniffer_reads_a_plain_network_and_not_an_encrypted_one(trio: TestCluster, m1: TestNode) -> None:
    plain = start(m1, "plain")
    wait_until(lambda: fetches(trio.node("w1"), "on-plain", plain["w2"]), "the plain one is reached")
    seen = sniffed(trio, "on-plain", plain["w2"])
    assert any(SAID in one for one in udp_to(seen, VXLAN)), "the plain twin shows the text"
    end(m1, "plain")

    secure = start(m1, "secure", "--opt", "encrypted")
    for name in secure:
        for address in secure.values():
            wait_until(
                lambda n=name, a=address: fetches(trio.node(n), "on-secure", a), f"{name} reaches {address}"
            )
    seen = sniffed(trio, "on-secure", secure["w2"])
    assert len(udp_to(seen, WIREGUARD)) > 10, "traffic flowed"
    assert [one for one in udp_to(seen, VXLAN) if PROBE_HEADER not in one] == []
    assert not any(SAID in one or b"localhost" in one for one in seen)
    shown = inside(trio.node("w1"), "on-secure", "cat", "/sys/class/net/eth0/mtu").stdout
    assert int(shown) == 1370
    labels = trio.node("w1").docker("info", "--format", "{{range .Labels}}{{println .}}{{end}}").stdout
    assert "skep.encryption=wireguard-go" in labels
    end(m1, "secure")
    wait_until(
        lambda: trio.node("w1").pids(PROCESS) == [], "wireguard-go ends with the last encrypted network"
    )


def test_killed_processes_do_not_stop_an_encrypted_network(trio: TestCluster, m1: TestNode) -> None:
    secure = start(m1, "secure", "--opt", "encrypted")
    w1, w2 = trio.node("w1"), trio.node("w2")
    wait_until(lambda: fetches(w1, "on-secure", secure["w2"]), "w1 reaches w2")

    for node in (w1, w2):
        (victim,) = node.pids(PROCESS)
        node.kill(victim)
        killed_at = time.monotonic()
        wait_until(lambda: fetches(w1, "on-secure", secure["w2"]), "traffic goes on")
        assert time.monotonic() - killed_at < 5.0, "3 s, and what a command in a container takes here"
        wait_until(lambda n=node, v=victim: n.pids(PROCESS) not in ([], [v]), "there is a new one")

    tunnels = w1.pids(PROCESS)
    before = {one["Id"] for one in containers(w1, "on-secure")}
    for stop in (kill, end_orderly):
        old = w1.pids("skep-node")
        stop(w1, old)
        assert w1.pids(PROCESS) == tunnels
        wait_until(lambda o=old: w1.pids("skep-node") not in ([], o), "there is a new node process")
        wait_until(lambda: w1.docker("version", check=False).returncode == 0, "it answers")
        wait_until(
            lambda: {one["Id"] for one in containers(w1, "on-secure")} == before, "containers are found"
        )
        assert w1.pids(PROCESS) == tunnels, "it was adopted"
        assert fetches(w1, "on-secure", secure["w2"])
    end(m1, "secure")


def kill(node: TestNode, processes: list[int]) -> None:
    for pid in processes:
        node.kill(pid)


def end_orderly(node: TestNode, processes: list[int]) -> None:
    for pid in processes:
        os.kill(pid, signal.SIGTERM)
