"""Staged updates: shares of new connections, what starts in each step, what a failure leaves, and other updates."""

from msgspec.structs import replace

from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.model.node import Availability
from skep.model.service import ServiceSpec, UpdateConfig, UpdateSplit, UpdateState
from skep.model.task import TaskState
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node
from tests.support.managers.rollouts import a_spec, a_world, advance, message, state, wanted
from tests.support.managers.worlds import World

CANARY_STEPS = {"skep.update": "canary", "skep.update.steps": "5%,50%"}
CANARY = {**CANARY_STEPS, "skep.update.step-time": "60s"}
ALL_AT_ONCE = UpdateConfig(parallelism=0, monitor=5 * SECOND_NS)
RUNNING = TaskState.RUNNING


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
    assert (percent(world), counts(world)) == (5, (4, 1))
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


BLUE_GREEN = {"skep.update": "blue-green", "skep.update.keep": "100s"}


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
