"""Scenarios of SwarmKit's own tests that no other test of ours plays: docs/conformance/orchestration.md has all."""

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.changes import FillSlot, RetireTask
from skep.manager.orchestrator.replacement.enforcement import overcommitted
from skep.model.node import Availability, NodeState
from skep.model.options.labels import DRAIN_NOW
from skep.model.service import Resources, RestartPolicy
from skep.model.task import Restart, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import advance
from tests.support.managers.worlds import World

READY, RUNNING = TaskState.READY, TaskState.RUNNING
DELAYED = RestartPolicy(delay=3 * SECOND_NS)


def a_global_world(*nodes: str, restart: RestartPolicy | None = None) -> World:
    """One task runs on each node."""
    service = a_service(is_global=True, restart=restart)
    world = World(service, nodes=[a_node(id) for id in nodes])
    for id in nodes:
        world.put(a_task(f"t-{id}", slot=0, node=id, service=service))
    return world


def wanted(world: World) -> list[Task]:
    return [task for task in world.tasks.values() if task.is_active]


def test_a_node_that_joins_gets_its_task_and_one_that_leaves_gives_it_up() -> None:
    world = a_global_world("n1", "n2")
    world.nodes[NodeId("n3")] = a_node("n3")
    assert world.steps() == [FillSlot(world.service, 0, NodeId("n3"))]
    del world.nodes[NodeId("n3")], world.nodes[NodeId("n2")]
    assert world.steps() == [RetireTask(world.tasks[TaskId("t-n2")], is_due=True)]


@pytest.mark.parametrize("state", [TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED])
def test_what_ends_of_a_global_service_is_replaced_on_its_node_after_the_delay(state: TaskState) -> None:
    world = a_global_world("n1", "n2", restart=DELAYED)
    world.report("t-n2", state)
    world.settle()
    (successor,) = [task for task in wanted(world) if task.id != "t-n1"]
    assert (successor.node_id, successor.desired_state) == ("n2", READY)
    world.now = 3.0
    world.settle()
    assert world.tasks[successor.id].desired_state is RUNNING


def test_a_node_that_is_down_gets_no_task_for_what_an_update_left_there() -> None:
    world = a_global_world("n1", "n2")
    ended = a_task("late", slot=0, node="n2", state=TaskState.SHUTDOWN, desired=TaskState.SHUTDOWN, version=2)
    world.put(replace(ended, spec=a_service_spec(image="app:2").task_template, service_id=world.service.id))
    world.service = replace(world.service, spec_version=Version(index=3))  # rolled back from version 2
    world.nodes[NodeId("n2")] = a_node("n2", state=NodeState.DOWN)
    world.settle()
    assert {task.id for task in world.tasks.values()} == {"t-n1", "t-n2", "late"}
    assert [task.id for task in wanted(world)] == ["t-n1"]


def test_a_task_that_vanished_is_made_again() -> None:
    for world in (a_global_world("n1"), World(a_service(), [a_task("t-n1", node="n1")], [a_node("n1")])):
        del world.tasks[TaskId("t-n1")]
        world.settle()
        assert len(wanted(world)) == 1


def test_of_two_tasks_on_one_node_one_goes() -> None:
    world = a_global_world("n1")
    world.put(a_task("extra", slot=0, node="n1", service=world.service))
    world.settle()
    assert len([task for task in world.tasks.values() if task.is_wanted]) == 1


def test_a_new_leader_finds_tasks_on_nodes_that_are_drained_down_or_gone() -> None:
    service = a_service(replicas=4, restart=RestartPolicy(delay=0))
    drained = a_node("n2", availability=Availability.DRAIN, labels={DRAIN_NOW: "true"})
    world = World(service, nodes=[a_node("n1"), drained, a_node("n3", state=NodeState.DOWN)])
    for slot, node in enumerate(("n1", "n2", "n3", "n4"), 1):
        world.put(a_task(f"t{slot}", slot=slot, node=node, service=service))
    world.settle()
    assert [
        task.is_wanted for task in map(world.tasks.__getitem__, map(TaskId, ("t1", "t2", "t3", "t4")))
    ] == [
        True,
        False,
        False,
        False,
    ]
    assert {task.slot for task in wanted(world) if task.is_wanted} == {1, 2, 3, 4}


def test_a_new_leader_goes_on_with_a_delay_that_another_began() -> None:
    """The successor is prepared already; the delay passes once more, and it starts."""
    service = a_service(restart=DELAYED)
    failed = a_task("t1", node="n1", service=service, state=TaskState.FAILED, desired=TaskState.SHUTDOWN)
    ready = a_task("t2", node="n1", service=service, state=READY, desired=READY)
    ready = replace(ready, restart=Restart(failures=1, delay=3 * SECOND_NS))
    world = World(service, [failed, ready], [a_node("n1")])
    world.settle()
    assert world.tasks[ready.id].desired_state is READY
    world.now = 3.0
    world.settle()
    assert world.tasks[ready.id].desired_state is RUNNING


def test_constraints_that_came_later_without_an_update_of_tasks_are_enforced_too() -> None:
    """The task stayed, because its node met the new constraints; when it no longer does, the task moves."""
    service = a_service()
    world = World(service, nodes=[a_node("n1", labels={"disk": "ssd"}), a_node("n2", labels={"disk": "ssd"})])
    world.put(a_task("old", node="n1", service=service))
    world.update(a_service_spec(constraints=("node.labels.disk==ssd",)))
    assert world.steps() == []
    world.nodes[NodeId("n1")] = a_node("n1")
    for _ in range(3):
        advance(world)
    assert not world.tasks[TaskId("old")].is_wanted
    assert len(wanted(world)) == 1


def test_what_a_job_has_completed_takes_no_room() -> None:
    job = a_service(reserve=Resources(memory_bytes=100))
    tasks = [a_task(slot=n, service=job, node="n1", state=TaskState.COMPLETE) for n in range(5)]
    tasks.append(a_task("runs", slot=9, service=job, node="n1"))
    assert overcommitted(a_node("n1", has=Resources(memory_bytes=100)), tasks) == frozenset()


def test_of_a_removed_service_no_task_stays() -> None:
    """All of them are to be removed, the ended and the unplaced ones too, and those are closed at once."""
    service = a_service(replicas=3)
    world = World(service, nodes=[a_node("n1")])
    world.put(a_task("runs", slot=1, node="n1", service=service))
    world.put(
        a_task(
            "ended", slot=1, node="n1", service=service, state=TaskState.FAILED, desired=TaskState.SHUTDOWN
        )
    )
    world.put(a_task("unplaced", slot=2, service=service, state=TaskState.PENDING))
    world.service = replace(service, removed_at="2026-01-01T00:00:00Z")
    world.settle()
    assert {task.desired_state for task in world.tasks.values()} == {TaskState.REMOVE}
    assert world.tasks[TaskId("unplaced")].status.state is TaskState.SHUTDOWN
    assert world.tasks[TaskId("runs")].status.state is RUNNING
