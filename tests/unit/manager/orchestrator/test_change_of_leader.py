"""A change of leader, at any moment and however often, gives no slot up and stops no update.

Each life runs on ``World``, second by second; what becomes of a task follows from its slot and from which attempt it
is, so that the same life can be run with other leaders.
"""

from collections.abc import Callable, Collection

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.slots import age
from skep.model.service import (
    RestartCondition,
    RestartPolicy,
    UpdateConfig,
    UpdateFailureAction,
    UpdateState,
)
from skep.model.task import Task, TaskState
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import a_spec, a_world, advance, state, wanted
from tests.support.managers.worlds import World

RUNNING, FAILED = TaskState.RUNNING, TaskState.FAILED
FOR_EVER = 10_000
LIFE_S = 60
MONITOR_S = 5
EXAMPLES = 60

runs = st.one_of(st.integers(1, 20), st.just(FOR_EVER))
moments = st.sets(st.integers(1, LIFE_S - 1), max_size=4)
policies = st.builds(
    RestartPolicy,
    condition=st.sampled_from((RestartCondition.ANY, RestartCondition.ON_FAILURE)),
    delay=st.integers(0, 3).map(lambda seconds: seconds * SECOND_NS),
    max_attempts=st.integers(1, 2),
    window=st.sampled_from((0, 6, 15, 40)).map(lambda seconds: seconds * SECOND_NS),
)


class Life:
    """One world, led by as many leaders as it takes."""

    def __init__(self, world: World, runs_s: Callable[[int, int], int]) -> None:
        """``runs_s``: for how long a task runs, by its slot and how many of its version the slot had before it."""
        self.world = world
        self._runs_s = runs_s
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def live(self, seconds: int, changes: Collection[int]) -> None:
        """Go on; a new leader begins at each of the ``changes``, counted from here."""
        for second in range(seconds):
            if second in changes:
                self.world.seen = ObservedTimes(self.world.now)
            self._end_what_is_over()
            for happen in (self.world.prepare_all, self.world.stop_all, self.world.run_all):
                self.world.settle()
                happen()
            self.world.settle()
            for task in self.world.tasks.values():
                if task.status.state is RUNNING:
                    self.started.setdefault(task.id, self.world.now)
            self.world.now += 1

    def _end_what_is_over(self) -> None:
        for task in list(self.world.tasks.values()):
            began = self.started.get(task.id)
            if (
                task.status.state is RUNNING
                and began is not None
                and self.world.now - began >= self._runs(task)
            ):
                self.world.report(task.id, FAILED)
                self.ended[task.id] = self.world.now

    def _runs(self, task: Task) -> int:
        alike = [
            other
            for other in self.world.tasks.values()
            if (other.slot, other.spec_version) == (task.slot, task.spec_version)
        ]
        return self._runs_s(task.slot, sorted(alike, key=age).index(task))

    @property
    def given_up(self) -> set[int]:
        wanted = {task.slot for task in self.world.tasks.values() if task.is_wanted}
        return {task.slot for task in self.world.tasks.values()} - wanted

    def ran_s(self, task_id: str) -> float:
        return self.ended[task_id] - self.started[task_id]


def a_life(policy: RestartPolicy, fates: list[list[int]]) -> Life:
    """As many slots as fates, each with the lengths of its runs; the last one holds for all that follow."""
    world = World(a_service(spec=a_service_spec(replicas=len(fates), restart=policy)), nodes=[a_node("n1")])
    return Life(world, lambda slot, attempt: fates[slot - 1][min(attempt, len(fates[slot - 1]) - 1)])


@settings(max_examples=EXAMPLES)
@example(RestartPolicy(condition=RestartCondition.ANY, delay=3_000_000_000, max_attempts=2), [[13, 19]], {16})
@example(
    RestartPolicy(condition=RestartCondition.ANY, delay=3_000_000_000, max_attempts=2),
    [[1], [9, 1, 10000]],
    {1, 2},
)
@given(policies, st.lists(st.lists(runs, min_size=1, max_size=4), min_size=1, max_size=2), moments)
def test_no_slot_ends_that_would_not_have_and_none_that_ended_comes_back(
    policy: RestartPolicy, fates: list[list[int]], changes: set[int]
) -> None:
    steady, changed = a_life(policy, fates), a_life(policy, fates)
    steady.live(LIFE_S, ())
    before: set[int] = set()
    for second in range(LIFE_S):
        changed.live(1, {0} if second in changes else ())
        assert changed.given_up >= before
        before = changed.given_up
    assert changed.given_up <= steady.given_up
    if not policy.window:
        changed.live(LIFE_S, ())  # a change of leader may put off a restart, and so the end of the slot
        assert steady.given_up <= changed.given_up


def test_restarts_of_months_ago_are_none_of_this_window() -> None:
    policy = RestartPolicy(
        condition=RestartCondition.ON_FAILURE, max_attempts=3, window=120 * SECOND_NS, delay=0
    )
    life = a_life(policy, [[1, FOR_EVER]])
    for _ in range(3):
        life.live(200, ())
        (task,) = [task for task in life.world.tasks.values() if task.is_wanted]
        life.world.report(task.id, FAILED)
    life.live(200, ())
    life.live(10, {0})
    (task,) = [task for task in life.world.tasks.values() if task.is_wanted]
    life.world.report(task.id, FAILED)
    life.live(2, ())
    assert life.given_up == set()


def a_rollout(
    action: UpdateFailureAction, fates: list[list[int]], *, delay_s: int, parallelism: int, ratio: float = 0.0
) -> Life:
    """A service that runs, and was just asked for another image, whose tasks have these ``fates``."""
    update = UpdateConfig(
        parallelism=parallelism,
        delay=delay_s * SECOND_NS,
        monitor=MONITOR_S * SECOND_NS,
        failure_action=action,
        max_failure_ratio=ratio,
    )
    world = World(a_service(spec=a_spec(replicas=len(fates), update=update)), nodes=[a_node("n1")])
    for slot in range(1, len(fates) + 1):
        world.put(a_task(slot=slot, node="n1", service=world.service))
    first = world.service.spec_version
    new = a_spec("app:2", replicas=len(fates), update=update)

    def runs_s(slot: int, attempt: int) -> int:
        is_old = world.service.spec_version == first or world.service.spec.task_template != new.task_template
        return FOR_EVER if is_old else fates[slot - 1][min(attempt, len(fates[slot - 1]) - 1)]

    life = Life(world, runs_s)
    life.live(3, ())
    world.update(new)
    return life


actions = st.sampled_from((UpdateFailureAction.PAUSE, UpdateFailureAction.ROLLBACK))
rollouts = st.lists(st.lists(runs, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=EXAMPLES)
@given(actions, rollouts, st.integers(0, 30), st.integers(0, 2), moments)
def test_an_update_stops_only_for_a_task_that_ended_within_the_monitor_time(
    action: UpdateFailureAction, fates: list[list[int]], delay_s: int, parallelism: int, changes: set[int]
) -> None:
    life = a_rollout(action, fates, delay_s=delay_s, parallelism=parallelism)
    for second in range(LIFE_S):
        life.live(1, {0} if second in changes else ())
        if state(life.world) not in (None, UpdateState.UPDATING, UpdateState.COMPLETED):
            assert life.world.service.update_status is not None
            words = life.world.service.update_status.message
            named = [id for id in life.ended if id in words]
            assert [life.ran_s(id) <= MONITOR_S for id in named] == [True], words
            return


@settings(max_examples=EXAMPLES)
@given(actions, st.integers(1, 3), st.integers(1, MONITOR_S), st.integers(0, 2), st.integers(1, 20))
def test_a_version_that_always_fails_is_stopped_under_any_leader(
    action: UpdateFailureAction, replicas: int, runs_s: int, parallelism: int, change: int
) -> None:
    life = a_rollout(action, [[runs_s]] * replicas, delay_s=1, parallelism=parallelism)
    life.live(LIFE_S, {change})
    assert state(life.world) in (
        UpdateState.PAUSED,
        UpdateState.ROLLBACK_STARTED,
        UpdateState.ROLLBACK_COMPLETED,
    )


@pytest.mark.parametrize("change", range(95, 110))
def test_a_task_that_ran_for_long_and_crashed_once_rolls_nothing_back(change: int) -> None:
    life = a_rollout(
        UpdateFailureAction.ROLLBACK, [[98, FOR_EVER], [FOR_EVER], [FOR_EVER]], delay_s=600, parallelism=1
    )
    life.live(change, ())
    life.live(30, {0})
    assert state(life.world) is UpdateState.UPDATING


def test_a_task_that_crashed_as_the_leader_changed_is_not_seen_to_end_when_it_is_replaced() -> None:
    """Its end would count as one after no time at all."""
    update = UpdateConfig(delay=600 * SECOND_NS, failure_action=UpdateFailureAction.ROLLBACK, parallelism=1)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    advance(world)
    (lead,) = wanted(world, "app:2")
    world.now += 98.0
    world.report(lead.id, TaskState.FAILED)
    world.now += 0.1
    world.seen = ObservedTimes(world.now)
    for _ in range(20):
        world.now += 0.5
        advance(world)
    assert world.tasks[lead.id].desired_state is TaskState.SHUTDOWN
    assert state(world) is UpdateState.UPDATING
