"""Why tasks ended, on real nodes: each cause by its name, with the last lines, also when the node is gone."""

import json
import subprocess
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    ready,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(120)

ONCE = ("--restart-condition", "none", "--detach")
CAUSES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "exits": ((), "echo one; printf 'two\\033[2J\\n' >&2; exit 3", "task: non-zero exit (3)"),
    "segfaults": ((), "kill -SEGV $$; exit 139", "task: non-zero exit (139)"),
    "eats": (
        ("--limit-memory", "16m"),
        "echo hungry; x=$(head -c 100m /dev/zero | tr '\\0' x); exit 1",
        "out of memory",
    ),
    "sick": (
        ("--health-cmd", "echo no answer; false", "--health-interval", "200ms", "--health-retries", "1"),
        "sleep 60 & trap 'exit 9' TERM; wait",
        "dockerexec: unhealthy container: last health check: no answer",
    ),
    "quiet": (("--label", "skep.last-lines=0"), "echo password; exit 4", "task: non-zero exit (4)"),
}


def ended(node: TestNode, service: str) -> dict[str, Any]:
    """The status of the service's only task, once it has failed."""

    def failed() -> dict[str, Any] | None:
        (task,) = node.client().api.tasks(filters={"service": service}) or (None,)
        return task if task is not None and task["Status"]["State"] == "failed" else None

    task = wait_until(failed, f"the task of {service} has failed")
    assert task is not None
    return json.loads(node.docker("inspect", task["ID"]).stdout)[0]["Status"]


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_each_cause_has_its_name_and_the_last_lines(m1: TestNode) -> None:
    for name, (options, script, _) in CAUSES.items():
        m1.docker("service", "create", "--name", name, *ONCE, *options, IMAGE, "sh", "-c", script)
    ends = {name: ended(m1, name) for name in CAUSES}
    for name, (_, _, error) in CAUSES.items():
        assert error in ends[name]["Err"]
        assert error in m1.docker("service", "ps", "--no-trunc", name).stdout
    assert {name: status["End"]["Cause"] for name, status in ends.items()} == {
        "exits": "exit",
        "segfaults": "signal",
        "eats": "out-of-memory",
        "sick": "unhealthy",
        "quiet": "exit",
    }
    lines = {(line["Stream"], line["Text"]) for line in ends["exits"]["End"]["Lines"]}
    assert lines == {("stdout", "one"), ("stderr", "two\x1b[2J")}
    assert ends["segfaults"]["End"]["Signal"] == "SIGSEGV"
    assert ends["sick"]["End"]["HealthOutput"] == "no answer\n"
    assert "Lines" not in ends["quiet"]["End"]
    (task,) = m1.client().api.tasks(filters={"service": "exits"})
    explained = skep(m1, "explain", task["ID"])
    assert "cause: exit" in explained
    assert "  | two[2J" in explained  # nothing that a terminal would obey
    assert "139 SIGSEGV" in skep(m1, "runs", "segfaults")


def test_a_task_that_does_not_stop_in_time_says_so(m1: TestNode) -> None:
    create(
        m1,
        "deaf",
        1,
        "--stop-grace-period",
        "300ms",
        command=("sh", "-c", "trap '' TERM; sleep 60 & wait; wait"),
    )
    wait_running(m1, "deaf", 1)
    m1.docker("service", "update", "--detach", "--force", "deaf")
    words = "killed: it did not end within 0.3 s of its stop signal"
    wait_until(lambda: words in m1.docker("service", "ps", "--no-trunc", "deaf").stdout, "the kill is named")


def test_the_last_lines_stay_when_the_node_is_gone() -> None:
    with a_playground("ends", workers=1) as cluster:
        m1 = cluster.node("m1")
        wait_until(lambda: ready(m1) == {"m1", "w1"}, "all nodes are ready", 60)
        there = ("--constraint", "node.hostname == w1")
        m1.docker(
            *("service", "create", "--name", "broken", *ONCE, *there, IMAGE),
            *("sh", "-c", "for n in $(seq 50); do echo line $n; done; exit 5"),
        )
        create(m1, "lost", 1, *there)
        wait_running(m1, "lost", 1)
        status = ended(m1, "broken")
        assert [line["Text"] for line in status["End"]["Lines"]] == [f"line {n}" for n in range(31, 51)]
        cluster.skep("kill", "w1")
        wait_until(lambda: nodes_by_name(m1)["w1"]["Status"]["State"] == "down", "w1 is down")
        shown = m1.docker("service", "logs", "--raw", "broken", check=False)
        assert "does not answer; the last lines kept with the task" in shown.stderr + shown.stdout
        assert "line 31\n" in shown.stdout
        assert "line 50\n" in shown.stdout
        assert "| line 50" in skep(m1, "runs", "broken")
        wait_until(
            lambda: "w1 is down" in m1.docker("service", "ps", "--no-trunc", "lost").stdout,
            "the loss is named",
        )
