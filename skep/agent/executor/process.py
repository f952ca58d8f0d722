"""Tasks as plain commands of the node, without image, runc, or a network namespace.

A small shell waits for the command and writes its exit code to a file, so that a task outlives the node process and is
found again, like a container.  Each task has a directory: ``exit`` (written by that shell), ``started`` (written by
Skep), ``output``.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from skep.agent.executor.interface import Controller, OnUnhealthy, Rejected, Running, TaskExit, ignored
from skep.aio.race import SharedWork, run_to_end
from skep.aio.trees import remove_tree
from skep.engine.containers.container import ProcessName
from skep.engine.containers.signals import signal_number
from skep.engine.runtime.processes import is_alive, named, send_signal, wait_gone
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.linux.files import replace_file
from skep.model.container import ContainerSpec
from skep.model.permissions.processes import is_process
from skep.model.permissions.rights import EXECUTOR_LABEL
from skep.model.task import AssignedTask, ContainerStatus
from skep.model.task_end import TaskEnd
from skep.model.values.ids import TaskId

_START_DEADLINE_S = 10.0
"""Seconds for the waiting shell to report the command's process."""
_WRAPPER = """\
cd "$1" || exit 126
directory=$2
shift 2
cat /proc/$$/stat
exec 3<&0 </dev/null
setsid /bin/sh -c '
  cat /proc/$$/stat
  read -r line <&3 || exit 125
  exec "$@" >"$0/output" 2>&1 3<&-
' "$directory" "$@" &
exec >/dev/null 3<&-
wait $!
echo $? >"$directory/.exit"
mv "$directory/.exit" "$directory/exit"
"""
"""Shell script that runs the command.

Its arguments are the working directory, the task directory and the command.  ``setsid`` starts the command in a
separate process group.  The command waits for a line on the standard input, which Skep sends once ``started`` is
written.  Without it, for example after a crash of Skep, the command does not run, because no later process would know
it.
"""


class _Started(msgspec.Struct, frozen=True):
    """The process of the command, and the process of the shell that waits for it."""

    command: ProcessName
    waiting: ProcessName


class ProcessExecutor:
    """Runs tasks as commands.  ``directory`` has a subdirectory with the state of each task."""

    name = "process"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Create the directory of the tasks.  The commands keep running when the block ends."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        """Return a controller.  Credentials are ignored, because a command has no image."""
        return ProcessController(self.directory, task)

    async def leftovers(self) -> Sequence[TaskId]:
        """Return the tasks that have a directory."""
        return sorted(TaskId(entry.name) for entry in self.directory.iterdir())

    async def discard(self, task_id: TaskId) -> None:
        """Kill the command and remove its directory."""
        path = self.directory / task_id
        await _kill(path)
        await remove_tree(path)


class ProcessController:
    """One command."""

    def __init__(self, directory: Path, task: AssignedTask) -> None:
        self._task = task
        self._path = directory / task.task.id
        self._stop_work = SharedWork()

    def observed(self) -> Running | None:
        """Return the state in the files that the waiting shell has written."""
        if not self._path.is_dir():
            return None
        started, code = _started(self._path), _exit_code(self._path)
        is_running = started is not None and code is None and is_alive(started.command)
        return Running(
            container=ContainerStatus(
                container_id=self._task.task.id,
                pid=started.command.pid if started is not None and is_running else 0,
                exit_code=code or 0,
            )
        )

    async def prepare(self) -> None:
        """Check that the task can run as a plain command."""
        spec = self._spec()
        arguments = (*spec.command, *spec.args)
        if not arguments:
            raise Rejected("No command specified")
        try:
            signal_number(spec.stop_signal or "SIGTERM")
        except InvalidArgument as error:
            raise Rejected(str(error)) from error
        if is_process(spec):  # that promises an unprivileged user and limits
            raise Rejected(
                f"this node runs plain commands, and cannot confine {EXECUTOR_LABEL}=process: remove the label"
            )
        if spec.mounts or spec.secrets or spec.configs:
            raise Rejected("this node runs plain commands, which cannot have mounts, secrets or configs")
        self._path.mkdir(mode=0o700, exist_ok=True)

    async def start(self) -> Running:
        """Start the command below its waiting shell."""
        if not self._path.is_dir():
            raise NotFound(f"No such process: {self._task.name}")
        if _started(self._path) is None:
            spec = self._spec()
            program = shutil.which((*spec.command, *spec.args)[0])
            if program is None:
                replace_file(self._path / "exit", b"127", is_durable=False)
                raise Unavailable(
                    f'starting process failed: exec: "{(*spec.command, *spec.args)[0]}":'
                    " executable file not found in $PATH"
                )
            # Otherwise a command could run whose process no file names.
            await run_to_end(self._launch(spec))
        observed = self.observed()
        assert observed is not None
        return observed

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        """Wait until the command has ended.  The exit code is 255 if the waiting shell was killed."""
        started = _started(self._path)
        if started is None:
            raise NotFound(f"No such process: {self._task.name}")
        await wait_gone(started.waiting)
        code = _exit_code(self._path)
        if code is None:
            await wait_gone(started.command)
            code = 255  # the waiting shell was killed: the exit code is lost
        return TaskExit(exit_code=code, message=f"task: non-zero exit ({code})" if code else "")

    async def fetch_end(self) -> TaskEnd | None:
        """Return None: only the exit code is known."""
        return None

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Send the stop signal, then kill.  Nothing is drained."""
        await self._stop_work.run(self._stop)

    async def _stop(self) -> None:
        started = _started(self._path)
        if started is None or not is_alive(started.command):
            return
        spec = self._spec()
        send_signal(started.command, signal_number(spec.stop_signal or "SIGTERM"))
        try:
            async with asyncio.timeout(spec.stop_grace_ns / 1e9):
                await wait_gone(started.command)
        except TimeoutError:
            await _kill(self._path)
        await wait_gone(started.waiting)

    async def terminate(self) -> None:
        """Kill the command and its process group."""
        await _kill(self._path)

    async def update(self, task: AssignedTask) -> None:
        """Do nothing: a plain command has no limits."""

    async def remove(self) -> None:
        """Kill the command and remove its directory."""
        await _kill(self._path)
        await remove_tree(self._path)

    def _spec(self) -> ContainerSpec:
        spec = self._task.task.spec.container_spec
        if spec is None:
            raise Rejected("this node runs plain commands, but the task has no command")
        return spec

    async def _launch(self, spec: ContainerSpec) -> None:
        (self._path / "exit").unlink(missing_ok=True)  # of an earlier start that failed
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", _WRAPPER, "sh", spec.dir or "/", str(self._path), *spec.command, *spec.args),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **dict(entry.partition("=")[::2] for entry in spec.env)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_DEADLINE_S):
                waiting = await process.stdout.readline()
                command = await process.stdout.readline()
            if not command:
                raise SkepError(f"starting process failed: cannot run in {spec.dir or '/'}")
            started = _Started(named(command), named(waiting))
            replace_file(self._path / "started", msgspec.json.encode(started), is_durable=False)
            process.stdin.write(b"\n")
        except TimeoutError as error:
            raise Unavailable(f"the command did not start in {_START_DEADLINE_S:g} s") from error
        finally:
            process.stdin.close()
            if _started(self._path) is None:  # without a line, both shells end at once
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _START_DEADLINE_S)


def _started(path: Path) -> _Started | None:
    with suppress(FileNotFoundError, msgspec.DecodeError):
        return msgspec.json.decode((path / "started").read_bytes(), type=_Started)
    return None


def _exit_code(path: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int((path / "exit").read_text())
    return None


async def _kill(path: Path) -> None:
    """Kill the command with its process group.  Returns when it has ended."""
    started = _started(path)
    if started is None:
        return
    if is_alive(started.command):
        with suppress(ProcessLookupError):
            os.killpg(started.command.pid, signal.SIGKILL)
        await wait_gone(started.command)
    await wait_gone(started.waiting)
