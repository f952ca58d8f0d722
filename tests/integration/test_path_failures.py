"""Ports blocked between two nodes of a real cluster: named, avoided, and taken back."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(300)

NAMED_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def quartet() -> Iterator[TestCluster]:
    with a_playground("paths", managers=1, workers=3) as playground:
        yield playground


@pytest.fixture
def m1(quartet: TestCluster) -> TestNode:
    return quartet.node("m1")


def in_network_of(node: TestNode, *command: str, stdin: str | None = None) -> str:
    words = ["nsenter", f"--net={node.description['netns']}", *command]
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


@contextmanager
def blocked(node: TestNode, peer: TestNode, port: str) -> Iterator[float]:
    """Nothing for ``port`` (``4789/udp``) passes between the two; gives when that began."""
    number, protocol = port.split("/")
    address = peer.description["addr"]
    rules = f"""
table inet blocked {{
  chain in {{ type filter hook input priority -400; ip saddr {address} {protocol} dport {number} drop; }}
  chain out {{ type filter hook output priority -400; ip daddr {address} {protocol} dport {number} drop; }}
}}
"""
    in_network_of(node, "nft", "-f", "-", stdin=rules)
    try:
        yield time.monotonic()
    finally:
        in_network_of(node, "nft", "delete", "table", "inet", "blocked")


def message(manager: TestNode, name: str) -> str:
    """What ``docker node inspect`` says of the node's status."""
    done = manager.docker("node", "inspect", "--format", "{{.Status.Message}}", name)
    return done.stdout.strip()


def doctor(node: TestNode, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [SKEP, "--host", node.socket, "doctor", "network", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def failing(responses: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(from, to, port) of what fails."""
    return {
        (response["Hostname"], path["Peer"], finding["Port"])
        for response in responses
        for path in response["Paths"]
        for finding in path["Findings"]
        if finding["Failing"]
    }


def _reported(manager: TestNode, since: float) -> set[str]:
    """What events about nodes have named since then: host name and port."""
    seconds = time.monotonic() - since + 1
    words = ("--filter", "type=node", "--since", f"{seconds:.0f}s", "--until", "0s", "--format", "{{json .}}")
    events = map(json.loads, manager.docker("events", *words).stdout.splitlines())
    said = (event["Actor"]["Attributes"].get("paths.failing.new", "") for event in events)
    return {words.partition(" (")[0] for words in said}


def wait_well(quartet: TestCluster) -> None:
    """All nodes probe each other, and nothing fails."""
    m1 = quartet.node("m1")
    wait_until(lambda: not any(message(m1, name) for name in nodes_by_name(m1)), "all paths are well", 60)


def test_a_cluster_that_is_well_is_diagnosed_in_seconds(quartet: TestCluster, m1: TestNode) -> None:
    wait_well(quartet)
    wait_until(lambda: "4 nodes, 6 pairs" in doctor(m1).stdout, "all know of each other")
    done = doctor(m1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 nodes, 6 pairs: no problems found")
    assert "\x1b" not in done.stdout + done.stderr
    responses = json.loads(doctor(m1, "--json").stdout)
    assert {response["Hostname"]: len(response["Paths"]) for response in responses} == {
        "m1": 3,
        "w1": 3,
        "w2": 3,
        "w3": 3,
    }
    assert all(path["MTU"] == 1500 for response in responses for path in response["Paths"])
    refused = doctor(quartet.node("w1"))
    assert refused.returncode == 1
    assert "This node is not a swarm manager" in refused.stderr


@pytest.mark.slow
def test_a_blocked_data_path_is_named_and_avoided_until_it_is_open_again(
    quartet: TestCluster, m1: TestNode
) -> None:
    wait_well(quartet)
    m1.docker("network", "create", "-d", "overlay", "back")
    w1, w2 = quartet.node("w1"), quartet.node("w2")
    with blocked(w1, w2, "4789/udp") as since:
        found = doctor(m1, "--json")
        assert found.returncode == 1
        assert {("w1", "w2", "4789/udp"), ("w2", "w1", "4789/udp")} <= failing(json.loads(found.stdout))
        assert "4789/udp (overlay) fails between w1 and w2" in doctor(m1).stdout
        for node, peer in (("w1", "w2"), ("w2", "w1")):
            left_s = NAMED_WITHIN_S - (time.monotonic() - since)
            wait_until(lambda n=node, p=peer: f"{p} 4789/udp" in message(m1, n), f"{node} says it", left_s)
        left_s = NAMED_WITHIN_S - (time.monotonic() - since)
        cut_off = wait_until(lambda: _cut_off(m1), "one of the two is cut off", left_s)
        assert len(cut_off) == 1
        assert cut_off[0] in ("w1", "w2")
        wait_until(lambda: {"w1 4789/udp", "w2 4789/udp"} <= _reported(m1, since), "events name both", 5)
        # No task on an overlay network is placed there; others are.
        m1.docker(
            "service",
            "create",
            "-d",
            "--name",
            "spread",
            "--replicas",
            "6",
            "--network",
            "back",
            IMAGE,
            *IDLE,
        )
        wait_running(m1, "spread", 6)
        names = {node["ID"]: name for name, node in nodes_by_name(m1).items()}
        assert cut_off[0] not in {names[task["NodeID"]] for task in running(m1, "spread")}
        m1.docker("service", "create", "-d", "--name", "plain", "--mode", "global", IMAGE, *IDLE)
        wait_running(m1, "plain", 4)
        # A task that could run nowhere else says why.
        only = ("--constraint", f"node.hostname=={cut_off[0]}")
        m1.docker("service", "create", "-d", "--name", "only", *only, "--network", "back", IMAGE, *IDLE)
        reason = "no suitable node (overlay traffic fails on 1 node; scheduling constraints not satisfied on 3 nodes)"
        wait_until(lambda: _error(m1, "only") == _in_order(reason), "the reason is given")
        explained = subprocess.run(
            [SKEP, "--host", m1.socket, "explain", "only"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
        assert "overlay traffic fails on 1 node" in explained
        # With the label it takes tasks nevertheless.
        m1.docker("node", "update", "--label-add", "skep.ignore-paths=true", cut_off[0])
        wait_running(m1, "only", 1)
        m1.docker("node", "update", "--label-rm", "skep.ignore-paths", cut_off[0])
    wait_until(lambda: not any(message(m1, name) for name in ("w1", "w2")), "both are well again", 60)
    m1.docker("service", "scale", "-d", "only=2")
    wait_running(m1, "only", 2)
    m1.docker("service", "rm", "spread", "plain", "only")


@pytest.mark.slow
def test_a_blocked_control_port_is_named_and_keeps_no_task_away(quartet: TestCluster, m1: TestNode) -> None:
    wait_well(quartet)
    w1 = quartet.node("w1")
    # Its session goes on over the connection that is there, if it is only new ones that are refused.
    address = m1.description["addr"]
    rules = f"""
table inet blocked {{
  chain out {{ type filter hook output priority -400;
    ip daddr {address} tcp dport 2377 tcp flags & (syn | ack) == syn drop; }}
}}
"""
    in_network_of(w1, "nft", "-f", "-", stdin=rules)
    try:
        wait_until(lambda: "m1 2377/tcp" in message(m1, "w1"), "w1 says it", NAMED_WITHIN_S)
        assert "takes no tasks" not in message(m1, "w1")
        found = doctor(m1, "--json")
        assert found.returncode == 1
        assert ("w1", "m1", "2377/tcp") in failing(json.loads(found.stdout))
    finally:
        in_network_of(w1, "nft", "delete", "table", "inet", "blocked")
    wait_until(lambda: not message(m1, "w1"), "w1 is well again", 60)


@pytest.mark.slow
def test_a_blocked_port_of_encrypted_networks_is_named_and_keeps_their_tasks_away(
    quartet: TestCluster, m1: TestNode
) -> None:
    wait_well(quartet)
    m1.docker("network", "create", "-d", "overlay", "--opt", "encrypted", "secret")
    m1.docker("network", "create", "-d", "overlay", "clear")
    m1.docker(
        "service", "create", "-d", "--name", "each", "--mode", "global", "--network", "secret", IMAGE, *IDLE
    )
    wait_running(m1, "each", 4)
    wait_until(lambda: _looks_at(m1, "4799/udp"), "the port is looked at")
    w1, w2 = quartet.node("w1"), quartet.node("w2")
    with blocked(w1, w2, "4799/udp") as since:
        left_s = NAMED_WITHIN_S - (time.monotonic() - since)
        (avoided,) = wait_until(lambda: _cut_off(m1), "one of the two is cut off", left_s)
        said = message(m1, avoided)
        assert "takes no tasks on encrypted overlay networks: 4799/udp fails" in said
        # Networks in clear go by another port.
        only = ("--constraint", f"node.hostname=={avoided}")
        m1.docker("service", "create", "-d", "--name", "open", *only, "--network", "clear", IMAGE, *IDLE)
        wait_running(m1, "open", 1)
    wait_well(quartet)
    m1.docker("service", "rm", "each", "open")


@pytest.mark.slow
def test_a_node_that_joins_behind_a_blocked_port_is_named(quartet: TestCluster, m1: TestNode) -> None:
    wait_well(quartet)
    w3 = quartet.node("w3")
    w3.docker("swarm", "leave")
    wait_until(lambda: nodes_by_name(m1)["w3"]["Status"]["State"] == "down", "w3 has left")
    m1.docker("node", "rm", "w3")
    token = m1.docker("swarm", "join-token", "-q", "worker").stdout.strip()
    with blocked(w3, m1, "4789/udp"):
        w3.docker("swarm", "join", "--token", token, f"{m1.description['addr']}:2377")
        wait_until(lambda: "m1 4789/udp" in message(m1, "w3"), "w3 is named", NAMED_WITHIN_S)
        found = doctor(m1, "--json")
        assert ("w3", "m1", "4789/udp") in failing(json.loads(found.stdout))
        wait_until(lambda: "takes no tasks on overlay networks" in message(m1, "w3"), "w3 is avoided")


@pytest.mark.slow
@pytest.mark.needs("root", "dockerd")
def test_the_gossip_port_of_a_docker_node_is_named() -> None:
    with a_playground("pathd", managers=1, docker_workers=1) as cluster:
        m1, d1 = cluster.node("m1"), cluster.node("d1")
        wait_until(lambda: _looks_at(m1, "7946/tcp"), "the port is looked at")
        with blocked(m1, d1, "7946/tcp"):
            wait_until(lambda: "d1 7946/tcp (gossip)" in message(m1, "m1"), "m1 says it", NAMED_WITHIN_S)
            assert ("m1", "d1", "7946/tcp") in failing(json.loads(doctor(m1, "--json").stdout))
            assert "takes no tasks" not in message(m1, "m1")
        wait_until(lambda: not message(m1, "m1"), "m1 is well again", 60)


def _looks_at(node: TestNode, port: str) -> bool:
    """Whether some node checks this port of another, and finds it open."""
    responses = json.loads(doctor(node, "--json").stdout)
    findings = [
        finding
        for response in responses
        for path in response["Paths"]
        for finding in path["Findings"]
        if finding["Port"] == port
    ]
    return bool(findings) and not any(finding["Failing"] for finding in findings)


def _cut_off(manager: TestNode) -> list[str]:
    return [name for name in nodes_by_name(manager) if "takes no tasks" in message(manager, name)]


def _error(manager: TestNode, service: str) -> str:
    (task, *_) = manager.client().api.tasks(filters={"service": service})
    return _in_order(task["Status"].get("Err", ""))


def _in_order(reason: str) -> str:
    """Reasons of equally many nodes come in the order of filters; here the order says nothing."""
    head, _, rest = reason.partition("(")
    return head + "; ".join(sorted(rest.rstrip(")").split("; ")))
