"""One task on its node: from what is observed and what is desired follows the next step.

``next_step`` is the whole state machine; ``TaskDriver`` carries its steps out, one at a time, and reports
each state it reaches.  States only move forward.  A change of what is desired interrupts the verb that is
in progress; every verb may be interrupted and repeated.

Source: swarmkit, agent/exec/controller.go (Do); messages and the choice between REJECTED and FAILED are its
own.
"""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeAlias

import msgspec
import structlog

from skep.agent.executor.interface import Controller, TaskExit
from skep.agent.session_state import SessionState
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, isolate, log_error, retry
from skep.aio.race import Preempted, run_unless
from skep.errors import SkepError
from skep.model.ids import TaskId
from skep.model.labels import drain_s, last_lines
from skep.model.service import RestartCondition, RestartPolicy
from skep.model.task import AssignedTask, ContainerStatus, PortStatus, Task, TaskState, TaskStatus
from skep.model.task_end import TaskEnd, words_of
from skep.model.times import SECOND_NS, timestamp

log = structlog.get_logger()


DEFAULT_DELAY_S = 5.0
CUT_OFF_S = 10.0
"""An outage shorter than this is left to the leader: managers restart and move."""


class Verb(Enum):
    """The verbs of a controller."""

    PREPARE = "prepare"
    START = "start"
    WAIT = "wait"
    SHUTDOWN = "shutdown"


class Move(msgspec.Struct, frozen=True):
    """Go on to ``state``; nothing has to be done for it."""

    state: TaskState
    message: str


class Do(msgspec.Struct, frozen=True):
    """Carry out ``verb``; when it has worked, the task is in ``state``."""

    verb: Verb
    state: TaskState
    message: str


class Rest(msgspec.Struct, frozen=True):
    """Nothing to do until something else is desired."""


Step: TypeAlias = Move | Do | Rest


def next_step(observed: TaskState, desired: TaskState) -> Step:
    """What brings a task from ``observed`` nearer to ``desired``.

    A verb that was begun may end beyond what is desired; between verbs the task waits for the desired
    state: READY holds a prepared task back until its start is wanted.
    """
    if desired >= TaskState.SHUTDOWN:
        if observed.is_terminal:
            return Rest()
        return Do(Verb.SHUTDOWN, TaskState.SHUTDOWN, "shutdown")
    if observed > desired:
        return Rest()
    match observed:
        case TaskState.PREPARING:
            return Do(Verb.PREPARE, TaskState.READY, "prepared")
        case TaskState.STARTING:
            return Do(Verb.START, TaskState.RUNNING, "started")
        case TaskState.RUNNING:
            return Do(Verb.WAIT, TaskState.COMPLETE, "finished")
    if observed >= desired:
        return Rest()
    match observed:
        case TaskState.NEW | TaskState.PENDING | TaskState.ASSIGNED:
            return Move(TaskState.ACCEPTED, "accepted")
        case TaskState.ACCEPTED:
            return Move(TaskState.PREPARING, "preparing")
        case TaskState.READY:
            return Move(TaskState.STARTING, "starting")
        case _:
            return Rest()


def failed_state(observed: TaskState) -> TaskState:
    """What a task becomes whose verb failed: before its start it was never accepted by this node."""
    return TaskState.REJECTED if observed < TaskState.STARTING else TaskState.FAILED


def next_attempt(task: Task, exit_code: int, attempts: Sequence[float], now: float) -> float | None:
    """Seconds until a process that ended without a manager is started again; None: the policy allows no more.

    With a manager the leader replaces what has ended.  Without one the restart policy of the task is followed here: the
    same task stays RUNNING, and each attempt is counted.  When the policy gives up, the task has failed, and the leader
    receives that state with the next session.

    Args:
        exit_code: of the process that has ended; a failure that has none counts as 1.
        attempts: when earlier attempts were made (any clock, that of ``now``).

    A job's task runs once: the leader decides about further runs.  The attachment of a plain container to a
    network is requested by that container only.

    Source: swarmkit, manager/orchestrator/restart/restart.go (the policy's meaning).
    """
    policy = task.spec.restart_policy or RestartPolicy()
    if task.job_iteration is not None or task.spec.network_attachment_spec is not None:
        return None
    match policy.condition or RestartCondition.ANY:
        case RestartCondition.NONE:
            return None
        case RestartCondition.ON_FAILURE if exit_code == 0:
            return None
    if policy.max_attempts:
        opens_at = now - policy.window / SECOND_NS if policy.window else float("-inf")
        if sum(at > opens_at for at in attempts) >= policy.max_attempts:
            return None
    return DEFAULT_DELAY_S if policy.delay is None else policy.delay / SECOND_NS


_MESSAGE_MAX = 2000
"""Characters of a status message with warnings."""


class TaskDriver:
    """Drives one task through its states."""

    def __init__(
        self,
        task: AssignedTask,
        status: TaskStatus,
        controller: Controller,
        *,
        clock: Clock,
        on_status: Callable[[TaskId, TaskStatus], None],
        session_state: SessionState,
        attempts: int = 0,
    ) -> None:
        """
        Args:
            status: the furthest known one of the task; ``on_status`` is called with every state reached from there.
            session_state: whether there is a manager; without one the task follows its restart policy itself.
            attempts: how often it did so before this process began.
        """
        self.task = task
        self.status = status
        self.controller = controller
        self._clock = clock
        self._on_status = on_status
        self._session_state = session_state
        self._attempts = [clock.monotonic()] * attempts
        self._stopped = ""
        self._desired_changed = asyncio.Event()

    @property
    def attempts(self) -> int:
        """How often the process was started again without a manager."""
        return len(self._attempts)

    @property
    def drain_s(self) -> float:
        """How long a stop waits for the task's clients, as its service specifies now."""
        return drain_s(self.task.service_labels)

    def stop(self, reason: str) -> None:
        """Stop the task for good, whatever is desired: its node is cut off, and its service's spec requires that.

        A repeated call changes nothing: a stop in progress would start again, and its grace period with it.
        """
        if not self._stopped:
            self._stopped = reason
            self._desired_changed.set()

    @property
    def is_stopped(self) -> bool:
        """Whether its node has stopped the task for good."""
        return bool(self._stopped)

    def assign(self, task: AssignedTask) -> bool:
        """Take over a newer assignment; whether it has other limits, or last lines to keep: the controller needs it."""
        before, self.task = self.task, task
        if before.task.desired_state is not task.task.desired_state:
            self._desired_changed.set()
        if last_lines(before.service_labels) != last_lines(task.service_labels):
            return True
        return before.task.spec.resources != task.task.spec.resources

    async def run(self) -> None:
        """Take one step after the other until cancelled."""
        while True:
            self._desired_changed.clear()
            desired = TaskState.SHUTDOWN if self._stopped else self.task.task.desired_state
            match next_step(self.status.state, desired):
                case Rest():
                    await self._desired_changed.wait()
                case Move(state, message):
                    self._reach(state, message)
                case Do() as step:
                    await self._carry_out(step)

    async def _carry_out(self, step: Do) -> None:
        """Do it, unless something else is desired meanwhile.

        The one broad ``except`` of a task: a bug met by one task ends that task, never its neighbours.
        """
        try:
            error = await run_unless(self._ask(step.verb), self._desired_changed.wait())
        except Preempted:
            return
        except SkepError as failure:
            error = str(failure)
        except Exception as failure:
            log.exception("task failed by a bug", task=self.task.task.id, verb=step.verb.value)
            error = describe_error(failure)
        if error:
            end = await self._end()
            self._reach(failed_state(self.status.state), self.status.message, error, end)
        elif step.state.is_terminal:
            end = await self._end()
            # Docker has no words for a container that did not stop in time, and an end that was wanted has no error.
            error = words_of(end) if end is not None and step.state is TaskState.SHUTDOWN else ""
            self._reach(step.state, self._stopped or step.message, error, end)
        else:
            self._reach(step.state, self._stopped or step.message)

    async def _end(self) -> TaskEnd | None:
        """Why the process ended, as far as it is known."""
        return await isolate(self.controller.ended(), "end of task not known", task=self.task.task.id)

    async def _ask(self, verb: Verb) -> str:
        """Carry out ``verb``; gives what went wrong with the task's process, empty if nothing."""
        match verb:
            case Verb.PREPARE:
                await self.controller.prepare()
            case Verb.START:
                await self.controller.start()
            case Verb.WAIT:
                return await self._watch()
            case Verb.SHUTDOWN:
                await self.controller.shutdown(self.drain_s)
        return ""

    async def _watch(self) -> str:
        """Until the process has ended, and no further attempt is to be made; gives what went wrong."""
        ended = await self._ended()
        while await self._may_try_again(ended):
            try:
                await self._start_again()
            except SkepError as error:
                ended = TaskExit(exit_code=1, message=str(error))
            else:
                ended = await self._ended()
        return ended.message

    async def _ended(self) -> TaskExit:
        """Return when the process has ended.  An error of the observation is no end of the process."""
        return await retry(
            self.controller.wait,
            "end of task not seen",
            clock=self._clock,
            longest_s=10.0,
            passes=(SkepError,),
            task=self.task.task.id,
        )

    async def _may_try_again(self, ended: TaskExit) -> bool:
        """Whether there is no manager to replace the task, and its policy allows an attempt; returns when it is due."""
        session_state = self._session_state
        if session_state.has_session:
            return False
        code = ended.exit_code or (1 if ended.message else 0)
        delay_s = next_attempt(self.task.task, code, self._attempts, self._clock.monotonic())
        if delay_s is None:
            return False
        try:
            wait_s = max(delay_s, CUT_OFF_S - session_state.silence_s())
            await run_unless(self._clock.sleep(wait_s), session_state.wait_session())
        except Preempted:
            return False  # the manager that is back decides
        return True

    async def _start_again(self) -> None:
        """Replace what has ended by a new process of the same task."""
        self._attempts.append(self._clock.monotonic())
        log.info("task tried again without a manager", task=self.task.task.id, attempt=self.attempts)
        await self.controller.remove()
        await self.controller.prepare()
        await self.controller.start()
        self._reach(TaskState.RUNNING, f"started again without a manager (attempt {self.attempts})")

    def _reach(self, state: TaskState, message: str, error: str = "", end: TaskEnd | None = None) -> None:
        assert state >= self.status.state, f"{self.task.task.id} would go back to {state}"
        container, ports, warnings = self._observed(state)
        if state is TaskState.RUNNING:
            message = "; ".join([message, *warnings])[:_MESSAGE_MAX]
        self.status = TaskStatus(
            timestamp=timestamp(self._clock.now_ns()),
            state=state,
            message=message,
            err=error,
            container_status=container,
            port_status=ports,
            end=end,
        )
        self._on_status(self.task.task.id, self.status)

    def _observed(self, state: TaskState) -> tuple[ContainerStatus | None, PortStatus, Sequence[str]]:
        """The container as it is, from STARTING on, with its warnings; once it was seen it is not forgotten."""
        observed = None
        try:
            observed = self.controller.observed() if state >= TaskState.STARTING else None
        except Exception as error:
            log_error(error, "task's container cannot be observed", task=self.task.task.id)
        if observed is None:
            return self.status.container_status, self.status.port_status, ()
        return observed.container, PortStatus(ports=observed.ports), observed.warnings
