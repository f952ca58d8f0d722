"""Staged updates: old tasks that end meanwhile, and the least time of a step."""

from msgspec.structs import replace

from skep.manager.orchestrator.replacement.staging import JUDGED_S
from skep.model.options.autoscaling import with_replicas
from skep.model.options.labels import PROGRESS_DEADLINE
from skep.model.service import RestartPolicy, UpdateState
from skep.model.task import TaskState
from skep.model.values.times import SECOND_NS
from tests.support.managers.rollouts import a_spec, a_world, advance, image_of, message, state, wanted
from tests.unit.manager.orchestrator.test_staged_updates import (
    ALL_AT_ONCE,
    BOUNDED,
    CANARY,
    RUNNING,
    a_canary,
    begun,
    counts,
    pass_time,
    percent,
    shares,
)


def test_an_old_task_that_ends_is_replaced_by_an_old_one() -> None:
    world = begun(replicas=10)
    free = {task.slot for task in wanted(world)} - {task.slot for task in wanted(world, "app:2")}
    for task in [task for task in wanted(world, "app:1") if task.slot in free]:
        world.report(task.id, TaskState.FAILED)
    advance(world)
    assert (counts(world), shares(world)) == ((10, 1), {"app:1": 95, "app:2": 5})


def test_an_old_task_waits_for_its_own_restart_delay() -> None:
    delayed = RestartPolicy(delay=5 * SECOND_NS)
    world = a_world(update=ALL_AT_ONCE, restart=delayed)
    world.update(replace(a_spec("app:2", update=ALL_AT_ONCE, restart=delayed), labels=CANARY))
    advance(world)
    taken = {task.slot for task in wanted(world, "app:2")}
    failed = next(task for task in wanted(world, "app:1") if task.slot not in taken)
    world.report(failed.id, TaskState.FAILED)
    advance(world)
    (successor,) = (task for task in wanted(world) if task.slot == failed.slot)
    assert (image_of(successor), successor.desired_state) == ("app:1", TaskState.READY)
    pass_time(world, 5)
    assert [task.desired_state for task in wanted(world) if task.slot == failed.slot] == [RUNNING]


def test_a_short_step_lasts_until_its_first_requests_have_been_judged() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels={**BOUNDED, "skep.update.step-time": "1s"}))
    advance(world)
    pass_time(world, JUDGED_S - 1)
    assert percent(world) == 5
    pass_time(world, 1)
    assert percent(world) == 50


def test_a_new_task_that_hangs_since_before_a_scale_fails_the_update() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels={**CANARY, PROGRESS_DEADLINE: "30s"}))
    world.settle()
    (hanging,) = wanted(world, "app:2")
    world.report(hanging.id, TaskState.PREPARING)
    world.held.add(hanging.id)
    world.update(with_replicas(world.service.spec, 8))
    advance(world)
    assert counts(world) == (8, 1)
    pass_time(world, 39)
    assert state(world) is UpdateState.UPDATING
    pass_time(world, 1)
    assert f"task {hanging.id} made no progress within 40 s" in message(world)
