"""OCI runtimes (runc, crun) under conmon, driven from asyncio.

One conmon per container is started.  conmon daemonizes (its parent becomes pid 1) and runs ``create``.  It holds
the container's terminal or pipes and writes the output to the log.  When the container ends, conmon writes the exit
code to a file and ends.  So three questions can be answered, even after a restart of this process:

* Has the container ended?  Then conmon's pidfd is readable, because conmon ends last.
* With which exit code?  conmon writes the exit file before it ends, twice: first in memory, where a full disk does not
  matter, then on disk, where it survives a reboot.  (In this order, because conmon stops writing after a failure.)
* What if conmon was killed?  Then the exit file is missing.  The container runs unwatched until its own pidfd is
  readable, and its unknown exit code is reported as 255.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.failures import describe_error, isolate
from skep.engine.capacity import Capacity, Programs
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.confinement.limits import block_io, resources
from skep.engine.confinement.machine import MachineOptions
from skep.engine.containers.attachment import Attachment, attach
from skep.engine.containers.container import Container, ContainerState, Interruption, ProcessName
from skep.engine.containers.exec_limits import held as open_files_held
from skep.engine.containers.signals import signal_number
from skep.engine.runtime.bundle import Bundles, forget_environment
from skep.engine.runtime.conmon import (
    RUNTIME_ENVIRONMENT,
    Conmons,
    RuntimeFailed,
    StartError,
    control,
    pipe_owner,
    plain,
    read_pid,
)
from skep.engine.runtime.processes import (
    find,
    is_alive,
    is_of_earlier_boot,
    kill_descendants,
    send_signal,
    wait_gone,
)
from skep.engine.runtime.runtime_state import ProcessEnded, RuntimeState
from skep.engine.runtime.sealed_program import SealedProgram
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.linux.commands import communicate
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS

log = structlog.get_logger()

COMMAND_DEADLINE_S = 60.0
"""Time limit in seconds for one command of a runtime.  Long, for overloaded machines.  It normally takes 0.01 s."""
EXIT_CODE_UNKNOWN = 255
"""containerd's code of a process whose end nobody saw."""
_CLEAR_TRIES_MAX = 8
"""Number of attempts to remove cgroups, both before and after leftover processes are killed.

Together they wait 0.1 s.
"""
_CONMON_ENDS_S = 10.0
"""Time limit in seconds for the end of a killed conmon."""


class CreatedProcess(msgspec.Struct, frozen=True):
    """A created container, whose first process waits for ``start``."""

    process: ProcessName
    monitor: ProcessName


async def end_all_gracefully(containers: Iterable[Container]) -> None:
    """Send all ``containers`` their stop signals, and wait until each has ended or its grace period is over."""
    await asyncio.gather(
        *(isolate(_end_gracefully(one), "container not stopped", container=one.name) for one in containers)
    )


async def _end_gracefully(container: Container) -> None:
    """Send the stop signal to a container's first process, and wait until it has ended or its grace period is over.

    Its monitor ends later, because it first writes the exit code.
    """
    if container.process is None or not container.is_running:
        return
    send_signal(container.process, signal_number(container.config.stop_signal or "SIGTERM"))
    with suppress(TimeoutError):
        async with asyncio.timeout(container.config.stop_grace_ns / SECOND_NS):
            await wait_gone(container.process)
            if container.monitor is not None:
                await wait_gone(container.monitor)


class StartedExec(msgspec.Struct, frozen=True):
    """A started exec.  ``monitor`` is its conmon, or None if the exec has already ended."""

    pid: int
    monitor: ProcessName | None
    attachment: Attachment


class Ended(msgspec.Struct, frozen=True):
    """The end of a container.  ``error`` is set if the end was not observed."""

    exit_code: int
    oom_killed: bool = False
    error: str = ""
    interruption: Interruption | None = None


class Runtime:
    """Runs the OCI runtimes and conmon.

    ``root`` has the runtimes' state, and is on a file system that is empty after a reboot.
    """

    def __init__(
        self, *, programs: Programs, root: Path, bundles: Bundles, cgroups: Cgroups, capacity: Capacity
    ) -> None:
        self._programs = programs
        self._sealed = {name: SealedProgram(path) for name, path in programs.runtimes.items()}
        self._root = root
        self.bundles = bundles
        self.cgroups = cgroups
        self._capacity = capacity
        self._conmons = Conmons(cgroups)
        self._state = RuntimeState(root)

    def close(self) -> None:
        """Free the resources for starting containers.  Running containers continue."""
        self._conmons.close()
        for program in self._sealed.values():
            program.close()

    def name_of(self, requested: str) -> str:
        """Return the name of the requested runtime, or of the default runtime if the request is empty.

        Raises: InvalidArgument: this node has no such runtime, in Docker's words.
        """
        if requested and requested not in self._programs.runtimes:
            raise InvalidArgument(f"unknown or invalid runtime name: {requested}")
        return requested or self._programs.default_runtime

    async def create(self, container: Container) -> CreatedProcess:
        """Run the runtime's ``create`` under a new conmon.

        Raises: StartError: the runtime refused, or this node lacks it; Unavailable: no response in time.
        """
        id, path, bundle = container.id, self.bundles.path(container.id), self.bundles.bundle(container.id)
        for stale in (*_exit_files(path, bundle, id), *_oom_files(path, bundle)):  # left by an earlier start
            stale.unlink(missing_ok=True)
        for name in ("attach", "ctl", "pidfile"):
            (bundle / name).unlink(missing_ok=True)
        arguments = self._conmon_arguments(container, id, bundle, path, terminal=container.config.tty)
        arguments += ["--persist-dir", str(bundle), "-P", str(bundle / "conmon.pid")]
        arguments += ["-l", _log_driver(container, self.bundles.log(id))]
        if container.config.open_stdin:
            # The input of a terminal does not end when a client detaches, because another client may attach.  Source:
            # moby, container/stream.
            ends_with_client = container.config.stdin_once and not container.config.tty
            arguments += ["-i"] if ends_with_client else ["-i", "--leave-stdin-open"]
        with ExitStack() as given:
            api = self.bundles.apis.take(id)
            inherited = () if api is None else (given.enter_context(api).fileno(),)
            async with self._conmons.start(arguments, path, attach=False, inherited=inherited) as pipes:
                pipes.proceed()
                pid = await read_pid(pipes.responses, container.config.path)
        process = find(pid)
        monitor = find(int((bundle / "conmon.pid").read_text()))
        if process is None or monitor is None:
            raise StartError("the container's first process ended before it was started")
        return CreatedProcess(process, monitor)

    async def start(self, id: ContainerId, process: ProcessName) -> None:
        """Make the created ``process`` execute the container's command.  Raises: StartError; Unavailable."""
        try:
            async with asyncio.timeout(COMMAND_DEADLINE_S):
                if not await self._state.start(id, process):
                    await self.run(id, "start")
        except (RuntimeFailed, ProcessEnded) as error:
            raise StartError(str(error), "start") from error
        except TimeoutError as error:
            raise Unavailable(f"the container did not start within {COMMAND_DEADLINE_S:g} s") from error

    async def wait(self, container: Container) -> Ended:
        """Wait until the container has ended.  Also works if an earlier process started it."""
        if container.monitor is not None:
            await wait_gone(container.monitor)
        # If the machine shuts down, it ends the containers too, and conmon records the exit codes of its signals.
        interruption = Interruption.MACHINE_RESTARTED if is_of_earlier_boot(container.monitor) else None
        ended = self._read_exit(container)
        if ended is not None:
            return replace(ended, interruption=interruption)
        if container.process is not None:
            await wait_gone(container.process)
        log.warning(
            "container exit not observed",
            container=container.name,
            first_process=msgspec.to_builtins(container.process),
            monitor=msgspec.to_builtins(container.monitor),
        )
        return Ended(
            EXIT_CODE_UNKNOWN,
            error="the container's monitor was lost, so its exit code is not known",
            interruption=interruption or Interruption.MONITOR_LOST,
        )

    async def delete(self, container: Container) -> None:
        """Remove the runtime's state and the container's cgroups, and kill its remaining processes.  Idempotent.

        Raises: Unavailable: something is left.  A process may hang in the kernel forever.
        """
        await self._delete(container.id, partial(self._end_remaining, container))

    async def delete_unknown(self, id: ContainerId) -> None:
        """Do the same as ``delete`` for a container without a readable record."""
        await self._delete(id, partial(self.cgroups.remove_unknown, id))

    async def _delete(self, id: ContainerId, remove: Callable[[], bool]) -> None:
        refusal = "its control groups are not empty"
        if self._state.has(id):
            try:
                await self.run(id, "delete", "--force")
            except (SkepError, OSError) as error:  # for example, its state is damaged
                refusal = describe_error(error)
        if not await self._try_often(remove):
            raise Unavailable(f"the container's processes do not end: {refusal}")
        self._state.forget(id)

    def _end_remaining(self, container: Container) -> bool:
        """Remove the container's cgroups, and kill processes that are left in them.

        Return whether no cgroup is left.
        """
        if self.cgroups.remove(container):
            return True
        for pid in self.cgroups.pids(container):
            self.kill_exec(container, pid)
        return False

    @staticmethod
    async def _try_often(remove: Callable[[], bool]) -> bool:
        """Call ``remove`` up to ``_CLEAR_TRIES_MAX`` times.  Return whether no cgroup is left."""
        backoff = Backoff(first_s=0.001, longest_s=0.02)
        for _ in range(_CLEAR_TRIES_MAX):
            if await asyncio.to_thread(remove):
                return True
            # A process stays a member of its group until a moment after the kernel has reported its end.
            await asyncio.sleep(backoff.next_delay_s())
        return False

    async def clear(self, container: Container) -> None:
        """Do the same as ``delete`` for an ended container without starting a runtime, as it has no processes left."""
        if await self._try_often(partial(self.cgroups.remove, container)):
            self._state.forget(container.id)
            return
        pids: list[int] = []
        with suppress(Unavailable):  # the text is only for the log
            pids = sorted(self.cgroups.pids(container))
        log.warning("leftover processes of an exited container killed", container=container.id, pids=pids)
        await self.delete(container)

    def signal(self, process: ProcessName, number: int) -> None:
        """Send a signal to exactly this process.  Does nothing if it has ended."""
        send_signal(process, number)

    def is_alive(self, process: ProcessName) -> bool:
        """Return whether the process still runs."""
        return is_alive(process)

    def has(self, id: ContainerId) -> bool:
        """Return whether a runtime has a container with this id, running or not."""
        return self._state.has(id)

    def is_frozen(self, container: Container) -> bool:
        """Return whether a running container is frozen.  If that cannot be read, return what its record says."""
        found = self.cgroups.is_frozen(container)
        return container.state is ContainerState.PAUSED if found is None else found

    async def pause(self, id: ContainerId) -> None:
        """Freeze the container.  Raises: RuntimeFailed."""
        await self.run(id, "pause")

    async def resume(self, id: ContainerId) -> None:
        """Resume the container.  Raises: RuntimeFailed."""
        await self.run(id, "resume")

    async def status(self, id: ContainerId) -> str:
        """Return ``created``, ``running``, ``paused``, ``stopped``, or "" for a container that no runtime knows.

        If the command fails (for example without memory for a process), reads the status from the runtime's files.
        """
        try:
            output = await self.run(id, "state")
        except RuntimeFailed:
            return self._state.stage(id)
        status: str = msgspec.json.decode(output).get("status", "")
        return status

    async def update(self, container: Container) -> Sequence[str]:
        """Set the limits of ``container`` if it runs.  Return warnings about limits that this node cannot set.

        Raises: InvalidArgument: this machine does not have the processors or memory nodes; RuntimeFailed.
        """
        config, warnings = container.config, list[str]()
        limits = resources(config, self._capacity, warnings)
        weight = MachineOptions(blkio_weight=config.machine.blkio_weight)
        if found := block_io(weight, {}, self._capacity, warnings):
            limits["blockIO"] = found
        if not container.is_running:
            return warnings
        # Runtimes leave a missing limit unchanged, so lift it explicitly.
        if "memory" in self._capacity.controllers and not config.memory_bytes:
            limits.setdefault("memory", {})["limit"] = -1
            if self._capacity.has_swap_accounting:
                limits["memory"]["swap"] = -1
        if "cpu" in self._capacity.controllers and not config.nano_cpus:
            limits.setdefault("cpu", {})["quota"] = -1
        if "pids" in self._capacity.controllers and not config.pids:
            limits["pids"] = {"limit": -1}
        await self.run(container.id, "update", "--resources", "-", stdin=msgspec.json.encode(limits))
        return warnings

    def forget_environment(self, id: ContainerId, entries: Sequence[str]) -> None:
        """Remove secret variables from the runtime's input and from crun's copy of it (see ``Bundles``)."""
        for file in (self.bundles.specification(id), self._root / id / "config.json"):
            forget_environment(file, entries)

    def reopen_log(self, id: ContainerId) -> None:
        """Make conmon reopen its log file after a rename.  No output is lost."""
        control(self.bundles.bundle(id), b"2 0 0\n")

    async def run(self, id: ContainerId, command: str, *arguments: str, stdin: bytes | None = None) -> bytes:
        """Run a command of the runtime that has created the container and return the output.

        Raises: RuntimeFailed; Unavailable: the deadline passed.
        """
        name = self._state.runtime(id) or self._programs.default_runtime
        if name not in self._programs.runtimes:
            raise RuntimeFailed(f"unknown or invalid runtime name: {name}")
        process = await asyncio.create_subprocess_exec(
            str(self._programs.runtimes[name]),
            "--root",
            str(self._root),
            command,
            *arguments,
            id,
            stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **RUNTIME_ENVIRONMENT},
        )
        try:
            output, errors = await communicate(process, COMMAND_DEADLINE_S, stdin)
        except TimeoutError as error:
            raise Unavailable(f"{name} {command} did not end within {COMMAND_DEADLINE_S:g} s") from error
        if process.returncode:
            raise RuntimeFailed(plain(errors))
        return output

    def expect_exec(self) -> None:
        """Save time for an exec that was created and will probably start in a moment (see ``Conmons.expect_move``)."""
        self._conmons.expect_move()

    async def exec(
        self, container: Container, exec_id: str, path: Path, *, terminal: bool, stdin: bool
    ) -> "StartedExec":
        """Start an additional process in a container, under a new conmon with its directory at ``path``.

        Raises: StartError: the runtime refused; Unavailable: no response in time.
        """
        arguments = self._conmon_arguments(container, exec_id, path, path, terminal=terminal)
        arguments += ["-l", "none", "-e", "--exec-attach", "--exec-process-spec", str(path / "process.json")]
        arguments += ["-P", str(path / "conmon.pid")]
        if stdin:
            arguments.append("-i")
        command: str = msgspec.json.decode((path / "process.json").read_bytes())["args"][0]
        attachment: Attachment | None = None
        try:
            async with self._conmons.start(arguments, path, attach=True) as pipes:
                pipes.proceed()
                if await pipes.attach_ready.readline():
                    attachment = await attach(path)  # before the process starts, so that no output is missed
                with open_files_held(path / "process.json", partial(self.cgroups.pids, container)):
                    if attachment is not None:
                        pipes.proceed()
                    pid = await read_pid(pipes.responses, command, "exec")
            if attachment is None:
                raise StartError("conmon opened no socket to attach to", "exec")
            monitor = find(int((path / "conmon.pid").read_text()))
        except BaseException:
            if attachment is not None:
                attachment.close()
            raise
        return StartedExec(pid, monitor, attachment)

    def kill_exec(self, container: Container, pid: int) -> None:
        """Kill an exec's process, if it exists.  Raises: Unavailable, OSError: it could not be killed."""
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                # Check the cgroup after opening the descriptor: if the process is in the container's cgroup then, the
                # descriptor refers to a process of the container.
                if pid in self.cgroups.pids(container):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)

    async def end_exec(self, container: Container, path: Path) -> None:
        """End an exec whose conmon did not respond in time.  Kills its process, conmon, runtime and all descendants."""
        with suppress(OSError, ValueError, Unavailable):
            self.kill_exec(container, int((path / "pidfile").read_text()))
        with suppress(OSError, ValueError, TimeoutError):
            monitor = find(int((path / "conmon.pid").read_text()))
            # The pid may belong to another process by now, so check that the exec's id is among conmon's arguments.
            if monitor and os.fsencode(path.name) in Path(f"/proc/{monitor.pid}/cmdline").read_bytes():
                # Stop conmon before killing its descendants.  If only conmon were killed, the runtime would end with it
                # (PR_SET_PDEATHSIG), but a process that the runtime has started in the container, and that got no
                # processor time yet, would later run the command.  A stopped conmon stays the parent of that process.
                send_signal(monitor, signal.SIGSTOP)
                try:
                    kill_descendants(monitor)
                finally:
                    send_signal(monitor, signal.SIGKILL)
                async with asyncio.timeout(_CONMON_ENDS_S):
                    await wait_gone(monitor)

    async def wait_exec(self, container: Container, path: Path, monitor: ProcessName | None) -> int:
        """Wait until an exec has ended, and return its exit code."""
        if monitor is not None:
            await wait_gone(monitor)
        try:
            return int((path / container.id).read_text())
        except (FileNotFoundError, ValueError):
            return EXIT_CODE_UNKNOWN

    # --- conmon -----------------------------------------------------------------------------------------------

    def _conmon_arguments(
        self, container: Container, name: str, path: Path, exits: Path, *, terminal: bool
    ) -> list[str]:
        if container.runtime not in self._sealed:
            raise StartError(f"unknown or invalid runtime name: {container.runtime}")
        arguments = [str(self._programs.conmon), "--api-version", "1"]
        arguments += ["-c", container.id, "-u", name, "-n", name]
        program = self._sealed[container.runtime].path()
        if container.users is not None:
            arguments += ["--runtime-arg", program]
            program = pipe_owner(self._root, container.users.root)
        arguments += [
            "-r",
            program,
            "-b",
            str(path),
            "-p",
            str(path / "pidfile"),
            "--exit-dir",
            str(exits),
        ]
        arguments += ["--full-attach", "--no-sync-log", "--log-level", "error"]
        # A mapped root may have only 200 keys, like any other user.
        if not self._capacity.has_keyrings or container.users is not None:
            arguments.append("--no-new-keyring")
        arguments += ["--runtime-arg", "--root", "--runtime-arg", str(self._root)]
        if terminal:
            arguments.append("-t")
        return arguments

    def _read_exit(self, container: Container) -> Ended | None:
        path, bundle = self.bundles.path(container.id), self.bundles.bundle(container.id)
        for file in _exit_files(path, bundle, container.id):
            with suppress(FileNotFoundError, ValueError):
                code = int(file.read_text())
                return Ended(code, oom_killed=any(one.exists() for one in _oom_files(path, bundle)))
        return None


def _exit_files(path: Path, bundle: Path, id: ContainerId) -> tuple[Path, Path]:
    return bundle / "exit", path / id


def _oom_files(path: Path, bundle: Path) -> tuple[Path, Path]:
    return bundle / "oom", path / "oom"


def _log_driver(container: Container, path: Path) -> str:
    return "none" if container.config.log.type == "none" else f"k8s-file:{path}"
