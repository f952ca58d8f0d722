"""Staged updates: shares of new connections, what starts in each step, what a failure leaves, and other updates."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.manager.control.services import update_service
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.staging import RequestCounts
from skep.model.networks.tables import TableEndpoint, TableService, TableSplit
from skep.model.node import Availability
from skep.model.service import Service, ServiceSpec, UpdateConfig, UpdateSplit, UpdateState
from skep.model.staging.shares import shares_of
from skep.model.staging.updates import TaskRequests
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId, TaskId, new_id
from skep.model.values.times import SECOND_NS, Timestamp
from skep.store.interface import Commit, Transaction, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.rollouts import a_spec, a_world, advance, image_of, message, state, wanted
from tests.support.managers.worlds import World
from tests.support.store.store_transactions import eventually

CANARY_STEPS = {"skep.update": "canary", "skep.update.steps": "5%,50%"}
CANARY = {**CANARY_STEPS, "skep.update.step-time": "60s"}
BLUE_GREEN = {"skep.update": "blue-green", "skep.update.keep": "100s"}
ALL_AT_ONCE = UpdateConfig(parallelism=0, monitor=5 * SECOND_NS)
RUNNING = TaskState.RUNNING
NOW = Timestamp("2026-01-02T03:04:05Z")


def a_canary(image: str = "app:2", labels: dict[str, str] = CANARY, *, replicas: int = 4) -> ServiceSpec:
    return replace(a_spec(image, update=ALL_AT_ONCE, replicas=replicas), labels=labels)


def split(world: World) -> UpdateSplit | None:
    return world.service.update_status.split if world.service.update_status else None


def percent(world: World) -> int | None:
    found = split(world)
    assert found is not None
    return found.percent


def counts(world: World) -> tuple[int, int]:
    """Return the number of old and of new tasks."""
    return len(wanted(world, "app:1")), len(wanted(world, "app:2"))


def begun(*, replicas: int = 4) -> World:
    """Return a world whose first canary runs."""
    world = a_world(update=ALL_AT_ONCE, replicas=replicas)
    world.update(a_canary(replicas=replicas))
    advance(world)
    return world


def pass_time(world: World, seconds: float) -> None:
    world.now += seconds
    advance(world)


def test_a_canary_raises_its_share_step_by_step_beside_all_old_tasks() -> None:
    world = begun()
    assert (percent(world), counts(world)) == (5, (4, 1))
    assert message(world) == "update in progress: step 1 of 3, 5 % of new connections"
    assert [step for step in world.steps() if isinstance(step, Recheck)] == [Recheck(60.0)]
    pass_time(world, 59)
    assert percent(world) == 5
    pass_time(world, 2)
    assert (percent(world), counts(world)) == (50, (4, 2))
    pass_time(world, 61)
    assert percent(world) is None
    assert message(world) == "update in progress: step 3 of 3, replacing the old tasks"
    pass_time(world, 6)
    assert counts(world) == (0, 4)
    assert (state(world), split(world)) == (UpdateState.COMPLETED, None)


@pytest.mark.parametrize("fails", [False, True])
def test_tasks_that_a_scale_adds_in_the_last_step_decide_about_the_update(fails: bool) -> None:
    world = begun()
    for _ in range(2):
        pass_time(world, 61)
    assert (state(world), counts(world)) == (UpdateState.UPDATING, (0, 4))
    before = wanted(world, "app:2")
    world.update(a_canary(replicas=6))
    advance(world)
    assert (state(world), counts(world)) == (UpdateState.UPDATING, (0, 6))
    if fails:
        added = [task for task in wanted(world, "app:2") if task not in before]
        world.report(added[0].id, TaskState.FAILED)
        world.settle()
        # As in Docker, the previous spec is that of before the scale.
        assert (state(world), counts(world)) == (UpdateState.ROLLBACK_COMPLETED, (0, 4))
    else:
        pass_time(world, 6)
        assert state(world) is UpdateState.COMPLETED


def test_the_versions_of_new_tasks_are_told_apart() -> None:
    world = begun()
    found = split(world)
    assert found is not None
    (new,) = wanted(world, "app:2")
    assert new.spec_version is not None
    assert found.versions == (new.spec_version.index,)


def test_a_step_waits_for_a_new_task_that_does_not_run() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary())
    world.settle()
    world.now += 120
    world.settle()
    assert (percent(world), counts(world)) == (0, (4, 1))
    advance(world)
    pass_time(world, 59)
    assert percent(world) == 5
    pass_time(world, 2)
    assert percent(world) == 50


def test_a_failure_takes_the_share_back_at_once_and_removes_new_tasks_only() -> None:
    world = begun()
    (new,) = wanted(world, "app:2")
    old = {task.id for task in wanted(world, "app:1")}
    pass_time(world, 30)
    world.report(new.id, TaskState.FAILED)
    world.settle()
    assert counts(world) == (4, 0)
    assert {task.id for task in wanted(world)} == old
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert message(world) == (
        f"rollback completed: update rolled back due to failure or early termination of task {new.id}"
    )


def test_a_rollback_leaves_no_connections_to_new_tasks_from_its_first_moment() -> None:
    world = begun()
    (new,) = wanted(world, "app:2")
    assert new.spec_version is not None
    world.report(new.id, TaskState.FAILED)
    world.apply(world.changes())
    assert state(world) is UpdateState.ROLLBACK_STARTED
    assert split(world) == UpdateSplit(percent=0, versions=(new.spec_version.index,))


def test_a_failure_ratio_counts_the_new_tasks_only() -> None:
    tolerant = replace(ALL_AT_ONCE, max_failure_ratio=0.9)
    world = a_world(update=tolerant)
    world.update(replace(a_canary(), update_config=tolerant))
    advance(world)
    (new,) = wanted(world, "app:2")
    world.report(new.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED


def test_a_task_that_moved_from_a_drained_node_fails_the_update_as_well() -> None:
    world = begun()
    world.nodes = {"n1": a_node("n1"), "n2": a_node("n2")}  # type: ignore[dict-item]
    (new,) = wanted(world, "app:2")
    world.put(replace(new, node_id=a_node("n2").id))
    world.nodes[a_node("n2").id] = a_node("n2", availability=Availability.DRAIN)
    advance(world)
    advance(world)
    (moved,) = wanted(world, "app:2")
    assert moved.id != new.id
    assert len(wanted(world, "app:1")) == 4
    world.report(moved.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED


def test_a_new_leader_continues_at_the_step_and_measures_its_time_anew() -> None:
    world = begun()
    pass_time(world, 61)
    assert percent(world) == 50
    pass_time(world, 30)
    world.seen = ObservedTimes(world.now)
    pass_time(world, 59)
    assert (percent(world), counts(world)) == (50, (4, 2))
    pass_time(world, 2)
    assert percent(world) is None


def test_a_paused_canary_keeps_its_share_and_all_tasks() -> None:
    world = begun()
    status = world.service.update_status
    assert status is not None
    world.put(replace(world.service, update_status=replace(status, state=UpdateState.PAUSED)))
    pass_time(world, 600)
    assert (percent(world), counts(world), state(world)) == (5, (4, 1), UpdateState.PAUSED)
    resumed = replace(status, message="update in progress")
    world.put(replace(world.service, update_status=resumed))
    world.settle()
    assert message(world) == "update in progress: step 1 of 3, 5 % of new connections"
    pass_time(world, 61)
    assert percent(world) == 50


def test_an_old_task_on_a_drained_node_is_replaced_in_any_step() -> None:
    world = begun()
    world.nodes = {"n1": a_node("n1"), "n2": a_node("n2")}  # type: ignore[dict-item]
    free = {task.slot for task in wanted(world)} - {task.slot for task in wanted(world, "app:2")}
    leaving = next(task for task in wanted(world, "app:1") if task.slot in free)
    world.put(replace(leaving, node_id=a_node("n2").id))
    world.nodes[a_node("n2").id] = a_node("n2", availability=Availability.DRAIN)
    for _ in range(3):
        advance(world)
    assert (percent(world), counts(world)) == (5, (3, 2))


def test_a_second_canary_replaces_the_first_one_and_not_the_old_tasks() -> None:
    world = begun()
    world.update(a_canary("app:3"))
    advance(world)
    assert len(wanted(world, "app:3")) == 1
    assert counts(world) == (4, 0)


def shares(world: World) -> dict[str, float]:
    """Return the percentage of new connections by image."""
    found = split(world)
    table = (
        TableSplit(found.percent, found.versions, found.withdrawn)
        if found and found.percent is not None
        else None
    )
    running = [task for task in world.tasks.values() if task.is_wanted and task.status.state is RUNNING]
    serving = [
        TableEndpoint(task_id=task.id, node_id=task.node_id, version=task.spec_version.index)
        for task in running
        if task.spec_version is not None
    ]
    divided = shares_of(TableService(id=world.service.id, name="web", split=table), serving)
    images: dict[str, float] = {}
    for group, of_group in ((divided.even, 100 - divided.percent), (divided.new, divided.percent)):
        for one in group:
            image = image_of(world.tasks[one.task_id])
            images[image] = images.get(image, 0) + of_group / len(group)
    return {image: round(part) for image, part in images.items()}


@pytest.mark.parametrize("labels", [CANARY, {**CANARY_STEPS, "skep.update.promote": "manual"}, {}])
def test_the_old_spec_deployed_again_gets_all_connections_at_once(labels: dict[str, str]) -> None:
    world = begun()
    old = {task.id for task in wanted(world, "app:1")}
    world.update(a_canary("app:1", labels))
    assert shares(world) == {"app:1": 100}
    while changes := world.changes():
        world.apply(changes[:1])
        assert shares(world) == {"app:1": 100}
    assert {task.id for task in wanted(world)} == old
    assert (state(world), split(world)) == (UpdateState.COMPLETED, None)


def test_the_old_spec_deployed_again_after_the_switch_gets_all_connections_at_once() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=BLUE_GREEN))
    advance(world)
    pass_time(world, 6)
    assert shares(world) == {"app:2": 100}
    world.update(a_canary("app:1", labels=BLUE_GREEN))
    assert shares(world) == {"app:1": 100}
    advance(world)
    assert (shares(world), counts(world)) == ({"app:1": 100}, (4, 0))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_tasks_of_replaced_canaries_are_never_old_ones(times: int) -> None:
    world = begun(replicas=10)
    pass_time(world, 61)
    assert (percent(world), counts(world)) == (50, (10, 5))
    for number in range(times):
        world.update(a_canary(f"app:{3 + number}", replicas=10))
        assert shares(world) == {"app:1": 100}
        while changes := world.changes():
            world.apply(changes[:1])
            assert shares(world) == {"app:1": 100}
        world.run_all()
        world.settle()
    assert shares(world) == {"app:1": 95, f"app:{2 + times}": 5}
    assert len(wanted(world)) == 11


def test_a_canary_after_a_canary_that_failed_leaves_the_failed_tasks_without_connections() -> None:
    world = begun(replicas=10)
    pass_time(world, 61)
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    world.apply(world.changes())
    assert state(world) is UpdateState.ROLLBACK_STARTED
    world.update(a_canary("app:3", replicas=10))
    assert shares(world) == {"app:1": 100}
    advance(world)
    assert shares(world) == {"app:1": 95, "app:3": 5}


def test_a_step_raises_the_share_with_the_new_tasks_that_run() -> None:
    world = begun(replicas=20)
    world.now += 61
    world.settle()
    found = split(world)
    assert found is not None
    assert (found.step, found.percent) == (1, 5)
    starting = [task for task in wanted(world, "app:2") if task.status.state is not RUNNING]
    assert len(starting) == 9
    for running, task in enumerate(starting, 2):
        world.report(task.id, RUNNING)
        world.settle()
        assert percent(world) == 5 * running


@pytest.mark.parametrize("labels", [CANARY, BLUE_GREEN])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_stop_or_a_scale_to_0_does_not_decide_for_the_new_version(
    labels: dict[str, str], stopped: bool
) -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=labels))
    advance(world)
    world.update(
        a_canary(labels={**labels, "skep.stopped": "true"})
        if stopped
        else a_canary(labels=labels, replicas=0)
    )
    for _ in range(4):
        pass_time(world, 1000)
    assert wanted(world) == []
    assert state(world) is UpdateState.UPDATING
    for task in [task for task in world.tasks.values() if task.desired_state is TaskState.REMOVE]:
        del world.tasks[task.id]
    world.update(a_canary(labels=labels))
    world.settle()
    assert counts(world) == (4, 1 if labels == CANARY else 4)
    for task in wanted(world, "app:1"):
        world.report(task.id, RUNNING)
        world.settle()
        assert shares(world) == {"app:1": 100}
    world.run_all()
    world.settle()
    assert shares(world) == ({"app:1": 95, "app:2": 5} if labels == CANARY else {"app:1": 100})


@pytest.mark.parametrize(("replicas", "new", "of_new"), [(6, 1, 5), (40, 2, 5), (1, 1, 5)])
def test_a_scaled_canary_adds_old_tasks_and_as_many_new_ones_as_its_share(
    replicas: int, new: int, of_new: int
) -> None:
    world = begun()
    world.update(a_canary(replicas=replicas))
    for _ in range(2):
        advance(world)
    assert counts(world) == (replicas, new)
    assert len({task.slot for task in wanted(world)}) == replicas
    assert shares(world) == {"app:1": 100 - of_new, "app:2": of_new}


def test_a_scaled_paused_canary_keeps_its_share() -> None:
    world = begun()
    status = world.service.update_status
    assert status is not None
    world.put(replace(world.service, update_status=replace(status, state=UpdateState.PAUSED)))
    world.update(a_canary(replicas=8))
    advance(world)
    pass_time(world, 600)
    assert (counts(world), shares(world)) == ((8, 1), {"app:1": 95, "app:2": 5})
    (new,) = wanted(world, "app:2")
    world.report(new.id, TaskState.FAILED)
    advance(world)
    assert (counts(world), shares(world)) == ((8, 1), {"app:1": 95, "app:2": 5})
    assert state(world) is UpdateState.PAUSED


def test_a_new_task_that_fails_after_a_scale_rolls_back_and_keeps_the_number() -> None:
    world = begun()
    (new,) = wanted(world, "app:2")
    world.update(a_canary(replicas=6))
    advance(world)
    world.report(new.id, TaskState.FAILED)
    world.settle()
    assert (counts(world), state(world)) == ((6, 0), UpdateState.ROLLBACK_COMPLETED)


def test_blue_green_keeps_old_tasks_without_connections_until_they_end() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=BLUE_GREEN))
    advance(world)
    pass_time(world, 6)
    world.now += 101
    while changes := world.changes():
        world.apply(changes[:1])
        assert shares(world) == {"app:2": 100}
        assert state(world) is UpdateState.COMPLETED or percent(world) == 100
    assert counts(world) == (0, 4)


def test_a_forced_update_has_no_steps() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary("app:1"))
    template = replace(world.service.spec.task_template, force_update=1)
    world.update(replace(world.service.spec, task_template=template))
    advance(world)
    pass_time(world, 6)
    assert (state(world), split(world)) == (UpdateState.COMPLETED, None)
    assert {task.spec.force_update for task in wanted(world)} == {1}


def test_a_forced_update_of_a_canary_begins_it_anew_and_keeps_the_old_tasks() -> None:
    world = begun()
    old = {task.id for task in wanted(world, "app:1")}
    template = replace(world.service.spec.task_template, force_update=1)
    world.update(replace(world.service.spec, task_template=template))
    assert shares(world) == {"app:1": 100}
    advance(world)
    (new,) = wanted(world, "app:2")
    assert new.spec.force_update == 1
    assert {task.id for task in wanted(world, "app:1")} == old
    assert shares(world) == {"app:1": 95, "app:2": 5}


def test_the_label_removed_lets_the_new_tasks_keep_connections() -> None:
    slow = replace(ALL_AT_ONCE, parallelism=1, delay=60 * SECOND_NS)
    world = a_world(update=slow)
    spec = replace(a_canary(), update_config=slow)
    world.update(spec)
    advance(world)
    world.update(replace(spec, labels={}))
    assert shares(world) == {"app:1": 80, "app:2": 20}
    for _ in range(8):
        pass_time(world, 61)
    assert (counts(world), state(world)) == ((0, 4), UpdateState.COMPLETED)


def test_one_replica_gets_a_second_task() -> None:
    world = begun(replicas=1)
    assert (percent(world), counts(world)) == (5, (1, 1))
    pass_time(world, 61)
    assert (percent(world), counts(world)) == (50, (1, 1))
    pass_time(world, 61)
    pass_time(world, 6)
    assert (counts(world), state(world)) == ((0, 1), UpdateState.COMPLETED)


def test_the_last_step_is_limited_by_the_parallelism() -> None:
    one_by_one = replace(ALL_AT_ONCE, parallelism=1, delay=10 * SECOND_NS)
    world = a_world(update=one_by_one)
    world.update(replace(a_canary(labels={**CANARY, "skep.update.steps": "25%"}), update_config=one_by_one))
    advance(world)
    pass_time(world, 61)
    assert percent(world) is None
    assert sum(counts(world)) <= 5
    for _ in range(20):
        world.now += 1
        world.settle()
        assert sum(counts(world)) <= 5
        assert len([task for task in wanted(world) if task.status.state is RUNNING]) >= 4
        advance(world)


def test_blue_green_switches_once_when_all_new_tasks_run_and_keeps_the_old_ones() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=BLUE_GREEN))
    advance(world)
    assert (percent(world), counts(world)) == (0, (4, 4))
    pass_time(world, 6)
    assert (percent(world), counts(world)) == (100, (4, 4))
    pass_time(world, 99)
    assert (percent(world), counts(world)) == (100, (4, 4))
    pass_time(world, 2)
    pass_time(world, 6)
    assert (counts(world), state(world)) == ((0, 4), UpdateState.COMPLETED)


def test_blue_green_that_fails_after_its_switch_returns_to_the_old_tasks() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=BLUE_GREEN))
    advance(world)
    pass_time(world, 6)
    old = {task.id for task in wanted(world, "app:1")}
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert {task.id for task in wanted(world)} == old


def test_a_manual_step_waits_for_its_promotion() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels={**CANARY_STEPS, "skep.update.promote": "manual"}))
    advance(world)
    pass_time(world, 100_000)
    assert percent(world) == 5
    status = world.service.update_status
    assert status is not None
    assert status.split is not None
    promoted = replace(status.split, step=1, percent=50)
    world.put(replace(world.service, update_status=replace(status, split=promoted)))
    advance(world)
    assert (percent(world), counts(world)) == (50, (4, 2))


BOUNDED = {
    "skep.http": "a.example",
    **CANARY,
    "skep.update.max-errors": "5%",
    "skep.update.max-latency": "500ms",
}


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        (
            TaskRequests(requests=200, errors=24),
            "because 24 of 200 requests to new tasks failed (12 %), more than 5 %",
        ),
        (
            TaskRequests(requests=100, milliseconds=80_000),
            "because responses of new tasks took 0.8 s on average (100 requests), more than 0.5 s",
        ),
        (TaskRequests(requests=200, errors=10, milliseconds=100_000), ""),
        (TaskRequests(requests=19, errors=1, milliseconds=100_000), ""),
        (
            TaskRequests(requests=2, errors=2),
            "because 2 of 2 requests to new tasks failed (100 %), more than 5 %",
        ),
        (TaskRequests(), ""),
    ],
)
def test_requests_beyond_a_bound_end_the_update(requests: TaskRequests, reason: str) -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=BOUNDED))
    advance(world)
    world.requests = requests
    world.settle()
    assert counts(world) == ((4, 0) if reason else (4, 1))
    if reason:
        assert state(world) is UpdateState.ROLLBACK_COMPLETED
        assert message(world) == f"rollback completed: update rolled back {reason}"


def test_requests_of_new_tasks_are_added_for_services_with_bounds_only() -> None:
    measured, world = RequestCounts(), begun()
    bounded = replace(world.service, spec=replace(world.service.spec, labels=BOUNDED))
    measured.start([world.service])
    assert measured.services == set()
    measured.note(Commit(1, (Updated(world.service, bounded),)))
    assert measured.services == {bounded.id}
    old, new = wanted(world, "app:1")[0], wanted(world, "app:2")[0]
    measured.requests = dict.fromkeys((old.id, new.id), TaskRequests(requests=7))
    assert measured.requests_of(bounded, world.tasks.values()) == TaskRequests(requests=7)
    measured.note(Commit(2, (Updated(bounded, world.service),)))
    assert measured.requests_of(bounded, world.tasks.values()) == TaskRequests()


async def test_the_loop_ends_an_update_by_what_it_collects() -> None:
    store, clock = MemoryStore(SystemClock()), SystemClock()
    service = a_service(spec=a_spec(replicas=1))
    old = a_task(slot=1, node="n1", service=service)

    is_collected = asyncio.Event()

    async def collect() -> dict[TaskId, TaskRequests]:
        await is_collected.wait()
        tasks = store.view().find(Task, service_id=service.id)
        return {task.id: TaskRequests(requests=50, errors=50) for task in tasks}

    def put(*objects: Any) -> Callable[[Transaction], list[Any]]:
        return lambda tx: [tx.put(one) for one in objects]

    await store.update(put(a_node("n1"), service, old))
    service = store.view().get(Service, service.id)
    spec = a_canary(labels=BOUNDED, replicas=1)
    await store.update(update_service, service.id, settled(spec), service.version.index, now=NOW)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(Orchestrator(store, clock, new_id, Random(1), collect).run())
        await eventually(lambda: len(store.view().find(Task, service_id=service.id)) == 2)
        for _ in range(100):
            await asyncio.sleep(0)  # no other change leads to the decision
        is_collected.set()
        await eventually(lambda: "requests to new tasks failed" in message_in(store, service.id))
        running.cancel()


def message_in(store: MemoryStore, id: ServiceId) -> str:
    status = store.view().get(Service, id).update_status
    return status.message if status is not None else ""
