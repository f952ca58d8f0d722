"""Staged updates: old tasks that end meanwhile, restarts with other services, and the least time of a step."""

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.replacement.staging import JUDGED_S
from skep.manager.services.dependent_services import restart_dependents
from skep.model.node import NodeState
from skep.model.options.autoscaling import with_replicas
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import ON_DISCONNECT, PROGRESS_DEADLINE
from skep.model.service import RestartPolicy, UpdateConfig, UpdateState
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service
from tests.support.managers.rollouts import a_spec, a_world, advance, image_of, message, state, wanted
from tests.unit.manager.orchestrator.test_staged_updates import (
    ALL_AT_ONCE,
    BLUE_GREEN,
    BOUNDED,
    CANARY,
    NOW,
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
    for task in wanted(world, "app:1"):
        world.report(task.id, TaskState.FAILED)
    advance(world)
    assert (counts(world), shares(world)) == ((10, 1), {"app:1": 95, "app:2": 5})


def test_an_old_task_on_a_lost_node_is_replaced_by_an_old_one_beside_the_new_one() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=BLUE_GREEN))
    world.settle()
    lost, *_ = wanted(world, "app:1")
    world.put(replace(lost, node_id="gone"))
    world.settle()
    assert counts(world) == (4, 4)
    (successor,) = (task for task in wanted(world, "app:1") if task.slot == lost.slot)
    assert successor.id != lost.id


def test_a_step_does_not_end_while_the_node_of_its_task_is_lost() -> None:
    """With ``skep.on-disconnect``, the task is not replaced meanwhile."""
    world = a_world(update=ALL_AT_ONCE)
    canary = a_canary()
    world.update(replace(canary, labels={**canary.labels, ON_DISCONNECT: "keep"}))
    advance(world)
    (new,) = wanted(world, "app:2")
    world.nodes[NodeId("n2")] = a_node("n2")
    world.put(replace(new, node_id=NodeId("n2")))
    world.put(a_node("n2", state=NodeState.DOWN))
    pass_time(world, 100)
    assert (percent(world), counts(world)) == (5, (4, 1))
    world.put(a_node("n2"))
    pass_time(world, 1)
    assert percent(world) == 50


def test_an_old_task_that_was_restarted_does_not_take_over_from_a_new_one_that_fails() -> None:
    tolerant = replace(ALL_AT_ONCE, max_failure_ratio=0.9)
    world = a_world(update=tolerant)
    world.update(replace(a_canary(labels=BLUE_GREEN), update_config=tolerant))
    advance(world)
    for task in wanted(world, "app:1"):
        world.report(task.id, TaskState.FAILED)
    advance(world)
    old, new = wanted(world, "app:1"), wanted(world, "app:2")
    pass_time(world, 61)
    world.now += 101
    status = world.service.update_status
    assert status is not None
    assert status.split is not None
    last = replace(status, split=replace(status.split, step=2))
    world.report(new[0].id, TaskState.FAILED)
    world.put(replace(world.service, update_status=last))
    advance(world)
    assert counts(world) == (0, 4)
    assert not {task.id for task in old} & {task.id for task in wanted(world)}


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


def test_a_rollback_of_the_last_step_leaves_connections_to_all_tasks() -> None:
    """Else the few old tasks that are left would get all of them."""
    slow = UpdateConfig(parallelism=1, delay=2 * SECOND_NS, monitor=5 * SECOND_NS)
    world = a_world(update=slow)
    world.update(replace(a_canary(), update_config=slow, rollback_config=slow))
    for _ in range(200):
        pass_time(world, 2)
        if counts(world) == (1, 3):
            break
    new = wanted(world, "app:2")
    world.report(new[-1].id, TaskState.FAILED)
    advance(world)
    assert (state(world), counts(world)) == (UpdateState.ROLLBACK_STARTED, (2, 2))
    assert shares(world) == {"app:1": 50, "app:2": 50}
    for _ in range(20):
        pass_time(world, 2)
    assert (state(world), shares(world)) == (UpdateState.ROLLBACK_COMPLETED, {"app:1": 100})


@pytest.mark.parametrize("is_paused", [False, True])
@pytest.mark.parametrize("labels", [CANARY, BLUE_GREEN])
def test_a_restart_with_another_service_begins_again_and_keeps_the_old_tasks(
    labels: dict[str, str], is_paused: bool
) -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels={**labels, DEPENDS_ON: "db=service_started+restart"}))
    advance(world)
    pass_time(world, 61)
    assert counts(world) == (4, 4 if labels is BLUE_GREEN else 2)
    old, first = wanted(world, "app:1"), wanted(world, "app:2")
    paused, status = UpdateState.PAUSED, world.service.update_status
    assert status is not None
    if is_paused:
        world.put(replace(world.service, update_status=replace(status, state=paused, message="by hand")))
    template = a_service("db", image="db:2").spec.task_template
    restart_dependents(world, a_service("db", image="db:1"), template, NOW)  # type: ignore[arg-type]
    assert shares(world) == {"app:1": 100}
    advance(world)
    if is_paused:
        assert (state(world), message(world)) == (paused, "by hand")
        status = world.service.update_status
        assert status is not None
        world.put(replace(world.service, update_status=replace(status, state=UpdateState.UPDATING)))
        advance(world)
    assert wanted(world, "app:1") == old
    assert {task.spec.force_update for task in wanted(world, "app:2")} == {1}
    assert not {task.id for task in first} & {task.id for task in wanted(world, "app:2")}
    pass_time(world, 61)
    pass_time(world, 101)
    pass_time(world, 101)
    assert (state(world), counts(world)) == (UpdateState.COMPLETED, (0, 4))


def test_a_short_step_lasts_until_its_first_requests_have_been_judged() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels={**BOUNDED, "skep.update.step-time": "1s"}))
    advance(world)
    pass_time(world, JUDGED_S - 1)
    assert percent(world) == 5
    pass_time(world, 1)
    assert percent(world) == 50


@pytest.mark.parametrize("restarts", [False, True])
def test_a_new_task_that_hangs_since_before_a_scale_fails_the_update(restarts: bool) -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels={**CANARY, PROGRESS_DEADLINE: "30s"}))
    world.settle()
    (hanging,) = wanted(world, "app:2")
    world.report(hanging.id, TaskState.PREPARING)
    world.held.add(hanging.id)
    world.update(with_replicas(world.service.spec, 8))
    advance(world)
    if restarts:
        (old,) = (task for task in wanted(world, "app:1") if task.slot == hanging.slot)
        world.report(old.id, TaskState.FAILED)
        advance(world)
    assert counts(world) == (8, 1)
    pass_time(world, 39)
    assert state(world) is UpdateState.UPDATING
    pass_time(world, 1)
    assert f"task {hanging.id} made no progress within 40 s" in message(world)
