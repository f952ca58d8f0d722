"""The task that decides whether a slot is filled again, where a younger one was retired while it ran on."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.changes import RetireTask
from skep.manager.orchestrator.reaper.history import surplus_history
from skep.manager.orchestrator.slots import DoneSlots
from skep.model.node import Availability
from skep.model.service import (
    RestartCondition,
    RestartPolicy,
    Service,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import TaskState
from skep.model.values.ids import NodeId, TaskId
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.rollouts import a_spec, a_world, state, wanted
from tests.support.managers.worlds import World

ROLLBACK = UpdateConfig(
    parallelism=1, failure_action=UpdateFailureAction.ROLLBACK, order=UpdateOrder.START_FIRST
)
ON_FAILURE = RestartPolicy(condition=RestartCondition.ON_FAILURE, delay=0)
N1 = NodeId("n1")


def fail(world: World) -> None:
    for task in wanted(world):
        world.report(task.id, TaskState.FAILED)
    world.settle()


def after_a_rollback(policy: RestartPolicy, *, has_failed: bool = False) -> World:
    """Return a world whose task runs on after an update to an image that cannot be pulled."""
    world = a_world(ROLLBACK, replicas=1, restart=policy)
    if has_failed:
        fail(world)
        world.run_all()
    world.update(a_spec("app:2", replicas=1, update=ROLLBACK, restart=policy))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
    world.settle()
    world.now = 30.0
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    return world


def after_a_drain(policy: RestartPolicy, *, has_failed: bool = False) -> World:
    """Return a world whose task runs on after a drain that was undone."""
    world = a_world(replicas=1, restart=policy)
    if has_failed:
        fail(world)
        (task,) = wanted(world)
        world.put(replace(task, node_id=N1))
        world.run_all()
    world.nodes[N1] = a_node("n1", availability=Availability.DRAIN)
    world.settle()
    world.nodes[N1] = a_node("n1")
    world.settle()
    return world


@pytest.mark.parametrize(
    "world",
    [
        after_a_rollback(ON_FAILURE),
        after_a_rollback(RestartPolicy(condition=RestartCondition.NONE)),
        after_a_drain(ON_FAILURE),
    ],
)
def test_a_task_that_is_done_is_not_started_again_whatever_was_tried_beside_it(world: World) -> None:
    (task,) = wanted(world)
    assert len(world.tasks) > 1, "the case that is to be tested"
    world.report(task.id, TaskState.COMPLETE)
    world.settle()
    assert not wanted(world)
    slots = DoneSlots()
    for one in world.tasks.values():
        slots.add(one)
    assert len([*slots.done()]) == 1
    for one in surplus_history([*world.tasks.values()], limit=0):
        del world.tasks[one.id]
    assert world.changes() == []


@pytest.mark.parametrize("prepared", [after_a_rollback, after_a_drain])
def test_a_slot_that_is_given_up_stays_so_whatever_was_tried_beside_its_last_task(
    prepared: Callable[..., World],
) -> None:
    world = prepared(RestartPolicy(delay=0, max_attempts=1), has_failed=True)
    fail(world)
    assert not wanted(world)


def test_a_global_task_that_is_done_is_not_started_again_after_an_update_that_was_rolled_back() -> None:
    def service(image: str) -> Service:
        given = a_service("agent", is_global=True)
        template = a_spec(image, restart=ON_FAILURE).task_template
        return replace(given, spec=replace(given.spec, task_template=template, update_config=ROLLBACK))

    first = service("app:1")
    world = World(first, [a_task("old", slot=0, node="n1", service=first)], [a_node("n1")])
    world.update(service("app:2").spec)
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
    world.settle()
    world.now = 30.0
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    world.report("old", TaskState.COMPLETE)
    world.settle()
    assert not wanted(world)


def test_a_new_task_that_is_done_as_it_is_stopped_ends_its_slot() -> None:
    """The update retires the old task that has filled the slot since, so that the next one filled it, without end."""
    labels = {"skep.update": "canary", "skep.update.steps": "5%,50%"}
    update = UpdateConfig(parallelism=0)
    world = a_world(update, replicas=1, restart=ON_FAILURE)
    world.update(replace(a_spec("app:2", replicas=1, update=update, restart=ON_FAILURE), labels=labels))
    world.settle()
    (old,), (new,) = wanted(world, "app:1"), wanted(world, "app:2")
    world.put(replace(new, node_id=N1))
    world.run_all()
    world.apply([RetireTask(world.tasks[one.id]) for one in (old, new)])
    world.settle()
    assert len(wanted(world, "app:1")) == 1, "the case that is to be tested"
    world.report(new.id, TaskState.COMPLETE)
    world.settle()
    assert not wanted(world)


def test_a_done_task_of_an_update_is_the_last_one_although_an_old_task_ran_on_beside_it() -> None:
    world = a_world(ROLLBACK, replicas=1, restart=ON_FAILURE)
    world.update(a_spec("app:2", replicas=1, update=ROLLBACK, restart=ON_FAILURE))
    world.settle()
    (new,) = wanted(world, "app:2")
    world.report(new.id, TaskState.COMPLETE)
    world.settle()
    assert not wanted(world)
    assert not world.tasks[TaskId(new.id)].was_surplus
