"""How many tasks a replicated service has, and in which slots."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.changes import FillSlot, RetireTask
from skep.manager.orchestrator.replicated import in_eviction_order, reconcile
from skep.manager.orchestrator.slots import group_by_slot
from skep.model.options.labels import STOPPED
from skep.model.service import RestartCondition, RestartPolicy
from skep.model.task import Task, TaskState
from tests.support.builders import a_service, a_task
from tests.support.managers.worlds import World


def test_a_new_service_gets_its_slots_from_one_up() -> None:
    web = a_service(replicas=3)
    assert reconcile(web, []) == [FillSlot(web, 1), FillSlot(web, 2), FillSlot(web, 3)]


def test_a_gap_is_filled_before_higher_numbers() -> None:
    web = a_service(replicas=3)
    tasks = [a_task(slot=1, service=web), a_task(slot=3, service=web)]
    assert reconcile(web, tasks) == [FillSlot(web, 2)]


def test_scaling_down_starts_with_the_node_holding_most_copies() -> None:
    tasks = [a_task(slot=1, node="n1"), a_task(slot=2, node="n2"), a_task(slot=3, node="n1")]
    assert reconcile(a_service(replicas=2), tasks) == [RetireTask(tasks[2], TaskState.REMOVE)]


def test_scaling_down_takes_what_does_not_run_before_what_runs() -> None:
    tasks = [
        a_task(slot=1, node="n1", state=TaskState.PREPARING),
        a_task(slot=2, node="n2"),
        a_task(slot=3, node="n3"),
    ]
    assert reconcile(a_service(replicas=2), tasks) == [RetireTask(tasks[0], TaskState.REMOVE)]


def test_scaling_down_takes_unplaced_tasks_first_and_high_numbers_before_low_ones() -> None:
    tasks = [
        a_task(slot=1, node="n1"),
        a_task(slot=2, state=TaskState.PENDING),
        a_task(slot=3, node="n2"),
        a_task(slot=4, node="n3"),
    ]
    assert in_eviction_order(group_by_slot(tasks)) == [1, 3, 4, 2]


def test_the_history_of_a_slot_goes_with_it() -> None:
    past = a_task(slot=2, node="n1", state=TaskState.FAILED, desired=TaskState.SHUTDOWN)
    tasks = [a_task(slot=1, node="n1"), past, a_task(slot=2, node="n1")]
    assert reconcile(a_service(replicas=1), tasks) == [
        RetireTask(past, TaskState.REMOVE),
        RetireTask(tasks[2], TaskState.REMOVE),
    ]


def test_a_slot_used_again_waits_for_what_still_stops_in_it() -> None:
    web = a_service(replicas=1)
    stopping = a_task(slot=1, node="n1", desired=TaskState.REMOVE)
    assert reconcile(web, [stopping]) == [FillSlot(web, 1, desired=TaskState.READY)]


def test_a_slot_whose_task_ended_for_good_stays_taken() -> None:
    web = a_service(replicas=1, restart=RestartPolicy(condition=RestartCondition.NONE))
    ended = a_task(slot=1, service=web, state=TaskState.COMPLETE, desired=TaskState.SHUTDOWN)
    assert reconcile(web, [ended]) == []


def test_zero_replicas_end_every_task() -> None:
    tasks = [a_task(slot=1), a_task(slot=2)]
    assert reconcile(a_service(replicas=0), tasks) == [RetireTask(t, TaskState.REMOVE) for t in tasks]


states = st.sampled_from(list(TaskState))
histories = st.lists(
    st.builds(
        lambda slot, node, state, desired: a_task(
            slot=slot, node=node if state >= TaskState.ASSIGNED else "", state=state, desired=desired
        ),
        st.integers(1, 6),
        st.sampled_from(["n1", "n2", "n3"]),
        states,
        st.sampled_from([TaskState.READY, TaskState.RUNNING, TaskState.SHUTDOWN, TaskState.REMOVE]),
    ),
    max_size=14,
)


@given(histories, st.integers(0, 8))
def test_one_application_is_enough(tasks: list[Task], replicas: int) -> None:
    world = World(a_service(replicas=replicas), tasks)
    world.apply(reconcile(world.service, tasks, world.seen))
    assert reconcile(world.service, world.tasks.values(), world.seen) == []


@given(histories, st.integers(0, 8), st.randoms(use_true_random=False))
def test_the_order_of_tasks_does_not_matter(tasks: list[Task], replicas: int, random: object) -> None:
    web = a_service(replicas=replicas)
    shuffled = list(tasks)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert reconcile(web, shuffled) == reconcile(web, tasks)


@given(histories, st.integers(0, 8))
def test_as_many_slots_are_held_as_wanted(tasks: list[Task], replicas: int) -> None:
    world = World(a_service(replicas=replicas, restart=RestartPolicy(condition=RestartCondition.ANY)), tasks)
    world.apply(reconcile(world.service, tasks, world.seen))
    held = {task.slot for task in world.tasks.values() if task.is_wanted}
    assert len(held) == replicas


def test_a_stopped_service_has_no_tasks() -> None:
    web = a_service(replicas=2)
    stopped = replace(web, spec=replace(web.spec, labels={STOPPED: "true"}))
    task = a_task(slot=1, node="n1", service=stopped)
    assert reconcile(stopped, [task]) == [RetireTask(task, TaskState.REMOVE)]
    assert reconcile(stopped, []) == []
