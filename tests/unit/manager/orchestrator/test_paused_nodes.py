"""Global services on nodes that are paused while an update is under way."""

import pytest
from msgspec.structs import replace

from skep.model.node import Availability, Node, NodeDescription, NodeStatus
from skep.model.service import (
    Resources,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Preemption, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import timestamp
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import AT_ONCE, advance, state, wanted
from tests.support.managers.worlds import World

READY, RUNNING = TaskState.READY, TaskState.RUNNING
N1 = NodeId("n1")
UNKNOWN = replace(a_node("n1"), description=NodeDescription(), status=NodeStatus())


def a_spec(
    image: str,
    order: UpdateOrder = UpdateOrder.STOP_FIRST,
    action: UpdateFailureAction = UpdateFailureAction.PAUSE,
) -> ServiceSpec:
    update = UpdateConfig(parallelism=1, order=order, failure_action=action)
    return a_service_spec(
        is_global=True,
        image=image,
        update=update,
        rollback=update,
        restart=AT_ONCE,
        reserve=Resources(memory_bytes=1),
    )


def begun(
    order: UpdateOrder = UpdateOrder.STOP_FIRST, action: UpdateFailureAction = UpdateFailureAction.PAUSE
) -> tuple[World, Task, Task]:
    """The update has made its first task, on n1, beside the old one; n2 comes later."""
    service = a_service(spec=a_spec("app:1", order, action))
    world = World(service, nodes=[a_node("n1"), a_node("n2")])
    for node in ("n1", "n2"):
        world.put(a_task(f"old-{node}", slot=0, node=node, service=service))
    world.update(a_spec("app:2", order, action))
    world.settle()
    (new,) = wanted(world, "app:2")
    assert new.node_id == N1
    return world, world.tasks[TaskId("old-n1")], new


def pause(world: World) -> None:
    world.nodes[N1] = a_node("n1", availability=Availability.PAUSE)


def on_n1(world: World) -> list[Task]:
    return [task for task in world.tasks.values() if task.node_id == N1 and task.is_wanted]


@pytest.mark.parametrize("away", [a_node("n1", availability=Availability.PAUSE), UNKNOWN])
def test_a_task_whose_predecessor_was_stopped_for_it_is_started_there(away: Node) -> None:
    world, old, new = begun()
    world.report(new.id, READY)
    world.settle()
    assert on_n1(world) == [world.tasks[new.id]]
    world.nodes[N1] = away
    world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert world.tasks[new.id].desired_state is RUNNING
    assert (state(world), len(wanted(world, "app:1"))) == (UpdateState.UPDATING, 1), "it has its turn"


def test_a_task_that_is_preempted_takes_no_place_there() -> None:
    """Each decision stopped the old task, and each write refused that."""
    world, old, new = begun()
    world.report(new.id, READY)
    preemption = Preemption(service="vip", task_id=TaskId("vip1"))
    world.put(replace(world.tasks[new.id], preemption=preemption))
    pause(world)
    assert world.settle() < 5
    assert world.tasks[old.id].is_wanted


def test_a_task_that_is_ready_takes_the_place_of_the_old_one_there() -> None:
    world, old, new = begun()
    world.report(new.id, TaskState.PREPARING)
    pause(world)
    world.settle()
    assert world.tasks[old.id].is_wanted
    world.report(new.id, READY)
    world.settle()
    assert on_n1(world) == [world.tasks[new.id]]
    world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert world.tasks[new.id].desired_state is RUNNING


def test_with_start_first_the_old_task_goes_when_the_new_one_runs_there() -> None:
    world, old, new = begun(UpdateOrder.START_FIRST)
    world.report(new.id, READY)
    pause(world)
    world.settle()
    assert world.tasks[old.id].is_wanted
    world.report(new.id, RUNNING)
    world.settle()
    assert on_n1(world) == [world.tasks[new.id]]


@pytest.mark.parametrize("order", UpdateOrder)
def test_a_task_that_the_paused_node_does_not_get_stops_nothing_and_holds_up_no_other(
    order: UpdateOrder,
) -> None:
    """It would be refused the node for as long as that is paused, whatever is stopped for it."""
    world, old, new = begun(order)
    pause(world)
    refused = replace(new.status, state=TaskState.PENDING, err="no suitable node (1 node not available)")
    world.put(replace(world.tasks[new.id], status=refused))
    world.held.add(new.id)
    for _ in range(3):
        advance(world)
        world.now += 10.0
    world.settle()
    assert world.tasks[old.id].is_wanted
    assert [task.node_id for task in wanted(world, "app:2")] == ["n1", "n2"]
    assert state(world) is UpdateState.COMPLETED


@pytest.mark.parametrize("order", UpdateOrder)
def test_no_update_begins_on_a_paused_node_and_one_that_was_begun_there_comes_to_its_end(
    order: UpdateOrder,
) -> None:
    world, _, new = begun(order)
    world.report(new.id, READY)
    pause(world)
    world.nodes[NodeId("n2")] = a_node("n2", availability=Availability.PAUSE)
    for _ in range(4):
        advance(world)
        world.now += 10.0
    world.settle()
    assert on_n1(world) == [world.tasks[new.id]]
    assert world.tasks[new.id].status.state is RUNNING
    assert [task.id for task in wanted(world, "app:1")] == ["old-n2"]
    assert state(world) is UpdateState.COMPLETED


def test_what_an_overtaken_update_has_prepared_is_started_where_nothing_else_runs() -> None:
    world, old, new = begun()
    world.report(new.id, READY)
    world.settle()
    pause(world)
    world.update(a_spec("app:3"))
    world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert on_n1(world) == [world.tasks[new.id]]
    assert world.tasks[new.id].desired_state is RUNNING


@pytest.mark.parametrize("order", UpdateOrder)
@pytest.mark.parametrize("end", [TaskState.REJECTED, TaskState.FAILED])
@pytest.mark.parametrize(
    ("action", "becomes"),
    [
        (UpdateFailureAction.PAUSE, UpdateState.PAUSED),
        (UpdateFailureAction.ROLLBACK, UpdateState.ROLLBACK_COMPLETED),
        (UpdateFailureAction.CONTINUE, UpdateState.COMPLETED),
    ],
)
def test_what_fails_there_fails_the_update_and_gets_no_successor(
    order: UpdateOrder, end: TaskState, action: UpdateFailureAction, becomes: UpdateState
) -> None:
    world, _, new = begun(order, action)
    if end is TaskState.FAILED:
        advance(world)
    pause(world)
    world.report(new.id, end)
    for _ in range(4):
        advance(world)
        world.now += 10.0
    world.settle()
    assert state(world) is becomes
    assert not world.tasks[new.id].is_wanted
    assert [task.id for task in world.tasks.values() if task.node_id == N1] == ["old-n1", new.id]


def test_a_failure_there_counts_in_the_decision_that_finds_all_else_complete() -> None:
    world, _, new = begun()
    world.report(new.id, READY)
    pause(world)
    world.nodes[NodeId("n2")] = a_node("n2", availability=Availability.DRAIN)
    advance(world)
    world.report(new.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED


def test_a_failed_update_that_is_resumed_comes_to_its_end_there() -> None:
    world, _, new = begun()
    pause(world)
    world.report(new.id, TaskState.REJECTED)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    resumed = UpdateStatus(state=UpdateState.UPDATING, tolerated_until=timestamp(3 * 10**18))
    world.put(replace(world.service, update_status=resumed))
    for _ in range(4):
        advance(world)
        world.now += 10.0
    world.settle()
    assert state(world) is UpdateState.COMPLETED
    assert [task.id for task in on_n1(world)] == ["old-n1"]
