"""How long a prepared task waits for the end of the one that it replaces."""

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.changes import Recheck, StartTask
from skep.model.ids import NodeId, TaskId
from skep.model.node import Availability, NodeState
from skep.model.service import RestartPolicy
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS
from skep.store.interface import Commit, Updated
from tests.support.builders import a_node, a_service, a_service_spec
from tests.support.rollouts import wanted
from tests.support.worlds import World

READY = TaskState.READY


def a_world(*, grace_s: int | None = None, labels: dict[str, str] | None = None) -> World:
    """One task runs, on n1."""
    spec = replace(a_service_spec(restart=RestartPolicy(delay=0)), labels=labels or {})
    container = spec.task_template.container_spec
    assert container is not None
    if grace_s is not None:
        container = replace(container, stop_grace_period=grace_s * SECOND_NS)
    spec = replace(spec, task_template=replace(spec.task_template, container_spec=container))
    world = World(a_service(spec=spec), nodes=[a_node("n1"), a_node("n2")])
    world.settle()
    (task,) = wanted(world)
    world.put(replace(task, node_id=NodeId("n1")))
    world.report(task.id, TaskState.RUNNING)
    return world


def drained(world: World) -> tuple[TaskId, Task]:
    """The task that is to stop, and the one that waits for it."""
    (old,) = wanted(world)
    world.nodes[NodeId("n1")] = a_node("n1", availability=Availability.DRAIN)
    world.settle()
    (new,) = wanted(world)
    assert new.desired_state is READY
    return old.id, new


@pytest.mark.parametrize(
    ("grace_s", "labels", "waits_s"),
    [
        (None, {}, 10 + 2 + 30),
        (300, {}, 300 + 2 + 30),
        (0, {"skep.drain": "0s"}, 30),
        (1, {"skep.drain": "2m"}, 1 + 240 + 30),
    ],
)
def test_a_task_that_never_reports_its_end_is_waited_for_as_long_as_it_may_take(
    grace_s: int | None, labels: dict[str, str], waits_s: float
) -> None:
    """It drains twice, once for new connections and once for those that it has, and then has its stop grace."""
    world = a_world(grace_s=grace_s, labels=labels)
    world.now = 100.0
    _, new = drained(world)
    assert world.steps() == [Recheck(100.0 + waits_s)]
    world.now = 100.0 + waits_s
    assert world.steps() == [StartTask(new)]


def come_and_go(world: World, state: NodeState) -> None:
    before = world.nodes[NodeId("n1")]
    after = replace(before, status=replace(before.status, state=state))
    world.nodes[before.id] = after
    world.seen.record(Commit(1, (Updated(before, after),)), world.now)


def test_a_node_that_comes_back_has_the_time_to_stop_what_was_retired_while_it_was_away() -> None:
    world = a_world(labels={"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "15m"})
    come_and_go(world, NodeState.DOWN)
    old, new = drained_while_down(world)
    world.now = 600.0
    come_and_go(world, NodeState.READY)
    assert world.steps() == [Recheck(642.0)], "it hears only now that the task is to stop"
    world.report(old, TaskState.SHUTDOWN)
    assert world.steps() == [StartTask(new)]


def drained_while_down(world: World) -> tuple[TaskId, Task]:
    (old,) = wanted(world)
    down = world.nodes[NodeId("n1")]
    world.nodes[down.id] = replace(down, spec=replace(down.spec, availability=Availability.DRAIN))
    world.settle()
    (new,) = wanted(world)
    return old.id, new
