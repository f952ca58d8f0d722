"""Why a task is still on its drained node."""

import pytest
from msgspec.structs import replace

from skep.manager.diagnosis.departures import why_it_stays
from skep.manager.diagnosis.reasons import problem_of
from skep.model.node import Availability
from skep.model.options.labels import DRAIN_NOW, MIN_AVAILABLE
from skep.model.service import RestartCondition, RestartPolicy, UpdateState, UpdateStatus
from skep.model.task import Restart, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from tests.support.builders import a_node, a_service, a_service_spec, a_task

DRAINED = {NodeId("n1"): a_node("n1", availability=Availability.DRAIN)}
WITH_ANOTHER = {**DRAINED, NodeId("n2"): a_node("n2")}
SERVICE = a_service(image="app:1")


def at(second: int) -> Timestamp:
    return timestamp(second * SECOND_NS)


def test_the_replacement_of_a_present_task_starts_first() -> None:
    task = a_task(node="n1", service=SERVICE)
    other = a_task(slot=2, node="n2", service=SERVICE)
    nodes = {**DRAINED, NodeId("n2"): a_node("n2")}
    why = why_it_stays(task, SERVICE, [task, other], nodes)
    assert why == "it stays on n1, which is drained: its replacement starts first"
    policy = RestartPolicy(condition=RestartCondition.NONE)
    once = replace(task, spec=replace(task.spec, restart_policy=policy))
    assert why_it_stays(once, SERVICE, [once, other], nodes) == "", "nothing replaces it, so it is stopped"


@pytest.mark.parametrize("state", [UpdateState.UPDATING, UpdateState.PAUSED])
def test_an_outdated_task_waits_for_its_turn_in_the_update(state: UpdateState) -> None:
    task = a_task(node="n1", service=SERVICE)
    updated = replace(SERVICE, spec=a_service_spec(image="app:2"), update_status=UpdateStatus(state=state))
    why = why_it_stays(task, updated, [task], DRAINED)
    assert why == "it stays on n1, which is drained: the update replaces it in its turn"


def moved(failures: int) -> tuple[Task, Task, Task]:
    """A failed task, the running task after it on a drained node, and the replacement of that one."""
    base = a_task(node="n1", service=SERVICE)
    status = TaskStatus(state=TaskState.FAILED, err="task: non-zero exit (1)")
    before = replace(base, id=TaskId("t1"), created_at=at(1), status=status)
    present = replace(base, id=TaskId("t2"), created_at=at(2), restart=Restart(failures=1))
    new = a_task(node="n2", service=SERVICE, state=TaskState.PREPARING)
    restart = Restart(failures=failures) if failures else None
    return before, present, replace(new, id=TaskId("t4"), created_at=at(4), restart=restart)


@pytest.mark.parametrize("failures", [0, 3])
def test_a_failure_before_the_running_task_is_not_the_reason_of_its_replacement(failures: int) -> None:
    before, present, new = moved(failures)
    start = "it stays on n1, which is drained: its replacement does not run yet: "
    found = why_it_stays(present, SERVICE, [before, present, new], WITH_ANOTHER)
    assert found == f"{start}n2 prepares it: image, mounts and networks"
    failed = replace(before, id=TaskId("t3"), created_at=at(3))
    found = why_it_stays(present, SERVICE, [present, failed, new], WITH_ANOTHER)
    assert found == f"{start}exit 1", "a replacement failed"


@pytest.mark.parametrize(
    ("failures", "reason"), [(0, "n2 prepares it: image, mounts and networks"), (3, "exit 1")]
)
def test_a_running_task_that_is_replaced_ends_a_crash_loop_once_it_is_stable(
    failures: int, reason: str
) -> None:
    """The leader counts no failures in a row after a task that ran for long enough."""
    tasks = moved(failures)
    assert problem_of(tasks[-1], tasks, WITH_ANOTHER).reason == reason


def test_a_node_that_is_drained_at_once_keeps_nothing() -> None:
    task = a_task(node="n1", service=SERVICE)
    node = a_node("n1", availability=Availability.DRAIN, labels={DRAIN_NOW: "true"})
    assert why_it_stays(task, SERVICE, [task], {node.id: node}) == ""


def test_a_node_that_no_longer_fits_keeps_only_tasks_with_a_minimum() -> None:
    spec = a_service_spec(constraints=("node.labels.zone == north",))
    with_minimum = a_service(spec=replace(spec, labels={MIN_AVAILABLE: "1"}))
    task = a_task(node="n1", service=with_minimum)
    nodes = {NodeId("n1"): a_node("n1", labels={"zone": "south"})}
    assert why_it_stays(task, a_service(spec=spec), [task], nodes) == ""
    why = why_it_stays(task, with_minimum, [task], nodes)
    assert why == (
        "it stays on n1, which no longer meets its constraints: 1 task is available, and 1 must stay available "
        "(skep.min-available)"
    )
    north = {NodeId("n1"): a_node("n1", labels={"zone": "north"})}
    assert why_it_stays(task, with_minimum, [task], north) == ""
    small = why_it_stays(task, with_minimum, [task], north, {task.id})
    assert small.startswith("it stays on n1, which has too few resources for it: ")
