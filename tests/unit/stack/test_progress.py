"""How far a service is."""

from itertools import count

import pytest
from msgspec.structs import replace

from skep.model.container import ContainerSpec
from skep.model.options.labels import STOPPED
from skep.model.service import (
    EndpointSpec,
    GlobalJob,
    GlobalService,
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
    UpdateConfig,
    UpdateSplit,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.updates import end_of_present_step, message_of, stages_of
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from skep.stack.progress import (
    FAILURES_MAX,
    GIVEN_UP_S,
    STEADY_S,
    TOO_LARGE_S,
    UNPLACED_S,
    Explanation,
    ServiceProblem,
    ServiceProgress,
    explained,
    explanation_of,
    is_rolled_back_by_hand,
    progress_of,
    why_hopeless,
)

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


RUNS, NEW_SUFFIX = a_task(TaskState.RUNNING), a_task(TaskState.RUNNING)
FAILED = a_task(TaskState.FAILED, TaskState.SHUTDOWN, err="no such file")


@pytest.mark.parametrize(
    ("tasks", "text", "is_done"),
    [
        ([RUNS, NEW_SUFFIX], "2 of 2 tasks run", True),
        ([RUNS], "1 of 2 tasks run", False),
        ([RUNS, a_task(TaskState.STARTING), FAILED], "1 of 2 tasks run: no such file", False),
        ([RUNS, NEW_SUFFIX, FAILED], "2 of 2 tasks run", True),
        ([RUNS, a_task(TaskState.SHUTDOWN, TaskState.SHUTDOWN, err="killed")], "1 of 2 tasks run", False),
        (
            [RUNS, a_task(TaskState.PENDING, err="no suitable node")],
            "1 of 2 tasks run: no suitable node",
            False,
        ),
        (
            [RUNS, replace(a_task(TaskState.RUNNING), spec=TaskSpec())],
            "1 of 2 tasks updated, 2 running",
            False,
        ),
    ],
)
def test_a_service_is_done_when_all_its_tasks_run_with_the_present_spec(
    tasks: list[Task], text: str, is_done: bool
) -> None:
    found = progress_of(SERVICE, tasks)
    assert (found.text, found.is_done, found.is_stuck) == (text, is_done, False)


def test_failures_in_a_row_are_those_of_one_slot_since_it_last_ran() -> None:
    def failed(at: int, slot: int, state: TaskState = TaskState.FAILED) -> Task:
        return replace(a_task(state, TaskState.SHUTDOWN), slot=slot, created_at=f"2026-01-01T00:00:{at:02}Z")

    rejected = failed(9, 2, TaskState.REJECTED)
    tasks = [
        failed(1, 1),
        failed(2, 1),
        failed(3, 2),
        failed(4, 2, TaskState.SHUTDOWN),
        failed(8, 2),
        rejected,
    ]
    problem = progress_of(SERVICE, tasks).problem
    assert (problem.kind, problem.failures, problem.task_id) == ("rejected", 2, rejected.id)
    assert progress_of(SERVICE, tasks, current={rejected.id}).problem.failures == 1
    assert progress_of(SERVICE, [*tasks, failed(20, 2, TaskState.RUNNING)]).problem.kind == "exit"
    start = a_task(
        TaskState.FAILED, TaskState.SHUTDOWN, err='starting container failed: exec: "x": not found'
    )
    assert progress_of(SERVICE, [start]).problem.kind == "start-failed"
    refused = a_task(
        TaskState.PENDING, err="no suitable node (scheduling constraints not satisfied on 2 nodes)"
    )
    assert progress_of(SERVICE, [refused]).problem.kind == "no-node"
    assert progress_of(SERVICE, [a_task(TaskState.PENDING)]).problem.kind == ""


def test_an_update_under_way_is_not_done_and_one_that_is_paused_is_stuck() -> None:
    under_way = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.UPDATING))
    assert not progress_of(under_way, [RUNS, NEW_SUFFIX]).is_done
    paused = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.PAUSED, message="too many failed"))
    found = progress_of(paused, [RUNS, FAILED])
    assert (found.text, found.is_stuck) == ("the update is paused: too many failed (no such file)", True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (UpdateState.PAUSED, "update paused due to failure or early termination of task t: no such file"),
        (UpdateState.ROLLBACK_COMPLETED, "rollback completed: update rolled back due to t: no such file"),
        (
            UpdateState.PAUSED,
            "update paused due to failure or early termination of task t: its file is missing",
        ),
        (UpdateState.PAUSED, "update paused because task t made no progress within 5 s: it is starting"),
    ],
)
def test_what_stops_an_update_is_not_said_twice(state: UpdateState, message: str) -> None:
    """The message begins with the state, and ends with the cause, in the words of the failed task or plainer ones."""
    stopped = replace(SERVICE, update_status=UpdateStatus(state=state, message=message))
    found = progress_of(stopped, [RUNS, FAILED])
    assert (found.text, found.is_stuck) == (message, True)


def test_a_rollback_to_the_wanted_spec_is_no_failure() -> None:
    """Of a deploy that changes nothing.  Of one that has changed the service, the same state is its failure."""
    message = "rollback completed: update rolled back due to t: no such file"
    back = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED, message=message))
    both = [RUNS, replace(RUNS, id=TaskId("second"), slot=2)]
    assert progress_of(back, both).is_stuck
    kept = progress_of(back, both, is_kept=True)
    assert (kept.text, kept.is_done, kept.is_stuck) == ("2 of 2 tasks run", True, False)
    under_way = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.ROLLBACK_STARTED))
    assert not progress_of(under_way, both, is_kept=True).is_done
    paused = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.ROLLBACK_PAUSED, message=message))
    assert progress_of(paused, both, is_kept=True).is_stuck


def test_a_rollback_by_hand_is_told_from_one_after_a_failed_update() -> None:
    def ended(message: str) -> bool:
        status = UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED, message=message)
        return is_rolled_back_by_hand(replace(SERVICE, update_status=status))

    assert ended("rollback completed")
    assert not ended("rollback completed: update rolled back due to t: no such file")
    assert not is_rolled_back_by_hand(SERVICE)


def test_a_job_is_done_when_its_tasks_of_this_run_have_completed() -> None:
    complete = a_task(TaskState.COMPLETE, TaskState.COMPLETE, of=JOB)
    earlier = replace(complete, job_iteration=Version(index=6))
    assert progress_of(JOB, [complete, earlier]).text == "1 of 2 tasks completed"
    assert progress_of(JOB, [complete, complete, earlier]).is_done


def test_a_global_job_waits_for_no_drained_node() -> None:
    job = replace(JOB, spec=replace(JOB.spec, mode=ServiceMode(global_job=GlobalJob())))
    complete, stopped = (
        replace(a_task(state, desired, of=job), node_id=NodeId(node))
        for node, state, desired in (
            ("n1", TaskState.COMPLETE, TaskState.COMPLETE),
            ("n2", TaskState.SHUTDOWN, TaskState.SHUTDOWN),
        )
    )
    found = progress_of(job, [complete, stopped])
    assert (found.text, found.is_done) == ("1 of 2 tasks completed", False)
    ended = explained(found, Explanation(is_healthy=True), current=(), failures_max=FAILURES_MAX)
    assert (ended.text, ended.is_done) == ("1 of 2 tasks completed: no other node is eligible", True)
    for going in (Explanation(is_healthy=True, desired=1), Explanation(is_healthy=False)):
        assert not explained(found, going, current=(), failures_max=FAILURES_MAX).is_done
    assert progress_of(job, []).without_nodes == "no node is eligible"
    assert not progress_of(JOB, []).without_nodes


def test_tasks_that_are_not_started_again_are_done_or_have_failed() -> None:
    complete = a_task(TaskState.COMPLETE, TaskState.SHUTDOWN, of=ONCE)
    failed = a_task(TaskState.FAILED, TaskState.SHUTDOWN, of=ONCE, err="exit 1")
    assert progress_of(ONCE, [complete]).is_done
    assert progress_of(ONCE, [failed]).is_stuck
    assert progress_of(ONCE, [failed]).text == "its tasks ended and are not started again: exit 1"
    assert not progress_of(ONCE, [a_task(TaskState.RUNNING, of=ONCE)]).is_stuck
    paused = UpdateStatus(state=UpdateState.PAUSED, message="early termination of task t")
    assert progress_of(replace(ONCE, update_status=paused), [complete]).is_done


def test_a_one_shot_service_whose_update_was_rolled_back_is_not_done() -> None:
    message = "rollback completed: update rolled back due to failure of task t"
    status = UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED, message=message)
    back = replace(ONCE, update_status=status)
    complete = a_task(TaskState.COMPLETE, TaskState.SHUTDOWN, of=ONCE)
    assert progress_of(back, [complete]).text == message
    assert progress_of(back, [complete]).is_stuck
    assert progress_of(back, [complete], is_kept=True).is_done


def test_a_one_shot_service_is_done_when_its_slots_run_or_have_completed() -> None:
    service = replace(ONCE, spec=replace(ONCE.spec, mode=SERVICE.spec.mode))
    done = replace(a_task(TaskState.COMPLETE, TaskState.SHUTDOWN, of=service), slot=1)
    starts, runs = (replace(a_task(state, of=service), slot=2) for state in (PREPARING, RUNNING))
    assert progress_of(service, [done, starts]).text == "0 of 2 tasks run, 1 completed"
    assert not progress_of(service, [done, starts]).is_done
    found = progress_of(service, [done, runs])
    assert (found.is_done, found.text) == (True, "1 of 2 tasks run, 1 completed")
    assert progress_of(service, [done, runs], {runs.id}).text == "1 of 2 tasks run"


def test_a_global_one_shot_service_is_done_when_it_has_completed_on_each_of_its_nodes() -> None:
    service = replace(ONCE, spec=replace(ONCE.spec, mode=ServiceMode(global_=GlobalService())))

    def on(node: str, state: TaskState, desired: TaskState = RUNNING) -> Task:
        return replace(a_task(state, desired, of=service), slot=0, node_id=NodeId(node))

    first, second = (on(node, TaskState.COMPLETE, TaskState.SHUTDOWN) for node in ("n1", "n2"))
    found = progress_of(service, [first, second])
    assert (found.is_done, found.text) == (True, "2 of 2 tasks completed")
    assert not progress_of(service, [first, on("n2", PREPARING)]).is_done


def test_an_update_of_a_global_one_shot_service_counts_the_nodes_that_it_has_not_reached_yet() -> None:
    """Their tasks have ended, and the leader replaces one after the other."""
    updating = UpdateStatus(state=UpdateState.UPDATING)
    spec = replace(ONCE.spec, mode=ServiceMode(global_=GlobalService()))
    service = replace(ONCE, spec=spec, update_status=updating)
    done = a_task(TaskState.COMPLETE, TaskState.SHUTDOWN, of=service)
    old, new = (replace(done, id=TaskId(node), slot=0, node_id=NodeId(node)) for node in ("n1", "n2"))
    found = progress_of(service, [old, new], {new.id})
    assert (found.is_done, found.text) == (False, "0 of 2 tasks run, 1 completed")
    over = replace(service, update_status=UpdateStatus(state=UpdateState.COMPLETED))
    assert progress_of(over, [old, new], {new.id}).is_done, "n1 is drained"


def test_an_update_of_ports_alone_has_to_reach_the_tasks() -> None:
    """Their template is the same: only the cluster knows which tasks the leader will replace."""
    ports = EndpointSpec(ports=(PortConfig(target_port=80, published_port=8080),))
    service = replace(SERVICE, spec=replace(SERVICE.spec, endpoint_spec=ports), previous_spec=SERVICE.spec)
    tasks = [a_task(TaskState.RUNNING), a_task(TaskState.RUNNING)]
    assert progress_of(service, tasks, current={tasks[0].id}) == ServiceProgress(
        "1 of 2 tasks updated, 2 running"
    )
    assert progress_of(service, tasks, current={one.id for one in tasks}).is_done


def test_where_the_cluster_names_no_tasks_their_versions_tell_what_the_update_has_reached() -> None:
    service = replace(SERVICE, spec_version=Version(index=2))
    tasks = [a_task(TaskState.RUNNING), a_task(TaskState.RUNNING)]
    old, new = ([replace(one, spec_version=Version(index=index)) for one in tasks] for index in (1, 2))
    assert progress_of(service, old).text == "0 of 2 tasks updated, 2 running"
    assert progress_of(service, new).is_done


def in_slots(*states: tuple[int, TaskState, bool]) -> tuple[list[Task], set[str]]:
    """Tasks, each of a slot, in a state, and of the present spec or the one before; and the ids of the present ones."""
    tasks = [replace(a_task(state), slot=slot) for slot, state, _ in states]
    return tasks, {task.id for task, (_, _, is_current) in zip(tasks, states, strict=True) if is_current}


RUNNING, PREPARING = TaskState.RUNNING, TaskState.PREPARING


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([(1, RUNNING, False), (2, RUNNING, False)], "0 of 2 tasks updated, 2 running"),
        ([(1, RUNNING, False), (1, PREPARING, True), (2, RUNNING, False)], "0 of 2 tasks updated, 2 running"),
        ([(1, RUNNING, False), (1, RUNNING, True), (2, RUNNING, False)], "1 of 2 tasks updated, 2 running"),
        ([(1, RUNNING, True), (2, RUNNING, False), (2, PREPARING, True)], "1 of 2 tasks updated, 2 running"),
        ([(1, RUNNING, True), (2, PREPARING, True)], "1 of 2 tasks run"),
    ],
)
def test_a_start_first_update_counts_slots_whatever_runs_beside_each_other(
    states: list[tuple[int, TaskState, bool]], text: str
) -> None:
    tasks, current = in_slots(*states)
    updating = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.UPDATING))
    assert progress_of(updating, tasks, current).text == text


def test_only_the_youngest_task_of_a_one_shot_service_counts() -> None:
    """An earlier deploy may have had the same spec, so that its ended tasks are up to date as well."""
    first = replace(
        a_task(TaskState.COMPLETE, TaskState.SHUTDOWN, of=ONCE), slot=1, created_at="2026-01-01T00:00:01Z"
    )
    other = replace(a_task(TaskState.COMPLETE, TaskState.SHUTDOWN), slot=1, created_at="2026-01-01T00:00:02Z")
    assert not progress_of(ONCE, [first, other]).is_done
    failed = replace(first, status=TaskStatus(state=TaskState.FAILED))
    assert not progress_of(ONCE, [failed, other]).is_stuck
    again = replace(first, id=TaskId("again"), created_at="2026-01-01T00:00:03Z")
    assert progress_of(ONCE, [again, other, first]).text == "1 of 1 tasks completed"
    assert progress_of(ONCE, [again, other, failed]).is_done


def test_the_cause_is_that_of_the_present_spec() -> None:
    """A version that failed before the update says nothing of the new one."""
    old, new = a_task(TaskState.FAILED, TaskState.SHUTDOWN, err="of before"), a_task(TaskState.PREPARING)
    assert progress_of(SERVICE, [old, new], {new.id}).text == "0 of 2 tasks run"
    assert progress_of(SERVICE, [old, new], {old.id, new.id}).text == "0 of 2 tasks run: of before"


def test_a_job_with_several_completions_counts_them_whatever_its_restart_policy_is() -> None:
    """A job has no replicas: as a service whose tasks end it would be done with its first task."""
    job = replace(
        JOB,
        spec=replace(
            JOB.spec,
            task_template=ONCE.spec.task_template,
            mode=ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=3)),
        ),
    )
    complete = a_task(TaskState.COMPLETE, TaskState.COMPLETE, of=job)
    found = progress_of(job, [complete])
    assert (found.text, found.is_done) == ("1 of 3 tasks completed", False)
    failed = a_task(TaskState.FAILED, TaskState.SHUTDOWN, of=job, err="exit 1")
    found = progress_of(job, [complete, failed])
    assert found.is_stuck
    assert found.text == "1 of 3 tasks completed; the others are not started again: exit 1"


def test_the_time_until_the_next_attempt_is_no_cause() -> None:
    """It would be another text at every look."""
    held = a_task(TaskState.READY, TaskState.READY, err="next attempt in 3 s (crash loop, 42nd)")
    assert progress_of(SERVICE, [held, FAILED]).text == "0 of 2 tasks run: no such file"
    held = a_task(TaskState.READY, TaskState.READY, err="exit 1; next attempt in 3 s (crash loop, 42nd)")
    assert progress_of(SERVICE, [held]).text == "0 of 2 tasks run: exit 1"


@pytest.mark.parametrize(
    ("kind", "failures", "unplaced_s", "is_hopeless"),
    [
        ("exit", FAILURES_MAX - 1, 0.0, False),
        ("exit", FAILURES_MAX, 0.0, True),
        ("unhealthy", FAILURES_MAX, 0.0, True),
        ("rejected", 1, 0.0, False),
        ("rejected", 2, 0.0, True),
        ("start-failed", 2, 0.0, True),
        ("no-node", 0, UNPLACED_S - 1, False),
        ("no-node", 0, UNPLACED_S, True),
        ("not-allocated", 0, UNPLACED_S - 1, False),
        ("not-allocated", 0, UNPLACED_S, True),
        ("too-large", 0, TOO_LARGE_S - 1, False),
        ("too-large", 0, TOO_LARGE_S, True),
        ("no-address", 0, TOO_LARGE_S - 1, False),
        ("no-address", 0, TOO_LARGE_S, True),
        ("left", 0, UNPLACED_S - 1, False),
        ("left", 0, UNPLACED_S, True),
        ("dependency", 0, UNPLACED_S - 1, False),
        ("dependency", 0, UNPLACED_S, True),
        ("waiting", 0, 900.0, False),
        ("progressing", 0, 900.0, False),
    ],
)
def test_waiting_ends_where_it_cannot_help(
    kind: str, failures: int, unplaced_s: float, is_hopeless: bool
) -> None:
    problem = ServiceProblem(kind=kind, failures=failures)
    assert bool(why_hopeless(problem, FAILURES_MAX, unplaced_s)) is is_hopeless
    assert not why_hopeless(problem, 0, unplaced_s), "0: it never ends early"


def test_the_managers_reason_is_shown_and_counts_for_tasks_of_the_present_spec_only() -> None:
    progress = ServiceProgress("0 of 1 tasks run", "older words")
    response = {"Reason": "exit 1", "Problem": {"Kind": "exit", "Failures": 5, "TaskID": "t", "Since": "?"}}
    explanation = explanation_of(response)
    found = explained(progress, explanation, current={"t"}, failures_max=5)
    assert (found.text, found.is_stuck) == ("0 of 1 tasks run: 5 failures in a row: exit 1", True)
    found = explained(progress, explanation, current={"u"}, failures_max=5)
    assert (found.text, found.is_stuck) == ("0 of 1 tasks run: exit 1", False)
    found = explained(
        progress, explanation_of({"Summary": "of an earlier version"}), current=(), failures_max=5
    )
    assert found == progress
    assert explanation_of("no object") == Explanation()
    done = ServiceProgress("1 of 1 tasks run", is_done=True)
    assert explained(done, explanation, current={"t"}, failures_max=5) == done


@pytest.mark.parametrize("failures_max", [0, 5])
@pytest.mark.parametrize("service", [SERVICE, JOB], ids=["service", "job"])
def test_a_task_that_its_policy_has_given_up_is_not_waited_for(service: Service, failures_max: int) -> None:
    failed = a_task(TaskState.FAILED, TaskState.SHUTDOWN, of=service)
    progress = progress_of(service, [failed])
    response = {
        "Reason": "exit 1",
        "Problem": {"Kind": "exit", "Failures": 1, "TaskID": failed.id, "IsGivenUp": True},
    }

    def is_stuck(progress: ServiceProgress, given_up_s: float, *current: str) -> bool:
        explanation = explanation_of(response)
        found = explained(
            progress, explanation, current=current, failures_max=failures_max, given_up_s=given_up_s
        )
        assert not found.is_stuck or found.cause == "not restarted, by its restart policy: exit 1"
        return found.is_stuck

    assert is_stuck(progress, GIVEN_UP_S, failed.id)
    assert not is_stuck(progress, 0.0, failed.id), "new tasks may come in a moment"
    assert not is_stuck(progress, GIVEN_UP_S, "another"), "it is of the spec before"
    assert not is_stuck(replace(progress, is_updating=True), GIVEN_UP_S, failed.id), "the update decides"


def test_a_service_under_an_update_says_so() -> None:
    under_way = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.UPDATING))
    assert progress_of(under_way, [RUNS]).is_updating
    assert not progress_of(SERVICE, [RUNS]).is_updating


def test_the_managers_reason_replaces_the_error_of_a_service_that_is_not_started_again() -> None:
    ended = ServiceProgress(
        "its tasks ended and are not started again", "task: non-zero exit (4)", is_stuck=True
    )
    reason = Explanation(reason='exit 4, last line "no table users"')
    found = explained(ended, reason, current=(), failures_max=5)
    assert (found.cause, found.is_stuck) == (reason.reason, True)
    assert explained(ended, Explanation(), current=(), failures_max=5).cause == "task: non-zero exit (4)"


def test_a_stopped_service_is_done_once_its_tasks_have_ended() -> None:
    stopped = replace(SERVICE, spec=replace(SERVICE.spec, labels={STOPPED: "true"}))
    stopping = a_task(TaskState.RUNNING, TaskState.REMOVE)
    assert progress_of(stopped, [stopping], {stopping.id}).text == "tasks left to stop: 1"
    for tasks in ([], [a_task(TaskState.SHUTDOWN, TaskState.REMOVE)]):
        assert progress_of(stopped, tasks, ()) == ServiceProgress("stopped", is_done=True, is_explained=True)


def test_a_stopped_service_waits_for_tasks_of_a_node_that_is_down_with_that_reason() -> None:
    stopped = replace(SERVICE, spec=replace(SERVICE.spec, labels={STOPPED: "true"}))
    left = a_task(TaskState.UNKNOWN, TaskState.SHUTDOWN, err="node w1 is down")
    found = progress_of(stopped, [left], ())
    assert found.text == "tasks left to stop: 1: node w1 is down"
    for left_s, is_stuck in ((UNPLACED_S - 1, False), (UNPLACED_S, True)):
        waited = explained(found, Explanation(), current=(), failures_max=FAILURES_MAX, unplaced_s=left_s)
        assert waited.is_stuck is is_stuck
    assert waited.text == "tasks left to stop: 1: their nodes have been down for 60 s: node w1 is down"
    stops = a_task(TaskState.RUNNING, TaskState.SHUTDOWN)
    assert not progress_of(stopped, [left, stops], ()).problem.kind


def test_a_global_task_that_waits_for_its_restart_counts_as_one_that_does_not_run() -> None:
    service = replace(SERVICE, spec=replace(SERVICE.spec, mode=ServiceMode(global_=GlobalService())))

    def on(node: str, state: TaskState, desired: TaskState = TaskState.RUNNING, err: str = "") -> Task:
        return replace(a_task(state, desired, of=service, err=err), node_id=NodeId(node))

    failed = on("w1", TaskState.FAILED, TaskState.SHUTDOWN, "port is already allocated")
    held = on("w1", TaskState.READY, TaskState.READY)
    found = progress_of(service, [on("m1", TaskState.RUNNING), failed, held])
    assert (found.text, found.is_done) == ("1 of 2 tasks run: port is already allocated", False)
    found = progress_of(service, [on("m1", TaskState.RUNNING), failed, on("w1", TaskState.RUNNING)])
    assert (found.text, found.is_done) == ("2 of 2 tasks run", True)


@pytest.mark.parametrize(
    ("state", "monitor_s", "has_failed", "steady_s"),
    [
        (None, 0, False, STEADY_S),
        (None, 2, False, 2.0),
        (UpdateState.COMPLETED, 0, False, 0.0),
        (UpdateState.COMPLETED, 0, True, STEADY_S),
    ],
)
def test_the_leader_has_monitored_a_completed_update(
    state: UpdateState | None, monitor_s: int, has_failed: bool, steady_s: float
) -> None:
    status = UpdateStatus(state=state) if state is not None else None
    spec = replace(SERVICE.spec, update_config=UpdateConfig(monitor=monitor_s * SECOND_NS))
    service = replace(SERVICE, spec=spec, update_status=status)
    found = progress_of(service, [RUNS, NEW_SUFFIX, *[FAILED][:has_failed]])
    assert (found.is_done, found.steady_s) == (True, steady_s)


def test_failures_before_a_completed_update_are_not_verified_after_it() -> None:
    """The rollback restores the spec with which a task of the slot had failed."""
    service = replace(SERVICE, update_status=UpdateStatus(state=UpdateState.COMPLETED))
    failed, other, runs = (
        replace(one, slot=1, created_at=f"2026-11-30T17:26:0{number}Z")
        for number, one in enumerate((FAILED, a_task(TaskState.SHUTDOWN, TaskState.SHUTDOWN), RUNS))
    )
    present = replace(NEW_SUFFIX, slot=2)
    found = progress_of(service, [failed, other, runs, present], {failed.id, runs.id, present.id})
    assert (found.is_done, found.steady_s) == (True, 0.0)


def test_a_service_of_no_tasks_needs_no_verification() -> None:
    none = replace(
        SERVICE, spec=replace(SERVICE.spec, mode=ServiceMode(replicated=ReplicatedService(replicas=0)))
    )
    found = progress_of(none, [])
    assert (found.is_done, found.steady_s) == (True, 0.0)


STAGED = replace(
    SERVICE,
    spec=replace(SERVICE.spec, name="web", labels={"skep.update": "blue-green"}),
)


@pytest.mark.parametrize(
    ("labels", "message", "end"),
    [
        (
            {"skep.update": "blue-green", "skep.update.promote": "manual"},
            "update in progress: step 1 of 3, 0 % of new connections until skep update promote",
            "skep update promote web",
        ),
        (
            {"skep.update": "blue-green"},
            "update in progress: step 2 of 3, 100 % of new connections",
            "the end of the 10m for which old tasks are kept (skep update switch-back web returns to them)",
        ),
    ],
)
def test_a_wait_ends_at_a_step_that_ends_by_a_user_or_after_the_time_of_kept_tasks(
    labels: dict[str, str], message: str, end: str
) -> None:
    status = UpdateStatus(state=UpdateState.UPDATING, message=message)
    service = replace(STAGED, spec=replace(STAGED.spec, labels=labels), update_status=status)
    old = [replace(a_task(TaskState.RUNNING), slot=slot) for slot in (1, 2)]
    new = [replace(a_task(TaskState.RUNNING), slot=slot) for slot in (1, 2)]
    current = {task.id for task in new}
    found = progress_of(service, [*old, *new], current)
    assert found.is_done
    assert found.text == f"2 of 2 tasks updated, 2 running, waiting for {end}"
    starting = [replace(new[0], status=TaskStatus(state=TaskState.STARTING)), new[1]]
    assert not progress_of(service, [*old, *starting], current).is_done


@pytest.mark.parametrize("promote", ["auto", "manual"])
def test_a_wait_ends_at_a_step_that_a_service_without_tasks_stays_in(promote: str) -> None:
    """It was scaled to 0 during its update."""
    labels = {"skep.update": "canary", "skep.update.promote": promote}
    status = UpdateStatus(state=UpdateState.UPDATING, message=message_of(stages_of(labels), 0))
    mode = ServiceMode(replicated=ReplicatedService(replicas=0))
    service = replace(STAGED, spec=replace(STAGED.spec, labels=labels, mode=mode), update_status=status)
    stopping = replace(a_task(TaskState.RUNNING), slot=1)
    assert not progress_of(service, [stopping], set()).is_done
    found = progress_of(service, [], set())
    assert found.is_done
    assert found.text.endswith("waiting for a task, without which the update stays in its step")
    split = UpdateSplit(percent=0, old=1)
    stored = replace(service, update_status=replace(status, split=split))
    assert end_of_present_step(stored) == "a task, without which the update stays in its step"


def test_a_wait_does_not_end_at_a_step_that_ends_by_itself() -> None:
    message = "update in progress: step 1 of 3, 5 % of new connections"
    status = UpdateStatus(state=UpdateState.UPDATING, message=message)
    labels = {"skep.update": "canary"}
    service = replace(STAGED, spec=replace(STAGED.spec, labels=labels), update_status=status)
    old = [replace(a_task(TaskState.RUNNING), slot=slot) for slot in (1, 2)]
    new = replace(a_task(TaskState.RUNNING), slot=1)
    assert not progress_of(service, [*old, new], {new.id}).is_done
