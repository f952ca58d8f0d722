"""``max_attempts`` counts failures of the task, not moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.model.node import Availability, NodeState
from skep.model.service import Placement, RestartCondition, RestartPolicy
from skep.model.task import Preemption, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.worlds import World

RUNNING, SHUTDOWN = TaskState.RUNNING, TaskState.SHUTDOWN


def a_world(policy: RestartPolicy) -> World:
    """One task, which runs on n1."""
    world = World(a_service(replicas=1, restart=policy), nodes=[a_node("n1"), a_node("n2")])
    world.put(a_task("first", slot=1, node="n1", service=world.service))
    return world


def wanted(world: World) -> list[Task]:
    return [task for task in world.tasks.values() if task.is_wanted]


MOVES = ("preempted", "drained", "lost", "removed", "evicted")


def move(world: World, how: str) -> None:
    """The task of the slot has to leave its node, for a reason that is not its own; the other node may have it."""
    task = wanted(world)[0]
    node, other = (NodeId("n1"), NodeId("n2")) if task.node_id == "n1" else (NodeId("n2"), NodeId("n1"))
    world.nodes[other] = a_node(other, labels={"zone": "a"})
    match how:
        case "preempted":
            world.put(replace(task, preemption=Preemption(task_id=TaskId("high"))))
        case "drained":
            world.nodes[node] = a_node(node, availability=Availability.DRAIN)
        case "lost":
            world.nodes[node] = a_node(node, state=NodeState.DOWN)
        case "removed":
            world.nodes.pop(node, None)
        case "evicted":
            world.nodes[node] = a_node(node, labels={"zone": "b"})


def moved(world: World, how: str, end: TaskState) -> None:
    """Move the task; its node reports ``end`` for it, and its successor runs on the other node."""
    (task,) = wanted(world)
    if not task.node_id:
        world.put(task := replace(task, node_id=NodeId("n1"), status=TaskStatus(state=RUNNING)))
    move(world, how)
    world.settle()
    world.report(task.id, TaskState.ORPHANED if how == "removed" else end)
    world.settle()
    for successor in wanted(world):
        world.put(replace(successor, node_id=NodeId("n2" if task.node_id == "n1" else "n1")))
        world.report(successor.id, RUNNING)


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(MOVES), st.sampled_from([SHUTDOWN, TaskState.FAILED])), min_size=1
    ),
    window=st.sampled_from([None, 3600 * SECOND_NS]),
    is_new_leader=st.booleans(),
)
def test_a_service_whose_containers_never_fail_has_its_tasks(
    moves: list[tuple[str, TaskState]], window: int | None, is_new_leader: bool
) -> None:
    """However often they are moved, and also if their stop fails."""
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, delay=0, max_attempts=1, window=window)
    world = a_world(policy)
    template = replace(
        world.service.spec.task_template, placement=Placement(constraints=("node.labels.zone!=b",))
    )
    world.service = replace(world.service, spec=replace(world.service.spec, task_template=template))
    world.put(replace(world.tasks[TaskId("first")], spec=template, status=TaskStatus(state=RUNNING)))
    for how, end in moves:
        moved(world, how, end)
        if is_new_leader:
            world.seen = ObservedTimes(world.now)
        assert len(wanted(world)) == 1


@pytest.mark.parametrize("how", MOVES)
def test_moves_between_failures_change_nothing_of_the_number_of_attempts(how: str) -> None:
    world = a_world(RestartPolicy(delay=0, max_attempts=2))
    for failures in (1, 2, 3):
        if how != "evicted":
            moved(world, how, SHUTDOWN)
        world.report(wanted(world)[0].id, TaskState.FAILED)
        world.settle()
        assert len(wanted(world)) == (failures < 3)
