"""Drained nodes: tasks stop only when their replacements run, within the service's disruption budget."""

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.changes import FillSlot
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import DRAIN_NOW, ON_DISCONNECT
from skep.model.service import (
    EndpointSpec,
    PortConfig,
    PublishMode,
    RestartCondition,
    RestartPolicy,
    ServiceSpec,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Relocation, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.drains import (
    DRAINED,
    N1,
    RUNNING,
    a_spec,
    a_world,
    assign,
    drain,
    new_ones,
    wanted,
)
from tests.support.managers.rollouts import wanted as of_image
from tests.support.managers.worlds import World

# --- replacements start first -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, *UpdateOrder])
def test_a_task_on_a_drained_node_stops_only_when_its_replacement_runs(order: UpdateOrder | None) -> None:
    world = a_world(a_spec(order=order))
    drain(world)
    old, (new,) = world.tasks[TaskId("old1")], new_ones(world)
    assert old.is_wanted, "it serves until its replacement does"
    assert (new.desired_state, new.slot) == (RUNNING, 1)
    assign(world, new.id)
    assert old.is_wanted
    assign(world, new.id, state=RUNNING)
    assert wanted(world) == [world.tasks[new.id]]


def test_a_task_with_a_port_of_its_node_also_stops_only_when_its_replacement_runs_on_another_one() -> None:
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    world = a_world(replace(a_spec(), endpoint_spec=EndpointSpec(ports=(port,))))
    drain(world)
    (new,) = new_ones(world)
    assign(world, new.id)
    assert world.tasks[TaskId("old1")].is_wanted
    assign(world, new.id, state=RUNNING)
    assert wanted(world) == [world.tasks[new.id]]


def test_all_tasks_of_a_drained_node_are_replaced_at_a_time() -> None:
    world = a_world(a_spec(100))
    drain(world)
    assert len(new_ones(world)) == 100


def test_a_replacement_that_no_node_takes_leaves_the_task_running() -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    world.put(replace(new, status=replace(new.status, state=TaskState.PENDING, err="no suitable node")))
    assert world.settle() == 0
    assert len(wanted(world)) == 2


def test_a_drain_that_is_undone_removes_the_surplus_task() -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    assign(world, new.id)
    world.nodes[N1] = a_node("n1")
    world.settle()
    assert [task.id for task in wanted(world)] == ["old1"]


def test_the_surplus_task_of_a_drain_that_is_undone_is_no_attempt() -> None:
    spec = a_spec()
    policy = RestartPolicy(delay=3 * SECOND_NS, max_attempts=1)
    world = a_world(replace(spec, task_template=replace(spec.task_template, restart_policy=policy)))
    drain(world)
    world.nodes[N1] = a_node("n1")
    world.settle()
    world.report("old1", TaskState.FAILED)
    world.settle()
    assert [task.desired_state for task in wanted(world)] == [TaskState.READY], (
        "it waits for the restart delay"
    )


def test_a_drain_that_is_undone_before_the_replacement_is_written_creates_none() -> None:
    world = a_world(a_spec())
    world.nodes[N1] = DRAINED
    changes = world.changes()
    assert [type(change) for change in changes] == [FillSlot]
    world.nodes[N1] = a_node("n1")
    world.apply(changes)
    assert [task.id for task in wanted(world)] == ["old1"]


def test_a_drained_node_that_dies_leaves_no_surplus_task() -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    assign(world, new.id)
    world.nodes[N1] = a_node("n1", availability=Availability.DRAIN, state=NodeState.DOWN)
    world.settle()
    assert [task.id for task in wanted(world)] == [new.id]
    assign(world, new.id, state=RUNNING)
    assert [task.id for task in wanted(world)] == [new.id]


def test_a_task_that_ends_before_its_replacement_runs_leaves_the_slot_to_the_replacement() -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    world.report("old1", TaskState.FAILED)
    world.settle()
    assert [task.id for task in wanted(world)] == [new.id]


def test_a_replacement_that_fails_is_retried_while_the_task_runs() -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    assign(world, new.id, state=TaskState.REJECTED)
    (second,) = new_ones(world)
    assert second.id != new.id
    assert world.tasks[TaskId("old1")].is_wanted
    assign(world, second.id, state=TaskState.REJECTED)
    (third,) = new_ones(world)
    assert third.restart is not None
    assert (third.desired_state, third.restart.failures) == (TaskState.READY, 2), (
        "it waits as after any failure"
    )
    world.now += 10
    world.settle()
    assert world.tasks[third.id].desired_state is RUNNING, (
        "the task on the drained node does not hold it back"
    )


def test_a_replacement_on_a_node_that_is_drained_too_moves_on() -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    assign(world, new.id)
    drain(world, "n9")
    (second,) = new_ones(world)
    assert second.id != new.id
    assert world.tasks[TaskId("old1")].is_wanted


def test_a_replacement_that_runs_on_a_node_that_is_drained_too_is_replaced_in_turn() -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    world.nodes[NodeId("n9")] = a_node("n9", availability=Availability.DRAIN)
    assign(world, new.id, state=RUNNING)
    assert [task.id.startswith("old") for task in wanted(world)].count(True) == 0, "one of the two is enough"
    third = next(task for task in new_ones(world) if task.id != new.id)
    world.nodes[NodeId("n3")] = a_node("n3")
    assign(world, third.id, "n3", RUNNING)
    assert [task.id for task in wanted(world)] == [third.id]


def test_a_drain_at_once_stops_tasks_first_as_docker_does() -> None:
    world = a_world(a_spec(minimum="1"))
    drain(world, labels={DRAIN_NOW: "true"})
    assert not world.tasks[TaskId("old1")].is_wanted
    assert [task.desired_state for task in new_ones(world)] == [TaskState.READY]


def test_a_task_that_its_policy_does_not_restart_stops_at_once() -> None:
    world = a_world(a_spec(2, condition=RestartCondition.NONE))
    drain(world)
    assert wanted(world) == []


def test_a_task_of_a_global_service_stops_at_once() -> None:
    service = a_service("agent", is_global=True)
    world = World(service, [a_task("t", slot=0, node="n1", service=service, state=RUNNING)], [DRAINED])
    world.settle()
    assert wanted(world) == []


# --- together with updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", UpdateOrder)
def test_an_update_of_a_drained_task_waits_until_the_new_task_runs(order: UpdateOrder) -> None:
    world = a_world(a_spec(order=order))
    drain(world)
    world.update(a_spec(order=order, image="app:2"))
    world.settle()
    (new,) = of_image(world, "app:2")
    assign(world, new.id, state=TaskState.READY)
    assert world.tasks[TaskId("old1")].is_wanted
    assign(world, new.id, state=RUNNING)
    assert [task.id for task in wanted(world)] == [new.id]


def test_a_drain_during_a_stop_first_update_starts_the_prepared_task() -> None:
    world = a_world(a_spec())
    world.update(a_spec(image="app:2"))
    world.settle()
    (new,) = of_image(world, "app:2")
    assert new.desired_state is TaskState.READY
    drain(world)
    assert world.tasks[new.id].desired_state is RUNNING
    assert world.tasks[TaskId("old1")].is_wanted


def test_a_drain_during_an_update_moves_as_many_outdated_tasks_at_a_time_as_the_update() -> None:
    world = a_world(a_spec(3))
    world.update(a_spec(3, image="app:2"))
    drain(world)
    for number in range(1, 4):
        (new,) = [task for task in of_image(world, "app:2") if task.status.state is not RUNNING]
        assert len(of_image(world, "app:2")) == number
        assert new.desired_state is RUNNING
        assign(world, new.id, state=RUNNING)
    assert of_image(world, "app:1") == []


def test_an_update_begins_with_the_tasks_of_a_drained_node() -> None:
    world = a_world(a_spec(3), ("n1", "n2", "n3"))
    drain(world, "n3")
    world.update(a_spec(3, image="app:2"))
    world.settle()
    assert [task.slot for task in of_image(world, "app:2")] == [3]


def test_an_update_during_a_drain_begins_no_more_slots_than_it_may() -> None:
    world = a_world(a_spec(3))
    drain(world)
    assert len(new_ones(world)) == 3
    world.update(a_spec(3, image="app:2"))
    world.settle()
    assert [task.id for task in of_image(world, "app:1")] == ["old1", "old2", "old3"]
    assert len(of_image(world, "app:2")) == 1


def test_a_drain_goes_on_while_the_update_is_paused() -> None:
    world = a_world(a_spec(2), ("n1", "n2"))
    world.update(a_spec(2, image="app:2"))
    world.put(replace(world.service, update_status=UpdateStatus(state=UpdateState.PAUSED)))
    assert world.settle() == 0
    drain(world)
    (new,) = of_image(world, "app:2")
    assert (new.slot, new.desired_state) == (1, RUNNING)
    assign(world, new.id, state=RUNNING)
    assert [task.id for task in of_image(world, "app:1")] == ["old2"], "the update is still paused"


@pytest.mark.parametrize("is_running", [False, True])
def test_a_drain_that_is_undone_while_the_update_is_paused_removes_the_surplus_task(is_running: bool) -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    assign(world, new.id)
    world.nodes[N1] = a_node("n1")
    if is_running:
        world.report(new.id, RUNNING)
    world.update(a_spec(image="app:2"))
    world.put(replace(world.service, update_status=UpdateStatus(state=UpdateState.PAUSED)))
    world.settle()
    assert [task.id for task in wanted(world)] == [new.id if is_running else "old1"]


def test_a_slot_that_waits_for_its_turn_keeps_one_running_task_after_a_drain_is_undone() -> None:
    world = a_world(a_spec(3), ("n9", "n9", "n1"))
    drain(world)
    (new,) = new_ones(world)
    world.nodes[N1] = a_node("n1")
    world.put(replace(new, node_id=NodeId("n9")))
    world.report(new.id, RUNNING)
    world.update(a_spec(3, image="app:2"))
    world.settle()
    assert [task.id for task in of_image(world, "app:1") if task.slot == 3] == [new.id]


@pytest.mark.parametrize(
    "target", [a_node("n9", state=NodeState.DOWN), a_node("n9", availability=Availability.PAUSE)]
)
def test_a_move_to_a_node_that_no_longer_takes_tasks_is_not_tried_again_and_again(target: Node) -> None:
    world = a_world(a_spec())
    old = world.tasks[TaskId("old1")]
    world.put(replace(old, relocation=Relocation(target=NodeId("n9"))))
    world.settle()
    (new,) = new_ones(world)
    assert new.node_id == "n9"
    world.report(new.id, TaskState.REJECTED)
    world.put(target)
    world.settle()
    assert [task.id for task in wanted(world)] == ["old1"]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_slot_that_waits_for_its_turn_keeps_the_task_that_still_runs(is_lost: bool) -> None:
    """The newest one failed between decision and write, or is kept on a lost node by ``skep.on-disconnect``."""
    labels = {ON_DISCONNECT: "keep"}
    world = a_world(replace(a_spec(3), labels=labels), ("n9", "n9", "n1"))
    world.nodes[NodeId("n2")] = a_node("n2")
    drain(world)
    (new,) = new_ones(world)
    world.nodes[N1] = a_node("n1")
    world.put(replace(new, node_id=NodeId("n2")))
    world.report(new.id, RUNNING)
    world.update(replace(a_spec(3, image="app:2"), labels=labels))
    if is_lost:
        world.put(a_node("n2", state=NodeState.DOWN))
    changes = world.changes()
    if not is_lost:
        world.report(new.id, TaskState.FAILED)
    world.apply(changes)
    assert [task.id for task in of_image(world, "app:1") if task.slot == 3 and task.id != new.id] == ["old3"]


@pytest.mark.parametrize("state", [TaskState.STARTING, RUNNING])
def test_a_rollback_during_a_drain_replaces_the_new_task_by_one_of_the_old_spec(state: TaskState) -> None:
    world = a_world(a_spec())
    drain(world)
    world.update(a_spec(image="app:2"))
    world.settle()
    (new,) = of_image(world, "app:2")
    world.put(replace(new, node_id=NodeId("n9")))
    world.report(new.id, state)
    world.update(a_spec())
    world.settle()
    old, second = sorted(of_image(world, "app:1"), key=lambda task: task.id, reverse=True)
    assert (old.id, of_image(world, "app:2")) == ("old1", [])
    assign(world, second.id, state=RUNNING)
    assert [task.id for task in wanted(world)] == [second.id]


def test_a_drain_that_is_undone_leaves_the_update_a_prepared_task_that_it_finishes() -> None:
    world = a_world(a_spec())
    world.update(a_spec(image="app:2"))
    drain(world)
    (new,) = of_image(world, "app:2")
    assign(world, new.id, state=TaskState.PREPARING)
    world.nodes[N1] = a_node("n1")
    world.settle()
    assign(world, new.id, state=TaskState.READY)
    assert [task.id for task in wanted(world)] == [new.id]


@pytest.mark.parametrize("state", [TaskState.NEW, TaskState.STARTING, RUNNING])
def test_scaling_to_zero_during_a_drain_removes_both_tasks(state: TaskState) -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    world.report(new.id, state)
    world.update(a_spec(0))
    world.settle()
    assert wanted(world) == []


@pytest.mark.parametrize("state", [TaskState.NEW, TaskState.STARTING, RUNNING])
def test_a_drain_at_once_after_a_drain_leaves_the_replacement(state: TaskState) -> None:
    world = a_world(a_spec())
    drain(world)
    (new,) = new_ones(world)
    world.report(new.id, state)
    drain(world, labels={DRAIN_NOW: "true"})
    assert [task.id for task in wanted(world)] == [new.id]


def test_a_task_on_a_drained_node_stays_while_the_node_of_its_replacement_is_lost() -> None:
    world = a_world(replace(a_spec(), labels={"skep.on-disconnect-delay": "10m"}))
    drain(world)
    (new,) = new_ones(world)
    world.nodes[NodeId("n9")] = a_node("n9", state=NodeState.DOWN)
    assign(world, new.id, state=RUNNING)
    assert world.tasks[TaskId("old1")].is_wanted
    world.nodes[NodeId("n9")] = a_node("n9")
    world.settle()
    assert not world.tasks[TaskId("old1")].is_wanted


def test_attempts_at_a_spec_that_was_taken_back_do_not_keep_a_task_on_a_drained_node() -> None:
    """They used up their restart policy, and the drain took them for replacements that had failed for good."""
    policy = RestartPolicy(delay=0, max_attempts=1)

    def spec(image: str) -> ServiceSpec:
        given = a_spec(image=image)
        return replace(given, task_template=replace(given.task_template, restart_policy=policy))

    world = a_world(spec("app:1"))
    world.update(spec("app:2"))
    for _ in range(2):
        world.settle()
        for task in of_image(world, "app:2"):
            world.report(task.id, TaskState.REJECTED)
    world.settle()
    assert not of_image(world, "app:2"), "it is given up"
    world.update(spec("app:1"))
    world.settle()
    drain(world)
    assert len(of_image(world, "app:1")) == 2


def test_a_new_leader_neither_creates_nor_stops_tasks() -> None:
    world = a_world(a_spec(3))
    drain(world)
    before = wanted(world)
    world.seen = ObservedTimes(world.now)
    assert world.settle() == 0
    assert wanted(world) == before


# --- tasks that stop first ----------------------------------------------------------------------------------------


def test_a_task_that_writes_data_stops_before_its_replacement_starts() -> None:
    world = a_world(a_spec(data=True))
    drain(world)
    assert not world.tasks[TaskId("old1")].is_wanted
    assert [task.desired_state for task in new_ones(world)] == [TaskState.READY]


def test_the_order_start_first_says_that_two_tasks_may_write() -> None:
    world = a_world(a_spec(data=True, order=UpdateOrder.START_FIRST))
    drain(world)
    assert world.tasks[TaskId("old1")].is_wanted


def test_tasks_that_stop_first_leave_as_many_at_a_time_as_in_an_update() -> None:
    world = a_world(a_spec(3, data=True))
    drain(world)
    assert len([task for task in wanted(world) if task.id.startswith("old")]) == 2
    (new,) = new_ones(world)
    world.stop_all()
    world.settle()
    assign(world, new.id, state=RUNNING)
    assert len([task for task in wanted(world) if task.id.startswith("old")]) == 1


def test_a_task_that_stops_first_waits_until_the_minimum_is_available() -> None:
    world = a_world(a_spec(2, minimum="2", data=True), ("n1", "n2"))
    drain(world)
    assert [task.id for task in wanted(world)] == ["old1", "old2"]
    world.update(a_spec(2, minimum="50%", data=True))
    world.settle()
    assert not world.tasks[TaskId("old1")].is_wanted


def test_a_lost_node_uses_up_the_budget_of_a_drain() -> None:
    world = a_world(a_spec(3, minimum="2", data=True), ("n1", "n2", "n3"))
    world.nodes[NodeId("n3")] = a_node("n3", state=NodeState.DOWN)
    drain(world)
    assert world.tasks[TaskId("old1")].is_wanted
