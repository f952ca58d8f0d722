"""Jobs through the docker command: the requested runs, again after an update, and the limit of attempts."""

import subprocess
from typing import Any

import pytest

from tests.support.machines.playground_rig import IMAGE, SKEP, TestNode, wait_until

pytestmark = pytest.mark.timeout(120)


def states(node: TestNode, name: str) -> list[str]:
    found = node.client().api.tasks(filters={"service": name})
    return sorted(task["Status"]["State"] for task in found)


def test_a_replicated_job_runs_so_often_and_its_command_waits_for_the_end(m1: TestNode) -> None:
    words = ("--mode", "replicated-job", "--replicas", "3", "--max-concurrent", "2", IMAGE, "true")
    progress = m1.docker("service", "create", "--name", "job", *words)
    assert "job complete" in progress.stdout
    listed = m1.docker("service", "ls", "--format", "{{.Name}} {{.Mode}} {{.Replicas}}").stdout.strip()
    assert listed == "job replicated job 0/2 (3/3 completed)"
    assert states(m1, "job") == ["complete"] * 3


def test_an_update_runs_a_job_again(m1: TestNode) -> None:
    m1.docker("service", "create", "--name", "job", "--mode", "replicated-job", IMAGE, "true")
    before = m1.client().api.inspect_service("job")["JobStatus"]
    m1.docker("service", "update", "--force", "job")
    after = m1.client().api.inspect_service("job")["JobStatus"]
    assert after["JobIteration"]["Index"] > before.get("JobIteration", {}).get("Index", 0)
    wait_until(lambda: states(m1, "job") == ["complete"] * 2, "both runs are complete")


def test_a_global_job_runs_once_on_the_node(m1: TestNode) -> None:
    m1.docker("service", "create", "--name", "job", "--mode", "global-job", IMAGE, "true")
    assert states(m1, "job") == ["complete"]


def test_a_job_that_fails_ends_after_its_attempts_and_says_with_what(m1: TestNode) -> None:
    words = ("--restart-condition", "on-failure", "--restart-max-attempts", "1", "--restart-delay", "0s")
    words = (*words, "--detach", IMAGE, "sh", "-c", "exit 3")
    m1.docker("service", "create", "--name", "job", "--mode", "replicated-job", *words)

    def failed() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = m1.client().api.tasks(filters={"service": "job"})
        ended = [task for task in found if task["Status"]["State"] == "failed"]
        is_over = all(task["DesiredState"] == "shutdown" for task in found)
        return ended if len(ended) == 2 and is_over else []

    tasks = wait_until(failed, "both attempts have failed")
    assert {task["Status"]["ContainerStatus"]["ExitCode"] for task in tasks} == {3}


def test_what_ended_is_listed_with_exit_codes_and_last_lines_in_one_call(m1: TestNode) -> None:
    words = (
        "--restart-condition",
        "none",
        "--detach",
        IMAGE,
        "sh",
        "-c",
        "echo one; echo two; echo three; exit 4",
    )
    m1.docker("service", "create", "--name", "job", "--mode", "replicated-job", *words)

    def listed() -> str:
        command = [SKEP, "--host", m1.socket, "runs", "job", "--tail", "2"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout

    shown = wait_until(lambda: text if "failed" in (text := listed()) else "", "the run is listed")
    _, row, *lines = shown.splitlines()
    assert row.split()[:5] == ["job.0", "m1", "0", "failed", "4"]
    assert lines == ["    | two", "    | three"]


def test_a_job_with_a_time_to_live_goes_by_itself(m1: TestNode) -> None:
    words = ("--mode", "replicated-job", "--label", "skep.job-ttl=1s", "--detach", IMAGE, "true")
    m1.docker("service", "create", "--name", "job", *words)
    wait_until(lambda: not m1.client().api.services(filters={"name": "job"}), "the job is gone")
    wait_until(lambda: states_of_all(m1) == [], "its tasks are gone")


def states_of_all(node: TestNode) -> list[str]:
    return [task["Status"]["State"] for task in node.client().api.tasks()]
