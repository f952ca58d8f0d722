"""What of a slot's past is kept."""

from collections import deque
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.reaper.history import (
    attempts_kept,
    history_limit,
    is_disposable,
    is_of_gone_slot,
    is_orphaned,
    surplus_history,
)
from skep.manager.orchestrator.reaper.removals import DeleteTask
from skep.manager.orchestrator.reaper.state import Key, ReaperState
from skep.manager.orchestrator.replacement.restart import attempts_of, should_restart
from skep.model.options.autoscaling import with_replicas
from skep.model.service import (
    MAX_ATTEMPTS_MAX,
    RestartPolicy,
    Service,
    UpdateSplit,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.updates import CANARY, UPDATE
from skep.model.swarm import OrchestrationConfig, Swarm, SwarmSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, TaskId
from skep.model.values.meta import Version
from skep.store.kinds import SpecVersion, unused_versions
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task

FAILED, REMOVE, SHUTDOWN = TaskState.FAILED, TaskState.REMOVE, TaskState.SHUTDOWN


def a_past_task() -> Task:
    return a_task(node="n1", state=FAILED, desired=SHUTDOWN)


@pytest.mark.parametrize("attempts", [1, MAX_ATTEMPTS_MAX, MAX_ATTEMPTS_MAX + 1, 2**64 - 1])
def test_a_task_that_always_fails_leaves_a_bounded_history_whatever_its_policy(attempts: int) -> None:
    service = a_service(restart=RestartPolicy(delay=0, max_attempts=attempts))
    past = [a_past_task() for _ in range(2 * MAX_ATTEMPTS_MAX)]
    limit, counted = history_limit(service, None), attempts_kept(service)
    kept = len(past) - len(surplus_history(past, limit, attempts=counted))
    assert kept <= MAX_ATTEMPTS_MAX + 2
    # As many are kept as decide that the slot is given up, or the policy never gives it up.
    last = replace(past[-1], spec=service.spec.task_template)
    is_restarted = should_restart(last, past[-kept:], ObservedTimes(0.0))
    assert is_restarted is (attempts > MAX_ATTEMPTS_MAX)


def test_the_oldest_tasks_go_first_and_the_running_one_counts() -> None:
    past = [a_past_task() for _ in range(4)]
    assert surplus_history([*past, a_task()], limit=3) == tuple(past[:2])


def test_a_task_on_a_lost_node_displaces_none_that_restarts_are_counted_by() -> None:
    """Else a slot that is given up would be filled again at once, as no restart is left that counts."""
    lost = a_task(node="n2", desired=SHUTDOWN)
    assert surplus_history([lost, a_past_task(), a_past_task()], limit=2) == ()
    oldest, *others = [a_past_task() for _ in range(3)]
    assert surplus_history([oldest, lost, *others], limit=2) == (oldest,)


def test_a_negative_limit_keeps_everything_and_zero_only_what_runs() -> None:
    slot = [a_past_task(), a_past_task(), a_task()]
    assert surplus_history(slot, limit=-1) == ()
    assert surplus_history(slot, limit=0) == tuple(slot[:2])


def test_what_still_runs_is_never_surplus() -> None:
    stopping = a_task(node="n1", desired=SHUTDOWN)
    assert surplus_history([stopping, a_task()], limit=0) == ()


def test_the_youngest_stays_whatever_the_limit_as_the_next_delay_is_read_from_it() -> None:
    past, failed = a_past_task(), a_past_task()
    assert surplus_history([failed], limit=0) == ()
    assert surplus_history([past, failed], limit=0) == (past,)
    assert surplus_history([past, failed, a_task(desired=TaskState.READY)], limit=0) == (past, failed)


@pytest.mark.parametrize("state", [FAILED, TaskState.REJECTED])
@pytest.mark.parametrize("iteration", [None, Version(index=1)])
def test_a_failure_stays_until_its_successor_is_there(state: TaskState, iteration: Version | None) -> None:
    """Else the orchestrator would find an empty slot, and fill it without the delay."""
    failed = replace(a_task(node="n1", state=state), job_iteration=iteration)
    assert surplus_history([failed], limit=0, iteration=iteration) == ()


def test_what_an_update_may_fail_by_stays_until_it_is_over() -> None:
    old = a_past_task()
    lead, retry, last = (replace(a_past_task(), spec_version=Version(index=7)) for _ in range(3))
    slot = [old, lead, retry, last, a_task(state=TaskState.PREPARING)]
    assert surplus_history(slot, limit=0, updating=[Version(index=7)]) == (old, retry)
    assert surplus_history(slot, limit=0) == (old, lead, retry, last)


def test_the_attempt_before_a_task_of_an_earlier_version_stays_during_an_update() -> None:
    """After a rollback it may have the same task spec.  Without it, the update would wait for the next attempt."""
    first, last = (replace(a_past_task(), spec_version=Version(index=3)) for _ in range(2))
    slot = [first, last, a_task(state=TaskState.NEW, desired=TaskState.READY, version=3)]
    assert surplus_history(slot, limit=0, updating=[Version(index=7)]) == (first,)
    assert surplus_history(slot, limit=0) == (first, last)


def test_an_attempt_that_was_given_up_with_its_node_stands_for_no_other() -> None:
    """An update is judged by the first one that reported its end, and by the last one under a new leader."""
    given_up = a_task(node="gone", state=TaskState.ORPHANED, desired=SHUTDOWN, version=7)
    first, second, last = (replace(a_past_task(), spec_version=Version(index=7)) for _ in range(3))
    slot = [given_up, first, second, last, a_task(state=TaskState.PREPARING, version=7)]
    assert surplus_history(slot, limit=0, updating=[Version(index=7)]) == (given_up, second)


def test_an_attempt_that_was_stopped_before_it_ran_stands_for_no_other() -> None:
    stopped = a_task(node="n1", state=SHUTDOWN, desired=SHUTDOWN, version=7)
    first, second, last = (replace(a_past_task(), spec_version=Version(index=7)) for _ in range(3))
    slot = [stopped, first, second, last, a_task(state=TaskState.PREPARING, version=7)]
    assert surplus_history(slot, limit=0, updating=[Version(index=7)]) == (second,)


async def test_attempts_at_both_sides_of_a_resume_and_of_the_start_of_a_term_stay() -> None:
    """Attempts that had ended by then no longer decide about the update, so others do."""
    store = MemoryStore(SystemClock())
    put = await store.update(lambda tx: tx.put(a_service()))
    attempts = [a_task(node="n1", state=FAILED, desired=SHUTDOWN, service=put) for _ in range(14)]
    status = UpdateStatus(state=UpdateState.UPDATING, tolerated_until=attempts[3].created_at)
    await store.update(lambda tx: tx.put(replace(put, update_status=status)))
    await store.update(lambda tx: [tx.put(task) for task in attempts[:8]])
    state = ReaperState(store.view, SystemClock(), Random(1))
    deque(state.start(store.view()), maxlen=0)
    await store.update(lambda tx: [tx.put(task) for task in attempts[8:]])
    found = state.decide(Key(f"{put.id}/1"))
    numbers = {task.id: number for number, task in enumerate(attempts)}
    deleted = [numbers[one.task.id] for one in found if isinstance(one, DeleteTask)]
    assert deleted == [1, 2, 5, 6, 9, 10, 11, 12]


def test_what_is_to_be_removed_goes_once_it_has_stopped_or_never_began() -> None:
    assert is_disposable(a_task(state=FAILED, desired=REMOVE))
    assert is_disposable(a_task(state=TaskState.PENDING, desired=REMOVE))
    assert not is_disposable(a_task(state=TaskState.RUNNING, desired=REMOVE))
    assert not is_disposable(a_task(state=FAILED, desired=SHUTDOWN))


def test_a_task_on_a_node_that_left_is_orphaned() -> None:
    assert is_orphaned(a_task(node="n1"), None)
    assert not is_orphaned(a_task(node="n1"), a_node("n1"))
    assert not is_orphaned(a_task(node="n1", state=FAILED), None)


def test_a_slot_of_a_global_service_ends_with_its_node() -> None:
    ended, running = a_task(slot=0, node="n1", state=FAILED), a_task(slot=0, node="n1")
    assert is_of_gone_slot(ended, None)
    assert is_of_gone_slot(a_task(slot=0, node="n1", state=TaskState.NEW), None), "its node never had it"
    assert not is_of_gone_slot(running, None), "its end is written first"
    assert not is_of_gone_slot(ended, a_node("n1"))
    assert not is_of_gone_slot(a_task(slot=1, node="n1", state=FAILED), None), "the slot is still there"


def test_as_much_history_is_kept_as_the_restart_policy_counts_with() -> None:
    assert history_limit(a_service(restart=RestartPolicy(max_attempts=9)), 5) == 10
    assert history_limit(a_service(), 2) == 2
    assert history_limit(a_service(), None) == 5


def test_tasks_that_were_moved_do_not_displace_those_by_which_restarts_are_counted() -> None:
    failed = [a_task(node="n1", state=FAILED, desired=SHUTDOWN) for _ in range(2)]
    moved = [a_task(node="n1", state=SHUTDOWN, desired=SHUTDOWN) for _ in range(4)]
    slot = [*failed, *moved, a_task(node="n1")]
    assert surplus_history(slot, limit=3, attempts=3) == tuple(moved[1:])
    assert surplus_history(slot, limit=5, attempts=3) == tuple(moved[1:3])


def test_restarts_of_an_old_task_next_to_the_new_one_are_counted_as_well() -> None:
    failed = [replace(a_past_task(), spec_version=Version(index=1)) for _ in range(3)]
    slot = [*failed, a_task(node="n1", version=1), a_task(node="n2", version=2)]
    assert surplus_history(slot, limit=0, attempts=2) == (failed[0],)


@given(st.lists(st.sampled_from([FAILED, SHUTDOWN]), min_size=1, max_size=9), st.integers(1, 3))
def test_what_is_deleted_changes_no_number_of_attempts(states: list[TaskState], most: int) -> None:
    """Tasks with the state shutdown were moved."""
    service = a_service(restart=RestartPolicy(max_attempts=most))
    slot = [a_task(node="n1", state=state, desired=SHUTDOWN) for state in states]
    surplus = surplus_history(slot, history_limit(service, None), attempts=attempts_kept(service))
    left = [task for task in slot if task not in surplus]
    before, after = attempts_of(slot, slot[-1]), attempts_of(left, slot[-1])
    assert after == before[len(before) - len(after) :]
    assert len(after) >= min(len(before), most)


def test_attempts_of_a_task_that_runs_on_stay_beside_attempts_at_a_newer_spec() -> None:
    before, after = (a_service(restart=RestartPolicy(max_attempts=2), version=index) for index in (1, 2))
    old = [a_task(node="n1", state=FAILED, desired=SHUTDOWN, service=before) for _ in range(2)]
    running = a_task(node="n1", service=before)
    new = [a_task(node="n1", state=FAILED, desired=SHUTDOWN, service=after) for _ in range(3)]
    slot = [*old, running, *new]
    surplus = surplus_history(slot, history_limit(after, None), attempts=attempts_kept(after))
    assert len(attempts_of([task for task in slot if task not in surplus], running)) == 2


def test_attempts_of_a_task_whose_policy_an_update_lifts_stay_until_the_update_replaces_it() -> None:
    before, after = a_service(restart=RestartPolicy(max_attempts=6)), a_service(restart=RestartPolicy())
    old = [a_task(node="n1", state=FAILED, desired=SHUTDOWN, service=before) for _ in range(9)]
    slot = [*old, a_task(node="n1", service=before)]
    surplus = surplus_history(slot, history_limit(after, None), attempts=attempts_kept(after))
    assert surplus == tuple(old[:2])


def test_versions_that_a_task_or_the_service_follows_stay() -> None:
    web = a_service(version=3)
    versions = [SpecVersion(id=f"web/{n}", service_id=web.id, index=n) for n in (1, 2, 3)]
    assert unused_versions(web, versions, [a_task(version=2)]) == versions[:1]
    staged = replace(web, update_status=UpdateStatus(split=UpdateSplit(old=versions[0].index)))
    assert unused_versions(staged, versions, [a_task(version=2)]) == []


@given(st.lists(st.sampled_from(list(TaskState)), max_size=12), st.integers(-1, 6))
def test_deleting_the_surplus_once_is_enough(states: list[TaskState], limit: int) -> None:
    slot = [a_task(node="n1", state=state, desired=SHUTDOWN) for state in states]
    surplus = surplus_history(slot, limit)
    assert surplus_history([task for task in slot if task not in surplus], limit) == ()


async def a_staged_update(*, attempts: int = 0) -> tuple[MemoryStore, Service]:
    """Return a store without history, and a service whose first spec version has the restart limit ``attempts``."""
    store = MemoryStore(SystemClock())
    orchestration = OrchestrationConfig(task_history_retention_limit=0)
    await store.update(
        lambda tx: tx.put(Swarm(id=ClusterId("c"), spec=SwarmSpec(orchestration=orchestration)))
    )
    await store.update(lambda tx: tx.put(a_node("n1")))
    first = a_service("web", restart=RestartPolicy(max_attempts=attempts) if attempts else None)
    service = await store.update(lambda tx: tx.put(first))
    assert service.spec_version is not None
    spec = replace(a_service_spec("web", image="app:2"), labels={UPDATE: CANARY})
    split = UpdateSplit(old=service.spec_version.index)
    status = UpdateStatus(state=UpdateState.UPDATING, split=split)
    staged = replace(service, spec=spec, previous_spec=service.spec, update_status=status)
    return store, await store.update(lambda tx: tx.put(staged))


async def deleted_from(store: MemoryStore, *slot: Task) -> set[TaskId]:
    for task in slot:
        await store.update(lambda tx, task=task: tx.put(task))
    reaper = ReaperState(store.view, SystemClock(), Random(1))
    return {one.task.id for one in reaper.decide(Key("web/1")) if isinstance(one, DeleteTask)}


async def test_the_restart_limit_of_old_tasks_counts_during_a_staged_update() -> None:
    store, service = await a_staged_update(attempts=3)
    assert service.old_version is not None
    former = replace(service, spec_version=Version(index=service.old_version))
    failed = [a_task(service=former, node="n1", state=FAILED, desired=SHUTDOWN) for _ in range(5)]
    assert await deleted_from(store, *failed, a_task(service=former, node="n1")) == {failed[0].id}


async def test_failures_of_a_staged_update_stay_after_it_was_scaled() -> None:
    store, service = await a_staged_update()
    assert service.spec_version is not None
    split = UpdateSplit(old=service.old_version, versions=(service.spec_version.index,), changes=1)
    status = UpdateStatus(state=UpdateState.UPDATING, split=split)
    scaled = replace(service, spec=with_replicas(service.spec, 3), update_status=status)
    await store.update(lambda tx: tx.put(scaled))
    failed = a_task(service=service, node="n1", state=FAILED, desired=SHUTDOWN)
    assert await deleted_from(store, failed, a_task(service=service, node="n1")) == set()
