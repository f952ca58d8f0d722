"""Two managers of three are lost: one goes on alone, the others find out when they come back, and join again."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    wait_running,
    wait_until,
)
from tests.support.managers.managers_rig import can_write, secrets, wait_managers, write

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


@pytest.fixture
def own() -> Iterator[TestCluster]:
    with a_playground("rec", managers=3, workers=1) as cluster:
        yield cluster


def skep(node: TestNode, *words: str, code: int = 0) -> str:
    """What ``skep cluster recover`` prints."""
    command = [SKEP, "--host", node.socket, "cluster", "recover", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == code, done
    return done.stdout + done.stderr


def listed(node: TestNode) -> dict[str, tuple[str, str]]:
    """Host name -> (state, reachability) of all nodes."""
    return {
        one["Description"]["Hostname"]: (
            one["Status"]["State"],
            one.get("ManagerStatus", {}).get("Reachability", ""),
        )
        for one in node.client().api.nodes()
    }


def swarm_error(node: TestNode) -> str:
    swarm = node.client().info()["Swarm"]
    return str(swarm["Error"]) if swarm["LocalNodeState"] == "error" else ""


def test_two_managers_of_three_are_lost_and_join_again(own: TestCluster) -> None:
    m1, w1 = own.node("m1"), own.node("w1")
    write(m1, "before")
    create(m1, "web", 4)
    wait_running(m1, "web", 4)
    for lost in ("m2", "m3"):
        own.skep("kill", lost)
    wait_until(lambda: not can_write(m1, "probe"), "without a quorum nothing is written")
    kept = {node.name: container_pids(node, "web") for node in (m1, w1)}

    planned = skep(m1, "--dry-run")
    assert "NO LEADER  1 of 3 managers responds, 2 are needed" in planned
    assert planned.count("LOST") == 2
    assert "of m1: 1 service, " in planned
    assert not can_write(m1, "probe"), "a dry run changes nothing"
    status = subprocess.run(
        [SKEP, "--host", m1.socket, "status", "-o", "json"], capture_output=True, timeout=60, check=False
    )
    lost_at = json.loads(status.stdout)["Cluster"]["AsOf"]
    wait_until(lambda: "no response for 3" in skep(m1, "--dry-run"), "the loss is 30 s old", within_s=90)
    recovered = skep(m1, "--yes")
    assert "m1 is now the only manager of the cluster." in recovered
    assert "docker node demote m2 && docker node rm --force m2" in recovered
    refused = skep(m1, "--yes", code=1)
    assert "the cluster has a leader, so there is nothing to recover" in refused
    assert {listed(m1)[lost][0] for lost in ("m2", "m3")} <= {"unknown", "down"}, "not ready for a moment"
    assert "before" in secrets(m1)
    write(m1, "alone")
    wait_until(lambda: listed(m1).get("w1", ("", ""))[0] == "ready", "the worker is back")
    shown = listed(m1)
    assert (shown["m1"], shown["m2"][1], shown["m3"][1]) == (
        ("ready", "reachable"),
        "unreachable",
        "unreachable",
    )
    wait_running(m1, "web", 4, within_s=60)
    wait_until(lambda: listed(m1)["m2"][0] == "down", "m2 does not come back", within_s=60)
    silent = {one["Description"]["Hostname"]: one.get("SilentSince", "") for one in m1.client().api.nodes()}
    assert "" < silent["m2"] < lost_at, "it was lost with the quorum, not at the recovery"
    for node in (m1, w1):
        now = container_pids(node, "web")
        assert kept[node.name].items() <= now.items(), "what ran, runs on"

    # The two lost ones are a quorum of the old cluster, and come back together.
    for lost in ("m2", "m3"):
        own.skep("start", lost)
    for lost in ("m2", "m3"):
        node = own.node(lost)
        error = wait_until(lambda node=node: swarm_error(node), f"{lost} says that it stopped", within_s=60)
        assert "incarnation" in error
        assert not can_write(node, "probe")
        assert "docker swarm leave --force" in error
    assert "alone" in secrets(m1)

    for lost in ("m2", "m3"):
        node = own.node(lost)
        m1.docker("node", "demote", lost)
        m1.docker("node", "rm", "--force", lost)
        node.docker("swarm", "leave", "--force")
        token = m1.docker("swarm", "join-token", "--quiet", "manager").stdout.strip()
        address = m1.description["addr"]
        node.docker("swarm", "join", "--token", token, f"{address}:2377")
    wait_managers(m1, "m1", "m2", "m3")
    assert {"before", "alone"} <= set(secrets(own.node("m3")))
    write(own.node("m2"), "together")
    assert "together" in secrets(m1)
