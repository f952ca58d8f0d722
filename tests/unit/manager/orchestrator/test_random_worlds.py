"""Properties of decisions in worlds where features meet, whatever happens and in whatever order."""

from collections import defaultdict
from collections.abc import Iterator
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
from skep.manager.orchestrator.reaper.history import (
    attempts_kept,
    counted_from,
    history_limit,
    surplus_history,
    updating_versions,
)
from skep.manager.services.disruption_budget import is_available, required
from skep.model.service import ENDED
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from tests.support.managers.random_worlds import RandomWorld
from tests.support.managers.worlds import World

WORLDS = [pytest.param(range(first, first + 20), id=f"{first} and next") for first in range(0, 80, 20)] + [
    pytest.param(range(1000, 2000), id="a thousand", marks=pytest.mark.slow)
]
EVENTS = 60


@pytest.mark.parametrize("seeds", WORLDS)
def test_what_the_history_deletes_changes_no_decision(seeds: range) -> None:
    """Neither the present decision, nor the one after the end of any task.

    Updates have no delay: it may begin anew if the history forgets when a slot began to run.
    """
    for seed in seeds:
        limits = Random(seed)
        limit, is_deleted = limits.choice((0, 1, 2, 5)), limits.random() < 0.5
        random = RandomWorld(seed, delay_s=0)
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
def test_no_change_that_is_written_late_stops_a_task_that_a_later_decision_keeps(seeds: range) -> None:
    for seed in seeds:
        random = RandomWorld(seed)
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


def _surplus(random: RandomWorld, limit: int) -> Iterator[TaskId]:
    """Yield the ids of the tasks that the reaper would delete with this limit of the cluster."""
    service = random.world.service
    slots: defaultdict[tuple[int, NodeId], list[Task]] = defaultdict(list)
    for task in random.world.tasks.values():
        if task.desired_state < TaskState.REMOVE:
            slots[task.slot, NodeId("") if task.slot else task.node_id].append(task)
    times = counted_from(service, random.newest_before_term)
    attempts, versions = attempts_kept(service), updating_versions(service)
    for slot in slots.values():
        for task in surplus_history(slot, history_limit(service, limit), None, versions, attempts, times):
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
