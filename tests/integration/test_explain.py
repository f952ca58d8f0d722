"""``skep explain`` on a real node: what waits says for what, what failed says of what."""

import subprocess

import pytest

from tests.support.playground_rig import IMAGE, SKEP, TestNode, create, wait_running, wait_until

pytestmark = pytest.mark.timeout(120)


def explained(node: TestNode, name: str) -> str:
    command = [SKEP, "--host", node.socket, "explain", name]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_a_service_without_a_node_says_which_filter_refused_and_its_task_what_each_node_says(
    m1: TestNode,
) -> None:
    words = ("--reserve-memory", "900g", "--constraint", "node.labels.zone == north")
    m1.docker("service", "create", "--detach", "--name", "web", *words, IMAGE, "sleep", "60")
    refusal = "no suitable node (insufficient resources on 1 node)"
    wait_until(lambda: refusal in explained(m1, "web"), "the refusal is shown")
    assert "0 of 1 tasks run; 1 wait: " in explained(m1, "web")
    (task,) = m1.client().api.tasks(filters={"service": "web"})
    reported = explained(m1, task["ID"])
    assert "921600 MiB of memory wanted" in reported
    assert "constraints not satisfied: node.labels.zone == north" in reported


def test_a_service_that_runs_says_so_and_its_failures_name_code_and_signal(m1: TestNode) -> None:
    create(m1, "web", 1)
    wait_running(m1, "web", 1)
    assert explained(m1, "web").strip() == "web: 1 of 1 tasks run: as wanted"
    words = ("--restart-condition", "none", "--detach", IMAGE, "sh", "-c", "exit 139")
    m1.docker("service", "create", "--name", "broken", *words)
    wait_until(lambda: "SIGSEGV" in explained(m1, "broken"), "the signal is named")
    assert "its process ended with code 139 (SIGSEGV)" in explained(m1, "broken")


def test_what_does_not_exist_is_said_to_be_neither(m1: TestNode) -> None:
    command = [SKEP, "--host", m1.socket, "explain", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (
        1,
        "Error: no such service, task, node or network: nothing (skep status; skep service ps SERVICE)",
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
