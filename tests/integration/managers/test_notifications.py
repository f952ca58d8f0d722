"""A node that dies and returns is told once each, to a real receiver, also if leaders are killed meanwhile."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.playground_rig import SKEP, TestNode, a_playground, wait_until
from tests.support.machines.webhook_receiver import a_receiver
from tests.support.managers.managers_rig import leader, wait_managers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

ALL = ("m1", "m2", "m3")


def skep(node: TestNode, *words: str) -> subprocess.CompletedProcess[str]:
    command = [SKEP, "--host", node.socket, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def notices(path: Path, subject: str) -> list[Mapping[str, Any]]:
    """Return the notices about a subject, of each message once, as its receiver would keep it."""
    messages = {message["ID"]: message for message in map(json.loads, path.read_text().splitlines())}
    return [one for message in messages.values() for one in message["Notices"] if one["Subject"] == subject]


def kill_leader(seen_by: TestNode) -> None:
    """Kill the leader's manager and its store, which start again."""
    name = leader(seen_by)
    victim = seen_by.cluster.node(name)
    for pid in (*victim.pids("skep-manager"), *victim.pids("etcd")):
        victim.kill(pid)
    wait_until(lambda: leader(seen_by) not in ("", name), "another manager leads", 60)


def test_a_node_that_dies_and_returns_is_told_once_with_any_leader(tmp_path: Path) -> None:
    with a_playground("notify", managers=3, workers=2) as cluster:
        m1, w2, received = cluster.node("m1"), cluster.node("w2"), tmp_path / "received"
        wait_managers(m1, *ALL)
        with a_receiver(w2, received):
            url = f"http://{w2.description['addr']}:8080/"
            added = skep(m1, "notify", "add", "ops", url)
            assert added.returncode == 0, added.stderr
            refused = skep(m1, "notify", "test", "ops")
            assert refused.returncode == 1
            assert "is an address of another node, which needs --allow-internal" in refused.stderr
            assert skep(m1, "notify", "rm", "ops").stdout == "ops\n"
            added = skep(m1, "notify", "add", "ops", url, "--allow-internal", "--on", "node,service")
            assert added.returncode == 0, added.stderr
            tested = skep(m1, "notify", "test", "ops")
            assert tested.stdout.startswith("ops accepted the test message "), tested.stderr

            cluster.skep("kill", "w1")
            watcher = next(cluster.node(name) for name in ALL if name != leader(m1))
            wait_until(lambda: state_of(watcher, "w1") == "down", "w1 is down", 60)
            kill_leader(watcher)
            wait_until(lambda: notices(received, "w1"), "its loss is told", 120)
            watcher = next(cluster.node(name) for name in ALL if name != leader(watcher))
            wait_managers(watcher, *ALL)
            kill_leader(watcher)
            cluster.skep("start", "w1")
            wait_until(lambda: len(notices(received, "w1")) == 2, "its return is told", 120)
            assert [one["Status"] for one in notices(received, "w1")] == ["began", "ended"]
            assert len({one["Incident"] for one in notices(received, "w1")}) == 1
            listed = skep(watcher, "notify", "ls")
            assert f"http://{w2.description['addr']}:8080" in listed.stdout


def state_of(seen_by: TestNode, name: str) -> str:
    return seen_by.docker(
        "node", "inspect", name, "--format", "{{.Status.State}}", check=False
    ).stdout.strip()
