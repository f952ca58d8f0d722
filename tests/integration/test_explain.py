"""``skep explain`` on a real node: what waits says for what, what failed says of what."""

import json
import subprocess
from typing import Any

import pytest

from tests.support.machines.playground_rig import IMAGE, SKEP, TestNode, create, wait_running, wait_until

pytestmark = pytest.mark.timeout(120)


def explained(node: TestNode, name: str, *options: str) -> str:
    command = [SKEP, "--host", node.socket, "explain", name, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_a_service_without_a_node_says_which_filter_refused_and_its_task_what_each_node_says(
    m1: TestNode,
) -> None:
    words = ("--reserve-memory", "900g", "--constraint", "node.labels.zone == north")
    m1.docker("service", "create", "--detach", "--name", "web", *words, IMAGE, "sleep", "60")
    refusal = "no suitable node (insufficient resources on 1 node)"
    wait_until(lambda: "the largest node" in explained(m1, "web"), "what no node has is shown")
    assert explained(m1, "web").startswith("web: needs 921600 MiB of memory; the largest node, m1, has ")
    assert refusal in m1.docker("service", "ps", "--no-trunc", "web").stdout
    (task,) = m1.client().api.tasks(filters={"service": "web"})
    reported = explained(m1, task["ID"])
    assert "921600 MiB of memory requested" in reported
    assert "constraints not satisfied: node.labels.zone == north" in reported


def test_a_service_that_runs_says_so_and_its_failures_name_code_and_signal(m1: TestNode) -> None:
    create(m1, "web", 1)
    wait_running(m1, "web", 1)
    assert explained(m1, "web").strip() == "web: 1 of 1 tasks run: healthy"
    words = ("--restart-condition", "none", "--detach", IMAGE, "sh", "-c", "exit 139")
    m1.docker("service", "create", "--name", "broken", *words)
    wait_until(lambda: "SIGSEGV" in explained(m1, "broken"), "the signal is named")
    assert "exit 139 (SIGSEGV); not restarted, by its restart policy; 0 of 1 tasks run" in explained(
        m1, "broken"
    )


def test_a_failed_health_check_stays_the_reason_while_new_attempts_are_made(m1: TestNode) -> None:
    """A check that writes 10 MB is bounded on its node; the SIGKILL that Skep sends is not named."""
    check = "head -c 10000000 /dev/zero | tr '\\0' x; exit 3"
    words = ("--health-cmd", check, "--health-interval", "500ms", "--health-retries", "2")
    m1.docker(
        "service",
        "create",
        "--detach",
        "--name",
        "web",
        "--restart-delay",
        "1s",
        "--stop-grace-period",
        "1s",
        *words,
        IMAGE,
        "sh",
        "-c",
        "echo listening; exec sleep 600",
    )
    reason = f'unhealthy: its health check "{check}" failed 2 times in a row, last: exit 3, output "xxx'

    def found() -> Any:
        return json.loads(explained(m1, "web", "-o", "json"))

    wait_until(lambda: found()["Problem"]["Failures"] >= 1, "a check has failed", within_s=60)
    seen = set()
    while (last := found())["Problem"]["Failures"] < 3:
        assert last["Reason"].startswith(reason), last
        assert len(last["Reason"]) < 500
        assert [line["Text"] for line in last["Problem"]["End"]["Lines"]] == ["listening"]
        seen.add(last["Reason"])
    assert len(seen) == 1
    shown = explained(m1, "web")
    assert shown.startswith(f"web: {reason}")
    assert "SIGKILL" not in shown
    assert "137" not in shown


def test_what_does_not_exist_is_said_to_be_neither(m1: TestNode) -> None:
    command = [SKEP, "--host", m1.socket, "explain", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (
        1,
        "Error: no such service, task, node or network: nothing. Run skep status to list services and nodes.",
    )


def test_a_task_with_a_cluster_volume_waits_and_says_so_in_dockers_words(m1: TestNode) -> None:
    """It does not exist, as in a cluster of engines without that volume."""
    mount = ("--mount", "type=cluster,source=data,target=/data")
    m1.docker("service", "create", "--detach", "--name", "web", *mount, IMAGE, "sleep", "60")
    refusal = "no suitable node (cannot fulfill requested CSI volume mounts on 1 node)"

    def listed() -> str:
        return m1.docker("service", "ps", "--no-trunc", "web").stdout

    wait_until(lambda: refusal in listed(), "docker service ps tells the refusal")
    assert "Pending" in listed()
    assert refusal in explained(m1, "web")
    (task,) = m1.client().api.tasks(filters={"service": "web"})
    assert "no such cluster volume: data" in explained(m1, task["ID"])
