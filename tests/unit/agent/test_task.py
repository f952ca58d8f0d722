"""One task's way through its states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.agent.tasks.task import Do, Idle, Move, Verb, failed_state, next_step
from skep.model.task import TaskState

STATES = list(TaskState)
RUNNING, READY, SHUTDOWN = TaskState.RUNNING, TaskState.READY, TaskState.SHUTDOWN


def path_of(state: TaskState, desired: TaskState) -> list[tuple[TaskState, str]]:
    """States and messages from ``state`` on, when every verb works."""
    reached = []
    while not isinstance(step := next_step(state, desired), Idle):
        assert isinstance(step, Move | Do)
        state = step.state
        reached.append((state, step.message))
    return reached


def test_a_task_goes_through_every_state_with_swarmkits_messages() -> None:
    assert path_of(TaskState.ASSIGNED, TaskState.COMPLETE) == [
        (TaskState.ACCEPTED, "accepted"),
        (TaskState.PREPARING, "preparing"),
        (TaskState.READY, "prepared"),
        (TaskState.STARTING, "starting"),
        (TaskState.RUNNING, "started"),
        (TaskState.COMPLETE, "finished"),
    ]


def test_a_prepared_task_waits_until_its_start_is_wanted() -> None:
    assert path_of(TaskState.ASSIGNED, READY)[-1] == (READY, "prepared")
    assert next_step(READY, READY) == Idle()
    assert next_step(READY, RUNNING) == Move(TaskState.STARTING, "starting")


def test_running_is_said_only_after_the_start_and_completion_after_the_end() -> None:
    assert next_step(TaskState.STARTING, RUNNING) == Do(Verb.START, RUNNING, "started")
    assert next_step(RUNNING, RUNNING) == Do(Verb.WAIT, TaskState.COMPLETE, "finished")


@pytest.mark.parametrize("state", [state for state in STATES if not state.is_terminal])
@pytest.mark.parametrize("desired", [SHUTDOWN, TaskState.REMOVE])
def test_a_shutdown_is_carried_out_from_any_state(state: TaskState, desired: TaskState) -> None:
    assert next_step(state, desired) == Do(Verb.SHUTDOWN, SHUTDOWN, "shutdown")


@pytest.mark.parametrize("state", [state for state in STATES if state.is_terminal])
@pytest.mark.parametrize("desired", STATES)
def test_an_ended_task_rests(state: TaskState, desired: TaskState) -> None:
    assert next_step(state, desired) == Idle()


@given(st.sampled_from(STATES), st.sampled_from(STATES))
def test_states_only_move_forward(observed: TaskState, desired: TaskState) -> None:
    step = next_step(observed, desired)
    assert isinstance(step, Idle) or step.state > observed


@given(st.sampled_from(STATES), st.sampled_from(STATES))
def test_every_way_comes_to_rest(observed: TaskState, desired: TaskState) -> None:
    assert len(path_of(observed, desired)) < len(STATES)


def test_what_fails_before_the_start_was_never_accepted_by_the_node() -> None:
    assert failed_state(TaskState.PREPARING) is TaskState.REJECTED
    assert failed_state(TaskState.STARTING) is TaskState.FAILED
    assert failed_state(RUNNING) is TaskState.FAILED
