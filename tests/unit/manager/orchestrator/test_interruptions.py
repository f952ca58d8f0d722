"""Ends of tasks whose node restarted, which are no failures of the task, and of those whose monitor was killed."""

import pytest
from msgspec.structs import replace

from skep.manager.diagnosis.service_problems import problems_of
from skep.manager.services.job_runs import FAILED
from skep.model.options.schedules import CRON
from skep.model.service import (
    GlobalJob,
    JobStatus,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    ScheduleStatus,
    ServiceMode,
)
from skep.model.task import Task, TaskState
from skep.model.task_end import INTERRUPTIONS, EndCause, TaskEnd
from skep.model.values.times import SECOND_NS, Timestamp
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.worlds import World


def a_world(policy: RestartPolicy) -> World:
    """One task that runs on n1."""
    world = World(a_service(replicas=1, restart=policy), nodes=[a_node("n1"), a_node("n2")])
    world.put(a_task(slot=1, node="n1", service=world.service))
    return world


def wanted(world: World, at_most: TaskState = TaskState.RUNNING) -> list[Task]:
    return [task for task in world.tasks.values() if task.desired_state <= at_most]


@pytest.mark.parametrize("cause", sorted(INTERRUPTIONS))
def test_restarts_of_the_node_use_up_no_attempts(cause: str) -> None:
    world = a_world(RestartPolicy(delay=0, max_attempts=1))
    for _ in range(3):
        (task,) = wanted(world)
        world.report(task.id, TaskState.FAILED, TaskEnd(cause=cause))
        world.settle()
    (task,) = wanted(world)
    assert task.restart is None or not task.restart.failures
    world.report(task.id, TaskState.FAILED)  # a failure of its own: the one attempt follows
    world.settle()
    world.report(wanted(world)[0].id, TaskState.FAILED)
    world.settle()
    assert wanted(world) == []


def test_what_is_never_restarted_is_not_restarted_after_a_restart_of_its_node() -> None:
    world = a_world(RestartPolicy(condition=RestartCondition.NONE))
    world.report(wanted(world)[0].id, TaskState.FAILED, TaskEnd(cause=EndCause.NODE_RESTARTED.value))
    world.settle()
    assert wanted(world) == []


@pytest.mark.parametrize("cause", [EndCause.NODE_RESTARTED, EndCause.MONITOR_LOST])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("labels", [{}, {CRON: "@hourly"}])
def test_a_job_that_is_never_restarted_ends_with_a_restart_of_its_node(
    cause: EndCause, is_global: bool, labels: dict[str, str]
) -> None:
    mode = (
        ServiceMode(global_job=GlobalJob())
        if is_global
        else ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    )
    service = a_service("job", restart=RestartPolicy(condition=RestartCondition.NONE))
    status = JobStatus(
        last_execution=Timestamp("2026-01-02T00:00:00Z"), schedule=ScheduleStatus() if labels else None
    )
    service = replace(service, spec=replace(service.spec, mode=mode, labels=labels), job_status=status)
    node = replace(a_node("n1"), created_at=Timestamp("2026-01-01T00:00:00Z"))
    world = World(service, nodes=[node])
    world.settle()
    (task,) = wanted(world, TaskState.COMPLETE)
    world.report(task.id, TaskState.FAILED, TaskEnd(cause=cause.value))
    world.settle()
    assert wanted(world, TaskState.COMPLETE) == []
    assert len(world.tasks) == 1
    assert world.service.job_status is not None
    assert world.service.job_status.present_outcome == FAILED
    problems = problems_of(world.service, list(world.tasks.values()), {node.id: node}, wanted=1, now_ns=0)
    assert [one.task_id for one in problems] == [task.id]


def test_a_service_that_is_never_restarted_has_a_reason_after_a_restart_of_its_node() -> None:
    world = a_world(RestartPolicy(condition=RestartCondition.NONE))
    (task,) = wanted(world)
    world.report(task.id, TaskState.FAILED, TaskEnd(cause=EndCause.NODE_RESTARTED.value))
    world.settle()
    (problem,) = problems_of(world.service, list(world.tasks.values()), {}, wanted=1, now_ns=0)
    assert problem.task_id == task.id


def test_killed_monitors_use_up_attempts_and_delay_the_next_task() -> None:
    world = a_world(RestartPolicy(delay=0, max_attempts=4))
    delays = []
    for _ in range(5):
        (task,) = wanted(world)
        delays.append(task.restart.delay / SECOND_NS if task.restart is not None else 0)
        world.report(task.id, TaskState.FAILED, TaskEnd(cause=EndCause.MONITOR_LOST.value))
        world.settle()
        world.now += 20
    assert wanted(world) == []
    assert delays == [0, 0, 0, 0.5, 1]
