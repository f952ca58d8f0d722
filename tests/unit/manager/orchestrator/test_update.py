"""Rolling updates, one decision at a time."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.changes import Recheck, SetUpdateStatus
from skep.model.node import Node
from skep.model.service import (
    PortConfig,
    PublishMode,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS
from tests.builders import a_node, a_service_spec
from tests.rollouts import a_spec, a_world, advance, image_of, message, state, wanted

RUNNING = TaskState.RUNNING


def test_one_slot_at_a_time_by_default() -> None:
    world = a_world()
    world.update(a_spec("app:2"))
    world.settle()
    assert state(world) is UpdateState.UPDATING
    assert message(world) == "update in progress"
    assert [image_of(task) for task in wanted(world)].count("app:2") == 1
    assert len(wanted(world, "app:1")) == 3


def test_parallelism_zero_takes_all_slots_at_once() -> None:
    update = UpdateConfig(parallelism=0)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    world.settle()
    assert wanted(world, "app:1") == []


def test_stop_first_starts_the_new_task_when_the_old_one_has_stopped() -> None:
    world = a_world(replicas=1)
    (old,) = wanted(world)
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    (new,) = wanted(world)
    assert new.desired_state is TaskState.READY
    world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert world.tasks[new.id].desired_state is RUNNING


def test_start_first_keeps_the_old_task_until_the_new_one_runs() -> None:
    update = UpdateConfig(parallelism=1, order=UpdateOrder.START_FIRST)
    world = a_world(update, replicas=1)
    world.update(a_spec("app:2", replicas=1, update=update))
    world.settle()
    assert len(wanted(world)) == 2
    world.report(wanted(world, "app:2")[0].id, RUNNING)
    world.settle()
    assert wanted(world, "app:1") == []


def test_start_first_tries_again_while_the_old_task_runs_on() -> None:
    action = UpdateFailureAction.CONTINUE
    update = UpdateConfig(parallelism=1, order=UpdateOrder.START_FIRST, failure_action=action)
    world = a_world(update, replicas=1)
    world.update(a_spec("app:2", replicas=1, update=update))
    for _ in range(3):
        world.settle()
        world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
        world.now += 2.0
    world.settle()
    world.now += 2.0
    world.settle()
    assert len(wanted(world, "app:1")) == 1
    world.run_all()
    world.settle()
    assert wanted(world, "app:1") == []


def test_the_delay_passes_between_slots_but_not_after_the_last() -> None:
    update = UpdateConfig(parallelism=1, delay=10 * SECOND_NS, monitor=SECOND_NS)
    world = a_world(update, replicas=2)
    world.update(a_spec("app:2", replicas=2, update=update))
    advance(world)
    assert len(wanted(world, "app:2")) == 1
    assert world.steps() == [Recheck(10.0)]
    world.now = 10.0
    advance(world)
    assert len(wanted(world, "app:2")) == 2
    assert world.steps() == [Recheck(11.0)]
    world.now = 11.0
    world.settle()
    assert state(world) is UpdateState.COMPLETED
    assert message(world) == "update completed"


def test_the_update_is_watched_for_the_monitor_time_before_it_is_complete() -> None:
    world = a_world(replicas=1)
    world.update(a_spec("app:2", replicas=1))
    advance(world)
    assert state(world) is UpdateState.UPDATING
    assert world.steps() == [Recheck(5.0)]
    world.now = 5.0
    world.settle()
    assert state(world) is UpdateState.COMPLETED


def test_force_starts_every_task_anew_and_the_same_spec_none() -> None:
    world = a_world(replicas=1)
    (old,) = wanted(world)
    world.update(replace(world.service.spec, labels={"changed": "only"}))
    assert world.steps() == []
    template = world.service.spec.task_template
    world.update(replace(world.service.spec, task_template=replace(template, force_update=1)))
    world.settle()
    assert old.id not in {task.id for task in wanted(world)}


def test_a_change_of_published_ports_starts_every_task_anew() -> None:
    world = a_world(replicas=1)
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    world.update(replace(world.service.spec, endpoint_spec=a_service_spec(ports=(port,)).endpoint_spec))
    world.settle()
    assert world.service.update_status is not None


def test_new_constraints_move_only_tasks_whose_nodes_do_not_meet_them() -> None:
    world = a_world(replicas=2)
    world.nodes[Node(id=a_node("n2").id).id] = a_node("n2", labels={"disk": "ssd"})
    task = wanted(world)[1]
    world.put(replace(task, node_id=a_node("n2").id))
    template = world.service.spec.task_template
    placement = a_service_spec(constraints=("node.labels.disk==ssd",)).task_template.placement
    world.update(replace(world.service.spec, task_template=replace(template, placement=placement)))
    world.settle()
    assert task.id in {task.id for task in wanted(world)}
    assert len(wanted(world)) == 2


def test_an_update_during_an_update_starts_over_with_the_newest_spec() -> None:
    world = a_world()
    world.update(a_spec("app:2"))
    advance(world)
    world.update(a_spec("app:3"))
    for _ in range(6):
        advance(world)
    assert len(wanted(world, "app:3")) == 4


def test_an_update_that_overtakes_another_keeps_what_runs() -> None:
    update = UpdateConfig(parallelism=1, order=UpdateOrder.START_FIRST)
    world = a_world(update, replicas=1)
    (old,) = wanted(world)
    world.update(a_spec("app:2", replicas=1, update=update))
    world.settle()
    world.update(a_spec("app:3", replicas=1, update=update))
    world.settle()
    assert [image_of(task) for task in wanted(world)] == ["app:1", "app:3"]
    assert wanted(world)[0].id == old.id


def test_scaling_during_an_update_does_both() -> None:
    world = a_world()
    world.update(a_spec("app:2"))
    advance(world)
    world.update(a_spec("app:2", replicas=6))
    for _ in range(8):
        advance(world)
    assert len(wanted(world, "app:2")) == 6


def test_nothing_to_update_says_nothing() -> None:
    world = a_world()
    assert not any(isinstance(step, SetUpdateStatus) for step in world.steps())


configs = st.builds(
    UpdateConfig,
    parallelism=st.integers(0, 3),
    delay=st.sampled_from([0, SECOND_NS]),
    failure_action=st.sampled_from(list(UpdateFailureAction)),
    max_failure_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    order=st.sampled_from(list(UpdateOrder)),
)
reports = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.sampled_from([RUNNING, TaskState.FAILED, TaskState.REJECTED, TaskState.SHUTDOWN]),
        st.sampled_from([0.0, 1.0, 6.0]),
    ),
    max_size=20,
)


@given(configs, reports)
@settings(max_examples=200)
def test_whatever_happens_parallelism_holds_and_decisions_settle(
    update: UpdateConfig, happenings: list[tuple[int, TaskState, float]]
) -> None:
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    for number, reported, pause in happenings:
        world.now += pause
        world.settle()
        slots: dict[int, list[Task]] = {}
        for task in wanted(world):
            slots.setdefault(task.slot, []).append(task)
        starts_first = update.order is UpdateOrder.START_FIRST
        assert all(len(tasks) <= (2 if starts_first else 1) for tasks in slots.values())
        assert len(slots) == 4
        task = list(world.tasks.values())[number % len(world.tasks)]
        is_stoppable = reported is not TaskState.SHUTDOWN or task.desired_state > RUNNING
        is_startable = reported is not RUNNING or task.desired_state >= RUNNING
        if reported > task.status.state and is_stoppable and is_startable:
            world.report(task.id, reported)
    for _ in range(12):
        world.now += 61.0
        advance(world)
    world.now += 61.0
    world.settle()
    assert state(world) not in (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)
    assert len(wanted(world)) == 4
