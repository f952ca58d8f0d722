"""The life of a service through real clients: create, scale, update, crash, remove."""

import os
import re
import signal

import pytest

from tests.support.machines.playground_rig import (
    CLIS,
    IMAGE,
    TestNode,
    container_pids,
    containers,
    create,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("cli", CLIS)
def test_a_created_service_runs_and_docker_ps_shows_it(m1: TestNode, cli: str) -> None:
    """The first commit that counts: one manager, busybox under runc, seen by ``docker ps``."""
    soon = ("--update-monitor", "500ms", "--stop-grace-period", "1s")
    words = ("--name", "web", "--replicas", "3", *soon, IMAGE, "sleep", "600")
    progress = m1.docker("service", "create", *words, cli=cli)
    assert "converged" in progress.stdout
    listed = m1.docker("ps", "--format", "{{.Names}} {{.Image}}", cli=cli).stdout.split("\n")
    assert sorted(line.split(".")[0] + "." + line.split(".")[1] for line in listed if line) == [
        "web.1",
        "web.2",
        "web.3",
    ]
    assert m1.docker(
        "service", "ls", "--format", "{{.Name}} {{.Mode}} {{.Replicas}}", cli=cli
    ).stdout.strip() == ("web replicated 3/3")


def test_scaling_to_twenty_and_back_ends_with_as_many_containers(m1: TestNode) -> None:
    create(m1, "web", 3)
    wait_running(m1, "web", 3)
    before = container_pids(m1, "web")
    m1.docker("service", "scale", "--detach", "web=20")
    wait_running(m1, "web", 20)
    assert len(containers(m1, "web")) == 20
    m1.docker("service", "scale", "--detach", "web=3")
    wait_until(lambda: len(containers(m1, "web")) == 3, "3 containers after scaling down")
    wait_running(m1, "web", 3)
    assert container_pids(m1, "web") == before  # the first three slots were left alone


def test_an_update_of_the_image_replaces_every_task_and_says_completed(m1: TestNode) -> None:
    m1.docker("tag", IMAGE, "busybox:next")
    create(m1, "web", 3, "--update-monitor", "100ms")
    old = {task["ID"] for task in wait_running(m1, "web", 3)}
    m1.docker("service", "update", "--detach", "--no-resolve-image", "--image", "busybox:next", "web")

    def is_completed() -> bool:
        service = m1.client().api.inspect_service("web")
        return bool(service.get("UpdateStatus", {}).get("State") == "completed")

    wait_until(is_completed, "the update is completed", 60)
    new = wait_running(m1, "web", 3)
    assert not old & {task["ID"] for task in new}
    assert {task["Spec"]["ContainerSpec"]["Image"] for task in new} == {"busybox:next"}


def test_a_killed_container_is_replaced_and_stays_in_history(m1: TestNode) -> None:
    create(m1, "web", 2, "--restart-delay", "0s")
    tasks = wait_running(m1, "web", 2)
    victim, pid = next(iter(container_pids(m1, "web").items()))
    os.kill(pid, signal.SIGKILL)

    def is_replaced() -> bool:
        return victim not in container_pids(m1, "web") and len(container_pids(m1, "web")) == 2

    wait_until(is_replaced, "the killed container is replaced")
    now = wait_running(m1, "web", 2)
    dead = next(task["ID"] for task in tasks if task["ID"] not in {t["ID"] for t in now})
    failed = m1.client().api.inspect_task(dead)
    assert failed["Status"]["State"] == "failed"
    assert failed["Status"]["ContainerStatus"]["ExitCode"] == 137
    assert "non-zero exit (137)" in failed["Status"]["Err"]
    rows = m1.docker("service", "ps", "web").stdout
    assert re.search(rf"^{dead[:12]} +\\_ web\.{failed['Slot']} .* Shutdown +Failed", rows, re.MULTILINE), (
        rows
    )


def test_a_removed_service_leaves_no_container_and_no_task(m1: TestNode) -> None:
    create(m1, "web", 3)
    wait_running(m1, "web", 3)
    m1.docker("service", "rm", "web")
    assert m1.docker("service", "ls", "-q").stdout == ""
    wait_until(lambda: not m1.client().api.containers(all=True), "no container is left")
    wait_until(lambda: not m1.client().api.tasks(), "no task is left")
    create(m1, "web", 1)  # the name is free again
    wait_running(m1, "web", 1)
