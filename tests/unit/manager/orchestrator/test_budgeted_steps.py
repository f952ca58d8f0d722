"""Drains, updates and preemption together stay within the service's disruption budget."""

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.changes import ReplaceTask, RetireTask
from skep.model.container import ContainerSpec
from skep.model.service import (
    EndpointSpec,
    PortConfig,
    PublishMode,
    RestartCondition,
    RestartPolicy,
)
from skep.model.staging.updates import CANARY, UPDATE, UPDATE_STEP_TIME, UPDATE_STEPS
from skep.model.task import Preemption, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from tests.support.managers.drains import (
    DRAINED,
    N1,
    RUNNING,
    a_spec,
    a_world,
    assign,
    new_ones,
    wanted,
)
from tests.support.managers.rollouts import wanted as of_image
from tests.support.managers.worlds import World


def preempt(world: World, id: str) -> None:
    task = world.tasks[TaskId(id)]
    world.put(replace(task, preemption=Preemption(service="vip", task_id=TaskId("vip1"))))


def test_preemption_waits_until_the_minimum_is_available() -> None:
    world = a_world(a_spec(3, minimum="2"))
    world.report("old3", TaskState.FAILED)
    preempt(world, "old1")
    world.settle()
    assert world.tasks[TaskId("old1")].is_wanted
    (new,) = new_ones(world)
    assign(world, new.id, state=RUNNING)
    assert not world.tasks[TaskId("old1")].is_wanted


def test_a_preempted_task_of_a_service_that_keeps_all_since_leaves_once_it_is_replaced() -> None:
    world = a_world(a_spec(2))
    preempt(world, "old1")
    world.update(a_spec(2, minimum="100%"))
    world.settle()
    (new,) = new_ones(world)
    assert world.tasks[TaskId("old1")].is_wanted
    assign(world, new.id, state=RUNNING)
    assert not world.tasks[TaskId("old1")].is_wanted


def test_an_update_replaces_a_preempted_task_that_is_never_restarted_although_all_are_kept() -> None:
    spec = a_spec(2)
    never = RestartPolicy(condition=RestartCondition.NONE)
    world = a_world(replace(spec, task_template=replace(spec.task_template, restart_policy=never)))
    preempt(world, "old1")
    world.update(a_spec(2, minimum="100%", image="app:2"))
    for _ in range(5):
        world.settle()
        world.stop_all()
        for task in of_image(world, "app:2"):
            if task.desired_state is RUNNING:
                assign(world, task.id, state=RUNNING)
    assert len(of_image(world, "app:2")) == 2
    assert len(wanted(world)) == 2


def test_a_staged_update_replaces_a_preempted_task_of_the_one_before_although_the_budget_keeps_it() -> None:
    """The task is never restarted, so it would leave for good, which the budget forbids."""
    never = RestartCondition.NONE
    canary = {UPDATE: CANARY, UPDATE_STEPS: "5%,50%", UPDATE_STEP_TIME: "5s"}
    world = a_world(a_spec(3, minimum="2", condition=never))
    spec = a_spec(3, minimum="2", condition=never, image="app:2")
    world.update(replace(spec, labels={**spec.labels, **canary}))
    world.settle()
    (new,) = new_ones(world)
    assign(world, new.id, state=RUNNING)
    for number in (1, 2):
        world.report(f"old{number}", TaskState.FAILED)
    preempt(world, new.id)
    world.settle()
    spec = a_spec(3, minimum="2", image="app:3")
    world.update(replace(spec, labels={**spec.labels, **canary}))
    world.settle()
    (present,) = of_image(world, "app:3")
    assert world.tasks[new.id].is_wanted
    assign(world, present.id, state=RUNNING)
    assert not world.tasks[new.id].is_wanted


def test_a_stop_first_update_waits_until_the_minimum_is_available() -> None:
    world = a_world(a_spec(4, minimum="3", parallelism=0), ("n1", "n2", "n3", "n4"))
    world.update(a_spec(4, minimum="3", parallelism=0, image="app:2"))
    world.settle()
    world.prepare_all()
    world.settle()
    assert len(of_image(world, "app:1")) == 3
    for _ in range(10):
        world.stop_all()
        world.settle()
        for task in of_image(world, "app:2"):
            if task.desired_state is RUNNING:
                assign(world, task.id, state=RUNNING)
    assert len(of_image(world, "app:2")) == 4
    assert len(wanted(world)) == 4


def test_an_update_of_a_service_that_keeps_all_tasks_starts_new_ones_first() -> None:
    world = a_world(a_spec(2, minimum="100%"))
    world.update(a_spec(2, minimum="100%", image="app:2"))
    world.settle()
    (new,) = of_image(world, "app:2")
    assert new.desired_state is RUNNING
    assert len(of_image(world, "app:1")) == 2


def test_an_update_of_a_service_that_keeps_all_tasks_stops_tasks_that_write_data_one_at_a_time() -> None:
    """With start-first, the new task could wait for the host port of the old one, which waits for the new task."""
    world = a_world(a_spec(2, minimum="100%", data=True, parallelism=0), ("n1", "n2"))
    world.update(a_spec(2, minimum="100%", data=True, parallelism=0, image="app:2"))
    world.settle()
    world.prepare_all()
    world.settle()
    assert len(of_image(world, "app:1")) == 1
    assert not [task for task in of_image(world, "app:2") if task.desired_state is RUNNING]
    world.stop_all()
    world.settle()
    (started,) = [task for task in of_image(world, "app:2") if task.desired_state is RUNNING]
    assert len(of_image(world, "app:1")) == 1
    assign(world, started.id, state=RUNNING)
    assert not of_image(world, "app:1")


def test_an_update_of_a_service_that_keeps_all_tasks_stops_those_whose_host_port_all_nodes_have_in_use() -> (
    None
):
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    endpoint = EndpointSpec(ports=(port,))
    before = replace(a_spec(2, minimum="100%", parallelism=0), endpoint_spec=endpoint)
    after = replace(a_spec(2, minimum="100%", parallelism=0, image="app:2"), endpoint_spec=endpoint)
    world = a_world(before, ("n1", "n2"))
    world.update(after)
    world.settle()
    for task in of_image(world, "app:2"):
        refuse(world, task, "no suitable node (host-mode port already in use on 2 nodes)")
    assert len(of_image(world, "app:1")) == 1, "each of the new tasks waits for an old one"
    world.settle()
    assert len(of_image(world, "app:1")) == 1
    world.stop_all()
    world.settle()
    first, _ = of_image(world, "app:2")
    assign(world, first.id, node=world.tasks[TaskId("old1")].node_id, state=RUNNING)
    assert not of_image(world, "app:1")


def test_an_update_of_a_service_that_keeps_all_tasks_waits_for_what_others_may_free() -> None:
    world = a_world(a_spec(2, minimum="100%", parallelism=0), ("n1", "n2"))
    world.update(a_spec(2, minimum="100%", parallelism=0, image="app:2"))
    world.settle()
    for task in of_image(world, "app:2"):
        refuse(world, task, "no suitable node (insufficient resources on 2 nodes)")
    assert len(of_image(world, "app:1")) == 2


def test_a_drain_and_an_update_together_stay_within_the_budget() -> None:
    world = a_world(a_spec(3, minimum="2", data=True, parallelism=0), ("n1", "n2", "n3"))
    world.update(a_spec(3, minimum="2", data=True, parallelism=0, image="app:2"))
    world.nodes[N1] = DRAINED
    world.settle()
    world.prepare_all()
    world.settle()
    assert len([task for task in wanted(world) if task.status.state is RUNNING]) == 2


def test_a_step_is_not_written_if_another_task_has_failed_since() -> None:
    world = a_world(a_spec(3, minimum="2", data=True), ("n1", "n2", "n3"))
    world.nodes[N1] = DRAINED
    changes = world.changes()
    assert [type(change) for change in changes] == [ReplaceTask]
    world.report("old2", TaskState.FAILED)
    world.apply(changes)
    assert world.tasks[TaskId("old1")].is_wanted


@pytest.mark.parametrize("how", ["update", "preempt", "drain"])
def test_a_task_that_began_to_run_since_the_decision_counts(how: str) -> None:
    world = a_world(a_spec(1, minimum="1"))
    world.report("old1", TaskState.STARTING)
    if how == "update":
        world.update(a_spec(1, minimum="1", image="app:2"))
    elif how == "preempt":
        preempt(world, "old1")
    else:
        world.nodes[N1] = DRAINED
    changes = world.changes()
    assert any(isinstance(one, ReplaceTask) for one in changes), "the case that is to be tested"
    world.report("old1", RUNNING)
    world.apply(changes)
    world.settle()
    assert world.tasks[TaskId("old1")].is_wanted


def test_scaling_down_does_not_wait_for_the_budget() -> None:
    world = a_world(a_spec(3, minimum="3"))
    world.update(a_spec(1, minimum="3"))
    assert {type(change) for change in world.changes()} == {RetireTask}
    world.settle()
    assert len(wanted(world)) == 1


def test_tasks_that_a_user_removes_count_against_the_budget() -> None:
    world = a_world(a_spec(4, minimum="2", parallelism=0), ("n1", "n2", "n3", "n4"))
    world.update(a_spec(4, minimum="2", parallelism=0, image="app:2"))
    world.settle()
    world.update(a_spec(3, minimum="2", parallelism=0, image="app:2"))
    world.prepare_all()
    stopped = [change for change in world.changes() if isinstance(change, RetireTask)]
    goals = [change.desired for change in stopped if change.task.status.state is RUNNING]
    assert sorted(goal.value for goal in goals) == ["remove", "shutdown"], "two of four stay"


def a_blocked_update(*, data: bool) -> tuple[World, Task, Task]:
    """Return an update in which slot 2 has lost its node, and the budget keeps the old task of slot 1."""
    spec = a_spec(2, minimum="1", parallelism=2, data=data)
    world = a_world(spec, ("n1", "n2"))
    container = replace(spec.task_template.container_spec or ContainerSpec(), image="app:2")
    world.update(replace(spec, task_template=replace(spec.task_template, container_spec=container)))
    world.settle()
    first, second = of_image(world, "app:2")
    world.put(replace(world.tasks[TaskId("old2")], node_id=NodeId("gone")))
    world.settle()
    assign(world, first.id, state=TaskState.READY)
    assert world.tasks[first.id].desired_state is TaskState.READY, "slot 2 may have a task soon"
    return world, first, second


def refuse(world: World, task: Task, err: str = "no suitable node") -> None:
    world.put(replace(task, status=replace(task.status, state=TaskState.PENDING, err=err)))
    world.settle()


def test_an_update_whose_stop_the_budget_forbids_starts_the_prepared_task_first() -> None:
    """The new task of slot 2 may need the node of slot 1, so no other task would raise the number of tasks."""
    world, first, second = a_blocked_update(data=False)
    refuse(world, second)
    assert world.tasks[first.id].desired_state is RUNNING
    assert world.tasks[TaskId("old1")].is_wanted
    assign(world, first.id, state=RUNNING)
    assert not world.tasks[TaskId("old1")].is_wanted


def test_a_prepared_task_that_writes_data_does_not_start_first() -> None:
    world, first, second = a_blocked_update(data=True)
    refuse(world, second)
    assert world.tasks[first.id].desired_state is TaskState.READY
    assert world.tasks[TaskId("old1")].is_wanted
