"""How far a service is."""

from itertools import count

import pytest
from msgspec.structs import replace

from skep.model.container import ContainerSpec
from skep.model.ids import ServiceId, TaskId
from skep.model.meta import Version
from skep.model.service import (
    EndpointSpec,
    JobStatus,
    PortConfig,
    ReplicatedJob,
    ReplicatedService,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.stack.progress import ServiceProgress, progress_of

TEMPLATE = TaskSpec(container_spec=ContainerSpec(image="w"), runtime="container")
SERVICE = Service(
    id=ServiceId("s"),
    spec=ServiceSpec(task_template=TEMPLATE, mode=ServiceMode(replicated=ReplicatedService(replicas=2))),
)
JOB = replace(
    SERVICE,
    spec=replace(
        SERVICE.spec, mode=ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=2))
    ),
    job_status=JobStatus(job_iteration=Version(index=7)),
)
ONCE = replace(
    SERVICE,
    spec=ServiceSpec(
        task_template=replace(TEMPLATE, restart_policy=RestartPolicy(condition=RestartCondition.NONE)),
        mode=ServiceMode(replicated=ReplicatedService(replicas=1)),
    ),
)


_numbers = count(1)


def a_task(
    state: TaskState, desired: TaskState = TaskState.RUNNING, *, of: Service = SERVICE, err: str = ""
) -> Task:
    """As the API shows it: a container's task has no runtime."""
    return Task(
        id=TaskId(f"t{next(_numbers)}"),
        spec=replace(of.spec.task_template, runtime=""),
        status=TaskStatus(state=state, err=err),
        desired_state=desired,
        job_iteration=of.job_status.job_iteration if of.job_status is not None else None,
    )


RUNS = a_task(TaskState.RUNNING)
FAILED = a_task(TaskState.FAILED, TaskState.SHUTDOWN, err="no such file")


@pytest.mark.parametrize(
    ("tasks", "text", "is_done"),
    [
        ([RUNS, RUNS], "2 of 2 tasks run", True),
        ([RUNS], "1 of 2 tasks run", False),
        ([RUNS, a_task(TaskState.STARTING), FAILED], "1 of 2 tasks run (no such file)", False),
        ([RUNS, RUNS, FAILED], "2 of 2 tasks run", True),
        ([RUNS, a_task(TaskState.SHUTDOWN, TaskState.SHUTDOWN, err="killed")], "1 of 2 tasks run", False),
        (
            [RUNS, a_task(TaskState.PENDING, err="no suitable node")],
            "1 of 2 tasks run (no suitable node)",
            False,
        ),
        ([RUNS, replace(a_task(TaskState.RUNNING), spec=TaskSpec())], "1 of 2 tasks run", False),
    ],
)
def test_a_service_is_done_when_all_its_tasks_run_with_the_present_spec(
    tasks: list[Task], text: str, is_done: bool
) -> None:
    found = progress_of(SERVICE, tasks)
    assert (found.text, found.is_done, found.is_stuck) == (text, is_done, False)


def test_an_update_under_way_is_not_done_and_one_that_is_paused_is_stuck() -> None:
    under_way = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.UPDATING))
    assert not progress_of(under_way, [RUNS, RUNS]).is_done
    paused = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.PAUSED, message="too many failed"))
    found = progress_of(paused, [RUNS, FAILED])
    assert (found.text, found.is_stuck) == ("the update is paused: too many failed (no such file)", True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (UpdateState.PAUSED, "update paused due to failure or early termination of task t: no such file"),
        (UpdateState.ROLLBACK_COMPLETED, "rollback completed: update rolled back due to t: no such file"),
    ],
)
def test_what_stops_an_update_is_not_said_twice(state: UpdateState, message: str) -> None:
    """The message begins with the state, and ends with the cause that the failed task has, too."""
    stopped = replace(SERVICE, update_status=UpdateStatus(state=state, message=message))
    found = progress_of(stopped, [RUNS, FAILED])
    assert (found.text, found.is_stuck) == (message, True)


def test_a_job_is_done_when_its_tasks_of_this_run_have_completed() -> None:
    complete = a_task(TaskState.COMPLETE, TaskState.COMPLETE, of=JOB)
    earlier = replace(complete, job_iteration=Version(index=6))
    assert progress_of(JOB, [complete, earlier]).text == "completed 1 of 2"
    assert progress_of(JOB, [complete, complete, earlier]).is_done


def test_tasks_that_are_not_started_again_are_done_or_have_failed() -> None:
    complete = a_task(TaskState.COMPLETE, TaskState.SHUTDOWN, of=ONCE)
    failed = a_task(TaskState.FAILED, TaskState.SHUTDOWN, of=ONCE, err="exit 1")
    assert progress_of(ONCE, [complete]).is_done
    assert progress_of(ONCE, [failed]).is_stuck
    assert progress_of(ONCE, [failed]).text == "its tasks ended and are not started again (exit 1)"
    assert not progress_of(ONCE, [a_task(TaskState.RUNNING, of=ONCE)]).is_stuck
    paused = UpdateStatus(state=UpdateState.PAUSED, message="early termination of task t")
    assert progress_of(replace(ONCE, update_status=paused), [complete]).is_done


def test_an_update_of_ports_alone_has_to_reach_the_tasks() -> None:
    """Their template is the same: only the cluster knows which tasks the leader will replace."""
    ports = EndpointSpec(ports=(PortConfig(target_port=80, published_port=8080),))
    service = replace(SERVICE, spec=replace(SERVICE.spec, endpoint_spec=ports), previous_spec=SERVICE.spec)
    tasks = [a_task(TaskState.RUNNING), a_task(TaskState.RUNNING)]
    assert progress_of(service, tasks, current={tasks[0].id}) == ServiceProgress("1 of 2 tasks run")
    assert progress_of(service, tasks, current={one.id for one in tasks}).is_done
