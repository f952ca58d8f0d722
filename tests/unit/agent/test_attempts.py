"""What a node does without a manager about a task whose process ended."""

from typing import Any, cast

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from skep.agent.tasks.task import DEFAULT_DELAY_S, TaskDriver, next_attempt
from skep.aio.clock import SystemClock
from skep.model.service import MAX_ATTEMPTS_MAX, RestartCondition, RestartPolicy
from skep.model.task import AssignedTask, Task, TaskStatus
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_service_spec, a_task


def a_task_with(policy: RestartPolicy | None, job_iteration: Version | None = None) -> Task:
    spec = a_service_spec(restart=policy).task_template
    return msgspec.structs.replace(a_task("t1"), spec=spec, job_iteration=job_iteration)


def test_without_a_policy_it_is_tried_again_after_dockers_delay() -> None:
    assert next_attempt(a_task_with(None), 1, [], 0.0) == DEFAULT_DELAY_S
    assert next_attempt(a_task_with(None), 0, [], 0.0) == DEFAULT_DELAY_S


def test_the_condition_is_the_services() -> None:
    on_failure = a_task_with(RestartPolicy(condition=RestartCondition.ON_FAILURE, delay=SECOND_NS))
    assert next_attempt(on_failure, 1, [], 0.0) == 1.0
    assert next_attempt(on_failure, 0, [], 0.0) is None
    assert next_attempt(a_task_with(RestartPolicy(condition=RestartCondition.NONE)), 1, [], 0.0) is None


def test_the_policy_gives_up_after_its_attempts() -> None:
    task = a_task_with(RestartPolicy(max_attempts=2, delay=0))
    assert next_attempt(task, 1, [1.0], 100.0) == 0.0
    assert next_attempt(task, 1, [1.0, 2.0], 100.0) is None


def test_attempts_before_the_window_do_not_count() -> None:
    task = a_task_with(RestartPolicy(max_attempts=2, delay=0, window=60 * SECOND_NS))
    assert next_attempt(task, 1, [1.0, 2.0], 62.0) == 0.0
    assert next_attempt(task, 1, [3.0, 50.0], 62.0) is None


def test_a_jobs_task_is_left_to_the_leader() -> None:
    assert next_attempt(a_task_with(None, job_iteration=Version(index=1)), 1, [], 0.0) is None


@given(st.lists(st.floats(0, 100)), st.integers(1, 5))
def test_never_more_attempts_than_allowed(gaps: list[float], most: int) -> None:
    task = a_task_with(RestartPolicy(max_attempts=most, delay=0))
    now = 0.0
    attempts: list[float] = []
    for gap_s in gaps:
        now += gap_s
        if next_attempt(task, 1, attempts, now) is not None:
            attempts.append(now)
    assert len(attempts) <= most


def test_a_number_of_attempts_that_the_leader_does_not_count_is_no_limit() -> None:
    attempts = [float(number) for number in range(MAX_ATTEMPTS_MAX)]
    assert (
        next_attempt(a_task_with(RestartPolicy(max_attempts=MAX_ATTEMPTS_MAX, delay=0)), 1, attempts, 1e6)
        is None
    )
    unlimited = a_task_with(RestartPolicy(max_attempts=MAX_ATTEMPTS_MAX + 1, delay=0))
    assert next_attempt(unlimited, 1, [*attempts, 1e5], 1e6) == 0.0


def test_years_of_restarts_without_a_manager_take_no_more_memory() -> None:
    unused = cast("Any", None)
    driver = TaskDriver(
        AssignedTask(task=a_task("t1")),
        TaskStatus(),
        unused,
        clock=SystemClock(),
        on_status=unused,
        session_state=unused,
        attempts=5 * MAX_ATTEMPTS_MAX,
    )
    assert driver.attempts == MAX_ATTEMPTS_MAX
