"""Properties of every decision about a service, and for each of them wrong twins of the decision that it must reject.

A property sees a service through a random life: its user updates and scales it, its tasks run, fail and stop, nodes go
down and are drained, time passes.  A twin is the production decision with one function replaced by a plausible mistake.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import count
from typing import Any, TypeAlias
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.time_slices import SlicedWork
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator import convergence, replicated, slots, update
from skep.manager.orchestrator.changes import (
    Change,
    FillSlot,
    ReplaceTask,
    RetireTask,
    RollBack,
    SetUpdateStatus,
    StartTask,
    decided_for,
)
from skep.manager.orchestrator.replacement import restart, slot_views
from skep.manager.orchestrator.slots import group_by_slot, is_unusable
from skep.model.node import Availability, NodeState
from skep.model.service import (
    PAUSED,
    ReplicatedService,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
)
from skep.model.task import Task, TaskState
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.worlds import World

READY, RUNNING = TaskState.READY, TaskState.RUNNING
Happening: TypeAlias = tuple[str, int, float]
Property: TypeAlias = Callable[[World, list[Change]], None]

DELAY_S = 3.0
ATTEMPTS = 1

updates = st.builds(
    UpdateConfig,
    parallelism=st.integers(0, 2),
    failure_action=st.sampled_from([UpdateFailureAction.CONTINUE, UpdateFailureAction.PAUSE]),
    order=st.sampled_from(list(UpdateOrder)),
)
policies = st.builds(
    RestartPolicy,
    condition=st.sampled_from([RestartCondition.ANY, RestartCondition.ON_FAILURE]),
    delay=st.sampled_from([0, int(DELAY_S * SECOND_NS)]),
    max_attempts=st.sampled_from([0, ATTEMPTS]),
)
ONE_AT_A_TIME = UpdateConfig(
    parallelism=1, failure_action=UpdateFailureAction.CONTINUE, order=UpdateOrder.STOP_FIRST
)
AT_ONCE = RestartPolicy(condition=RestartCondition.ANY, delay=0, max_attempts=0)
lives = st.lists(
    st.tuples(
        st.sampled_from(["goes on"] * 4 + ["fails", "is rejected", "new image", "scale", "labels", "node"]),
        st.integers(0, 30),
        st.sampled_from([0.0, 0.0, 1.0, 6.0]),
    ),
    max_size=15,
)


def begun(config: UpdateConfig, policy: RestartPolicy) -> World:
    """Three replicas run on two nodes."""
    spec = a_service_spec(replicas=3, update=config, rollback=config, restart=policy)
    service = a_service(spec=spec)
    world = World(service, nodes=[a_node("n1"), a_node("n2")])
    for slot in (1, 2, 3):
        world.put(a_task(f"old{slot}", slot=slot, node=f"n{slot % 2 + 1}", service=service))
    return world


def live(world: World, happenings: Iterable[Happening], look: Property) -> None:
    """What happens, one by one; ``look`` sees each list of changes before it is applied."""
    numbers = count(2)
    for what, which, pause_s in happenings:
        world.now += pause_s
        _happen(world, what, which, next(numbers))
        for _ in range(20):
            changes = world.changes()
            look(world, changes)
            if not changes:
                break
            world.apply(changes)


def _happen(world: World, what: str, which: int, number: int) -> None:
    spec = world.service.spec
    tasks = list(world.tasks.values())
    task = tasks[which % len(tasks)]
    match what:
        case "goes on":
            for one in tasks:
                _go_on(world, one)
        case "fails" if task.status.state is RUNNING:
            world.report(task.id, TaskState.FAILED)
        case "is rejected" if task.status.state < RUNNING and task.is_wanted:
            world.report(task.id, TaskState.REJECTED)
        case "new image":
            world.update(replace(spec, task_template=replace(spec.task_template, force_update=number)))
        case "scale":
            mode = ServiceMode(replicated=ReplicatedService(replicas=which % 5))
            world.update(replace(spec, mode=mode))
        case "labels":
            world.update(replace(spec, labels={"number": str(number)}))
        case "node":
            state = [NodeState.READY, NodeState.DOWN][which % 2]
            drained = [Availability.ACTIVE, Availability.DRAIN][which // 2 % 2]
            world.nodes[a_node("n2").id] = a_node("n2", state=state, availability=drained)


def _go_on(world: World, task: Task) -> None:
    """The task's node follows the desired state; an unplaced task gets the first node."""
    if task.status.state.is_terminal:
        return
    if not task.node_id:
        world.put(
            replace(task, node_id=a_node("n1").id, status=replace(task.status, state=TaskState.ASSIGNED))
        )
    elif task.desired_state > RUNNING:
        world.report(task.id, TaskState.SHUTDOWN)
    elif task.status.state < task.desired_state:
        world.report(task.id, task.desired_state)


# -- the properties ------------------------------------------------------------------------------------------------


def one_application_is_enough(world: World, changes: list[Change]) -> None:
    """Decided again on the outcome, nothing happening meanwhile, no task is made or retired (a start may follow).

    Not if the update is rolled back, or paused: then a drain goes on.
    """
    if not changes or any(isinstance(change, RollBack) or _pauses(change) for change in changes):
        return
    copy = World(world.service, world.tasks.values(), world.nodes.values())
    copy.specs, copy.seen, copy.now = dict(world.specs), deepcopy(world.seen), world.now
    copy._numbers = count(10_000)
    copy.apply(changes)
    assert [change for change in copy.changes() if _makes_or_retires(change)] == []


def the_order_of_tasks_does_not_matter(world: World, changes: list[Change]) -> None:
    """Given the tasks backwards, the same is decided."""
    backwards = replace(world.situation, tasks=tuple(reversed(world.situation.tasks)))
    steps = [decided_for(world.service, step) for step in convergence.next_steps(backwards)]
    again = [step for step in steps if not isinstance(step, Recheck)]
    assert sorted(map(repr, again)) == sorted(map(repr, changes))


def no_slot_has_two_tasks_of_one_kind(world: World, changes: list[Change]) -> None:
    """One task is to run, and at most one is prepared to follow; both are to run with start-first only.

    Both may also run if a drain of n2 started the second and was undone since.  Tasks that the changes retire do not
    count: a task that failed on a drained node, beside its replacement, say.
    """
    order = world.service.spec.update_config and world.service.spec.update_config.order
    retired = {change.task.id for change in changes if isinstance(change, RetireTask | ReplaceTask)}
    situation = world.situation
    for slot in group_by_slot(world.tasks.values()).values():
        wanted = [task for task in slot if task.is_wanted and task.id not in retired]
        wanted = [task for task in wanted if not situation.moves_start_first(task)]
        started = [task for task in wanted if task.desired_state is RUNNING]
        may_overlap = order is UpdateOrder.START_FIRST or any(task.node_id == "n2" for task in wanted)
        assert len(wanted) <= 2
        assert len(started) <= (2 if may_overlap else 1)


def what_did_not_change_is_left_alone(world: World, changes: list[Change]) -> None:
    """A task that runs where it may, as its service's spec has it, in a slot that stays, is not touched."""
    for change in changes:
        if isinstance(change, FillSlot):
            there = [
                task
                for task in world.tasks.values()
                if task.slot == change.slot and task.is_active and not world.situation.moves_start_first(task)
            ]
            assert not any(task.spec == world.service.spec.task_template for task in there)
        if isinstance(change, RetireTask | ReplaceTask):
            task = change.task
            is_fine = task.status.state is RUNNING and not is_unusable(world.nodes.get(task.node_id))
            is_as_asked = task.spec == world.service.spec.task_template
            is_surplus = isinstance(change, RetireTask) and change.desired is TaskState.REMOVE
            rivals = [one for one in _slot_of(world, task) if one.is_wanted and one.id != task.id]
            assert not is_fine or not is_as_asked or is_surplus or rivals


def what_serves_gives_way_to_what_is_ready(world: World, changes: list[Change]) -> None:
    """A task that runs is retired by an update only when another of its slot could start at once, or runs."""
    for change in changes:
        if isinstance(change, RetireTask | ReplaceTask):
            task = change.task
            if task.status.state is not RUNNING or is_unusable(world.nodes.get(task.node_id)):
                continue
            if isinstance(change, RetireTask) and change.desired is TaskState.REMOVE:
                continue
            successors = [one for one in _slot_of(world, task) if one.is_wanted and one.id != task.id]
            assert any(READY <= one.status.state <= RUNNING for one in successors)


def no_more_slots_are_begun_than_may_be(world: World, changes: list[Change]) -> None:
    """The slots whose first task of the present version neither ran nor ended are at most ``parallelism``.

    Not if it follows one with the same task spec that failed: labels that change start a slot with nothing.
    """
    config = world.service.spec.update_config or UpdateConfig()
    replaced = {
        slot
        for slot, tasks in group_by_slot(world.tasks.values()).items()
        if any(task.spec != world.service.spec.task_template and task.is_wanted for task in tasks)
    }
    busy = 0
    for slot, tasks in group_by_slot(world.tasks.values()).items():
        of_version = [task.spec_version == world.service.spec_version for task in tasks]
        if slot not in replaced or not any(of_version):
            continue
        number = of_version.index(True)
        first, before = tasks[number], tasks[:number][-1:]
        is_retry = any(one.spec == first.spec and one.ended_by_itself for one in before)
        busy += first.is_active and first.status.state < RUNNING and not is_retry
    assert not config.parallelism or busy <= config.parallelism


def the_restart_delay_passes(world: World, changes: list[Change]) -> None:
    """What follows a failure under the same spec starts no earlier than the policy's delay after it was made."""
    for change in changes:
        if isinstance(change, ReplaceTask) and change.task.status.state is TaskState.FAILED:
            policy, spec = change.task.spec.restart_policy, change.successor.service.spec.task_template
            is_delayed = policy is not None and policy.delay and spec == change.task.spec
            assert not is_delayed or change.successor.desired is READY
        if isinstance(change, StartTask):
            before = [
                task
                for task in _slot_of(world, change.task)
                if task.created_at < change.task.created_at and task.desired_state < TaskState.REMOVE
            ]
            last = max(before, key=lambda task: task.created_at, default=None)
            if last is None or last.spec != change.task.spec or last.status.state is not TaskState.FAILED:
                continue
            if not last.ended_by_itself:  # it crashed while it was drained, say
                continue
            delay = change.task.spec.restart_policy.delay if change.task.spec.restart_policy else 0
            assert world.now - world.seen.created(change.task) >= (delay or 0) / SECOND_NS


def attempts_are_limited(world: World, changes: list[Change]) -> None:
    """A slot gets no successor of a task that failed once so many of its version have failed before."""
    policy = world.service.spec.task_template.restart_policy or RestartPolicy()
    if not policy.max_attempts:
        return
    for change in changes:
        if isinstance(change, ReplaceTask) and change.task.spec_version == world.service.spec_version:
            made = [t for t in _slot_of(world, change.task) if t.spec_version == world.service.spec_version]
            failed = [task for task in made if task.desired_state < TaskState.REMOVE and task.ended_by_itself]
            assert len(failed) <= policy.max_attempts


def _slot_of(world: World, task: Task) -> list[Task]:
    return [one for one in world.tasks.values() if one.slot == task.slot]


def _pauses(change: Change) -> bool:
    return isinstance(change, SetUpdateStatus) and change.state in PAUSED


def _makes_or_retires(change: Change) -> bool:
    return isinstance(change, FillSlot | RetireTask | ReplaceTask)


PROPERTIES = (
    one_application_is_enough,
    the_order_of_tasks_does_not_matter,
    no_slot_has_two_tasks_of_one_kind,
    what_did_not_change_is_left_alone,
    what_serves_gives_way_to_what_is_ready,
    no_more_slots_are_begun_than_may_be,
    the_restart_delay_passes,
    attempts_are_limited,
)


@pytest.mark.parametrize("look", PROPERTIES, ids=lambda look: look.__name__)
@given(config=updates, policy=policies, happenings=lives)
@example(
    config=UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.CONTINUE),
    policy=AT_ONCE,
    happenings=[("new image", 0, 0.0), ("labels", 0, 0.0), ("is rejected", 13, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=AT_ONCE,
    happenings=[("new image", 0, 0.0), ("labels", 0, 0.0), ("is rejected", 3, 0.0)],
)
@example(
    config=UpdateConfig(parallelism=1, order=UpdateOrder.STOP_FIRST),
    policy=AT_ONCE,
    happenings=[("new image", 0, 0.0), ("goes on", 0, 0.0), ("labels", 0, 0.0), ("goes on", 0, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=AT_ONCE,
    happenings=[
        *[("new image", 0, 0.0), *[("goes on", 0, 0.0)] * 4],
        *[("is rejected", 24, 0.0), *[("goes on", 0, 0.0)] * 2],
    ],
)
@example(
    config=ONE_AT_A_TIME,
    policy=AT_ONCE,
    happenings=[("node", 2, 0.0), ("new image", 0, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=AT_ONCE,
    happenings=[("new image", 0, 0.0), ("node", 2, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=AT_ONCE,
    happenings=[("scale", 14, 0.0), ("node", 2, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=AT_ONCE,
    happenings=[("node", 2, 0.0), ("fails", 0, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=AT_ONCE,
    happenings=[("new image", 0, 0.0), ("node", 2, 0.0), ("node", 0, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=replace(AT_ONCE, max_attempts=ATTEMPTS),
    happenings=[("node", 2, 0.0), ("node", 0, 0.0), ("fails", 0, 0.0)],
)
@example(
    config=ONE_AT_A_TIME,
    policy=replace(AT_ONCE, delay=int(DELAY_S * SECOND_NS)),
    happenings=[("scale", 0, 0.0), ("scale", 1, 0.0), ("fails", 0, 0.0)],
)
@settings(max_examples=60, deadline=None)
def test_a_property_holds_whatever_happens(
    look: Property, config: UpdateConfig, policy: RestartPolicy, happenings: list[Happening]
) -> None:
    live(begun(config, policy), happenings, look)


# -- the twins -----------------------------------------------------------------------------------------------------


def _unsorted(tasks: Iterable[Task]) -> SlicedWork[dict[int, slots.Slot]]:
    """Believes that tasks come in the order in which they were made."""
    yield
    by_slot: dict[int, list[Task]] = {}
    for task in tasks:
        by_slot.setdefault(task.slot, []).append(task)
    return {number: tuple(by_slot[number]) for number in by_slot}


def _fills_again(slot: slots.Slot, service: Service, seen: Any) -> bool:
    """Takes only tasks that are placed for tasks."""
    return any(task.node_id and task.is_wanted for task in slot)


def _dirty_by_version(task: Task, situation: Any) -> bool:
    """Takes every new version of the spec for another task."""
    return task.spec_version != situation.service.spec_version


def _never_over(*_: object) -> bool:
    return True


TWINS: tuple[tuple[str, Property, Any, str, Any], ...] = (
    ("a slot is filled again", one_application_is_enough, replicated, "is_filled", _fills_again),
    (
        "tasks are taken as they come",
        the_order_of_tasks_does_not_matter,
        convergence,
        "grouping_by_slot",
        _unsorted,
    ),
    (
        "the successor starts beside",
        no_slot_has_two_tasks_of_one_kind,
        restart,
        "_waits_for_update",
        lambda *_: False,
    ),
    (
        "every version is another task",
        what_did_not_change_is_left_alone,
        slot_views,
        "is_dirty",
        _dirty_by_version,
    ),
    (
        "a desired state counts as an observed one",
        what_serves_gives_way_to_what_is_ready,
        update._Rollout,
        "_can_take_over",
        _never_over,
    ),
    (
        "a running task does not serve",
        what_serves_gives_way_to_what_is_ready,
        slot_views,
        "serves",
        lambda task: False,
    ),
    (
        "what was begun counts as done",
        no_more_slots_are_begun_than_may_be,
        update._Rollout,
        "_settled_at",
        lambda *_: 0.0,
    ),
    ("no time passes", the_restart_delay_passes, restart, "_is_delayed", lambda *_: False),
    ("attempts are not counted", attempts_are_limited, restart, "should_restart", _never_over),
)


@pytest.mark.parametrize(
    ("look", "module", "name", "twin"), [row[1:] for row in TWINS], ids=[row[0] for row in TWINS]
)
def test_a_wrong_twin_is_rejected(look: Property, module: Any, name: str, twin: Any) -> None:
    @given(config=updates, policy=policies, happenings=lives)
    @settings(
        max_examples=1_000,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def holds(config: UpdateConfig, policy: RestartPolicy, happenings: list[Happening]) -> None:
        live(begun(config, policy), happenings, look)

    with patch.object(module, name, twin), pytest.raises(AssertionError):
        holds()


def test_every_property_has_a_twin() -> None:
    assert {look for _, look, *_ in TWINS} == set(PROPERTIES)
