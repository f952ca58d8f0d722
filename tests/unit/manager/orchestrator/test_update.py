"""Rolling updates, one decision at a time."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import RetireTask, SetUpdateStatus, apply
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability, Node
from skep.model.service import (
    PortConfig,
    PublishMode,
    Resources,
    RestartCondition,
    RestartPolicy,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import NetworkAttachment, Task, TaskState, VolumeAttachment
from skep.model.values.ids import TaskId
from skep.model.values.times import SECOND_NS
from skep.model.volume import Volume, VolumeScope, VolumeSharing
from skep.store.keys import object_key
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transactions.proposal import Unchanged
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_cluster_volume, a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import a_spec, a_world, advance, image_of, message, state, wanted
from tests.support.managers.worlds import World

RUNNING = TaskState.RUNNING


def test_one_slot_at_a_time_by_default() -> None:
    world = a_world()
    world.update(a_spec("app:2"))
    world.settle()
    assert state(world) is UpdateState.UPDATING
    assert message(world) == "update in progress"
    assert [image_of(task) for task in wanted(world)].count("app:2") == 1
    world.prepare_all()
    world.settle()
    assert len(wanted(world, "app:1")) == 3


def test_parallelism_zero_takes_all_slots_at_once() -> None:
    update = UpdateConfig(parallelism=0)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    world.settle()
    world.prepare_all()
    world.settle()
    assert wanted(world, "app:1") == []


def test_stop_first_stops_the_old_task_for_one_that_is_ready_and_then_starts_that() -> None:
    world = a_world(replicas=1)
    (old,) = wanted(world)
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    (new,) = wanted(world, "app:2")
    assert (new.desired_state, world.tasks[old.id].desired_state) == (TaskState.READY, RUNNING)
    world.report(new.id, TaskState.READY)
    world.settle()
    assert wanted(world) == [world.tasks[new.id]]
    assert world.tasks[new.id].desired_state is TaskState.READY
    world.report(old.id, TaskState.SHUTDOWN)
    world.settle()
    assert world.tasks[new.id].desired_state is RUNNING


def test_a_successor_that_took_long_to_prepare_still_waits_for_the_stop() -> None:
    world = a_world(replicas=1)
    (old,) = wanted(world)
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    (new,) = wanted(world, "app:2")
    world.now = 500.0
    world.report(new.id, TaskState.READY)
    world.settle()
    assert (world.tasks[old.id].is_wanted, world.tasks[new.id].desired_state) == (False, TaskState.READY)
    world.now = 560.0
    world.settle()
    assert world.tasks[new.id].desired_state is RUNNING


@pytest.mark.parametrize("order", list(UpdateOrder))
def test_the_old_task_runs_on_while_the_new_one_cannot_be_prepared(order: UpdateOrder) -> None:
    update = UpdateConfig(parallelism=1, order=order, failure_action=UpdateFailureAction.CONTINUE)
    world = a_world(update, replicas=1)
    (old,) = wanted(world)
    world.update(a_spec("app:2", replicas=1, update=update))
    for _ in range(4):
        world.settle()
        world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
        world.settle()
        assert world.tasks[old.id].is_wanted
        world.now += 2.0
    for _ in range(3):
        advance(world)
    assert (len(wanted(world, "app:2")), wanted(world, "app:1")) == (1, [])


@pytest.mark.parametrize("order", list(UpdateOrder))
def test_a_new_task_that_is_not_tried_again_leaves_the_old_one_and_the_update_goes_on(
    order: UpdateOrder,
) -> None:
    update = UpdateConfig(parallelism=1, order=order, failure_action=UpdateFailureAction.CONTINUE)
    world = a_world(update, replicas=2)
    spec = a_spec("app:2", replicas=2, update=update)
    once = replace(spec.task_template, restart_policy=RestartPolicy(condition=RestartCondition.NONE))
    world.update(replace(spec, task_template=once))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
    for _ in range(3):
        advance(world)
    world.now = 5.0
    world.settle()
    assert state(world) is UpdateState.COMPLETED
    assert sorted(image_of(task) for task in wanted(world)) == ["app:1", "app:2"]
    assert len(world.tasks) == 4


ROOM = Resources(memory_bytes=1 << 30)
HOST_PORT = PortConfig(target_port=80, published_port=80, publish_mode=PublishMode.HOST)


@pytest.mark.parametrize(
    ("requested", "gives_way"),
    [({"reserve": ROOM}, True), ({"max_replicas": 1}, True), ({"ports": (HOST_PORT,)}, True), ({}, False)],
)
def test_what_takes_the_room_of_its_successor_gives_way_and_nothing_else(
    requested: dict[str, Any], gives_way: bool
) -> None:
    service = a_service(spec=a_service_spec(image="app:1", **requested))
    world = World(service, nodes=[a_node("n1")])
    world.put(a_task(node="n1", service=service))
    world.update(a_service_spec(image="app:2", **requested))
    world.settle()
    (new,) = wanted(world, "app:2")
    world.put(replace(new, status=replace(new.status, state=TaskState.PENDING)))
    world.settle()
    assert len(wanted(world, "app:1")) == 1
    refused = replace(new.status, state=TaskState.PENDING, err="no suitable node (...)")
    world.put(replace(world.tasks[new.id], status=refused))
    world.settle()
    assert wanted(world, "app:1") == (
        [] if gives_way else [task for task in wanted(world) if task.id != new.id]
    )


@pytest.mark.parametrize(
    ("volume", "gives_way"),
    [
        (a_cluster_volume(sharing=VolumeSharing.NONE), True),
        (a_cluster_volume(sharing=VolumeSharing.ONE_WRITER), True),
        (a_cluster_volume(sharing=VolumeSharing.ALL), True),  # scope single: it is on the old task's node
        (a_cluster_volume(sharing=VolumeSharing.ONE_WRITER, scope=VolumeScope.MULTI), True),
        (a_cluster_volume(sharing=VolumeSharing.ALL, scope=VolumeScope.MULTI), False),
    ],
)
@pytest.mark.parametrize("source", ["orders", "group:g"])
def test_a_cluster_volume_that_cannot_be_shared_is_given_up_for_the_successor(
    source: str, volume: Volume, gives_way: bool
) -> None:
    volume = replace(volume, spec=replace(volume.spec, group="g"))
    world = a_world_with_volume(volume, source)
    world.update(mounting(source, image="app:2"))
    world.settle()
    (new,) = wanted(world, "app:2")
    refused = replace(new.status, state=TaskState.PENDING, err="no suitable node (...)")
    world.put(replace(new, status=refused))
    world.settle()
    assert bool(wanted(world, "app:1")) is not gives_way


def test_a_task_keeps_its_volume_if_its_successor_mounts_another_one() -> None:
    world = a_world_with_volume(a_cluster_volume("orders"), "orders")
    world.update(mounting("other", image="app:2"))
    world.settle()
    (new,) = wanted(world, "app:2")
    refused = replace(new.status, state=TaskState.PENDING, err="no suitable node (...)")
    world.put(replace(new, status=refused))
    world.settle()
    assert len(wanted(world, "app:1")) == 1


def mounting(source: str, image: str = "app:1") -> ServiceSpec:
    spec = a_spec(image, replicas=1)
    container = ContainerSpec(image=image, mounts=(Mount(type="cluster", source=source, target="/d"),))
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def a_world_with_volume(volume: Volume, source: str) -> World:
    """The one task of app:1 has ``volume``."""
    service = a_service(spec=mounting(source))
    world = World(service, nodes=[a_node("n1")])
    world.volumes[volume.id] = volume
    attachment = VolumeAttachment(id=volume.id, source=source, target="/d")
    world.put(replace(a_task(node="n1", service=service), volumes=(attachment,)))
    return world


def test_a_limit_of_replicas_that_an_update_adds_counts_the_tasks_that_it_replaces() -> None:
    service = a_service(spec=a_service_spec(image="app:1"))
    world = World(service, nodes=[a_node("n1")])
    world.put(a_task(node="n1", service=service))
    world.update(a_service_spec(image="app:2", max_replicas=1))
    world.settle()
    (new,) = wanted(world, "app:2")
    words = "no suitable node (max replicas per node limit exceed)"
    world.put(replace(new, status=replace(new.status, state=TaskState.PENDING, err=words)))
    world.settle()
    assert wanted(world, "app:1") == []


def test_addresses_that_have_run_out_are_given_back_for_the_successor() -> None:
    world = a_world(replicas=1)
    (old,) = wanted(world)
    world.put(replace(old, networks_attachments=(NetworkAttachment(),)))
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    (new,) = wanted(world, "app:2")
    world.put(replace(new, status=replace(new.status, err="no address is free")))
    world.settle()
    assert wanted(world, "app:1") == []


@pytest.mark.parametrize("order", list(UpdateOrder))
@pytest.mark.parametrize("stage", [TaskState.NEW, TaskState.PREPARING, TaskState.STARTING])
def test_a_task_that_does_not_run_is_nothing_to_hold_on_to(order: UpdateOrder, stage: TaskState) -> None:
    update = UpdateConfig(parallelism=1, order=order)
    service = a_service(spec=a_spec(update=update, replicas=1))
    world = World(service, nodes=[a_node("n1")])
    world.put(a_task("old", node="n1", service=service, state=stage))
    world.update(a_spec("app:2", replicas=1, update=update))
    world.settle()
    old = world.tasks[TaskId("old")]
    assert [image_of(task) for task in wanted(world)] == ["app:2"]
    assert old.status.state is (TaskState.SHUTDOWN if stage is TaskState.NEW else stage)


@pytest.mark.parametrize("waiting", [1, 2], ids=["one", "with that of an overtaken update"])
def test_an_old_task_that_gets_a_node_before_it_is_retired_is_waited_for(waiting: int) -> None:
    service = a_service(spec=a_spec(replicas=1))
    world = World(service, nodes=[a_node("n1")])
    for number in range(waiting):
        world.put(a_task(f"old{number}", service=service, state=TaskState.PENDING))
    world.update(a_spec("app:2", replicas=1))
    decided = world.changes()
    for number in range(waiting):
        world.put(a_task(f"old{number}", node="n1", service=service, state=TaskState.ASSIGNED))
    world.apply(decided)
    world.settle()
    (new,) = wanted(world)
    assert (image_of(new), new.desired_state) == ("app:2", TaskState.READY)
    world.stop_all()
    world.settle()
    assert world.tasks[new.id].desired_state is RUNNING


def test_a_task_that_still_stops_on_a_drained_node_is_waited_for_if_an_update_fills_its_slot() -> None:
    spec = a_service_spec(replicas=1, restart=RestartPolicy(condition=RestartCondition.NONE))
    world = World(a_service(spec=spec), nodes=[a_node("n1", availability=Availability.DRAIN), a_node("n2")])
    world.put(a_task("old", node="n1", service=world.service))
    world.settle()
    assert wanted(world) == []
    world.update(replace(spec, task_template=replace(spec.task_template, force_update=1)))
    world.settle()
    (new,) = wanted(world)
    assert new.desired_state is TaskState.READY
    world.stop_all()
    world.settle()
    assert world.tasks[new.id].desired_state is RUNNING


@pytest.mark.parametrize("order", list(UpdateOrder))
def test_a_task_whose_status_cannot_be_read_is_held_on_to_like_one_that_runs(order: UpdateOrder) -> None:
    update = UpdateConfig(parallelism=1, order=order)
    service = a_service(spec=a_spec(update=update, replicas=2))
    world = World(service, nodes=[a_node("n1")])
    for slot, status in ((1, TaskState.ASSIGNED), (2, RUNNING)):
        world.put(a_task(f"old{slot}", slot=slot, node="n1", service=service, state=status))
    world.unknown.add(TaskId("old1"))
    world.update(a_spec("app:2", replicas=2, update=update))
    world.settle()
    assert {task.id for task in wanted(world, "app:1")} == {"old1", "old2"}
    (new,) = wanted(world, "app:2")
    world.report(new.id, TaskState.REJECTED)
    world.settle()
    assert {task.id for task in wanted(world, "app:1")} == {"old1", "old2"}
    world.update(a_spec("app:3", replicas=2, update=update))
    for _ in range(3):
        advance(world)
    assert [image_of(task) for task in wanted(world)] == ["app:3"] * 2


def test_an_update_goes_on_when_the_spec_that_its_old_tasks_were_made_from_can_be_read_again() -> None:
    """Meanwhile the old task was taken for one of the present version, and the new one beside it was stopped."""
    world = a_world(replicas=1)
    made_from = world.service.spec_version
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    assert len(wanted(world)) == 2
    world.unread_versions.add(made_from)
    for _ in range(3):
        advance(world)
    assert [image_of(task) for task in wanted(world)] == ["app:1"]
    world.unread_versions.clear()
    for _ in range(3):
        advance(world)
    assert [image_of(task) for task in wanted(world)] == ["app:2"]


@pytest.mark.parametrize(("is_running", "kept"), [(False, "old1"), (True, "new1")])
def test_of_an_old_task_of_which_nothing_can_be_read_and_a_new_one_the_old_one_stays_until_the_new_one_runs(
    *, is_running: bool, kept: str
) -> None:
    update = UpdateConfig(order=UpdateOrder.START_FIRST)
    service = a_service(a_spec("app:1", replicas=1, update=update))
    world = World(service, nodes=[a_node("n1")])
    world.put(a_task("old1", slot=1, node="n1", service=service, state=TaskState.ASSIGNED))
    made_from = service.spec_version
    world.update(a_spec("app:2", replicas=1, update=update))
    new = a_task("new1", slot=1, node="n1", service=world.service, state=TaskState.PREPARING)
    world.put(replace(new, status=replace(new.status, state=RUNNING)) if is_running else new)
    world.unknown.add(TaskId("old1"))
    world.unread_versions.add(made_from)
    world.settle()
    assert [task.id for task in wanted(world)] == [kept]


def test_a_service_that_never_came_to_run_is_updated_to_one_that_does() -> None:
    """Every task of it is rejected again and again; the update does not wait for any of them."""
    world = a_world(replicas=3)
    for task in wanted(world):
        world.report(task.id, TaskState.REJECTED)
    world.settle()
    for _ in range(3):
        for task in wanted(world):
            world.report(task.id, TaskState.REJECTED)
        world.settle()
    world.update(a_spec("app:2", replicas=3))
    for _ in range(4):
        advance(world)
    world.now += 5.0
    world.settle()
    assert state(world) is UpdateState.COMPLETED
    assert [image_of(task) for task in wanted(world)] == ["app:2"] * 3


def test_start_first_keeps_the_old_task_until_the_new_one_runs() -> None:
    update = UpdateConfig(parallelism=1, order=UpdateOrder.START_FIRST)
    world = a_world(update, replicas=1)
    world.update(a_spec("app:2", replicas=1, update=update))
    world.settle()
    assert len(wanted(world)) == 2
    world.report(wanted(world, "app:2")[0].id, RUNNING)
    world.settle()
    assert wanted(world, "app:1") == []


def test_the_old_task_runs_on_if_the_new_one_ends_before_its_retirement_is_written() -> None:
    world = a_world(UpdateConfig(order=UpdateOrder.START_FIRST), replicas=1)
    world.update(a_spec("app:2", replicas=1, update=UpdateConfig(order=UpdateOrder.START_FIRST)))
    world.settle()
    world.run_all()
    (old,), (new,) = wanted(world, "app:1"), wanted(world, "app:2")
    changes = [step for step in world.steps() if isinstance(step, RetireTask)]
    assert [change.task for change in changes] == [old]
    state = State()
    tx = LocalTransaction(state, 0)
    tx.put(old)
    tx.put(new)
    proposal = tx.proposal()
    state.apply(1, [KeyChange(key, value, 1, 1) for key, value in proposal.puts])
    for change in changes:
        tx = LocalTransaction(state, 0)
        apply(tx, change, lambda: "another", "2026-01-01T00:00:00Z")
    assert Unchanged(object_key("task", new.id, "status"), 1) in tx.proposal().compares
    world.report(new.id, TaskState.FAILED)
    world.apply(changes)
    assert wanted(world, "app:1") == [old]


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
    advance(world)
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
    for _ in range(3):
        advance(world)
    assert task.id in {task.id for task in wanted(world)}
    assert len(wanted(world)) == 2


def test_a_task_whose_spec_cannot_be_read_is_left_alone() -> None:
    """Of the version before the present one, which says the same: only the leader's disk is damaged."""
    world = a_world(replicas=1)
    (task,) = wanted(world)
    world.update(replace(world.service.spec, labels={"a": "b"}))
    world.tasks[task.id] = replace(task, spec=TaskSpec())
    assert world.changes() != [], "the case that is to be tested"
    world.unread_versions.add(task.spec_version)
    assert world.changes() == []


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


def _started(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.desired_state is not TaskState.READY]


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
        assert all(len(tasks) <= 2 for tasks in slots.values())
        assert all(starts_first or len(_started(tasks)) <= 1 for tasks in slots.values())
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
