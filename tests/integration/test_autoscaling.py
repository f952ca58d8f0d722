"""A service whose tasks are busy gets more of them, and fewer when they are idle again; on a real node."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients.docker_calls import raw_get
from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    running,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

WHILE_THERE_IS = """trap 'exit 0' TERM
while :; do
  if [ -e /load/busy ]; then i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; else sleep 1; fi
done"""
"""Busy while there is the file, else idle."""
WITHIN_S = 240.0


@pytest.fixture(scope="module")
def pair() -> Iterator[TestCluster]:
    """m1 and w1."""
    with a_playground("scale", managers=1, workers=1) as cluster:
        yield cluster


@pytest.fixture
def load(tmp_path: Path) -> Path:
    """A directory that tasks mount."""
    tmp_path.chmod(0o755)
    return tmp_path


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def explained(node: TestNode, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(skep(node, "explain", name, "-o", "json"))["Autoscaling"]
    return found


def replicas(node: TestNode, name: str) -> int:
    count: int = node.client().api.inspect_service(name)["Spec"]["Mode"]["Replicated"]["Replicas"]
    return count


def test_busy_tasks_become_more_and_idle_ones_fewer(pair: TestCluster, load: Path) -> None:
    m1 = pair.node("m1")
    # Of a small part of a processor a busy task gets enough beside whatever else the machine does.
    labels = {"skep.autoscale": "1..3", "skep.autoscale.cpu": "20", "skep.autoscale.down-after": "20s"}
    m1.docker(
        *("service", "create", "--detach", "--name", "web", "--limit-cpu", "0.1"),
        *(word for name, value in labels.items() for word in ("--label", f"{name}={value}")),
        *("--mount", f"type=bind,source={load},target=/load,readonly"),
        *(IMAGE, "sh", "-c", WHILE_THERE_IS),
    )
    wait_running(m1, "web", 1)

    def measured() -> bool:
        return explained(m1, "web").get("Unmeasured") == 0

    wait_until(measured, "its task is measured", WITHIN_S)
    assert explained(m1, "web")["Metrics"][0]["Average"] < 20
    assert replicas(m1, "web") == 1

    (load / "busy").touch()
    wait_until(lambda: len(running(m1, "web")) == 3, "three busy tasks", WITHIN_S)
    wait_until(
        lambda: "it is at its maximum number of tasks" in skep(m1, "explain", "web"),
        "why not more",
        WITHIN_S,
    )
    assert "autoscaling, 1 to 3 tasks: cpu" in skep(m1, "explain", "web")
    m1.docker("service", "update", "--detach", "--label-add", "other=1", "web")
    assert replicas(m1, "web") == 3, "an update keeps the number"

    (load / "busy").unlink()
    wait_until(lambda: replicas(m1, "web") == 1, "one idle task", WITHIN_S)
    wait_running(m1, "web", 1)
    wait_until(lambda: "→ 1 (cpu " in skep(m1, "history", "web"), "the last change is in the history")
    assert "service web autoscaled: replicas 1 → 2 (cpu " in skep(m1, "history", "web")
    metrics = raw_get(m1.client().api, "/metrics").text
    assert 'skep_autoscale_changes_total{direction="up"} 2' in metrics
    assert "skep_autoscale_services 1" in metrics


def test_labels_that_cannot_be_honored_are_refused_in_words(pair: TestCluster) -> None:
    m1 = pair.node("m1")

    def refusal(*options: str) -> str:
        done = m1.docker("service", "create", "--detach", *options, IMAGE, "sleep", "60", check=False)
        assert done.returncode
        return done.stderr

    assert "expected the fewest and the most tasks, like 2..10" in refusal("--label", "skep.autoscale=lots")
    assert "is for replicated services, not for a global one" in refusal(
        "--mode", "global", "--label", "skep.autoscale=1..2"
    )
    assert "unknown label skep.autoscale.requests" in refusal(
        "--label", "skep.autoscale=1..2", "--label", "skep.autoscale.requests=100"
    )
