"""The docker command, unchanged, old and new, against a node of Skep."""

import json
import re
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    CLIS,
    IDLE,
    IMAGE,
    TestNode,
    create,
    wait_running,
    wait_until,
)

pytestmark = [
    pytest.mark.timeout(120),
    # The newest; the older ones in long runs, and beside a real engine.
    pytest.mark.parametrize(
        "cli", [*(pytest.param(cli, marks=pytest.mark.slow) for cli in CLIS[:-1]), CLIS[-1]]
    ),
]


@pytest.fixture
def web(m1: TestNode) -> str:
    """A service of two running tasks that say a line each."""
    create(m1, "web", 2, "--label", "tier=front", command=("sh", "-c", f"echo hello; {IDLE[2]}"))
    wait_running(m1, "web", 2)
    return "web"


def test_service_ls_and_its_filters(m1: TestNode, web: str, cli: str) -> None:
    table = m1.docker("service", "ls", cli=cli).stdout
    assert re.search(r"web\s+replicated\s+2/2\s+busybox:1", table)
    names = ("service", "ls", "--format", "{{.Name}}")
    assert m1.docker(*names, "--filter", "name=web", cli=cli).stdout == "web\n"
    assert m1.docker(*names, "--filter", "name=other", cli=cli).stdout == ""
    assert m1.docker(*names, "--filter", "label=tier=front", cli=cli).stdout == "web\n"
    assert m1.docker(*names, "--filter", "mode=global", cli=cli).stdout == ""
    assert "Invalid filter" in m1.docker(*names, "--filter", "bogus=1", cli=cli, check=False).stderr.replace(
        "invalid", "Invalid"
    )


def test_service_ps_shows_tasks_with_node_and_state(m1: TestNode, web: str, cli: str) -> None:
    rows = m1.docker(
        "service", "ps", web, "--format", "{{.Name}} {{.Node}} {{.DesiredState}} {{.CurrentState}}", cli=cli
    )
    lines = sorted(rows.stdout.splitlines())
    assert [line.split()[:4] for line in lines] == [
        ["web.1", "m1", "Running", "Running"],
        ["web.2", "m1", "Running", "Running"],
    ]
    none = m1.docker("service", "ps", web, "-q", "--filter", "desired-state=shutdown", cli=cli)
    assert none.stdout == ""


def test_service_inspect_in_both_forms(m1: TestNode, web: str, cli: str) -> None:
    (service,) = json.loads(m1.docker("service", "inspect", web, cli=cli).stdout)
    assert service["Spec"]["Name"] == "web"
    assert service["Spec"]["Mode"] == {"Replicated": {"Replicas": 2}}
    pretty = m1.docker("service", "inspect", "--pretty", web, cli=cli).stdout
    assert re.search(r"Service Mode:\s+Replicated\s+Replicas:\s+2", pretty)


def test_service_logs_of_all_tasks(m1: TestNode, web: str, cli: str) -> None:
    def both() -> bool:
        lines = m1.docker("service", "logs", web, cli=cli).stdout.splitlines()
        return sorted(line.split(".")[1] for line in lines if line.endswith("hello")) == ["1", "2"]

    wait_until(both, "a line of each task")
    raw = m1.docker("service", "logs", "--raw", "--tail", "1", web, cli=cli).stdout
    assert raw == "hello\nhello\n"


def test_service_update_of_the_environment_rolls_every_task(m1: TestNode, web: str, cli: str) -> None:
    # The command returns once it has seen every task run for the monitor's time, or once the update is completed.
    # Either may be first.
    shown = m1.docker("service", "update", "--env-add", "X=1", "--update-monitor", "10ms", web, cli=cli)
    assert "overall progress" in shown.stdout

    def inspected() -> dict[str, Any]:
        (service,) = json.loads(m1.docker("service", "inspect", web, cli=cli).stdout)
        return service

    wait_until(lambda: inspected()["UpdateStatus"]["State"] == "completed", "the update is completed")
    service = inspected()
    assert service["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"] == ["X=1"]
    assert service["PreviousSpec"]["TaskTemplate"]["ContainerSpec"].get("Env") is None


def test_containers_of_tasks_can_be_listed_inspected_and_entered(m1: TestNode, web: str, cli: str) -> None:
    ids = m1.docker(
        "ps", "-q", "--no-trunc", "--filter", "label=com.docker.swarm.service.name=web", cli=cli
    ).stdout.split()
    assert len(ids) == 2
    (container,) = json.loads(m1.docker("inspect", ids[0], cli=cli).stdout)
    assert container["State"]["Running"] is True
    assert re.fullmatch(r"/web\.[12]\.[0-9a-z]{25}", container["Name"])
    assert m1.docker("logs", ids[0], cli=cli).stdout == "hello\n"
    assert m1.docker("exec", ids[0], "echo", "inside", cli=cli).stdout == "inside\n"
    assert m1.docker("exec", "-i", ids[0], "cat", cli=cli, stdin="typed\n").stdout == "typed\n"
    assert m1.docker("exec", ids[0], "sh", "-c", "exit 7", cli=cli, check=False).returncode == 7
    wait_until(lambda: "sleep" in m1.docker("top", ids[0], cli=cli).stdout, "its process is shown")
    stats = m1.docker("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", ids[0], cli=cli).stdout
    assert stats.startswith("web.")


def test_a_killed_container_can_be_waited_for(m1: TestNode, web: str, cli: str) -> None:
    id = m1.docker("ps", "-q", cli=cli).stdout.split()[0]
    m1.docker("kill", id, cli=cli)
    assert m1.docker("wait", id, cli=cli).stdout.strip() == "137"


def test_nodes_are_listed_inspected_updated(m1: TestNode, cli: str) -> None:
    line = m1.docker(
        "node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.Availability}} {{.ManagerStatus}}", cli=cli
    )
    assert line.stdout == "m1 Ready Active Leader\n"
    m1.docker("node", "update", "--label-add", "rack=7", "m1", cli=cli)
    (node,) = json.loads(m1.docker("node", "inspect", "self", cli=cli).stdout)
    assert node["Spec"]["Labels"]["rack"] == "7"
    m1.docker("node", "update", "--label-rm", "rack", "m1", cli=cli)
    (node,) = json.loads(m1.docker("node", "inspect", "self", cli=cli).stdout)
    assert "rack" not in node["Spec"]["Labels"]  # guides that ran on this node have left other labels
    assert "Leader" in m1.docker("node", "inspect", "--pretty", "m1", cli=cli).stdout


def test_node_ps_lists_the_tasks_of_a_node(m1: TestNode, web: str, cli: str) -> None:
    names = m1.docker("node", "ps", "self", "--format", "{{.Name}}", cli=cli).stdout.split()
    assert {"web.1", "web.2"} <= set(names)


def test_the_swarm_is_described(m1: TestNode, cli: str) -> None:
    info = m1.docker(
        "info",
        "--format",
        "{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}} {{.Swarm.Managers}}",
        cli=cli,
    )
    assert info.stdout == "active true 1\n"
    token = m1.docker("swarm", "join-token", "-q", "worker", cli=cli).stdout
    assert re.fullmatch(r"SWMTKN-1-[0-9a-z]{50}-[0-9a-z]{25}\n", token)
    rotated = m1.docker("swarm", "join-token", "--rotate", "-q", "worker", cli=cli).stdout
    assert rotated != token
    m1.docker("swarm", "update", "--task-history-limit", "3", cli=cli)
    m1.docker("swarm", "update", "--task-history-limit", "5", cli=cli)


def test_images_are_listed_inspected_tagged(m1: TestNode, cli: str) -> None:
    assert "busybox" in m1.docker("images", cli=cli).stdout
    (image,) = json.loads(m1.docker("image", "inspect", IMAGE, cli=cli).stdout)
    assert image["Id"].startswith("sha256:")
    m1.docker("tag", IMAGE, "other:tag", cli=cli)
    assert "Untagged: other:tag" in m1.docker("rmi", "other:tag", cli=cli).stdout


def test_a_service_without_a_name_gets_a_readable_one(m1: TestNode, cli: str) -> None:
    id = m1.docker("service", "create", "--detach", IMAGE, *IDLE, cli=cli).stdout.strip()
    name = m1.docker("service", "ls", "--filter", f"id={id}", "--format", "{{.Name}}", cli=cli).stdout.strip()
    assert re.fullmatch(r"[a-z]+_[a-z]+", name)


def test_several_services_are_scaled_by_one_command(m1: TestNode, web: str, cli: str) -> None:
    create(m1, "api", 2)
    said = m1.docker("service", "scale", "--detach", f"{web}=3", "api=1", cli=cli).stdout
    assert {"web scaled to 3", "api scaled to 1"} <= set(said.splitlines())
    wait_running(m1, web, 3)
    wait_running(m1, "api", 1)


def test_a_container_is_named_by_its_service_slot_or_node_and_task(m1: TestNode, web: str, cli: str) -> None:
    m1.docker("service", "create", "--detach", "--name", "every", "--mode", "global", IMAGE, *IDLE, cli=cli)
    expected = {f"web.{task['Slot']}.{task['ID']}" for task in wait_running(m1, web, 2)}
    expected |= {f"every.{task['NodeID']}.{task['ID']}" for task in wait_running(m1, "every", 1)}
    assert set(m1.docker("ps", "--format", "{{.Names}}", cli=cli).stdout.split()) == expected
