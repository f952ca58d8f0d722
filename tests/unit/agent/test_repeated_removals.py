"""A task that is removed and assigned again several times, as by managers in turn of which one does not know it yet."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from skep.agent.executor.interface import Controller
from skep.agent.executor.simulated import Behavior, SimulatedController, SimulatedExecutor
from skep.agent.session.reports import Reports
from skep.agent.tasks.task_files import TaskFiles
from skep.agent.tasks.worker import Worker
from skep.aio.clock import SystemClock
from skep.model.assignment import AssignmentSet
from skep.model.task import AssignedTask, TaskState
from skep.model.values.ids import TaskId
from tests.support.builders import a_task
from tests.support.managers.fake_worker import a_session

ID = TaskId("a")
DEADLINE_S = 30


class LingeringExecutor(SimulatedExecutor):
    """Its first removal takes until ``ends``."""

    def __init__(self) -> None:
        quick = Behavior(prepare_s=0.0, start_s=0.0, shutdown_s=0.0)
        super().__init__(SystemClock(), random.Random(1), behavior=quick)
        self.ends, self.removals = asyncio.Event(), 0

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        return LingeringController(self, task)


class LingeringController(SimulatedController):
    def __init__(self, executor: LingeringExecutor, task: AssignedTask) -> None:
        super().__init__(executor, task)
        self.lingering = executor

    async def remove(self) -> None:
        self.lingering.removals += 1
        if self.lingering.removals == 1:
            await self.lingering.ends.wait()
        await super().remove()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_task_that_is_assigned_a_third_time_outlives_its_first_removal(tmp_path: Path) -> None:
    executor = LingeringExecutor()
    worker = Worker(
        executor=executor,
        files=TaskFiles(tmp_path),
        reports=Reports(),
        clock=SystemClock(),
        session_state=a_session(),
    )
    with_task = AssignmentSet(
        complete=True, tasks=(AssignedTask(task=a_task(ID, node="n1", state=TaskState.ASSIGNED)),)
    )
    without = AssignmentSet(complete=True)

    def is_running() -> bool:
        status = worker.statuses().get(ID)
        return status is not None and status.state is TaskState.RUNNING

    async with asyncio.TaskGroup() as group:
        running = group.create_task(worker.run())
        await worker.assign(with_task)
        await eventually(is_running)
        await worker.assign(without)
        await eventually(lambda: executor.removals)
        for change in (with_task, without, with_task):
            await worker.assign(change)
        for _ in range(1000):
            await asyncio.sleep(0)
        executor.ends.set()
        await eventually(is_running)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert executor.machine.processes[ID].exit_code is None
        assert is_running()
        running.cancel()
