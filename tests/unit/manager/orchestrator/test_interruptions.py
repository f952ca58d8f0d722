"""Ends of tasks whose node restarted: they are no failures of the task."""

import pytest

from skep.model.service import RestartCondition, RestartPolicy
from skep.model.task import Task, TaskState
from skep.model.task_end import INTERRUPTIONS, EndCause, TaskEnd
from tests.support.builders import a_node, a_service, a_task
from tests.support.worlds import World


def a_world(policy: RestartPolicy) -> World:
    """One task that runs on n1."""
    world = World(a_service(replicas=1, restart=policy), nodes=[a_node("n1"), a_node("n2")])
    world.put(a_task(slot=1, node="n1", service=world.service))
    return world


def wanted(world: World) -> list[Task]:
    return [task for task in world.tasks.values() if task.desired_state <= TaskState.RUNNING]


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
