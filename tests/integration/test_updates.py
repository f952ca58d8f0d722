"""Updates and rollbacks through the docker command: what they stop, what they leave, and what they say in the end."""

from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest

from tests.support.machines.playground_rig import IMAGE, TestNode, wait_until

pytestmark = pytest.mark.timeout(120)

QUICK = ("--update-monitor", "500ms", "--restart-delay", "0s", "--stop-grace-period", "1s")
SLEEP = ("sleep", "3600")


def create(m1: TestNode, *words: str, command: tuple[str, ...] = SLEEP) -> None:
    m1.docker("service", "create", "--name", "web", *QUICK, *words, IMAGE, *command)


def update(m1: TestNode, *words: str) -> str:
    """The command's output; it may say that the update failed."""
    done = m1.docker("service", "update", *words, "web", check=False)
    return str(done.stdout + done.stderr)


def tasks(m1: TestNode) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = m1.client().api.tasks(filters={"service": "web"})
    return found


def running(m1: TestNode) -> set[str]:
    return {task["ID"] for task in tasks(m1) if task["Status"]["State"] == "running"}


def seconds(moment: str) -> float:
    """The API's time in seconds."""
    return datetime.fromisoformat(f"{moment[:19]}+00:00").timestamp() + float(f"0.{moment[20:].rstrip('Z')}")


def status(m1: TestNode) -> dict[str, Any]:
    found: dict[str, Any] = m1.client().api.inspect_service("web").get("UpdateStatus") or {}
    return found


def test_an_image_that_does_not_exist_stops_nothing_and_the_next_update_goes_on(m1: TestNode) -> None:
    create(m1, "--replicas", "2")
    before = running(m1)
    said = update(m1, "--image", "localhost:1/nosuch:1", "--no-resolve-image")
    assert "update paused due to failure or early termination of task" in said
    assert status(m1)["State"] == "paused"
    refused = [task["ID"] for task in tasks(m1) if task["Status"]["State"] == "rejected"]
    assert [id for id in refused if id in status(m1)["Message"]] != []
    assert "localhost:1" in status(m1)["Message"]
    assert running(m1) == before
    update(m1, "--image", IMAGE, "--no-resolve-image", "--env-add", "A=1")
    assert status(m1)["State"] == "completed"
    assert len(running(m1)) == 2
    assert not running(m1) & before


def test_a_failing_update_is_rolled_back_and_says_why(m1: TestNode) -> None:
    create(m1, "--replicas", "2", "--update-failure-action", "rollback")
    said = update(m1, "--args", "false")
    assert "update rolled back due to failure or early termination of task" in said
    final = wait_until(
        lambda: now if (now := status(m1)).get("State") == "rollback_completed" else {}, "it is rolled back"
    )
    assert "exit 1" in final["Message"]
    wait_until(lambda: len(running(m1)) == 2, "both replicas run again")
    spec = m1.client().api.inspect_service("web")["Spec"]
    assert spec["TaskTemplate"]["ContainerSpec"]["Args"] == list(SLEEP)


def test_what_changes_no_task_starts_none_and_force_starts_all(m1: TestNode) -> None:
    create(m1, "--replicas", "2", "--label", "a=1")
    before = running(m1)
    update(m1)
    update(m1, "--label-add", "a=2")
    update(m1, "--update-parallelism", "0", "--update-order", "start-first", "--rollback-monitor", "500ms")
    update(m1, "--replicas", "3")
    assert len(running(m1)) == 3
    assert running(m1) > before
    assert len(tasks(m1)) == 3
    before = running(m1)
    update(m1, "--force")
    wait_until(
        lambda: len(running(m1)) == 3 and not running(m1) & before, "three others run, and nothing else"
    )


def test_a_rollback_swaps_the_specs_and_so_does_the_next(m1: TestNode) -> None:
    create(m1, "--env", "A=1", "--rollback-monitor", "500ms")
    update(m1, "--env-add", "A=2")
    for expected in ("A=1", "A=2"):
        m1.docker("service", "rollback", "web")
        spec = m1.client().api.inspect_service("web")["Spec"]
        assert spec["TaskTemplate"]["ContainerSpec"]["Env"] == [expected]
        assert status(m1)["State"] == "rollback_completed"


def test_a_service_gives_its_name_port_and_network_back_at_once(m1: TestNode) -> None:
    """Its container takes a second to stop; a hidden record owns it until then."""
    m1.docker("network", "create", "--driver", "overlay", "own")
    port = ("--publish", "published=8123,target=80,mode=host")
    create(m1, *port)
    (first,) = tasks(m1)
    m1.docker("service", "create", "--name", "user", "--network", "own", "--replicas", "0", IMAGE)
    assert "is in use by service" in m1.docker("network", "rm", "own", check=False).stderr
    m1.docker("service", "rm", "user", "web")
    m1.docker("network", "rm", "own")
    m1.docker("service", "create", "--name", "web", "--detach", *QUICK, *port, IMAGE, *SLEEP)
    wait_until(lambda: running(m1), "the new service has the port")
    assert first["ID"] not in running(m1)


def test_start_first_stops_the_old_task_first_where_it_has_the_host_port_of_the_new_one(m1: TestNode) -> None:
    """No other node has that port free, so the new task could never start beside the old one."""
    port = ("--publish", "published=8124,target=8080,mode=host")
    serve = "echo version $V >/tmp/index.html; exec httpd -f -p 8080 -h /tmp"
    create(m1, *port, "--update-order", "start-first", "--env", "V=1", command=("sh", "-c", serve))
    before = running(m1)
    ask = ("run", "--rm", "--network", "host", IMAGE, "wget", "-qO-", "http://127.0.0.1:8124/")
    assert m1.docker(*ask).stdout == "version 1\n"
    update(m1, "--env-add", "V=2")
    assert status(m1)["State"] == "completed"
    assert not running(m1) & before
    assert m1.docker(*ask).stdout == "version 2\n"


def test_a_crash_loop_is_damped_and_the_service_beside_it_runs(m1: TestNode) -> None:
    create(m1, "--detach", command=("false",))
    m1.docker("service", "create", "--name", "calm", *QUICK, IMAGE, *SLEEP)
    wait_until(
        lambda: len([t for t in tasks(m1) if t["Status"]["State"] == "failed"]) >= 4, "it failed four times"
    )
    (last,) = [task for task in tasks(m1) if task["DesiredState"] in ("ready", "running")]
    assert last["DesiredState"] == "ready"
    (calm,) = m1.client().api.tasks(filters={"service": "calm"})
    assert calm["Status"]["State"] == "running"


def test_an_update_to_a_crash_loop_ends_and_its_status_names_task_and_cause(m1: TestNode) -> None:
    create(m1, "--replicas", "2")
    before = running(m1)
    said = update(m1, "--args", "sh -c 'exit 3'")
    assert "update paused due to failure or early termination of task" in said
    final = status(m1)
    assert final["State"] == "paused"
    failed = {task["ID"] for task in tasks(m1) if task["Status"]["State"] == "failed"}
    assert [id for id in failed if id in final["Message"]] != []
    assert "exit 3" in final["Message"]
    assert len(running(m1) & before) == 1  # what was not touched yet runs on


@pytest.mark.slow
def test_attempts_end_at_the_maximum_and_those_outside_of_the_window_do_not_count(m1: TestNode) -> None:
    words = ("--detach", "--restart-delay", "0s", "--restart-max-attempts", "2")
    m1.docker("service", "create", "--name", "few", *words, IMAGE, "false")
    window = ("--restart-window", "1s")
    m1.docker("service", "create", "--name", "web", *words, *window, IMAGE, "sh", "-c", "sleep 2; false")

    def ended(service: str) -> set[str]:
        found = m1.client().api.tasks(filters={"service": service})
        return {task["ID"] for task in found if task["Status"]["State"] == "failed"}

    attempts: set[str] = set()  # of a slot one more than its attempts are kept

    def has_gone_on() -> bool:
        attempts.update(ended("web"))
        return len(attempts) >= 5

    wait_until(lambda: len(ended("few")) == 3, "one task and two attempts")
    wait_until(has_gone_on, "attempts go on", within_s=60)
    few = m1.client().api.tasks(filters={"service": "few"})
    assert {task["ID"] for task in few} == ended("few")
    assert len(few) == 3


@pytest.mark.slow
def test_a_service_that_is_scaled_during_its_update_has_all_tasks_and_all_are_new(m1: TestNode) -> None:
    create(m1, "--replicas", "3", "--update-delay", "2s")
    before = running(m1)
    update(m1, "--detach", "--env-add", "A=1")
    wait_until(lambda: len(running(m1) - before) == 1 and running(m1) & before, "the first is new")
    m1.docker("service", "scale", "--detach", "web=5")
    wait_until(lambda: len(running(m1)) == 5, "five run")
    assert status(m1)["State"] == "updating"
    wait_until(lambda: status(m1)["State"] == "completed", "the update is complete")
    assert len(running(m1)) == 5
    assert not running(m1) & before
    specs = [task["Spec"]["ContainerSpec"] for task in tasks(m1) if task["ID"] in running(m1)]
    assert [spec.get("Env") for spec in specs] == [["A=1"]] * 5


def test_a_policy_that_was_set_once_counts_for_later_updates(m1: TestNode) -> None:
    """By two at a time with a pause: of four new tasks, the third comes after the pause, and no other does."""
    create(m1, "--replicas", "4")
    before = running(m1)
    update(m1, "--update-parallelism", "2", "--update-delay", "4s")
    assert running(m1) == before, "the policy itself replaces nothing"
    update(m1, "--env-add", "A=1")
    assert status(m1)["State"] == "completed"
    moments = sorted(seconds(task["CreatedAt"]) for task in tasks(m1) if task["ID"] not in before)
    assert [later - earlier > 3 for earlier, later in pairwise(moments)] == [False, True, False]
