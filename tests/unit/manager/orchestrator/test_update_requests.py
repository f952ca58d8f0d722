"""Updates that their users pause, resume and abort."""

import pytest
from msgspec.structs import replace

from skep.manager.control.updates import PAUSED_BY_USER, abort_update, pause_update, resume_update
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.early_failures import step_seconds_max
from skep.model.node import Availability
from skep.model.service import UpdateConfig, UpdateFailureAction, UpdateState
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, Timestamp
from tests.support.builders import a_node
from tests.support.managers.rollouts import a_spec, a_world, advance, message, state, wanted
from tests.support.managers.worlds import World

NOW = Timestamp("2026-01-02T03:04:05Z")


def pause(world: World) -> None:
    pause_update(world, world.service.id, now=NOW)  # type: ignore[arg-type]


def resume(world: World) -> None:
    resume_update(world, world.service.id)  # type: ignore[arg-type]


def a_paused_one(update: UpdateConfig | None = None) -> World:
    """One of four slots is new, one has been begun with, and the user has paused."""
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    advance(world)
    pause(world)
    return world


def test_a_paused_update_begins_with_no_further_slot_under_any_leader() -> None:
    world = a_paused_one()
    for _ in range(5):
        advance(world)
        world.now += 100
        world.seen = ObservedTimes(world.now)  # a new leader
    assert (state(world), message(world)) == (UpdateState.PAUSED, PAUSED_BY_USER)
    assert (len(wanted(world, "app:1")), len(wanted(world, "app:2"))) == (2, 2)
    resume(world)
    for _ in range(10):
        advance(world)
        world.now += 10
    assert state(world) is UpdateState.COMPLETED
    assert len(wanted(world, "app:2")) == 4


def test_what_was_decided_before_the_pause_and_comes_after_it_does_nothing() -> None:
    world = a_world(UpdateConfig(parallelism=0))
    world.update(a_spec("app:2", update=UpdateConfig(parallelism=0)))
    decided = world.changes()
    assert len(decided) > 4
    pause(world)
    world.apply(decided)
    assert wanted(world, "app:2") == []
    assert state(world) is UpdateState.PAUSED


def test_a_pause_before_the_leader_has_begun_counts() -> None:
    world = a_world()
    world.update(a_spec("app:2"))
    pause(world)
    world.settle()
    assert (state(world), wanted(world, "app:2")) == (UpdateState.PAUSED, [])


def test_a_resumed_update_tolerates_the_failures_before_and_not_those_after() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.PAUSE, monitor=5 * SECOND_NS)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    advance(world)
    world.now = 1.0
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert message(world).startswith("update paused due to failure")
    resume(world)
    world.settle()
    assert state(world) is UpdateState.UPDATING
    world.now = 20.0
    advance(world)
    world.now = 40.0
    world.settle()
    assert state(world) is UpdateState.UPDATING
    assert len(wanted(world, "app:2")) == 2
    world.now = 41.0
    advance(world)
    newest = max(wanted(world, "app:2"), key=lambda task: task.created_at)
    world.now = 42.0
    world.report(newest.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert newest.id in message(world)


def test_a_task_that_fails_after_the_resume_counts_though_it_is_from_before() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.PAUSE, monitor=5 * SECOND_NS)
    world = a_paused_one(update)
    resume(world)
    world.now = 1.0
    (first, *_) = wanted(world, "app:2")
    world.report(first.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert first.id in message(world)


def test_an_attempt_that_was_drained_before_the_resume_hides_no_failure_after_it() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.PAUSE, monitor=5 * SECOND_NS)
    world = a_paused_one(update)
    world.nodes[NodeId("n2")] = a_node("n2")
    (lead, *_) = wanted(world, "app:2")
    world.put(replace(lead, node_id=NodeId("n2")))
    world.put(a_node("n2", availability=Availability.DRAIN))
    advance(world)
    world.stop_all()
    (moved,) = (task for task in wanted(world, "app:2") if task.slot == lead.slot)
    assert (world.tasks[lead.id].status.state, moved.status.state) == (TaskState.SHUTDOWN, TaskState.RUNNING)
    resume(world)
    world.now = 1.0
    world.report(moved.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert moved.id in message(world)


@pytest.mark.parametrize("starts", [True, False])
def test_a_task_without_progress_holds_up_no_other_after_a_resume_and_has_its_deadline_again(
    starts: bool,
) -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.PAUSE, monitor=5 * SECOND_NS)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    world.settle()
    (stuck,) = wanted(world, "app:2")
    world.held.add(stuck.id)
    deadline_s = step_seconds_max(world.service.spec)
    world.now = deadline_s
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert "made no progress" in message(world)
    world.now += 3600
    resume(world)
    resumed_at = world.now
    for _ in range(10):
        advance(world)
        world.now += 10
    assert len(wanted(world, "app:2")) == 4
    assert state(world) is UpdateState.UPDATING
    assert [step.at for step in world.steps() if isinstance(step, Recheck)] == [resumed_at + deadline_s]
    world.now = resumed_at + deadline_s - 1
    if starts:
        world.held.clear()
        advance(world)
    world.now += 10
    world.settle()
    assert state(world) is (UpdateState.COMPLETED if starts else UpdateState.PAUSED)
    assert starts or stuck.id in message(world)


@pytest.mark.parametrize("is_paused", [True, False])
def test_an_aborted_update_returns_to_the_spec_before_it(is_paused: bool) -> None:
    world = a_paused_one()
    if not is_paused:
        resume(world)
    world.put(replace(world.service, version=Version(index=7)))
    abort_update(world, world.service.id, 7, now=NOW)  # type: ignore[arg-type]
    for _ in range(10):
        advance(world)
        world.now += 10
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert len(wanted(world, "app:1")) == 4


def test_a_paused_rollback_is_a_rollback_still() -> None:
    world = a_paused_one()
    before = world.service.previous_spec
    assert before is not None
    status = replace(world.service.update_status, state=UpdateState.ROLLBACK_STARTED)
    world.put(replace(world.service, spec=before, previous_spec=None, update_status=status))
    pause(world)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_PAUSED
    resume(world)
    for _ in range(10):
        advance(world)
        world.now += 10
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
