"""Plain commands of the node: each start runs the command once, or not at all."""

import errno
from pathlib import Path

import pytest

from skep.agent.executor.interface import Controller
from skep.agent.executor.process import ProcessExecutor
from skep.model.container import ContainerSpec
from skep.model.service import TaskSpec
from skep.model.task import AssignedTask, Task
from skep.model.values.ids import ServiceId, TaskId
from tests.support.file_faults import file_faults

ID = TaskId("t1")


def controller_of(executor: ProcessExecutor, *command: str) -> Controller:
    spec = TaskSpec(container_spec=ContainerSpec(image="i", command=command))
    task = Task(id=ID, slot=1, service_id=ServiceId("s1"), spec=spec)
    return executor.controller(AssignedTask(task=task, service_name="web"))


async def test_a_command_whose_process_cannot_be_recorded_does_not_run(tmp_path: Path) -> None:
    """Nobody would stop it.  The next start runs it once."""
    executor, mark = ProcessExecutor(tmp_path / "processes"), tmp_path / "mark"
    async with executor.running():
        controller = controller_of(executor, "sh", "-c", f"echo ran >>{mark}")
        await controller.prepare()
        with file_faults(tmp_path) as faults:
            faults.choose(
                errno.ENOSPC, lambda call, path: call == "replace" and path.name.startswith("started")
            )
            with pytest.raises(OSError, match="No space left"):
                await controller.start()
        await controller.start()
        assert (await controller.wait()).exit_code == 0
        assert mark.read_text() == "ran\n"
        await controller.remove()
