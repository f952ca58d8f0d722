"""Whether and when an ended task gets a successor."""

from collections.abc import Callable
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import FillSlot, ReplaceTask, RetireTask, StartTask, apply
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import DRAIN_NOW
from skep.model.service import RestartCondition, RestartPolicy, UpdateState, UpdateStatus
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, new_id
from skep.model.values.times import MILLISECOND_NS, SECOND_NS, ZERO_TIME, timestamp, unix_ns
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.worlds import World

READY, RUNNING, SHUTDOWN = TaskState.READY, TaskState.RUNNING, TaskState.SHUTDOWN
AT_ONCE = RestartPolicy(delay=0)


def a_world(policy: RestartPolicy | None = None, *, replicas: int = 1) -> World:
    """Everything runs, on n1."""
    world = World(a_service(replicas=replicas, restart=policy), nodes=[a_node("n1"), a_node("n2")])
    for slot in range(1, replicas + 1):
        world.put(a_task(slot=slot, node="n1", service=world.service))
    return world


def only(world: World) -> Task:
    return next(iter(world.tasks.values()))


def wanted(world: World) -> list[Task]:
    return [task for task in world.tasks.values() if task.desired_state <= RUNNING]


def test_without_a_delay_the_successor_starts_at_once() -> None:
    world = a_world(AT_ONCE)
    world.report(only(world).id, TaskState.FAILED)
    failed = only(world)
    assert world.steps() == [ReplaceTask(failed, FillSlot(world.service, 1, desired=RUNNING, failures=1))]


def test_with_a_delay_the_successor_is_prepared_first_and_started_after_it() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.now = 10.0
    world.report(only(world).id, TaskState.FAILED)
    assert world.steps() == [ReplaceTask(only(world), FillSlot(world.service, 1, desired=READY, delay_s=3.0))]
    world.apply(world.changes())
    (successor,) = wanted(world)
    assert world.steps() == [Recheck(13.0)]
    world.now = 13.0
    assert world.steps() == [StartTask(successor)]


def test_the_delay_holds_when_the_service_changes_between_decision_and_write() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.now = 10.0
    world.report(only(world).id, TaskState.FAILED)
    decided = world.changes()
    world.update(replace(world.service.spec, labels={"tier": "front"}))
    world.apply(decided)
    assert wanted(world) == [only(world)]  # nothing of what was decided about another service
    world.apply(world.changes())
    assert world.steps() == [Recheck(13.0)]


def test_the_delay_holds_across_a_change_that_starts_no_task() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.update(replace(world.service.spec, labels={"tier": "front"}))
    world.report(only(world).id, TaskState.FAILED)
    world.apply(world.changes())
    assert world.steps() == [Recheck(3.0)]


def test_the_delay_holds_when_the_leaders_clock_was_set_back_meanwhile() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.put(replace(only(world), created_at=timestamp(3 * 10**18)))
    world.report(only(world).id, TaskState.FAILED)
    world.apply(world.changes())
    (successor,) = wanted(world)
    assert successor.created_at == timestamp(3 * 10**18 + MILLISECOND_NS)
    assert world.steps() == [Recheck(3.0)]


def test_the_default_is_five_seconds() -> None:
    world = a_world()
    world.report(only(world).id, TaskState.COMPLETE)
    world.apply(world.changes())
    assert world.steps() == [Recheck(5.0)]


def test_a_new_leader_starts_the_delay_again() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.report(only(world).id, TaskState.FAILED)
    world.apply(world.changes())
    world.seen = type(world.seen)(100.0)
    world.now = 101.0
    assert world.steps() == [Recheck(103.0)]


def test_a_slot_that_has_a_task_of_the_present_spec_needs_no_other_when_the_youngest_is_lost() -> None:
    """An update to what a later one returned to was still preparing; what ran meanwhile is the younger one."""
    world = World(a_service(image="app:1"), nodes=[a_node("n1"), a_node("n2")])
    world.put(a_task("attempt", node="n2", state=TaskState.PREPARING, service=world.service))
    world.update(a_service_spec(image="app:2"))
    world.put(a_task("younger", node="n1", service=world.service))
    world.update(a_service_spec(image="app:1"))
    world.nodes[NodeId("n1")] = a_node("n1", state=NodeState.DOWN)
    assert [step.task.id for step in world.steps() if isinstance(step, RetireTask)] == ["younger"]
    world.apply(world.changes())
    assert [task.id for task in wanted(world)] == ["attempt"]


@pytest.mark.parametrize(
    ("condition", "state", "is_replaced"),
    [
        (RestartCondition.ANY, TaskState.COMPLETE, True),
        (RestartCondition.ANY, TaskState.FAILED, True),
        (RestartCondition.ANY, TaskState.REJECTED, True),
        (RestartCondition.ON_FAILURE, TaskState.COMPLETE, False),
        (RestartCondition.ON_FAILURE, TaskState.FAILED, True),
        (RestartCondition.ON_FAILURE, TaskState.REJECTED, True),
        (RestartCondition.NONE, TaskState.FAILED, False),
        (RestartCondition.NONE, TaskState.COMPLETE, False),
    ],
)
def test_the_condition_decides(condition: RestartCondition, state: TaskState, is_replaced: bool) -> None:
    world = a_world(RestartPolicy(condition=condition, delay=0))
    world.report(only(world).id, state)
    world.settle()
    assert bool(wanted(world)) is is_replaced
    assert only(world).desired_state is SHUTDOWN


def test_attempts_are_counted_per_slot_and_end_at_the_maximum() -> None:
    world = a_world(RestartPolicy(delay=0, max_attempts=2), replicas=2)
    for _ in range(10):
        for task in [task for task in wanted(world) if task.slot == 1]:
            world.report(task.id, TaskState.FAILED)
        world.settle()
    assert len(world.tasks) == 2 + 2
    assert [task.slot for task in wanted(world)] == [2]


def given_up(policy: RestartPolicy) -> World:
    """A slot whose second task has failed, too; one restart is allowed."""
    world = a_world(replace(policy, max_attempts=1))
    for _ in range(2):
        (task,) = wanted(world)
        world.report(task.id, TaskState.FAILED)
        world.apply(world.changes())
        world.now += 3.0
        world.apply(world.changes())
    assert wanted(world) == []
    return world


def roll_back(world: World) -> Task:
    """The task that fills the slot again."""
    rolling_back = UpdateStatus(state=UpdateState.ROLLBACK_STARTED)
    world.service = replace(world.service, update_status=rolling_back)
    world.apply([one for one in world.changes() if isinstance(one, FillSlot)])
    (task,) = wanted(world)
    return task


def test_a_slot_that_was_given_up_and_is_filled_by_a_rollback_waits_for_the_rest_of_the_delay() -> None:
    world = given_up(RestartPolicy(delay=5 * SECOND_NS))
    assert world.steps() == []
    task = roll_back(world)
    assert task.desired_state is READY
    assert Recheck(world.now + 2.0) in world.steps()
    world.now += 2.0
    assert StartTask(task) in world.steps()


def test_a_rollback_fills_a_slot_at_once_where_the_delay_is_over() -> None:
    task = roll_back(given_up(RestartPolicy(delay=2 * SECOND_NS)))
    assert task.desired_state is RUNNING


def test_a_rollback_to_another_spec_does_not_wait() -> None:
    world = given_up(RestartPolicy(delay=60 * SECOND_NS))
    world.update(a_service_spec(image="other:1"))
    assert roll_back(world).desired_state is RUNNING


def test_a_new_spec_starts_with_a_full_number_of_attempts() -> None:
    world = a_world(RestartPolicy(delay=0, max_attempts=1))
    world.report(only(world).id, TaskState.FAILED)
    world.settle()
    world.report(wanted(world)[0].id, TaskState.FAILED)
    world.settle()
    assert wanted(world) == []
    world.update(a_service("web", image="app:2", restart=RestartPolicy(delay=0, max_attempts=1)).spec)
    world.settle()
    world.report(wanted(world)[0].id, TaskState.FAILED)
    world.settle()
    assert len(wanted(world)) == 1


def test_only_attempts_within_the_window_count() -> None:
    policy = RestartPolicy(delay=0, max_attempts=2, window=10 * SECOND_NS)
    world = a_world(policy)
    for moment in (0.0, 20.0, 40.0, 60.0):
        world.now = moment
        world.report(wanted(world)[0].id, TaskState.FAILED)
        world.settle()
    assert len(wanted(world)) == 1
    for moment in (61.0, 62.0, 63.0):
        world.now = moment
        for task in wanted(world):
            world.report(task.id, TaskState.FAILED)
        world.settle()
    assert wanted(world) == []


def test_a_new_leader_refills_the_slot_of_a_task_that_was_stopped_and_not_of_one_that_ended() -> None:
    """With its node, say: only what ended by itself can have been given up by the leader before."""
    policy = RestartPolicy(delay=0, max_attempts=2, window=10 * SECOND_NS)
    for state, tasks in ((SHUTDOWN, 1), (TaskState.FAILED, 0)):
        world = World(a_service(replicas=1, restart=policy), nodes=[a_node("n1")])
        world.put(a_task(slot=1, node="n1", service=world.service, state=state, desired=SHUTDOWN))
        world.seen = ObservedTimes(0.0)
        world.settle()
        assert len(wanted(world)) == tasks


def test_what_could_not_be_prepared_is_tried_again_only_after_its_delay() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.report(only(world).id, TaskState.FAILED)
    world.apply(world.changes())
    world.now = 1.0
    world.report(wanted(world)[0].id, TaskState.REJECTED)
    assert world.steps() == [Recheck(3.0)]
    world.now = 3.0
    world.settle()
    assert world.steps() == [Recheck(6.0)]


def test_what_cannot_be_prepared_at_all_is_tried_more_and_more_slowly() -> None:
    world = a_world(AT_ONCE)
    waits = []
    for _ in range(6):
        world.report(wanted(world)[0].id, TaskState.REJECTED)
        before = world.now
        while not any(task.status.state is TaskState.NEW for task in wanted(world)):
            world.settle()
            rechecks = [step.at for step in world.steps() if isinstance(step, Recheck)]
            world.now = max([world.now, *rechecks])
        waits.append(world.now - before)
        world.settle()
    assert waits == sorted(waits)
    assert waits[0] == 0.0
    assert waits[-1] == 2.0


def crash(world: World, *, ran_s: float = 0.1) -> float:
    """The task runs and fails; the seconds until its successor may start."""
    world.settle()
    (task,) = wanted(world)
    world.report(task.id, RUNNING)
    world.now += ran_s
    world.report(task.id, TaskState.FAILED)
    failed_at = world.now
    world.settle()
    while next(iter(wanted(world))).desired_state is READY:
        (recheck,) = world.steps()
        assert isinstance(recheck, Recheck)
        world.now = recheck.at
        world.settle()
    return world.now - failed_at


def test_a_crash_loop_without_a_delay_is_damped_and_what_ran_well_begins_anew() -> None:
    world = a_world(AT_ONCE)
    assert [round(crash(world), 3) for _ in range(9)] == [0, 0, 0.5, 1, 2, 4, 8, 8, 8]
    assert crash(world, ran_s=10.0) == 0.0
    assert crash(world) == 0.0


def test_a_delay_longer_than_the_damping_holds_alone() -> None:
    world = a_world(RestartPolicy(delay=20 * SECOND_NS))
    assert [round(crash(world), 3) for _ in range(9)] == [20.0] * 9


def test_a_delay_that_the_user_set_is_what_happens() -> None:
    world = a_world(RestartPolicy(delay=2 * SECOND_NS))
    assert [round(crash(world), 3) for _ in range(9)] == [2.0] * 9


def test_a_delay_too_short_to_keep_a_loop_slow_is_damped_as_none() -> None:
    world = a_world(RestartPolicy(delay=SECOND_NS // 10))
    assert [round(crash(world), 3) for _ in range(8)] == [0.1, 0.1, 0.5, 1, 2, 4, 8, 8]


def test_a_task_that_has_to_wait_says_until_when_and_after_how_many_failures() -> None:
    world = a_world(AT_ONCE)
    for _ in range(4):
        crash(world)
    world.settle()
    world.report(next(task.id for task in wanted(world)), TaskState.FAILED)
    world.apply(world.changes())
    (task,) = wanted(world)
    assert task.restart is not None
    assert task.restart.failures == 5
    assert unix_ns(task.restart.not_before) - unix_ns(task.created_at) == 2 * SECOND_NS


def forget_the_past(world: World) -> None:
    """What history allows: of each slot only the youngest task is kept."""
    for task in list(world.tasks.values())[:-1]:
        del world.tasks[task.id]


def change_the_leader(world: World) -> None:
    world.now += 100.0
    world.seen = ObservedTimes(world.now)


@pytest.mark.parametrize("between", [forget_the_past, change_the_leader])
def test_neither_history_nor_a_change_of_leader_ends_a_crash_loop(between: Callable[[World], None]) -> None:
    world, waits = a_world(AT_ONCE), []
    for _ in range(7):
        waits.append(round(crash(world), 3))
        between(world)
    assert waits == [0, 0, 0.5, 1, 2, 4, 8]


@pytest.mark.parametrize("between", [forget_the_past, change_the_leader])
def test_neither_forgets_how_often_a_task_could_not_be_prepared(between: Callable[[World], None]) -> None:
    world, delays = a_world(AT_ONCE), []
    for _ in range(5):
        world.now += 10.0
        world.settle()
        world.report(wanted(world)[0].id, TaskState.REJECTED)
        world.settle()
        (task,) = wanted(world)
        delays.append(task.restart.delay / SECOND_NS if task.restart is not None else None)
        between(world)
    assert delays == [0, 0.25, 1, 2, 2]


def test_a_delay_holds_without_the_task_that_it_was_decided_by() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.report(only(world).id, TaskState.FAILED)
    world.apply(world.changes())
    forget_the_past(world)
    assert world.steps() == [Recheck(3.0)]


def test_a_task_that_an_earlier_leader_saw_start_has_run_for_as_long_as_its_own_stamps_say() -> None:
    world = a_world(AT_ONCE)
    for _ in range(6):
        crash(world)
    world.settle()
    world.report(wanted(world)[0].id, RUNNING)
    change_the_leader(world)
    (task,) = wanted(world)
    ended = timestamp(unix_ns(task.created_at) + 3600 * SECOND_NS)
    for at, delay_s in ((task.created_at, 8.0), (ended, 0.0)):
        status = replace(task.status, state=TaskState.FAILED, timestamp=at)
        world.put(replace(task, status=status))
        fills = [step.successor for step in world.steps() if isinstance(step, ReplaceTask)]
        assert [fill.delay_s for fill in fills] == [delay_s]


def test_a_task_that_never_became_healthy_has_not_run_however_long_an_earlier_leader_waited_for_it() -> None:
    """Its node keeps the last message, ``starting``.  Else each change of leader would start the count anew."""
    world = a_world(AT_ONCE)
    for _ in range(6):
        crash(world)
    world.settle()
    change_the_leader(world)
    (task,) = wanted(world)
    later = timestamp(unix_ns(task.created_at) + 3600 * SECOND_NS)
    for message, failures in (("starting", 7), ("starting; a warning", 7), ("started", 0)):
        status = replace(task.status, state=TaskState.FAILED, timestamp=later, message=message)
        world.put(replace(task, status=status))
        fills = [step.successor for step in world.steps() if isinstance(step, ReplaceTask)]
        assert [fill.failures for fill in fills] == [failures]


@pytest.mark.parametrize("between", [forget_the_past, change_the_leader])
def test_every_attempt_of_a_crash_loop_says_since_when_it_lasts(between: Callable[[World], None]) -> None:
    world = a_world(AT_ONCE)
    stamps = [timestamp(n * SECOND_NS) for n in range(5)]
    for number, stamp in enumerate(stamps):
        world.settle()
        (task,) = wanted(world)
        world.put(replace(task, status=replace(task.status, state=TaskState.FAILED, timestamp=stamp)))
        world.apply(world.changes())
        (successor,) = wanted(world)
        assert successor.restart is not None
        assert (successor.restart.failures, successor.restart.since) == (number + 1, stamps[0])
        if successor.desired_state is READY:
            world.put(replace(successor, desired_state=RUNNING))
        between(world)


def test_a_scale_in_a_crash_loop_does_not_end_it() -> None:
    world = a_world(AT_ONCE)
    for _ in range(5):
        crash(world)
    world.update(replace(world.service.spec, labels={"a": "b"}))
    assert crash(world) == pytest.approx(4.0)


def test_a_crash_loop_of_one_slot_costs_the_others_nothing() -> None:
    world = a_world(AT_ONCE, replicas=2)
    for _ in range(8):
        world.settle()
        looping = next(task for task in wanted(world) if task.slot == 1)
        world.report(looping.id, TaskState.FAILED)
    world.settle()
    other = next(task for task in wanted(world) if task.slot == 2)
    world.report(other.id, TaskState.FAILED)
    world.settle()
    desired = {task.slot: task.desired_state for task in wanted(world)}
    assert desired == {1: READY, 2: RUNNING}


def test_a_new_spec_counts_no_crashes_before_it() -> None:
    world = a_world(AT_ONCE)
    for _ in range(6):
        crash(world)
    world.update(a_service(replicas=1, restart=AT_ONCE, image="busybox:2").spec)
    world.settle()
    world.prepare_all()
    world.settle()
    world.stop_all()
    assert crash(world) == 0.0


def test_a_lost_node_is_not_waited_for_but_the_delay_holds() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.nodes[a_node("n1").id] = a_node("n1", state=NodeState.DOWN)
    world.apply(world.changes())
    assert world.steps() == [Recheck(3.0)]
    world.now = 3.0
    assert isinstance(world.steps()[0], StartTask)


def test_a_drained_node_gives_its_task_away_without_delay_once_it_has_stopped() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    first = only(world)
    world.nodes[a_node("n1").id] = a_node("n1", availability=Availability.DRAIN, labels={DRAIN_NOW: "true"})
    world.apply(world.changes())
    assert world.steps() == [Recheck(42.0)]
    world.report(first.id, SHUTDOWN)
    assert isinstance(world.steps()[0], StartTask)


def test_a_task_that_failed_on_a_node_that_is_drained_has_a_successor_at_once() -> None:
    world = a_world(RestartPolicy(delay=3 * SECOND_NS))
    world.report(only(world).id, TaskState.FAILED)
    world.nodes["n1"] = a_node("n1", availability=Availability.DRAIN)
    failed = only(world)
    assert world.steps() == [ReplaceTask(failed, FillSlot(world.service, 1, desired=RUNNING, failures=1))]


def test_a_task_on_a_removed_node_is_replaced() -> None:
    world = a_world(AT_ONCE)
    del world.nodes[a_node("n1").id]
    assert world.steps() == [ReplaceTask(only(world), FillSlot(world.service, 1, desired=RUNNING))]


def test_a_task_whose_node_is_back_before_its_replacement_is_written_stays() -> None:
    world = a_world(AT_ONCE)
    world.nodes["n1"] = a_node("n1", state=NodeState.DOWN)
    changes = world.changes()
    world.nodes["n1"] = a_node("n1")
    world.apply(changes)
    assert [task.id for task in wanted(world)] == [only(world).id]
    world.nodes["n1"] = a_node("n1", state=NodeState.DOWN)
    world.apply(changes)
    assert [task.id for task in wanted(world)] != [only(world).id]


async def test_a_leader_that_is_behind_replaces_no_task_whose_node_is_back() -> None:
    world = a_world(AT_ONCE)
    world.nodes["n1"] = a_node("n1", state=NodeState.DOWN)
    (change,) = world.changes()
    other = MemoryStore(SystemClock())
    leader = MemoryStore(SystemClock(), other.cluster)
    for one in (world.service, world.nodes["n1"], only(world)):
        await other.update(lambda tx, one=one: tx.put(one))
    leader.faults.lag_s = 0.05
    await other.update(lambda tx: tx.put(a_node("n1")))
    assert leader.view().get(Node, NodeId("n1")).status.state is NodeState.DOWN
    await leader.update_each(lambda tx, change: apply(tx, change, new_id, ZERO_TIME), [change])
    assert [task.id for task in other.view().find(Task) if task.is_wanted] == [only(world).id]


def test_a_task_that_no_node_ever_got_is_closed_at_once() -> None:
    world = World(a_service(replicas=1))
    world.settle()
    world.put(a_service(replicas=0))
    world.settle()
    assert only(world).status.state is SHUTDOWN


policies = st.builds(
    RestartPolicy,
    condition=st.sampled_from(list(RestartCondition)),
    delay=st.sampled_from([None, 0, SECOND_NS]),
    max_attempts=st.sampled_from([None, 0, 1, 3]),
    window=st.sampled_from([None, 0, 5 * SECOND_NS]),
)
events = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([TaskState.RUNNING, TaskState.FAILED, TaskState.COMPLETE, SHUTDOWN]),
        st.sampled_from([0.0, 0.5, 2.0, 70.0]),
    ),
    max_size=12,
)


@given(policies, events)
def test_whatever_happens_decisions_settle_and_no_slot_is_filled_twice(
    policy: RestartPolicy, happenings: list[tuple[int, TaskState, float]]
) -> None:
    world = a_world(policy, replicas=2)
    for number, state, pause in happenings:
        world.now += pause
        task = list(world.tasks.values())[number % len(world.tasks)]
        if state > task.status.state and (state is not SHUTDOWN or task.desired_state > RUNNING):
            world.report(task.id, state)
        assert world.settle() <= 3
        slots = [task.slot for task in wanted(world)]
        assert len(slots) == len(set(slots))
        assert not any(isinstance(step, RetireTask) for step in world.steps())


@pytest.mark.parametrize("availability", [Availability.ACTIVE, Availability.DRAIN])
def test_a_new_task_waits_until_a_node_that_is_down_has_stopped_the_last_by_itself(
    availability: Availability,
) -> None:
    """It was retired; nothing may run twice where the service says that nodes stop their tasks.

    A node that was drained while it was cut off does not know it.
    """
    labels = {"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "20s"}
    world = World(a_service(spec=replace(a_service_spec(restart=AT_ONCE), labels=labels)))
    down = a_node("n1", state=NodeState.DOWN, availability=availability)
    world.nodes = {node.id: node for node in (down, a_node("n2"))}
    world.put(a_task(node="n1", service=world.service, desired=TaskState.REMOVE, state=RUNNING))
    world.put(a_task("next", node="n2", service=world.service, desired=READY, state=READY))
    assert world.steps() == [Recheck(30.0)], "the delay, and the grace to stop"
    world.now = 30.0
    assert world.steps() == [StartTask(world.tasks["next"])]
    world.now, world.service = 0.0, replace(world.service, spec=replace(world.service.spec, labels={}))
    assert world.steps() == [StartTask(world.tasks["next"])]


def test_of_a_node_that_is_drained_when_it_is_down_already_nothing_runs_twice_either() -> None:
    labels = {"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "20s"}
    world = World(a_service(spec=replace(a_service_spec(replicas=1, restart=AT_ONCE), labels=labels)))
    down = a_node("n1", state=NodeState.DOWN, availability=Availability.DRAIN)
    world.nodes = {node.id: node for node in (down, a_node("n2"))}
    world.put(a_task("last", node="n1", service=world.service, state=RUNNING))
    world.now = 5.0
    world.settle()
    (successor,) = wanted(world)
    assert (world.tasks["last"].desired_state, successor.desired_state) == (SHUTDOWN, READY)
    world.now = 29.0
    assert world.steps() == [Recheck(30.0)], "the delay, and the grace to stop"
    world.now = 30.0
    assert world.steps() == [StartTask(successor)]


def test_a_hold_for_a_disruption_does_not_begin_the_delay_of_a_replacement_again() -> None:
    labels = {"skep.on-disconnect-delay": "60s"}
    world = World(a_service(spec=replace(a_service_spec(replicas=1, restart=AT_ONCE), labels=labels)))
    world.nodes = {node.id: node for node in (a_node("n1", state=NodeState.DOWN), a_node("n2"))}
    lost = a_task("lost", node="n1", service=world.service, state=RUNNING)
    world.put(lost)

    def leaves_at(**options: object) -> float:
        return replace(world.situation, **options).leaves_at(lost)

    assert leaves_at(replaces_from=50.0) == 60.0
    assert leaves_at(replaces_from=70.0) == 70.0
    assert leaves_at(is_frozen=True) == inf
