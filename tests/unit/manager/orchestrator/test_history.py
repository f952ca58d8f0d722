"""What of a slot's past is kept."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.reaper.history import (
    history_limit,
    is_disposable,
    is_orphaned,
    surplus_history,
    unused_versions,
)
from skep.model.meta import Version
from skep.model.service import RestartPolicy
from skep.model.task import Task, TaskState
from skep.store.kinds import SpecVersion
from tests.builders import a_node, a_service, a_task

FAILED, REMOVE, SHUTDOWN = TaskState.FAILED, TaskState.REMOVE, TaskState.SHUTDOWN


def a_past_task() -> Task:
    return a_task(node="n1", state=FAILED, desired=SHUTDOWN)


def test_the_oldest_tasks_go_first_and_the_running_one_counts() -> None:
    past = [a_past_task() for _ in range(4)]
    assert surplus_history([*past, a_task()], limit=3) == tuple(past[:2])


def test_a_negative_limit_keeps_everything_and_zero_only_what_runs() -> None:
    slot = [a_past_task(), a_past_task(), a_task()]
    assert surplus_history(slot, limit=-1) == ()
    assert surplus_history(slot, limit=0) == tuple(slot[:2])


def test_what_still_runs_is_never_surplus() -> None:
    stopping = a_task(node="n1", desired=SHUTDOWN)
    assert surplus_history([stopping, a_task()], limit=0) == ()


def test_the_failure_that_a_restart_delay_is_read_from_stays() -> None:
    past = a_past_task()
    assert surplus_history([past, a_task(desired=TaskState.READY)], limit=0) == ()


def test_a_failure_stays_until_its_successor_is_there_and_a_run_of_a_job_does_not_wait_for_one() -> None:
    """Else the orchestrator would find an empty slot, and fill it without the delay."""
    failed = a_task(node="n1", state=FAILED)
    assert surplus_history([failed], limit=0) == ()
    run = replace(failed, job_iteration=Version(index=1))
    assert surplus_history([run], limit=0) == (run,)


def test_rejections_in_a_row_stay_until_something_runs_or_the_image_would_be_asked_for_without_a_pause() -> (
    None
):
    rejected = [a_task(node="n1", state=TaskState.REJECTED, desired=SHUTDOWN) for _ in range(6)]
    assert surplus_history([a_past_task(), *rejected, a_task(state=TaskState.PREPARING)], limit=0) != ()
    surplus = surplus_history([*rejected, a_task(state=TaskState.PREPARING)], limit=0)
    assert surplus == tuple(rejected[:2])
    assert surplus_history([*rejected, a_task(state=TaskState.RUNNING)], limit=0) == tuple(rejected)


def test_what_is_to_be_removed_goes_once_it_has_stopped_or_never_began() -> None:
    assert is_disposable(a_task(state=FAILED, desired=REMOVE))
    assert is_disposable(a_task(state=TaskState.PENDING, desired=REMOVE))
    assert not is_disposable(a_task(state=TaskState.RUNNING, desired=REMOVE))
    assert not is_disposable(a_task(state=FAILED, desired=SHUTDOWN))


def test_a_task_on_a_node_that_left_is_orphaned() -> None:
    assert is_orphaned(a_task(node="n1"), None)
    assert not is_orphaned(a_task(node="n1"), a_node("n1"))
    assert not is_orphaned(a_task(node="n1", state=FAILED), None)


def test_as_much_history_is_kept_as_the_restart_policy_counts_with() -> None:
    assert history_limit(a_service(restart=RestartPolicy(max_attempts=9)), 5) == 10
    assert history_limit(a_service(), 2) == 2
    assert history_limit(a_service(), None) == 5


def test_versions_that_a_task_or_the_service_follows_stay() -> None:
    web = a_service(version=3)
    versions = [SpecVersion(id=f"web/{n}", service_id=web.id, index=n) for n in (1, 2, 3)]
    assert unused_versions(web, versions, [a_task(version=2)]) == versions[:1]


@given(st.lists(st.sampled_from(list(TaskState)), max_size=12), st.integers(-1, 6))
def test_deleting_the_surplus_once_is_enough(states: list[TaskState], limit: int) -> None:
    slot = [a_task(node="n1", state=state, desired=SHUTDOWN) for state in states]
    surplus = surplus_history(slot, limit)
    assert surplus_history([task for task in slot if task not in surplus], limit) == ()
