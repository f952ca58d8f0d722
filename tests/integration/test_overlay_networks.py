"""Overlay networks of a real cluster: docker makes them, containers on three nodes reach each other over them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import requests

from tests.support.machines.playground_rig import (
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    containers,
    nodes_by_name,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

SERVE = ("httpd", "-f", "-p", "80", "-h", "/etc")


@pytest.fixture(scope="module")
def trio() -> Iterator[TestCluster]:
    with a_playground("ovl", managers=1, workers=2) as playground:
        # A node process that is started anew on a busy machine is not to be taken for a dead node.
        playground.node("m1").docker("swarm", "update", "--dispatcher-heartbeat", "10s")
        yield playground


@pytest.fixture
def m1(trio: TestCluster) -> TestNode:
    return trio.node("m1")


def addresses(manager: TestNode, service: str, network: str) -> dict[str, str]:
    """Node's name -> address of the service's task there, on the network."""
    names = {node["ID"]: name for name, node in nodes_by_name(manager).items()}
    found = {}
    for task in running(manager, service):
        for attachment in task["NetworksAttachments"]:
            if attachment["Network"]["Spec"]["Name"] == network:
                found[names[task["NodeID"]]] = attachment["Addresses"][0].partition("/")[0]
    return found


def inside(node: TestNode, service: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the service's container on this node."""
    container = containers(node, service)[0]
    return node.docker("exec", container["Id"], *command, check=False)


def fetches(node: TestNode, service: str, address: str) -> bool:
    response = inside(node, service, "wget", "-q", "-O", "-", f"http://{address}/hosts")
    return "localhost" in response.stdout


def adopted(node: TestNode, service: str) -> dict[str, int] | None:
    """The service's containers with their processes, None without a response."""
    try:
        return container_pids(node, service)
    except (requests.exceptions.ConnectionError, docker.errors.DockerException):
        return None


def kernel(node: TestNode, *command: str) -> str:
    """What a command says in the node's own network namespace."""
    words = ["nsenter", f"--net={node.description['netns']}", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout


def namespaces(node: TestNode) -> list[str]:
    """The networks that have a namespace on the node; the probes' VXLAN stays, and with it the open port."""
    (holder,) = node.description["pids"]
    return [pin.name for pin in Path(f"/proc/{holder}/root/run/skep/overlays").glob("*")]


def create_global(manager: TestNode, name: str, *options: str, image: str = IMAGE) -> None:
    words = (
        "--detach",
        "--mode",
        "global",
        "--name",
        name,
        "--stop-grace-period",
        "1s",
        *options,
        image,
        *SERVE,
    )
    manager.docker("service", "create", *words)


def test_a_service_on_an_overlay_is_reached_from_every_node(trio: TestCluster, m1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--subnet", "10.77.1.0/24", "web")
    create_global(m1, "each", "--network", "web")
    wait_running(m1, "each", 3)
    found = addresses(m1, "each", "web")
    assert sorted(found) == ["m1", "w1", "w2"]
    assert len(namespaces(m1)) == 1
    for name in found:
        for address in found.values():
            wait_until(
                lambda a=address, n=name: fetches(trio.node(n), "each", a), f"{name} reaches {address}"
            )
    shown: dict[str, Any] = m1.client().api.inspect_container(containers(m1, "each")[0]["Id"])
    assert list(shown["NetworkSettings"]["Networks"]) == ["web"]
    assert shown["NetworkSettings"]["Networks"]["web"]["IPAddress"] == found["m1"]
    m1.docker("service", "rm", "each")
    wait_until(lambda: not m1.client().api.tasks(), "no task is left")
    m1.docker("network", "rm", "web")
    for name in ("m1", "w1", "w2"):
        node = trio.node(name)
        wait_until(lambda n=node: not namespaces(n), f"no overlay on {name}")
        wait_until(
            lambda n=node: "skep-gw" not in kernel(n, "ip", "-o", "link", "show", "type", "veth"),
            f"no port of the gateway on {name}",
        )


def test_the_overlay_goes_on_while_the_node_process_is_away_and_after(
    trio: TestCluster, m1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "net2")
    create_global(m1, "each", "--network", "net2")
    wait_running(m1, "each", 3)
    found = addresses(m1, "each", "net2")
    w1 = trio.node("w1")
    wait_until(lambda: fetches(w1, "each", found["w2"]), "w1 reaches w2")
    pids = container_pids(w1, "each")
    (pid,) = pids.values()
    pinging = subprocess.Popen(
        f"nsenter --net=/proc/{pid}/ns/net busybox ping -i 0.1 -c 60 {found['w2']}".split(),
        stdout=subprocess.PIPE,
        text=True,
    )
    old = w1.pids("skep-node")
    for one in old:
        w1.kill(one)
    wait_until(lambda: adopted(w1, "each") == pids, "the container is found again")
    assert not set(old) & set(w1.pids("skep-node"))
    output, _ = pinging.communicate(timeout=30)
    assert "60 packets received" in output
    assert fetches(w1, "each", found["w2"])
    wait_until(lambda: fetches(trio.node("w2"), "each", found["w1"]), "w2 reaches w1")
    m1.docker("service", "rm", "each")
    wait_until(lambda: not m1.client().api.tasks(), "no task is left")
    m1.docker("network", "rm", "net2")
