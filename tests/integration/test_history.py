"""``skep history`` and ``skep status --at`` on a real cluster."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.playground_rig import IMAGE, SKEP, TestNode, create, wait_running, wait_until

pytestmark = pytest.mark.timeout(120)


def skep(node: TestNode, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [SKEP, "--host", node.socket, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    # 3: some service of the moment is not as wanted
    assert not check or done.returncode in (0, 3), done.stderr
    return done


def entries(node: TestNode, name: str, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        skep(node, "history", name, "-n", "1000", "-o", "json", *words).stdout
    )["Entries"]
    return found


def test_scale_a_kill_and_a_failed_update_are_recorded_and_the_state_before_is_shown(
    m1: TestNode, tmp_path: Path
) -> None:
    create(m1, "told", 1)
    wait_running(m1, "told", 1)
    m1.docker("service", "scale", "--detach", "told=2")
    task, _ = wait_running(m1, "told", 2)
    container = task["Status"]["ContainerStatus"]["ContainerID"]
    m1.client().containers.get(container).kill()

    def replaced() -> list[str]:
        return [one["Message"] for one in entries(m1, "told") if one["Action"] == "replace"]

    (message,) = wait_until(replaced, "the history tells the replacement")
    assert task["ID"] in message
    assert "is replaced: it failed: exit 137 (SIGKILL)" in message
    wait_running(m1, "told", 2)

    before = max(one["Revision"] for one in entries(m1, "told"))
    failing = ("--image", "busybox:none", "--update-failure-action", "pause", "--update-monitor", "100ms")
    m1.docker(
        "service",
        "update",
        "--detach",
        "--no-resolve-image",
        *failing,
        "--env-add",
        "DB_PASSWORD=hunter2",
        "told",
    )
    m1.docker("service", "update", "--detach", "no-such-service", check=False)

    def paused() -> list[dict[str, Any]]:
        return [one for one in entries(m1, "told") if one["Action"] == "update-paused"]

    (pause,) = wait_until(paused, "the update is paused", within_s=60)
    assert pause["Severity"] == "error"

    def asked_for() -> list[dict[str, Any]]:
        return [one for one in entries(m1, "told") if one["Kind"] == "request"]

    # Changes and requests are written beside each other, each twice a second.
    wait_until(lambda: len(asked_for()) >= 3, "the requests are told")
    found = entries(m1, "told")
    messages = [one["Message"] for one in found if one["Kind"] == "change"]
    assert "service told updated: replicas 1 → 2" in messages
    (update,) = (one for one in messages if "image" in one and one.startswith("service told updated"))
    assert f"image {IMAGE} → busybox:none" in update
    assert "environment +DB_PASSWORD" in update

    asked = [one for one in found if one["Kind"] == "request"]
    assert [(one["Action"], one["Method"], one["Status"]) for one in asked] == [
        ("create", "POST", 201),
        ("update", "POST", 200),
        ("update", "POST", 200),
    ]
    assert {(one["By"]["User"], one["By"]["UID"], one["By"]["Through"]) for one in asked} == {
        ("root", 0, "socket")
    }

    then = skep(m1, "status", "--at", f"revision:{before}").stdout
    assert any("told" in line and IMAGE in line for line in then.splitlines())
    assert "busybox:none" not in then
    now = json.loads(skep(m1, "status", "--at", "0s", "-o", "json").stdout)
    assert [one["Image"] for one in now["Cluster"]["Services"] if one["Name"] == "told"] == ["busybox:none"]
    late = skep(m1, "status", "--at", "600 days ago", check=False)
    assert late.returncode == 1
    assert "is no longer in the store" in late.stderr

    exported = tmp_path / "history.ndjson"
    skep(m1, "history", "--export", str(exported))
    lines = [json.loads(line) for line in exported.read_text().splitlines()]
    assert [one["ID"] for one in found] == [
        one["ID"] for one in lines if one["ID"] in {each["ID"] for each in found}
    ]
    assert "hunter2" not in exported.read_text()
