"""``skep secret rotate`` and ``skep config rotate`` on a whole node."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients.docker_calls import raw_post
from tests.support.machines.playground_rig import (
    SKEP,
    TestNode,
    create,
    remove_services,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def node(m1: TestNode) -> Iterator[TestNode]:
    """Without services, secrets and configs, before and after."""
    yield m1
    remove_services(m1)
    for noun in ("secret", "config"):
        if ids := m1.docker(noun, "ls", "-q").stdout.split():
            m1.docker(noun, "rm", *ids)


def skep(node: TestNode, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SKEP, "-H", node.socket, *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done


def contents(node: TestNode, service: str, path: str) -> set[str]:
    """What the running tasks of a service read from a file."""
    ids = [task["Status"]["ContainerStatus"]["ContainerID"] for task in running(node, service)]
    return {node.docker("exec", id, "cat", path).stdout for id in ids}


@pytest.mark.parametrize(
    ("noun", "folder"), [("secret", "/run/secrets/"), pytest.param("config", "/", marks=pytest.mark.slow)]
)
def test_a_rotation_gives_every_task_the_new_content_under_the_same_name(
    node: TestNode, tmp_path: Path, noun: str, folder: str
) -> None:
    node.docker(noun, "create", "--label", "team=red", "key", "-", stdin="one")
    for service in ("web", "api"):
        create(node, service, 2, "--update-monitor", "500ms", f"--{noun}", "source=key,target=password")
        wait_running(node, service, 2, 60)
    create(node, "bystander", 1)
    before = {task["ID"] for task in wait_running(node, "bystander", 1, 60)}
    (tmp_path / "new").write_text("two")
    rotated = skep(node, noun, "rotate", "key", str(tmp_path / "new"))
    assert rotated.stdout == "key-v2\n"
    assert {f"{name}: 2 of 2 tasks have key-v2" for name in ("web", "api")} <= set(
        rotated.stderr.splitlines()
    )
    path = f"{folder}password"
    assert contents(node, "web", path) == contents(node, "api", path) == {"two"}
    assert {task["ID"] for task in running(node, "bystander")} == before
    labels = node.docker(noun, "inspect", "key-v2", "--format", "{{json .Spec.Labels}}").stdout
    assert '"team":"red"' in labels
    # What a rollback returns to stays; what no service has any more goes, once it is not returned to.
    assert "key" not in skep(node, noun, "prune", "--force").stdout
    (tmp_path / "new").write_text("three")
    assert skep(node, noun, "rotate", "key", str(tmp_path / "new")).stdout == "key-v3\n"
    assert contents(node, "web", path) == {"three"}
    assert "key" in skep(node, noun, "prune", "--force").stdout.splitlines()


def test_a_service_that_is_stuck_is_named_and_the_rotation_is_finished_later(
    node: TestNode, tmp_path: Path
) -> None:
    node.docker("secret", "create", "key", "-", stdin="good")
    script = 'grep -q good /run/secrets/key || exit 1; trap "exit 0" TERM; while :; do sleep 1; done'
    update = ("--update-monitor", "5s", "--update-failure-action", "pause", "--restart-condition", "none")
    create(node, "web", 1, "--secret", "key", *update, command=("sh", "-c", script))
    wait_running(node, "web", 1, 60)
    (tmp_path / "new").write_text("bad")
    failed = skep(node, "secret", "rotate", "key", str(tmp_path / "new"), check=False)
    assert failed.returncode == 1
    # The task's end may be seen before the update's pause.
    reasons = (
        "update paused due to failure or early termination of task|its tasks ended .*; its update is paused"
    )
    assert re.search(f"Error: web: ({reasons})", failed.stderr)
    assert failed.stderr.splitlines()[-1].endswith("Run skep explain web.")
    (tmp_path / "new").write_text("good again")
    assert skep(node, "secret", "rotate", "key", str(tmp_path / "new")).stdout == "key-v3\n"
    assert contents(node, "web", "/run/secrets/key") == {"good again"}
    missing = skep(node, "secret", "rotate", "nothing", str(tmp_path / "new"), check=False)
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: nothing does not exist. ")


def test_a_secret_is_a_variable_only_where_the_option_says_so_and_is_shown_nowhere(node: TestNode) -> None:
    node.docker("secret", "create", "key", "-", stdin="hidden-value")
    script = 'echo "with ${#PASSWORD} characters"; trap "exit 0" TERM; while :; do sleep 1; done'
    for name, options in (("plain", ()), ("web", ("--container-label", "skep.secret-env=PASSWORD=pass"))):
        create(node, name, 1, "--secret", "source=key,target=pass", *options, command=("sh", "-c", script))
    (task,) = wait_running(node, "web", 1, 60)
    id = task["Status"]["ContainerStatus"]["ContainerID"]
    wait_running(node, "plain", 1, 60)
    wait_until(lambda: "with 12 characters" in node.docker("service", "logs", "web").stdout, "it has it")
    wait_until(lambda: "with 0 characters" in node.docker("service", "logs", "plain").stdout, "it has it not")
    api = node.client().api
    shown = [api.inspect_container(id), api.inspect_service("web"), api.inspect_task(task["ID"])]
    shown.append(node.docker("events", "--since", "10m", "--until", "0s", "--format", "{{json .}}").stdout)
    assert "hidden-value" not in json.dumps(shown)
    assert "PASSWORD" not in node.docker("exec", id, "env").stdout
    without = node.docker("restart", id, check=False)
    assert (without.returncode, "is started by its task only" in without.stderr) == (1, True)

    spec = api.inspect_service("web")["Spec"] | {"Name": "again"}
    made = raw_post(api, "/services/create", data=spec).json()
    assert "secrets are in the environment (PASSWORD)" in made["Warnings"][0]
    spec["TaskTemplate"]["ContainerSpec"]["Labels"] = {"skep.secret-env": "PASSWORD=other"}
    refused = raw_post(api, "/services/create", data=spec | {"Name": "refused"})
    assert (refused.status_code, "no secret with the target other" in refused.text) == (400, True)
