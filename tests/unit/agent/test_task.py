"""One task's way through its states."""

import asyncio
from collections import deque
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.agent.executor.interface import OnUnhealthy, Running, TaskExit
from skep.agent.executor.simulated import SimulatedExecutor, SimulatedMachine
from skep.agent.session.session_state import SessionState
from skep.agent.tasks.task import (
    CHECK_REPORT_MAX_S,
    CHECK_REPORT_S,
    Do,
    Idle,
    Move,
    TaskDriver,
    Verb,
    failed_state,
    next_step,
)
from skep.aio.clock import SystemClock
from skep.errors import SkepError
from skep.model.service import RestartCondition, RestartPolicy
from skep.model.task import AssignedTask, ContainerStatus, TaskState, TaskStatus
from skep.model.task_end import EndCause, TaskEnd
from skep.model.values.ids import TaskId
from skep.model.values.times import timestamp
from tests.support.builders import a_task

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


class Sleeper(SystemClock):
    """Sleeps no longer than a turn of the event loop, and notes how long it was asked to."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


class Sick:
    """Controller of a container whose health check fails within its start period."""

    def __init__(self) -> None:
        self.checks = deque(
            ["", "exit 1, no output", "exit 1, no output", "exit 2, no output", "", "", "exit 3"]
        )
        self.ends = asyncio.Event()

    def observed(self) -> Running:
        if not self.checks:
            self.ends.set()
        failed = self.checks.popleft() if self.checks else "exit 3"
        return Running(container=ContainerStatus(container_id="c1"), failed_check=failed)

    async def start(self) -> Running:
        await self.ends.wait()
        raise SkepError("dockerexec: unhealthy container")

    async def fetch_end(self) -> None:
        return None


async def test_failed_checks_of_a_task_that_is_starting_are_reported_once_each_and_ever_more_rarely() -> None:
    clock, reported, ended = Sleeper(), list[TaskStatus](), asyncio.Event()

    def on_status(_: TaskId, status: TaskStatus) -> None:
        reported.append(status)
        if status.state is TaskState.FAILED:
            ended.set()

    task = replace(a_task("t1"), desired_state=RUNNING)
    started = TaskStatus(state=TaskState.STARTING, message="starting", timestamp=timestamp(1))
    driver = TaskDriver(
        AssignedTask(task=task),
        started,
        cast("Any", Sick()),
        clock=clock,
        on_status=on_status,
        session_state=SessionState(clock),
    )
    async with asyncio.TaskGroup() as group:
        running = group.create_task(driver.run())
        async with asyncio.timeout(10):
            await ended.wait()
        running.cancel()
    assert [one.message for one in reported] == [
        "starting: exit 1, no output",
        "starting: exit 2, no output",
        "starting",
        "starting: exit 3",
        "starting",
    ]
    *starting, failed = reported
    assert {(one.state, one.timestamp) for one in starting} == {(TaskState.STARTING, timestamp(1))}
    assert (failed.state, failed.err) == (TaskState.FAILED, "dockerexec: unhealthy container")
    assert clock.slept[:2] == [CHECK_REPORT_S] * 2
    assert max(clock.slept) == CHECK_REPORT_MAX_S


SICK = TaskEnd(cause=EndCause.UNHEALTHY.value, health_command="false", health_failures=3)


class Unhealthy:
    """Controller of a container that becomes unhealthy, and takes long to stop."""

    def __init__(self) -> None:
        self.stops = asyncio.Event()

    def observed(self) -> Running:
        return Running(container=ContainerStatus(container_id="c1"))

    async def wait(self, on_unhealthy: OnUnhealthy) -> TaskExit:
        on_unhealthy(SICK)
        await self.stops.wait()
        return TaskExit(exit_code=143, message="task: non-zero exit (143)")

    async def fetch_end(self) -> TaskEnd:
        return SICK


@pytest.mark.parametrize("known", [None, SICK], ids=["new", "restarted"])
async def test_a_running_task_that_becomes_unhealthy_is_reported_before_it_has_stopped(
    known: TaskEnd | None,
) -> None:
    clock, controller, reported = SystemClock(), Unhealthy(), list[TaskStatus]()
    task = replace(a_task("t1"), desired_state=RUNNING)
    once = RestartPolicy(condition=RestartCondition.NONE)
    seen = {state: asyncio.Event() for state in (RUNNING, TaskState.FAILED)}

    def on_status(_: TaskId, status: TaskStatus) -> None:
        reported.append(status)
        seen[status.state].set()

    driver = TaskDriver(
        AssignedTask(task=replace(task, spec=replace(task.spec, restart_policy=once))),
        TaskStatus(state=RUNNING, message="started", timestamp=timestamp(1), end=known),
        cast("Any", controller),
        clock=clock,
        on_status=on_status,
        session_state=SessionState(clock),
    )
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(driver.run())
        await seen[RUNNING].wait()
        assert (reported[-1].end, reported[-1].timestamp) == (SICK, timestamp(1))
        controller.stops.set()
        await seen[TaskState.FAILED].wait()
        running.cancel()
    ends = [(one.state, one.end) for one in reported]
    assert ends == [*([(RUNNING, None)] if known else []), (RUNNING, SICK), (TaskState.FAILED, SICK)]


@pytest.mark.parametrize("was_prepared", [False, True])
async def test_a_restart_without_a_manager_goes_on_after_the_node_process_ended_within_it(
    was_prepared: bool,
) -> None:
    clock, machine, runs = Sleeper(), SimulatedMachine(), asyncio.Event()
    task = replace(a_task("t1"), desired_state=RUNNING)
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, delay=0)
    assigned = AssignedTask(task=replace(task, spec=replace(task.spec, restart_policy=policy)))
    reported = list[TaskStatus]()
    controller = SimulatedExecutor(clock, Random(1), machine).controller(assigned)
    if was_prepared:
        await controller.prepare()

    def on_status(_: TaskId, status: TaskStatus) -> None:
        reported.append(status)
        runs.set()

    driver = TaskDriver(
        assigned,
        TaskStatus(state=RUNNING, message="started"),
        controller,
        clock=clock,
        on_status=on_status,
        session_state=SessionState(clock),
        attempts=1,
    )
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(driver.run())
        await runs.wait()
        running.cancel()
    assert [(one.state, one.message) for one in reported] == [
        (RUNNING, "started again without a manager (attempt 2)")
    ]
    assert machine.processes[task.id].started
