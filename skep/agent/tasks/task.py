"""One task on its node: the next step follows from its observed and its desired state.

``next_step`` is the whole state machine.  ``TaskDriver`` executes its steps, one at a time, and reports each state that
it reaches.  States only move forward.  A change of the desired state interrupts the verb in progress.  Every verb may
be interrupted and repeated.

Source: swarmkit, agent/exec/controller.go (Do), which also has the messages and the choice between REJECTED and FAILED.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import TypeAlias

import msgspec
import structlog

from skep.agent.executor.interface import Controller, Rejected, TaskExit
from skep.agent.session.session_state import SessionState
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, isolate, log_error, retry
from skep.aio.race import LostRace, run_unless, wait_first
from skep.errors import SkepError
from skep.model.options.labels import drain_s, last_lines
from skep.model.service import MAX_ATTEMPTS_MAX, RestartCondition, RestartPolicy
from skep.model.task import AssignedTask, ContainerStatus, PortStatus, Task, TaskState, TaskStatus
from skep.model.task_end import FAILED_CHECK, TaskEnd, words_of
from skep.model.values.ids import TaskId
from skep.model.values.times import SECOND_NS, timestamp

log = structlog.get_logger()


DEFAULT_DELAY_S = 5.0
"""Restart delay in seconds of a policy that sets none, as in SwarmKit."""
CUT_OFF_S = 10.0
"""Seconds without a manager before this node restarts tasks itself, or rejects a task without its credentials.

Short outages, when a manager restarts or the leader changes, are left to the leader.
"""
CHECK_REPORT_S = 5.0
"""Seconds until the first failed health check of a starting container is reported.

Most containers are healthy earlier, so they cause no report."""
CHECK_REPORT_MAX_S = 60.0
"""Longest time in seconds between two such reports, which bounds the writes for checks whose output always differs."""


class Verb(Enum):
    """The verbs of a controller."""

    PREPARE = "prepare"
    START = "start"
    WAIT = "wait"
    SHUTDOWN = "shutdown"


class Move(msgspec.Struct, frozen=True):
    """Advance to ``state`` without an action."""

    state: TaskState
    message: str


class Do(msgspec.Struct, frozen=True):
    """Execute ``verb``.  If it succeeds, the task is in ``state``."""

    verb: Verb
    state: TaskState
    message: str


class Idle(msgspec.Struct, frozen=True):
    """Nothing to do until the desired state changes."""


Step: TypeAlias = Move | Do | Idle


def next_step(observed: TaskState, desired: TaskState) -> Step:
    """Return the step that brings a task from ``observed`` nearer to ``desired``.

    The task stops at the desired state: with READY, a prepared task waits until its start is wanted.  A verb that
    already runs may end beyond the desired state.
    """
    if desired >= TaskState.SHUTDOWN:
        if observed.is_terminal:
            return Idle()
        return Do(Verb.SHUTDOWN, TaskState.SHUTDOWN, "shutdown")
    if observed > desired:
        return Idle()
    match observed:
        case TaskState.PREPARING:
            return Do(Verb.PREPARE, TaskState.READY, "prepared")
        case TaskState.STARTING:
            return Do(Verb.START, TaskState.RUNNING, "started")
        case TaskState.RUNNING:
            return Do(Verb.WAIT, TaskState.COMPLETE, "finished")
    if observed >= desired:
        return Idle()
    match observed:
        case TaskState.NEW | TaskState.PENDING | TaskState.ASSIGNED:
            return Move(TaskState.ACCEPTED, "accepted")
        case TaskState.ACCEPTED:
            return Move(TaskState.PREPARING, "preparing")
        case TaskState.READY:
            return Move(TaskState.STARTING, "starting")
        case _:
            return Idle()


def failed_state(observed: TaskState) -> TaskState:
    """Return the state of a task whose verb failed: REJECTED before its start, FAILED from then on."""
    return TaskState.REJECTED if observed < TaskState.STARTING else TaskState.FAILED


def next_attempt(task: Task, exit_code: int, attempts: Sequence[float], now: float) -> float | None:
    """Return the seconds until a process that ended without a manager is restarted, or None if the policy forbids it.

    With a manager, the leader replaces ended tasks.  Without one, the node follows the task's restart policy: the same
    task stays RUNNING, and each attempt is counted.  When the policy gives up, the task has failed, and the next
    session reports that state to the leader.

    Args:
        exit_code: Exit code of the ended process.  1 if the process failed without an exit code.
        attempts: Times of earlier attempts, on the same clock as ``now``.

    A job's task runs once: the leader decides about further runs.  The attachment of a plain container to a network is
    requested only by that container.

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
    if policy.attempts_limit:
        opens_at = now - policy.window / SECOND_NS if policy.window else float("-inf")
        if sum(at > opens_at for at in attempts) >= policy.attempts_limit:
            return None
    return DEFAULT_DELAY_S if policy.delay is None else policy.delay / SECOND_NS


_MESSAGE_MAX = 2000
"""Limit in characters for a status message with warnings."""


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
        """Args: status: Last known status of the task.

        ``on_status`` is called with every later status. session_state: Whether there is a manager.  Without one, the
        task follows its restart policy itself. attempts: Number of restarts without a manager before this process
        started.
        """
        self.task = task
        self.status = status
        self.controller = controller
        self._clock = clock
        self._on_status = on_status
        self._session_state = session_state
        self._attempts = deque([clock.monotonic()] * attempts, maxlen=MAX_ATTEMPTS_MAX)
        self._stopped = ""
        self._desired_changed = asyncio.Event()
        self.lacks_credentials = False
        """Whether the task is from this node's disk, where its credentials are not."""
        self._next_controller: Controller | None = None
        self._has_credentials = asyncio.Event()

    @property
    def attempts(self) -> int:
        """Number of restarts without a manager, at most ``MAX_ATTEMPTS_MAX``."""
        return len(self._attempts)

    @property
    def drain_s(self) -> float:
        """Seconds that a stop waits for the task's clients to disconnect, from the newest assignment."""
        return drain_s(self.task.service_labels)

    def stop(self, reason: str) -> None:
        """Stop the task permanently, whatever its desired state, because this node has lost its managers and the spec
        requires a stop then.

        A repeated call changes nothing.  Otherwise a stop in progress would restart with its full grace period.
        """
        if not self._stopped:
            self._stopped = reason
            self._desired_changed.set()

    @property
    def is_stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return bool(self._stopped)

    def assign(self, task: AssignedTask) -> bool:
        """Apply a newer assignment.

        Returns whether the controller must be updated, because limits, the number of kept log lines, or the rights
        changed with which the node restarts the task without a manager.
        """
        before, self.task = self.task, task
        is_drained_otherwise = task.task.desired_state >= TaskState.SHUTDOWN and drain_s(
            before.service_labels
        ) != drain_s(task.service_labels)
        if before.task.desired_state is not task.task.desired_state or is_drained_otherwise:
            self._desired_changed.set()
        if before.trust != task.trust:
            return True
        if last_lines(before.service_labels) != last_lines(task.service_labels):
            return True
        return before.task.spec.resources != task.task.spec.resources

    def take_credentials(self, controller: Controller) -> None:
        """Use ``controller``, which has the credentials of the first assignment, if the image is refused without."""
        self.lacks_credentials = False
        self._next_controller = controller
        self._has_credentials.set()

    async def run(self) -> None:
        """Take one step after the other until cancelled."""
        while True:
            self._desired_changed.clear()
            desired = TaskState.SHUTDOWN if self._stopped else self.task.task.desired_state
            match next_step(self.status.state, desired):
                case Idle():
                    await self._desired_changed.wait()
                case Move(state, message):
                    self._reach(state, message)
                case Do() as step:
                    await self._carry_out(step)

    async def _carry_out(self, step: Do) -> None:
        """Execute a step, unless the desired state changes in the meantime.

        This is the one broad ``except`` of a task: a bug in one task ends that task, never its neighbors.
        """
        try:
            error = await run_unless(self._ask(step.verb), self._desired_changed.wait())
        except LostRace:
            return
        except SkepError as failure:
            error = str(failure)
        except Exception as failure:
            log.exception("task failed by a bug", task=self.task.task.id, verb=step.verb.value)
            error = describe_error(failure)
        if error:
            end = await self._end()
            message = self.status.message
            message = "starting" if message.startswith(FAILED_CHECK) else message
            self._reach(failed_state(self.status.state), message, error, end)
        elif step.state.is_terminal:
            end = await self._end()
            # Docker has no text for a container that did not stop in time, and an intended end has no error.
            error = words_of(end) if end is not None and step.state is TaskState.SHUTDOWN else ""
            self._reach(step.state, self._stopped or step.message, error, end)
        else:
            self._reach(step.state, self._stopped or step.message)

    async def _end(self) -> TaskEnd | None:
        """Return why the process ended, if known."""
        return await isolate(
            self.controller.fetch_end(), "reason of task's end unknown", task=self.task.task.id
        )

    async def _ask(self, verb: Verb) -> str:
        """Execute ``verb``.  Returns the failure of the task's process, or an empty text."""
        match verb:
            case Verb.PREPARE:
                await self._prepare()
            case Verb.START:
                await run_unless(self.controller.start(), self._report_failed_checks())
            case Verb.WAIT:
                return await self._watch()
            case Verb.SHUTDOWN:
                await self.controller.shutdown(self.drain_s)
        return ""

    async def _prepare(self) -> None:
        """Prepare the task, or prepare it again with the credentials that the first assignment brings.

        Raises: SkepError.
        """
        try:
            await self.controller.prepare()
        except Rejected:
            if self.lacks_credentials:
                await wait_first(self._has_credentials.wait(), self._clock.sleep(CUT_OFF_S))
            if self._next_controller is None:
                raise
            self.controller, self._next_controller = self._next_controller, None
            await self.controller.prepare()

    async def _report_failed_checks(self) -> None:
        """Report failed health checks of a container that is not healthy yet, until cancelled."""
        delay_s = CHECK_REPORT_S
        while True:
            await self._clock.sleep(delay_s)
            try:
                observed = self.controller.observed()
            except Exception as error:
                log_error(error, "task's container cannot be observed", task=self.task.task.id)
                continue
            failure = observed.failed_check if observed is not None else ""
            message = f"{FAILED_CHECK}{failure}" if failure else "starting"
            if self.status.state is TaskState.STARTING and message != self.status.message:
                self.status = msgspec.structs.replace(self.status, message=message)
                self._on_status(self.task.task.id, self.status)
                delay_s = min(delay_s * 2, CHECK_REPORT_MAX_S)

    async def _watch(self) -> str:
        """Wait until the process has ended and is not restarted again.  Returns its failure, or an empty text."""
        self._note_unhealthy(None)  # an earlier process of the node may not have stopped it
        ended = await self._wait_ended()
        while await self._may_try_again(ended):
            try:
                await self._start_again()
            except SkepError as error:
                ended = TaskExit(exit_code=1, message=str(error))
            else:
                ended = await self._wait_ended()
        return ended.message

    async def _wait_ended(self) -> TaskExit:
        """Wait until the process has ended.  A process that does not exist has failed.

        An earlier process of the node may have ended while it started the task again.  If waiting fails otherwise, try
        again, because the failure does not mean that the process ended.
        """
        try:
            return await retry(
                partial(self.controller.wait, self._note_unhealthy),
                "end of task not observed",
                clock=self._clock,
                longest_s=10.0,
                passes=(SkepError,),
                task=self.task.task.id,
            )
        except SkepError as error:
            return TaskExit(exit_code=1, message=str(error))

    def _note_unhealthy(self, end: TaskEnd | None) -> None:
        """Report why the running process is stopped, so that it gets no connections meanwhile, or None if it is not."""
        if self.status.state is TaskState.RUNNING and self.status.end != end:
            self.status = msgspec.structs.replace(self.status, end=end)
            self._on_status(self.task.task.id, self.status)

    async def _may_try_again(self, ended: TaskExit) -> bool:
        """Wait until a restart is due.

        Returns whether to restart the task: no manager replaces it, and its policy allows a restart.
        """
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
        except LostRace:
            return False  # the manager decides, now that there is one again
        return True

    async def _start_again(self) -> None:
        """Replace an ended process by a new one of the same task."""
        self._attempts.append(self._clock.monotonic())
        log.info("task restarted without a manager", task=self.task.task.id, attempt=self.attempts)
        await self.controller.remove()
        await self._prepare()
        await self.controller.start()
        self._reach(TaskState.RUNNING, f"started again without a manager (attempt {self.attempts})")

    def _reach(self, state: TaskState, message: str, error: str = "", end: TaskEnd | None = None) -> None:
        assert state >= self.status.state, f"{self.task.task.id} would return to {state}"
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
        """Return the container, its ports and warnings.

        They are observed from STARTING on.  Otherwise, or if that fails, the last status has the container and ports.
        """
        observed = None
        try:
            observed = self.controller.observed() if state >= TaskState.STARTING else None
        except Exception as error:
            log_error(error, "task's container cannot be observed", task=self.task.task.id)
        if observed is None:
            return self.status.container_status, self.status.port_status, ()
        return observed.container, PortStatus(ports=observed.ports), observed.warnings
