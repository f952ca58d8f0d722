"""Properties of decisions in worlds where features meet, whatever happens and in whatever order."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from random import Random

import pytest

from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import (
    Change,
    FillSlot,
    ReplaceTask,
    RetireTask,
    SetUpdateStatus,
    key_of,
)
from skep.manager.orchestrator.jobs import is_done, iteration_of
from skep.manager.orchestrator.reaper.history import (
    attempts_kept,
    counted_from,
    history_limit,
    surplus_history,
    updating_versions,
)
from skep.manager.orchestrator.replacement.restart import stopped_at
from skep.manager.services.disruption_budget import is_available, required
from skep.manager.services.job_runs import COMPLETED
from skep.model.node import is_lost
from skep.model.service import ENDED, UpdateState
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.meta import Version
from tests.support.managers.random_jobs import RandomJob
from tests.support.managers.random_worlds import GOOD, RandomWorld
from tests.support.managers.worlds import World

WORLDS = [pytest.param(range(first, first + 20), id=f"{first} and next") for first in range(0, 80, 20)] + [
    pytest.param(range(1000, 2000), id="a thousand", marks=[pytest.mark.slow, pytest.mark.timeout(600)])
]
EVENTS = 60


@pytest.mark.parametrize("seeds", WORLDS)
@pytest.mark.parametrize("kind", [RandomWorld, RandomJob])
def test_what_the_history_deletes_changes_no_decision(kind: type[RandomWorld], seeds: range) -> None:
    """Neither the present decision, nor the one after the end of any task.

    Updates have no delay: it may begin anew if the history forgets when a slot began to run.
    """
    for seed in seeds:
        limits = Random(seed)
        limit, is_deleted = limits.choice((0, 1, 2, 5)), limits.random() < 0.5
        random = kind(seed, delay_s=0)
        for number in range(EVENTS):
            random.step()
            random.world.settle()
            if not (gone := set(_surplus(random, limit))):
                continue
            for ended, state in _next_ends(random.world, gone):
                before, after = random.fork(), random.fork()
                after.tasks = {id: task for id, task in after.tasks.items() if id not in gone}
                if ended is not None:
                    before.report(ended, state)
                    after.report(ended, state)
                assert _decision(before) == _decision(after), (seed, number, limit, gone, ended, state)
            if is_deleted:
                for id in gone:
                    del random.world.tasks[id]


@pytest.mark.parametrize("seeds", WORLDS)
def test_no_change_that_is_written_late_takes_a_service_below_its_minimum(seeds: range) -> None:
    for seed in seeds:
        random = RandomWorld(seed, has_minimum=True)
        world = random.world
        for number in range(EVENTS):
            random.step()
            changes = world.changes()
            for _ in range(random.random.randrange(3)):
                random.step()
            before = _available(world)
            world.apply(changes)
            minimum, is_scaled = required(world.service), any(map(_removes, changes))
            assert is_scaled or _available(world) >= min(before, minimum or 0), (seed, number, changes)
            world.settle()
            assert max(_wanted(world).values(), default=0) <= 3, (seed, number)


@pytest.mark.parametrize("seeds", WORLDS)
@pytest.mark.parametrize("kind", [RandomWorld, RandomJob])
def test_no_change_that_is_written_late_stops_a_task_that_a_later_decision_keeps(
    kind: type[RandomWorld], seeds: range
) -> None:
    for seed in seeds:
        random = kind(seed)
        world = random.world
        for number in range(EVENTS):
            random.step()
            changes = world.changes()
            for _ in range(random.random.randrange(3)):
                random.step()
            decided_now = random.fork()
            decided_now.settle()
            running = [id for id, task in world.tasks.items() if _serves(task)]
            world.apply(changes)
            stopped = {id for id in running if world.tasks[id].desired_state is TaskState.SHUTDOWN}
            needless = {id for id in stopped if decided_now.tasks[id].is_wanted}
            assert not needless, (seed, number, changes)
            world.settle()


@pytest.mark.parametrize("seeds", WORLDS)
@pytest.mark.parametrize("has_minimum", [False, True])
def test_whatever_happened_an_update_to_a_good_image_ends(has_minimum: bool, seeds: range) -> None:
    for seed in seeds:
        random = RandomWorld(seed, has_minimum=has_minimum)
        _live(random)
        random.end_well()
        tasks = [task for task in random.world.tasks.values() if task.is_wanted]
        images = [task.spec.container_spec.image for task in tasks if task.spec.container_spec is not None]
        status = random.world.service.update_status
        assert images == [GOOD] * 3, (seed, images, status)
        assert all(map(_serves, tasks)), (seed, tasks)
        assert status is None or status.state is UpdateState.COMPLETED, (seed, status)


@pytest.mark.parametrize("seeds", WORLDS)
def test_whatever_happened_a_run_that_does_not_fail_completes(seeds: range) -> None:
    for seed in seeds:
        random = RandomJob(seed)
        _live(random)
        random.end_well()
        job = random.world.service.job_status
        assert job is not None
        assert job.present_outcome == COMPLETED, (seed, job)
        assert not [task for task in random.world.tasks.values() if task.is_active], seed


def _live(random: RandomWorld) -> None:
    """Let random events happen, and let changes be written late."""
    for _ in range(EVENTS):
        random.step()
        changes = random.world.changes()
        for _ in range(random.random.randrange(3)):
            random.step()
        random.world.apply(changes)
        if random.random.random() < 0.7:
            random.world.settle()


@pytest.mark.parametrize("seeds", WORLDS)
def test_a_job_does_no_work_twice_at_a_time_whatever_is_written_late(seeds: range) -> None:
    """Neither two tasks of a slot, nor a task of a slot that has completed, nor tasks of two runs."""
    for seed in seeds:
        random = RandomJob(seed)
        world = random.world
        for number in range(EVENTS):
            random.step()
            changes, lost = world.changes(), [node.id for node in world.nodes.values() if is_lost(node)]
            for _ in range(random.random.randrange(3)):
                random.step()
            before = dict(world.tasks)
            world.apply(changes)
            world.settle()
            run = iteration_of(world.service)
            for slot in _slots(_of_run(world, run)):
                working = [task for task in slot if task.is_active]
                assert len(working) <= (0 if is_done(slot) else 1), (seed, number, working)
            started = [task.id for task in _of_run(world, run) if _starts(before.get(task.id), task)]
            earlier = [
                task.id
                for task in world.tasks.values()
                if task.job_iteration != run and task.is_assigned and task.node_id not in lost
                if stopped_at(task, world.situation) > world.now
            ]
            assert not (started and earlier), (seed, number, started, earlier)


def _of_run(world: World, run: Version) -> list[Task]:
    return [task for task in world.tasks.values() if task.job_iteration == run]


def _starts(before: Task | None, after: Task) -> bool:
    """Return whether the task was allowed to run since."""
    is_allowed = after.desired_state is TaskState.COMPLETE and after.is_active
    return is_allowed and (before is None or before.desired_state is TaskState.READY)


def _slots(tasks: Iterable[Task]) -> Collection[list[Task]]:
    slots: defaultdict[int | NodeId, list[Task]] = defaultdict(list)
    for task in tasks:
        slots[task.slot or task.node_id].append(task)
    return slots.values()


def _surplus(random: RandomWorld, limit: int) -> Iterator[TaskId]:
    """Yield the ids of the tasks that the reaper would delete with this limit of the cluster."""
    service = random.world.service
    kept = [task for task in random.world.tasks.values() if task.desired_state < TaskState.REMOVE]
    times = counted_from(service, random.newest_before_term)
    attempts, versions = attempts_kept(service), updating_versions(service)
    iteration = service.job_status.job_iteration if service.job_status is not None else None
    for slot in _slots(kept):
        for task in surplus_history(
            slot, history_limit(service, limit), iteration, versions, attempts, times
        ):
            yield task.id


def _next_ends(world: World, gone: set[TaskId]) -> Iterator[tuple[TaskId | None, TaskState]]:
    yield None, TaskState.NEW
    for id, task in world.tasks.items():
        if id not in gone and task.is_active and task.node_id:
            yield id, TaskState.FAILED
            yield id, TaskState.COMPLETE


def _decision(world: World) -> list[object]:
    """Return what a decision would do.

    The end of an update is left out, for the same reason.
    """
    steps = [step for step in world.steps() if not isinstance(step, Recheck)]
    return sorted(
        [_what(step) for step in steps if not (isinstance(step, SetUpdateStatus) and step.state in ENDED)],
        key=str,
    )


def _what(change: Change) -> object:
    match change:
        case FillSlot():
            return key_of(change), change.desired, change.failures, change.is_old
        case ReplaceTask():
            return key_of(change), _what(change.successor)
        case RetireTask():
            return key_of(change), change.desired, change.cause
        case SetUpdateStatus():
            return key_of(change), change.state
    return key_of(change)


def _available(world: World) -> int:
    nodes = world.nodes
    return len({one.slot for one in world.tasks.values() if is_available(one, nodes.get(one.node_id))})


def _removes(change: Change) -> bool:
    return isinstance(change, RetireTask) and change.desired is TaskState.REMOVE


def _serves(task: Task) -> bool:
    return task.is_active and task.status.state is TaskState.RUNNING and task.preemption is None


def _wanted(world: World) -> dict[int, int]:
    wanted: defaultdict[int, int] = defaultdict(int)
    for task in world.tasks.values():
        wanted[task.slot] += task.is_active
    return wanted
