"""Simulated tasks: for whole clusters on simulated time, and for load without containers.

Clock and random numbers are arguments.  The simulated processes belong to a ``SimulatedMachine``, which outlives
executors as a real machine outlives its node process.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from skep.agent.executor.interface import Controller, OnUnhealthy, Rejected, Running, TaskExit, ignored
from skep.aio.clock import Clock
from skep.aio.race import wait_first
from skep.errors import NotFound
from skep.model.task import AssignedTask, ContainerStatus
from skep.model.task_end import TaskEnd
from skep.model.values.ids import TaskId


class Behavior(msgspec.Struct, frozen=True, kw_only=True):
    """Durations (seconds, each spread by up to half) and failure probabilities (0 to 1)."""

    prepare_s: float = 0.05
    start_s: float = 0.05
    shutdown_s: float = 0.05
    run_s: float | None = None
    """Seconds until a task ends, or None if it never ends."""
    exit_code: int = 0
    rejected: float = 0.0
    crashed: float = 0.0
    """Probability that a run ends with exit code 1 instead."""


class SimulatedProcess:
    """A simulated process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit_code: int | None = None
        self.started = False
        self.ended = asyncio.Event()

    def end(self, exit_code: int) -> None:
        """End with this exit code.  Only the first end counts."""
        if self.exit_code is None:
            self.exit_code = exit_code
            self.ended.set()


class SimulatedMachine:
    """The processes on one simulated machine."""

    def __init__(self) -> None:
        self.processes: dict[TaskId, SimulatedProcess] = {}
        self._last_pid = 1

    def new_process(self, id: TaskId) -> SimulatedProcess:
        """Create a task's process without starting it."""
        self._last_pid += 1
        self.processes[id] = SimulatedProcess(self._last_pid)
        return self.processes[id]

    def crash(self, id: TaskId, exit_code: int = 137) -> None:
        """End a task's process from outside."""
        self.processes[id].end(exit_code)


class SimulatedExecutor:
    """Runs simulated tasks."""

    name = "simulated"

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        machine: SimulatedMachine | None = None,
        behavior: Behavior | None = None,
    ) -> None:
        self.clock = clock
        self.rng = rng
        self.machine = machine or SimulatedMachine()
        self.behavior = behavior or Behavior()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do nothing: no preparation is needed."""
        yield

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        """Return a controller that needs no image."""
        return SimulatedController(self, task)

    async def leftovers(self) -> Sequence[TaskId]:
        """Return the tasks that have a process on the machine."""
        return sorted(self.machine.processes)

    async def discard(self, task_id: TaskId) -> None:
        """End a task's process and forget it."""
        process = self.machine.processes.pop(task_id, None)
        if process is not None:
            process.end(137)

    async def take(self, seconds: float) -> None:
        """Sleep for about ``seconds``."""
        await self.clock.sleep(seconds * self.rng.uniform(0.5, 1.5))


class SimulatedController:
    """One simulated task."""

    def __init__(self, executor: SimulatedExecutor, task: AssignedTask) -> None:
        self._executor = executor
        self._id = task.task.id

    def observed(self) -> Running | None:
        """Return the state of the machine's process."""
        process = self._executor.machine.processes.get(self._id)
        if process is None:
            return None
        is_alive = process.started and process.exit_code is None
        return Running(
            container=ContainerStatus(
                container_id=container_id_of(self._id),
                pid=process.pid if is_alive else 0,
                exit_code=process.exit_code or 0,
            )
        )

    async def prepare(self) -> None:
        """Wait for the configured time.  Rejects the task with the configured probability."""
        if self._id in self._executor.machine.processes:
            return
        await self._executor.take(self._executor.behavior.prepare_s)
        if self._executor.rng.random() < self._executor.behavior.rejected:
            raise Rejected("the simulated node has no such image")
        self._executor.machine.new_process(self._id)

    async def start(self) -> Running:
        """Start the process."""
        process = self._require()
        if not process.started:
            await self._executor.take(self._executor.behavior.start_s)
            process.started = True
        observed = self.observed()
        assert observed is not None
        return observed

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        """Wait until the process has ended.  If ``run_s`` is set, the process ends by itself after about that time."""
        process, behavior = self._require(), self._executor.behavior
        if not process.started:
            raise NotFound(f"Process {self._id} was not started")
        if behavior.run_s is None:
            await process.ended.wait()
        elif process.exit_code is None:
            await self._run_for(process, behavior.run_s)
        code = process.exit_code or 0
        return TaskExit(exit_code=code, message=f"task: non-zero exit ({code})" if code else "")

    async def fetch_end(self) -> TaskEnd | None:
        """Return None: only the exit code is known."""
        return None

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """End the process after the time that a stop takes."""
        process = self._executor.machine.processes.get(self._id)
        if process is not None and process.exit_code is None:
            if process.started:
                await self._executor.take(self._executor.behavior.shutdown_s)
            process.end(143)

    async def terminate(self) -> None:
        """End the process at once."""
        process = self._executor.machine.processes.get(self._id)
        if process is not None:
            process.end(137)

    async def update(self, task: AssignedTask) -> None:
        """Do nothing: limits have no effect."""

    async def remove(self) -> None:
        """End the process and forget it."""
        await self._executor.discard(self._id)

    async def _run_for(self, process: SimulatedProcess, seconds: float) -> None:
        """Let a process run for about ``seconds``, unless it ends earlier."""
        await wait_first(self._executor.take(seconds), process.ended.wait())
        behavior = self._executor.behavior
        process.end(1 if self._executor.rng.random() < behavior.crashed else behavior.exit_code)

    def _require(self) -> SimulatedProcess:
        process = self._executor.machine.processes.get(self._id)
        if process is None:
            raise NotFound(f"No such process: {self._id}")
        return process


def container_id_of(id: TaskId) -> str:
    """Return the container ID that the simulated container of a task has."""
    return f"simulated-{id}"
