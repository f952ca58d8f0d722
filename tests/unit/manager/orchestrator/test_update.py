"""Rolling updates, one decision at a time."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.changes import Recheck, SetUpdateStatus
from skep.model.node import Node, NodeState
from skep.model.service import (
    PortConfig,
    PublishMode,
    RestartPolicy,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS
from tests.builders import a_node, a_service, a_service_spec, a_task
from tests.worlds import World

RUNNING = TaskState.RUNNING
AT_ONCE = RestartPolicy(delay=0)


def a_spec(image: str = "app:1", *, replicas: int = 4, update: UpdateConfig | None = None) -> ServiceSpec:
    return a_service_spec(replicas=replicas, image=image, update=update, rollback=update, restart=AT_ONCE)


def a_world(update: UpdateConfig | None = None, *, replicas: int = 4) -> World:
    """All replicas of app:1 run on n1."""
    service = a_service(spec=a_spec(update=update, replicas=replicas))
    world = World(service, nodes=[a_node("n1")])
    for slot in range(1, replicas + 1):
        world.put(a_task(slot=slot, node="n1", service=service))
    return world


def wanted(world: World, image: str = "") -> list[Task]:
    return [
        t for t in world.tasks.values() if t.desired_state <= RUNNING and (not image or image_of(t) == image)
    ]


def image_of(task: Task) -> str:
    return task.spec.container_spec.image if task.spec.container_spec else ""


def state(world: World) -> UpdateState | None:
    return world.service.update_status.state if world.service.update_status else None


def message(world: World) -> str:
    return world.service.update_status.message if world.service.update_status else ""


def advance(world: World) -> None:
    """What was decided comes about: retired tasks stop, wanted ones run."""
    world.settle()
    world.stop_all()
    world.settle()
    world.run_all()
    world.settle()


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


def test_a_failure_pauses_with_dockers_words_and_a_further_update_goes_on() -> None:
    world = a_world()
    world.update(a_spec("app:2"))
    world.settle()
    lead = wanted(world, "app:2")[0]
    world.report(lead.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert message(world) == f"update paused due to failure or early termination of task {lead.id}"
    advance(world)
    assert len(wanted(world, "app:1")) == 3
    world.update(a_spec("app:3"))
    for _ in range(4):
        advance(world)
    assert len(wanted(world, "app:3")) == 4


def test_the_message_of_a_failed_update_names_the_cause() -> None:
    world = a_world(replicas=1)
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    (lead,) = wanted(world, "app:2")
    status = replace(lead.status, state=TaskState.REJECTED, err="No such image: app:2")
    world.put(replace(lead, status=status))
    world.settle()
    words = f"update paused due to failure or early termination of task {lead.id}: No such image: app:2"
    assert (state(world), message(world)) == (UpdateState.PAUSED, words)


def test_an_update_goes_on_when_the_node_of_its_first_task_is_lost() -> None:
    world = a_world(replicas=2)
    world.nodes[a_node("n2").id] = a_node("n2")
    world.update(a_spec("app:2", replicas=2))
    world.settle()
    world.stop_all()
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.put(replace(lead, node_id=a_node("n2").id, status=replace(lead.status, state=TaskState.PREPARING)))
    world.nodes[a_node("n2").id] = a_node("n2", state=NodeState.DOWN)
    for _ in range(5):
        world.settle()
        for task in list(world.tasks.values()):
            if task.node_id != "n2" and task.desired_state > RUNNING and not task.status.state.is_terminal:
                world.report(task.id, TaskState.SHUTDOWN)
        world.run_all()
        world.now += 6
    world.settle()
    assert world.tasks[lead.id].status.state is TaskState.PREPARING
    assert state(world) is UpdateState.COMPLETED
    assert len(wanted(world, "app:2")) == 2


def deadline(seconds: int, action: UpdateFailureAction = UpdateFailureAction.PAUSE) -> ServiceSpec:
    update = UpdateConfig(parallelism=1, failure_action=action, monitor=SECOND_NS)
    spec = a_spec("app:2", replicas=2, update=update)
    return replace(spec, labels={"skep.progress-deadline": f"{seconds}s"})


def test_a_task_that_gets_nowhere_ends_the_update_after_its_deadline() -> None:
    world = a_world(replicas=2)
    world.update(deadline(30))
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.now = 39.9
    world.settle()
    assert state(world) is UpdateState.UPDATING
    assert Recheck(40.0) in world.steps()
    world.now = 40.0
    world.settle()
    words = f"update paused because task {lead.id} made no progress within 40 s: it is new"
    assert (state(world), message(world)) == (UpdateState.PAUSED, words)


def test_an_overdue_task_rolls_the_update_back_or_lets_it_go_on_as_the_failure_action_says() -> None:
    world = a_world(replicas=2)
    world.update(deadline(30, UpdateFailureAction.ROLLBACK))
    world.settle()
    world.now = 40.0
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_STARTED
    world = a_world(replicas=2)
    world.update(deadline(30, UpdateFailureAction.CONTINUE))
    world.settle()
    assert len(wanted(world, "app:2")) == 1
    world.now = 40.0
    world.settle()
    assert len(wanted(world, "app:2")) == 2


def test_a_task_that_fails_after_the_monitor_time_is_no_failure_of_the_update() -> None:
    update = UpdateConfig(parallelism=1, delay=100 * SECOND_NS, monitor=SECOND_NS)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    advance(world)
    world.now = 2.0
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.UPDATING


def test_the_ratio_allows_some_failures() -> None:
    update = UpdateConfig(parallelism=0, max_failure_ratio=0.25)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    world.settle()
    first, second, *_ = wanted(world, "app:2")
    world.report(first.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.UPDATING
    world.report(second.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED


def test_continue_ignores_failures() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.CONTINUE)
    world = a_world(update, replicas=2)
    world.update(a_spec("app:2", replicas=2, update=update))
    for _ in range(2):
        world.settle()
        world.stop_all()
        for task in wanted(world, "app:2"):
            world.report(task.id, TaskState.FAILED)
    advance(world)
    assert len(wanted(world, "app:2")) == 2


def test_an_update_that_goes_on_in_spite_of_failures_comes_to_an_end() -> None:
    action = UpdateFailureAction.CONTINUE
    update = UpdateConfig(parallelism=1, order=UpdateOrder.START_FIRST, failure_action=action)
    world = a_world(update, replicas=2)
    world.update(a_spec("app:2", replicas=2, update=update))
    for _ in range(4):
        world.settle()
        for task in wanted(world, "app:2"):
            world.report(task.id, TaskState.REJECTED)
        world.now += 5.0
    world.settle()
    assert state(world) is UpdateState.COMPLETED
    assert len(wanted(world, "app:1")) == 2


def test_a_rollback_returns_to_the_previous_spec() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    world.settle()
    lead = wanted(world, "app:2")[0]
    world.report(lead.id, TaskState.REJECTED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_STARTED
    assert message(world) == f"update rolled back due to failure or early termination of task {lead.id}"
    assert world.service.previous_spec is None
    advance(world)
    world.now += 5.0
    world.settle()
    assert len(wanted(world, "app:1")) == 4
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert message(world) == "rollback completed"


def test_a_rollback_that_fails_is_paused_and_not_rolled_back() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
    world.settle()
    world.report(wanted(world, "app:1")[-1].id, TaskState.REJECTED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_PAUSED
    assert message(world).startswith("rollback paused due to failure or early termination of task ")


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
