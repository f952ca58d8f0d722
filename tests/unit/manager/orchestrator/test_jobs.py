"""Jobs: so many runs to their end, so many at a time; or one on each node that was there."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import Cause, FillSlot, RemoveService, RetireTask, SettleRun
from skep.manager.orchestrator.reaper.history import attempts_kept, surplus_history
from skep.manager.orchestrator.slots import age
from skep.manager.services.job_runs import COMPLETED, FAILED
from skep.model.node import Availability, Node, NodeState
from skep.model.options.schedules import CRON, CRON_MAX_ATTEMPTS
from skep.model.service import (
    GlobalJob,
    JobStatus,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    ScheduleStatus,
    Service,
    ServiceMode,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, Timestamp
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.worlds import World

ASKED_AT = Timestamp("2026-01-02T00:00:00Z")


def a_job(*, concurrent: int = 2, total: int = 5, restart: RestartPolicy | None = None) -> Service:
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=concurrent, total_completions=total))
    return _job(mode, restart)


def a_global_job() -> Service:
    return _job(ServiceMode(global_job=GlobalJob()), None)


def _job(mode: ServiceMode, restart: RestartPolicy | None) -> Service:
    service = a_service("job", restart=restart)
    spec = replace(service.spec, mode=mode)
    return replace(service, spec=spec, job_status=JobStatus(last_execution=ASKED_AT))


def an_old_node(id: str, availability: Availability = Availability.ACTIVE) -> Node:
    return replace(a_node(id, availability=availability), created_at=Timestamp("2026-01-01T00:00:00Z"))


def live(world: World) -> list[Task]:
    return [task for task in world.tasks.values() if task.is_active]


def test_no_more_tasks_run_at_a_time_than_asked_for() -> None:
    job = a_job(concurrent=2, total=5)
    assert World(job).steps() == [FillSlot(job, 1), FillSlot(job, 2)]


def test_a_completed_run_makes_room_for_the_next_slot() -> None:
    world = World(a_job(concurrent=2, total=5))
    world.settle()
    first = min(live(world), key=lambda task: task.slot)
    world.report(first.id, TaskState.COMPLETE)
    world.settle()
    assert sorted(task.slot for task in live(world)) == [2, 3]


def test_tasks_of_a_job_are_to_complete_and_know_their_iteration() -> None:
    world = World(a_job())
    world.settle()
    assert {task.desired_state for task in live(world)} == {TaskState.COMPLETE}
    assert {task.job_iteration for task in live(world)} == {Version(index=0)}


def test_a_job_ends_when_all_runs_are_completed() -> None:
    world = World(a_job(concurrent=2, total=3))
    for _ in range(3):
        world.settle()
        world.report(live(world)[0].id, TaskState.COMPLETE)
    assert world.steps() == [SettleRun(world.service, is_over=True)]
    world.settle()
    assert world.service.job_status is not None
    assert world.service.job_status.present_outcome == COMPLETED
    assert sorted(task.slot for task in world.tasks.values()) == [1, 2, 3]


def test_a_failed_run_is_repeated_in_its_slot_after_the_delay() -> None:
    world = World(a_job(concurrent=1, total=1))
    world.settle()
    (task,) = live(world)
    world.report(task.id, TaskState.FAILED)
    world.settle()
    (successor,) = live(world)
    assert (successor.slot, successor.desired_state) == (1, TaskState.READY)
    world.now += 6
    world.settle()
    assert live(world)[0].desired_state is TaskState.COMPLETE


def test_a_slot_whose_attempts_are_used_up_is_given_up() -> None:
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, delay=0, max_attempts=1)
    world = World(a_job(concurrent=1, total=2, restart=policy))
    for _ in range(2):
        world.settle()
        world.report(next(task.id for task in live(world) if task.slot == 1), TaskState.FAILED)
    world.settle()
    assert [task.slot for task in live(world)] == [2]


def a_scheduled(job: Service, **labels: str) -> Service:
    spec = replace(job.spec, labels={CRON: "@hourly", **labels})
    assert job.job_status is not None
    return replace(job, spec=spec, job_status=replace(job.job_status, schedule=ScheduleStatus()))


def failures_until_the_end(job: Service, most: int = 30) -> tuple[int, str]:
    """How often its only task fails before the run ends, and the outcome; ``most``: it goes on."""
    world = World(job, nodes=[an_old_node("n1")])
    for number in range(most):
        world.settle()
        if not live(world):
            assert world.service.job_status is not None
            return number, world.service.job_status.present_outcome
        world.report(live(world)[0].id, TaskState.FAILED)
        slot = sorted(world.tasks.values(), key=age)
        for task in surplus_history(slot, 5, Version(), (), attempts_kept(world.service)):
            del world.tasks[task.id]
        world.now += 20
    return most, ""


@pytest.mark.parametrize("mode", ["replicated", "global"])
@pytest.mark.parametrize(
    ("labels", "policy", "failures"),
    [
        ({}, {}, 7),
        ({CRON_MAX_ATTEMPTS: "2"}, {}, 3),
        ({CRON_MAX_ATTEMPTS: "2"}, {"window": SECOND_NS}, 3),
        ({CRON_MAX_ATTEMPTS: "8"}, {}, 9),
        ({CRON_MAX_ATTEMPTS: "2"}, {"max_attempts": 4}, 5),
        ({}, {"condition": RestartCondition.NONE}, 1),
    ],
)
def test_a_scheduled_run_ends_when_a_task_has_failed_too_often(
    labels: dict[str, str], policy: dict[str, Any], failures: int, mode: str
) -> None:
    job = a_job(concurrent=1, total=1) if mode == "replicated" else a_global_job()
    template = replace(job.spec.task_template, restart_policy=RestartPolicy(**policy))
    job = replace(job, spec=replace(job.spec, task_template=template))
    assert failures_until_the_end(a_scheduled(job, **labels)) == (failures, FAILED)


def test_a_job_without_a_schedule_or_with_attempts_of_0_is_tried_without_end() -> None:
    job = a_job(concurrent=1, total=1, restart=RestartPolicy())
    assert failures_until_the_end(job) == (30, "")
    assert failures_until_the_end(a_scheduled(job, **{CRON_MAX_ATTEMPTS: "0"})) == (30, "")


def test_the_outcome_of_a_job_is_written_when_all_its_runs_have_ended() -> None:
    world = World(a_job(concurrent=2, total=2, restart=RestartPolicy(condition=RestartCondition.NONE)))
    world.settle()
    one, two = live(world)
    world.report(one.id, TaskState.FAILED)
    world.settle()
    assert world.service.job_status is not None
    assert world.service.job_status.present_outcome == ""
    world.report(two.id, TaskState.COMPLETE)
    world.settle()
    assert world.service.job_status.present_outcome == FAILED
    assert world.steps() == []


def test_a_run_that_was_replaced_and_completes_after_all_is_enough() -> None:
    """Its node was believed lost; what took its place goes, and the next run begins."""
    world = World(a_job(concurrent=1, total=2))
    world.settle()
    (lost,) = live(world)
    world.put(replace(lost, desired_state=TaskState.SHUTDOWN))
    world.settle()
    (successor,) = live(world)
    assert (successor.slot, successor.id != lost.id) == (1, True)
    world.report(lost.id, TaskState.COMPLETE)
    world.settle()
    assert [task.slot for task in live(world)] == [2]
    assert world.tasks[successor.id].desired_state is TaskState.SHUTDOWN


def test_a_run_ends_in_a_slot_that_has_completed_although_what_took_its_place_failed() -> None:
    world = World(a_global_job(), nodes=[an_old_node("n1")])
    world.settle()
    (moved,) = live(world)
    world.put(replace(moved, desired_state=TaskState.SHUTDOWN))
    world.settle()
    (successor,) = live(world)
    world.report(successor.id, TaskState.REJECTED)
    world.report(moved.id, TaskState.COMPLETE)
    world.settle()
    assert world.service.job_status is not None
    assert world.service.job_status.present_outcome == COMPLETED
    assert live(world) == []


def test_what_took_the_place_of_a_completed_run_counts_until_it_is_retired() -> None:
    """The decision to retire it may fail: until it is written, nothing begins in its place."""
    world = World(a_job(concurrent=1, total=2))
    world.settle()
    (lost,) = live(world)
    world.put(replace(lost, desired_state=TaskState.SHUTDOWN))
    world.settle()
    (successor,) = live(world)
    world.report(lost.id, TaskState.COMPLETE)
    assert world.steps() == [RetireTask(world.tasks[successor.id])]


def test_another_iteration_runs_everything_again_and_keeps_what_ended_as_history() -> None:
    world = World(a_job(concurrent=2, total=2))
    world.settle()
    done, running = live(world)
    world.report(done.id, TaskState.COMPLETE)
    world.report(running.id, TaskState.RUNNING)
    again = JobStatus(job_iteration=Version(index=1), last_execution=ASKED_AT)
    world.put(replace(world.service, job_status=again))
    world.settle()
    assert world.tasks[done.id].desired_state is TaskState.SHUTDOWN
    assert world.tasks[running.id].desired_state is TaskState.REMOVE
    assert sorted(task.slot for task in live(world) if task.job_iteration == Version(index=1)) == [1, 2]


def run_again(world: World) -> Version:
    """A user, or the schedule, asks for another run."""
    before = world.service.job_status
    assert before is not None
    iteration = Version(index=before.job_iteration.index + 1)
    world.put(replace(world.service, job_status=JobStatus(job_iteration=iteration, last_execution=ASKED_AT)))
    return iteration


def of(world: World, iteration: Version) -> list[Task]:
    return [task for task in live(world) if task.job_iteration == iteration]


@pytest.mark.parametrize("job", [a_job(concurrent=2, total=2), a_global_job()])
def test_another_iteration_starts_when_the_tasks_of_the_last_one_have_stopped(job: Service) -> None:
    world = World(job, nodes=[an_old_node("n1"), an_old_node("n2")])
    world.settle()
    first, second = live(world)
    for task, node in ((first, "n1"), (second, "n2")):
        world.put(replace(task, node_id=NodeId(node)))
        world.report(task.id, TaskState.RUNNING)
    iteration = run_again(world)
    world.now = 100.0
    world.settle()
    assert [task.desired_state for task in of(world, iteration)] == [TaskState.READY] * 2
    world.report(first.id, TaskState.SHUTDOWN)
    assert world.steps() == [Recheck(142.0)], "of the whole run, not of one slot"
    world.report(second.id, TaskState.SHUTDOWN)
    world.settle()
    assert [task.desired_state for task in of(world, iteration)] == [TaskState.COMPLETE] * 2


def test_an_iteration_waits_no_longer_than_the_last_one_may_take_to_stop_and_not_for_a_lost_node() -> None:
    for node, waits_until in ((a_node("n1"), 142.0), (a_node("n1", state=NodeState.DOWN), None)):
        world = World(a_job(concurrent=1, total=1), nodes=[a_node("n1")])
        world.settle()
        (task,) = live(world)
        world.put(replace(task, node_id=NodeId("n1")))
        world.report(task.id, TaskState.RUNNING)
        iteration = run_again(world)
        world.now = 100.0
        world.nodes[node.id] = node
        world.settle()
        if waits_until is not None:
            assert world.steps() == [Recheck(waits_until)]
            world.now = waits_until
            world.settle()
        assert [task.desired_state for task in of(world, iteration)] == [TaskState.COMPLETE]


def test_a_run_waits_for_a_task_of_the_last_one_that_was_given_a_node_since_the_decision() -> None:
    world = World(a_job(concurrent=1, total=1), nodes=[a_node("n1")])
    world.settle()
    (old,) = live(world)
    iteration = run_again(world)
    changes = world.changes()
    world.put(replace(old, node_id=NodeId("n1"), status=replace(old.status, state=TaskState.ASSIGNED)))
    world.apply(changes)
    world.settle()
    assert [task.desired_state for task in of(world, iteration)] == [TaskState.READY]
    world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert [task.desired_state for task in of(world, iteration)] == [TaskState.COMPLETE]


def test_a_run_waits_for_a_task_of_the_last_one_whose_retirement_was_refused() -> None:
    world = World(a_job(concurrent=2, total=2), nodes=[a_node("n1")])
    world.settle()
    olds = live(world)
    iteration = run_again(world)
    world.apply([change for change in world.changes() if isinstance(change, FillSlot)])
    for old in olds:
        world.put(replace(old, node_id=NodeId("n1"), status=replace(old.status, state=TaskState.ASSIGNED)))
    assert [task.desired_state for task in of(world, iteration)] == [TaskState.READY] * 2
    world.settle()
    assert [task.desired_state for task in of(world, iteration)] == [TaskState.READY] * 2
    for old in olds:
        world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert [task.desired_state for task in of(world, iteration)] == [TaskState.COMPLETE] * 2


def test_what_replaces_a_task_of_a_run_that_waits_for_the_last_one_waits_too() -> None:
    world = World(a_job(concurrent=1, total=1, restart=RestartPolicy(delay=0)), nodes=[a_node("n1")])
    world.settle()
    (old,) = live(world)
    world.put(replace(old, node_id=NodeId("n1")))
    world.report(old.id, TaskState.RUNNING)
    iteration = run_again(world)
    world.settle()
    (refused,) = of(world, iteration)
    world.report(refused.id, TaskState.REJECTED)
    world.settle()
    (successor,) = of(world, iteration)
    assert (successor.id != refused.id, successor.desired_state) == (True, TaskState.READY)
    world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert of(world, iteration)[0].desired_state is TaskState.COMPLETE


def test_a_global_job_runs_once_on_each_node_that_was_there() -> None:
    job = a_global_job()
    late = replace(a_node("n3"), created_at=Timestamp("2026-01-03T00:00:00Z"))
    nodes = [an_old_node("n1"), an_old_node("n2", Availability.PAUSE), late]
    world = World(job, nodes=nodes)
    assert world.steps() == [FillSlot(job, 0, nodes[0].id)]
    world.settle()
    world.report(live(world)[0].id, TaskState.COMPLETE)
    world.settle()
    assert len(world.tasks) == 1


def test_a_plain_global_job_runs_late_on_a_node_that_returns_as_dockers_do() -> None:
    world = World(a_global_job(), nodes=[an_old_node("n1"), an_old_node("n2", Availability.DRAIN)])
    world.settle()
    world.report(live(world)[0].id, TaskState.COMPLETE)
    world.settle()
    world.nodes[NodeId("n2")] = an_old_node("n2")
    world.settle()
    assert [task.node_id for task in live(world)] == ["n2"]


def test_a_global_job_leaves_a_node_that_is_drained() -> None:
    world = World(a_global_job(), nodes=[an_old_node("n1")])
    world.settle()
    (task,) = live(world)
    world.nodes[task.node_id] = an_old_node("n1", Availability.DRAIN)
    assert world.steps() == [RetireTask(task, cause=Cause.NODE_IS_UNFIT)]


def test_a_node_that_stopped_its_task_of_a_plain_global_job_fails_no_run() -> None:
    """It runs the job again when it takes tasks again."""
    world = World(a_global_job(), nodes=[an_old_node("n1"), an_old_node("n2")])
    world.settle()
    ended = {task.node_id: task.id for task in live(world)}
    world.nodes[NodeId("n2")] = an_old_node("n2", Availability.DRAIN)
    world.settle()
    world.report(ended[NodeId("n2")], TaskState.SHUTDOWN)
    world.settle()
    assert outcome_of(world) == ""
    world.report(ended[NodeId("n1")], TaskState.COMPLETE)
    world.settle()
    assert outcome_of(world) == COMPLETED
    world.nodes[NodeId("n2")] = an_old_node("n2")
    world.settle()
    (task,) = live(world)
    world.report(task.id, TaskState.COMPLETE)
    world.settle()
    assert outcome_of(world) == COMPLETED


def test_a_plain_global_job_whose_only_node_is_drained_has_no_outcome() -> None:
    world = World(a_global_job(), nodes=[an_old_node("n1")])
    world.settle()
    (task,) = live(world)
    world.nodes[NodeId("n1")] = an_old_node("n1", Availability.DRAIN)
    world.settle()
    world.report(task.id, TaskState.SHUTDOWN)
    world.settle()
    assert outcome_of(world) == ""


def outcome_of(world: World) -> str:
    assert world.service.job_status is not None
    return world.service.job_status.present_outcome


def test_a_run_whose_node_is_lost_is_repeated_elsewhere() -> None:
    world = World(a_job(concurrent=1, total=1), nodes=[a_node("n1")])
    world.settle()
    (task,) = live(world)
    world.put(replace(task, node_id=a_node("n1").id))
    world.report(task.id, TaskState.RUNNING)
    world.nodes[a_node("n1").id] = a_node("n1", state=NodeState.DOWN)
    world.settle()
    (successor,) = live(world)
    assert (successor.slot, successor.node_id) == (1, "")


def test_a_job_with_a_time_to_live_is_removed_that_long_after_its_end() -> None:
    job = a_job(concurrent=1, total=1)
    job = replace(job, spec=replace(job.spec, labels={"skep.job-ttl": "1m"}))
    world = World(job)
    world.settle()
    assert world.steps() == []
    world.now = 5.0
    world.report(live(world)[0].id, TaskState.COMPLETE)
    world.settle()
    assert world.steps() == [Recheck(65.0)]
    world.now = 65.0
    assert world.steps() == [RemoveService(world.service)]
    world.settle()
    assert world.service.removed_at is not None
    assert {task.desired_state for task in world.tasks.values()} == {TaskState.REMOVE}


def test_a_job_without_a_time_to_live_stays() -> None:
    world = World(a_job(concurrent=1, total=1))
    world.settle()
    world.report(live(world)[0].id, TaskState.COMPLETE)
    world.settle()
    world.now = 10.0**9
    assert world.steps() == []


def test_history_keeps_what_the_present_iteration_has_completed() -> None:
    done = replace(
        a_task("done", state=TaskState.COMPLETE, desired=TaskState.COMPLETE), job_iteration=Version(index=1)
    )
    before = replace(done, id=a_task("before").id, job_iteration=Version(index=0))
    assert surplus_history([before, done], 0, Version(index=1)) == (before,)


reports = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([TaskState.RUNNING, TaskState.COMPLETE, TaskState.FAILED]))
)


@settings(max_examples=60)
@given(st.integers(0, 4), st.integers(0, 6), reports)
def test_whatever_happens_runs_stay_within_their_numbers(
    concurrent: int, total: int, happening: list[tuple[int, TaskState]]
) -> None:
    world = World(a_job(concurrent=concurrent, total=total, restart=RestartPolicy(delay=0)))
    for number, state in happening:
        world.settle()
        running = live(world)
        assert len(running) <= concurrent
        if running and running[number % len(running)].status.state < state:
            world.report(running[number % len(running)].id, state)
    world.settle()
    done = {task.slot for task in world.tasks.values() if task.status.state is TaskState.COMPLETE}
    assert len(done) + len(live(world)) <= total
    assert world.changes() == []
    world.now += 60.0  # those that crashed in a row wait for their next attempt
    world.settle()
    while running := live(world):
        world.report(running[0].id, TaskState.COMPLETE)
        world.settle()
    done = {task.slot for task in world.tasks.values() if task.status.state is TaskState.COMPLETE}
    assert done == set(range(1, total + 1)) or concurrent == 0
