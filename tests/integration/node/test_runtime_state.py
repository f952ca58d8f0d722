"""Starting and clearing containers without a runc command."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from skep.engine.containers.container import ProcessName
from skep.engine.engine import Engine
from skep.engine.runtime.conmon import StartError
from skep.engine.runtime.processes import find, wait_gone
from skep.engine.runtime.runtime_state import ProcessEnded, RuntimeState
from skep.model.values.ids import ContainerId
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.runc_lab import RUNTIME, Lab

ID = ContainerId("c1")


def own_process() -> ProcessName:
    process = find(os.getpid())
    assert process is not None
    return process


async def test_the_runtime_sees_a_started_container_as_running(lab: Lab, run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    command = Path(f"/proc/{container.pid}/cmdline")
    await eventually(lambda: command.read_bytes() == b"sleep\x00100\x00", "the command runs")
    assert not (lab.paths.runc / container.id / "exec.fifo").exists()
    state = await lab.in_home(RUNTIME, "--root", str(lab.paths.runc), "state", container.id)
    assert '"status": "running"' in state


async def test_the_runtime_is_executed_from_memory_that_nothing_can_write_to(
    run: Runner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, programs = RuntimeState.start, list[str]()

    async def look_first(self: RuntimeState, id: ContainerId, process: ProcessName) -> bool:
        programs.append(os.readlink(f"/proc/{process.pid}/exe"))  # still the runtime
        return await begin(self, id, process)

    monkeypatch.setattr(RuntimeState, "start", look_first)
    container = await run.start("sleep", "100")
    assert engine.get(container.id).is_running
    assert programs == [f"/memfd:{RUNTIME} (deleted)"]


async def test_another_runtimes_state_is_left_to_its_own_start(tmp_path: Path) -> None:
    state = RuntimeState(tmp_path)
    assert not await state.start(ID, own_process())
    (tmp_path / ID).mkdir()
    (tmp_path / ID / "state.json").write_text("{}")
    (tmp_path / ID / "exec.fifo").write_text("no fifo")
    assert not await state.start(ID, own_process())
    os.unlink(tmp_path / ID / "exec.fifo")
    os.unlink(tmp_path / ID / "state.json")
    os.mkfifo(tmp_path / ID / "exec.fifo")  # a fifo alone does not make it runc's
    assert not await state.start(ID, own_process())


STATES = pytest.mark.parametrize("file", ["state.json", "status"], ids=["runc", "crun"])


@STATES
async def test_a_process_that_ended_before_its_start_is_said_to_be_dead(tmp_path: Path, file: str) -> None:
    (tmp_path / ID).mkdir()
    (tmp_path / ID / file).write_text("{}")
    os.mkfifo(tmp_path / ID / "exec.fifo")
    sleeper = await asyncio.create_subprocess_exec("sleep", "100")
    process = find(sleeper.pid)
    assert process is not None
    sleeper.kill()
    try:
        with pytest.raises(ProcessEnded, match="already dead"):
            await RuntimeState(tmp_path).start(ID, process)
    finally:
        await sleeper.wait()


async def test_a_container_of_crun_starts_by_a_byte_and_runs_once_its_process_has_read_it(
    tmp_path: Path,
) -> None:
    (tmp_path / ID).mkdir()
    (tmp_path / ID / "status").write_text("{}")
    fifo = tmp_path / ID / "exec.fifo"
    os.mkfifo(fifo)
    script = f"exec 3<>{fifo}; echo ready; read -r -n 1 -d '' _ <&3; exec 3<&-; read _"
    waiter = await asyncio.create_subprocess_exec(
        "bash", "-c", script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert waiter.stdout is not None
        await waiter.stdout.readline()
        process = find(waiter.pid)
        assert process is not None
        async with asyncio.timeout(30):
            assert await RuntimeState(tmp_path).start(ID, process)
        assert waiter.returncode is None, "it has not waited for the end of the process"
        assert not fifo.exists()
    finally:
        waiter.kill()
        await waiter.wait()


async def test_a_created_container_that_is_killed_fails_to_start(
    run: Runner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = RuntimeState.start

    async def killed_first(self: RuntimeState, id: ContainerId, process: ProcessName) -> bool:
        os.kill(process.pid, signal.SIGKILL)
        await wait_gone(process)
        return await begin(self, id, process)

    monkeypatch.setattr(RuntimeState, "start", killed_first)
    container = await run.create("sleep", "100")
    with pytest.raises(StartError):
        await engine.start(container.id)
    assert not engine.get(container.id).is_running


async def test_nothing_is_left_of_a_container_that_ended_with_nested_groups(
    lab: Lab, run: Runner, engine: Engine
) -> None:
    container = await run.start("sleep", "100")
    procs = engine.cgroups.directory(container, "pids")
    assert procs is not None
    (procs / "nested").mkdir()
    await engine.kill(container.id)
    await engine.wait(container.id)
    await engine.remove(container.id)
    assert lab.remains() == []
