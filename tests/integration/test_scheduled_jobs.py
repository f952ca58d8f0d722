"""A scheduled job on real managers: its leader is killed between two due times, and no run is doubled or missed.

The test waits for three minutes of the machine's clock, as the resolution of a schedule is one.
"""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from skep.model.values.times import SECOND_NS, unix_ns
from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

JOB = ("service", "create", "--detach", "--mode", "replicated-job", "--label")


@pytest.fixture
def three() -> Iterator[TestCluster]:
    """m1, m2 and m3 are managers, w1 is a worker."""
    with a_playground("scheduled", managers=3, workers=1) as cluster:
        yield cluster


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def jobs(node: TestNode) -> dict[str, dict[str, Any]]:
    return {one["Name"]: one for one in json.loads(skep(node, "job", "ls", "-o", "json"))}


def due(node: TestNode, name: str) -> list[int]:
    """The due times that had runs, in minutes since 1970."""
    return [
        unix_ns(one["ScheduledAt"]) // SECOND_NS // 60
        for one in jobs(node)[name].get("Starts", ())
        if not one.get("Skipped")
    ]


def answers(node: TestNode) -> bool:
    return node.docker("node", "ls", check=False).returncode == 0


def test_two_schedules_survive_the_loss_of_their_leader_without_a_doubled_or_missed_run(
    three: TestCluster,
) -> None:
    m1 = three.node("m1")
    on_workers = ("--constraint", "node.role==worker")
    for name, cron in (("first", "* * * * *"), ("second", "*/1 * * * *")):
        m1.docker(
            *JOB, f"skep.cron={cron}", "--name", name, *on_workers, IMAGE, "sh", "-c", f"echo {name} ran"
        )
    assert {one["State"] for one in jobs(m1).values()} == {"waiting"}
    listed = m1.docker("service", "ls", "--format", "{{.Name}} {{.Replicas}}").stdout.split("\n")
    assert "first 0/0 (0/1 completed)" in listed
    wait_until(lambda: due(m1, "first") and due(m1, "second"), "the first runs", within_s=90)
    leader = next(
        name for name, node in nodes_by_name(m1).items() if node.get("ManagerStatus", {}).get("Leader")
    )
    other = three.node(next(name for name in ("m1", "m2", "m3") if name != leader))
    three.skep("kill", leader)
    try:
        wait_until(lambda: answers(other), "another manager leads", within_s=60)
        for name in ("first", "second"):
            wait_until(lambda name=name: len(due(other, name)) >= 3, "two more runs", within_s=180)
    finally:
        three.skep("start", leader)
    for name in ("first", "second"):
        minutes = due(other, name)
        assert minutes == list(range(minutes[0], minutes[0] + len(minutes)))
        wait_until(lambda name=name: jobs(other)[name]["State"] == "completed", "its run ends", within_s=30)
        lines = [one for one in skep(other, "runs", name).splitlines() if "| " in one]
        assert set(lines) == {f"    | {name} ran"}
        assert len(lines) >= 3


def test_a_job_that_always_fails_ends_each_run_as_failed_and_starts_the_next(three: TestCluster) -> None:
    m1 = three.node("m1")
    labels = ("skep.cron=* * * * *", "--label", "skep.cron.max-attempts=1")
    m1.docker(
        *JOB, *labels, "--restart-delay", "1s", "--name", "hopeless", IMAGE, "sh", "-c", "echo no; exit 3"
    )

    def outcomes() -> list[str]:
        return [one.get("Outcome", "") for one in jobs(m1)["hopeless"].get("Starts", ())]

    wait_until(lambda: outcomes()[:2] == ["failed", "failed"], "two runs have failed", within_s=180)
    assert not any(one.get("Skipped") for one in jobs(m1)["hopeless"]["Starts"])
    history = skep(m1, "history", "hopeless", "-o", "wide")
    assert "run 0 of job hopeless failed after 1 restart: " in history
    assert "FAILED" in skep(m1, "explain", "hopeless")
