"""``skep events`` on a real cluster: the tasks' lives, each event once, from any cursor on."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.machines.playground_rig import IMAGE, SKEP, TestNode, create, wait_running, wait_until

pytestmark = pytest.mark.timeout(120)


@contextmanager
def following(node: TestNode, *words: str) -> Iterator[Iterator[Any]]:
    """The events that come while the block runs; the first is there."""
    command = [SKEP, "--host", node.socket, "events", "--json", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        assert next(events)["Action"] == "progress"
        try:
            yield (event for event in events if event["Type"] != "stream")
        finally:
            process.terminate()


def test_the_life_of_a_task_is_followed_and_gone_on_with(m1: TestNode) -> None:
    once = ("--restart-condition", "none", "--detach")
    with following(m1, "--filter", "service=broken", "--filter", "type=task") as events:
        m1.docker("service", "create", "--name", "broken", *once, IMAGE, "sh", "-c", "exit 7")
        created, started, died = (next(events) for _ in range(3))
        assert [one["Action"] for one in (created, started, died)] == ["create", "start", "die"]
        attributes = died["Actor"]["Attributes"]
        assert (attributes["exitCode"], attributes["cause"]) == ("7", "exit")
        assert attributes["com.docker.swarm.service.name"] == "broken"
    with following(m1, "--after", started["Cursor"], "--filter", "service=broken") as events:
        assert next(events)["Actor"]["ID"] == died["Actor"]["ID"]

    def errors() -> list[str]:
        found = events_of_docker(m1, "--filter", "type=task", "--filter", "event=die")
        mine = [one["Actor"] for one in found if one["Actor"]["ID"] == died["Actor"]["ID"]]
        return [actor["Attributes"]["error"] for actor in mine]

    assert wait_until(errors, "the end is past") == ["task: non-zero exit (7)"]


def test_docker_events_without_a_filter_are_dockers(m1: TestNode) -> None:
    create(m1, "web", 1)
    (task,) = wait_running(m1, "web", 1)

    def with_service() -> list[Any] | None:
        events = events_of_docker(m1)
        names = {one["Actor"]["Attributes"].get("name") for one in events if one["Type"] == "service"}
        return events if "web" in names else None

    found = wait_until(with_service, "the service's event is past")  # the command counts in whole seconds
    assert found is not None
    assert [one for one in found if one["Type"] == "task" and one["Actor"]["ID"] == task["ID"]] == []
    assert {one.get("Cursor") for one in found} == {None}


def events_of_docker(node: TestNode, *words: str) -> list[Any]:
    shown = node.docker("events", "--since", "10m", "--until", "0s", "--format", "{{json .}}", *words).stdout
    return [json.loads(line) for line in shown.splitlines()]


def test_a_cursor_that_is_none_is_refused(m1: TestNode) -> None:
    command = [SKEP, "--host", m1.socket, "events", "--after", "yesterday"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "invalid cursor 'yesterday'" in done.stderr
