"""Starts conmon processes and communicates with them.

conmon daemonizes, so that its parent is pid 1.  During the start, this process and conmon communicate over pipes, whose
descriptor numbers are in conmon's environment.  On ``_OCI_STARTPIPE``, conmon waits for a byte, which we send once
conmon is in its cgroup.  On ``_OCI_SYNCPIPE``, it responds with a line of JSON: the pid, or a negative number with the
runtime's error.  For an exec, it writes a line to ``_OCI_ATTACHPIPE`` once its socket accepts connections.  Later,
conmon reads commands from the pipe ``ctl``.  If several commands wait there, conmon before 2.2 executes only the first.

Source: conmon 2.1, src/conmon.c; podman, libpod/oci_conmon_linux.go.
"""

import asyncio
import errno
import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import ProcessName
from skep.engine.runtime.processes import open_pidfd
from skep.errors import SkepError, Unavailable
from skep.linux.files import replace_file
from skep.linux.processes import borrowed

T = TypeVar("T")
P = ParamSpec("P")

RUNTIME_ENVIRONMENT = {"GOGC": "off", "GOMAXPROCS": "2"}
"""Environment of runc, a Go program that lives for some milliseconds.

Garbage collection and a thread for each processor would only cost time.  With less than 2 in ``GOMAXPROCS``, it starts
more threads than a container with a small pids limit allows.  Containers never see these variables.
"""
DEADLINE_S = 60.0
"""Time limit in seconds for conmon's response.  Long, for overloaded machines.  It normally takes 0.05 s."""
_CONMON_ENDS_S = 10.0
"""Time limit in seconds for the end of the process that has forked the conmon daemon."""
_LINE_BYTES_MAX = 64 << 10
"""Limit in bytes for one response of conmon."""


class RuntimeFailed(SkepError):
    """runc or conmon has failed.  The message is from the program."""


class StartError(RuntimeFailed):
    """A process could not be started.  ``exit_code`` is Docker's: 127 not found, 126 not executable."""

    def __init__(self, message: str, verb: str = "create") -> None:
        super().__init__(f"OCI runtime {verb} failed: {message}: unknown")
        self.exit_code = exit_code_of(message)


class Pipes(msgspec.Struct, frozen=True):
    """This process's ends of the pipes to one conmon."""

    responses: asyncio.StreamReader
    attach_ready: asyncio.StreamReader
    start: int

    def proceed(self) -> None:
        """Send the byte for which conmon waits.

        If conmon has already ended, nothing happens here, but it sends no response.
        """
        with suppress(BrokenPipeError):
            os.write(self.start, b"\0")


class Conmons:
    """Starts conmons in the monitors' cgroup.

    On cgroup v1, a child starts in the cgroup of the *thread* that forks it.  So one thread stays in the monitors'
    cgroup and starts all conmons.  Moving each conmon afterwards would take several milliseconds per hierarchy, during
    which no process of the machine can fork.

    While a conmon starts, another thread calls ``Cgroups.expect_move``, so that runc's move into the container's groups
    is fast.
    """

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._thread: ThreadPoolExecutor | None = None
        self._expecting: asyncio.Future[None] | None = None

    def close(self) -> None:
        """End the thread.  The next start creates another."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    @asynccontextmanager
    async def start(
        self, arguments: Sequence[str], directory: Path, *, attach: bool, inherited: Sequence[int] = ()
    ) -> AsyncIterator[Pipes]:
        """Start a conmon, which waits for ``Pipes.proceed``.  Do not cancel the block before conmon has responded.

        Args:
            directory: Its working directory.  conmon creates the file ``oom`` there if the kernel kills the container
                for lack of memory.
            inherited: Descriptors that conmon keeps open until the container ends.

        Raises: Unavailable: it did not respond in time.
        """
        self.expect_move()
        responses, conmon_responses = os.pipe()
        conmon_start, start = os.pipe()
        ready, conmon_ready = os.pipe()
        theirs = (conmon_responses, conmon_start, conmon_ready)
        transports: list[asyncio.BaseTransport] = []
        process: subprocess.Popen[bytes] | None = None
        try:
            environment = RUNTIME_ENVIRONMENT | {
                "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
                "TZ": "UTC",  # conmon writes local time into its log lines
                "_OCI_SYNCPIPE": str(conmon_responses),
                "_OCI_STARTPIPE": str(conmon_start),
            }
            if attach:
                environment["_OCI_ATTACHPIPE"] = str(conmon_ready)
            try:
                given = (*theirs, *inherited)
                process = await self._on_thread(_spawn, arguments, environment, given, directory)
                self._cgroups.join_monitors(process.pid)
            finally:
                for descriptor in theirs:
                    os.close(descriptor)
            reader = await _stream(responses, transports)
            attach_ready = await _stream(ready, transports)
            async with asyncio.timeout(DEADLINE_S):
                yield Pipes(reader, attach_ready, start)
        except TimeoutError as error:
            raise Unavailable(f"conmon did not respond within {DEADLINE_S:g} s") from error
        finally:
            os.close(start)
            for transport in transports:
                transport.close()
            if process is not None:
                # The process that we started ended as soon as it had forked the daemon.
                await self._on_thread(process.wait, _CONMON_ENDS_S)

    def expect_move(self) -> None:
        """Call ``Cgroups.expect_move`` in a thread, because the runtime is about to move a process.

        Returns immediately.  Does nothing if such a call is still in progress.
        """
        if self._expecting is None or self._expecting.done():
            loop = asyncio.get_running_loop()
            self._expecting = loop.run_in_executor(None, self._cgroups.expect_move)

    async def _on_thread(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "conmon", initializer=self._cgroups.enter_monitors)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(*args, **kwargs))


def _spawn(
    arguments: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], directory: Path
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=descriptors,
        start_new_session=True,
        env=environment,
        cwd=directory,
    )


class _Response(msgspec.Struct, frozen=True):
    """One line from conmon.  If the number is negative, the message of the runtime follows."""

    data: int = 0
    pid: int = 0
    exit_code: int = 0
    message: str = ""


_decode = msgspec.json.Decoder(_Response).decode


async def read_pid(responses: asyncio.StreamReader, command: str, verb: str = "create") -> int:
    """Return the pid of the started ``command`` in conmon's next response.

    Raises: StartError: the runtime refused, or conmon ended.
    """
    line = await responses.readline()
    if not line:
        raise StartError("conmon ended without a response", verb)
    try:
        response = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartError(f"conmon sent {line[:200]!r}", verb) from error
    pid = response.data or response.pid
    if pid <= 0:
        raise StartError(with_runcs_words(plain(response.message.encode()), command, verb), verb)
    return pid


async def _stream(descriptor: int, transports: list[asyncio.BaseTransport]) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_LINE_BYTES_MAX)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )
    transports.append(transport)
    return reader


def control(path: Path, command: bytes) -> None:
    """Write a command to the pipe of the conmon at ``path``.  Does nothing if it has ended."""
    try:
        descriptor = os.open(path / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):
            return
        raise
    try:
        os.write(descriptor, command)
    finally:
        os.close(descriptor)


def resize_terminal(monitor: ProcessName | None, height: int, width: int) -> None:
    """Set the size of a conmon's terminal, in characters.  Does nothing if it has no terminal or has ended.

    The size is set on the terminal itself, not through ``ctl``: conmon before 2.2 drops a size that arrives while an
    earlier one waits there.
    """
    process = open_pidfd(monitor) if monitor is not None else None
    if monitor is None or process is None:
        return
    try:
        for number in map(int, os.listdir(f"/proc/{monitor.pid}/fd")):
            if os.readlink(f"/proc/{monitor.pid}/fd/{number}").endswith("/ptmx"):
                terminal = borrowed(process, number)
                try:
                    size = struct.pack("4H", height & 0xFFFF, width & 0xFFFF, 0, 0)
                    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
                finally:
                    os.close(terminal)
                return
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EBADF):  # conmon has ended meanwhile
            raise
    finally:
        os.close(process)


def pipe_owner(directory: Path, owner: tuple[int, int]) -> str:
    """Return a program that conmon executes as the runtime of a container with mapped users.

    It makes the container's root the owner of conmon's pipes, so that programs can open ``/dev/stdout``, and executes
    the runtime in its first argument.  Without it, the pipes belong to the machine's root, whom the container does not
    have.  containerd does the same (``IoUid``).  Raises: OSError.
    """
    uid, gid = owner
    path = directory / f"pipes-{uid}-{gid}"
    if not path.exists():
        replace_file(path, _PIPE_OWNER.format(uid=uid, gid=gid).encode(), mode=0o700, is_durable=False)
    return str(path)


# Only pipes: a terminal belongs to the container already, and /dev/null to the machine.
_PIPE_OWNER = """#!/bin/sh
pipes=
for number in 0 1 2; do
    [ ! -p /proc/self/fd/$number ] || pipes="$pipes /proc/self/fd/$number"
done
[ -z "$pipes" ] || chown {uid}:{gid} $pipes
exec "$@"
"""


def plain(errors: bytes) -> str:
    """Strip the log format from a runtime's message (runc: ``time="..." level=error msg="..."``)."""
    text = errors.decode(errors="replace").strip()
    match = _LOGGED.search(text)
    if match is not None:
        text = match.group(1).replace('\\"', '"').replace("\\n", "\n")
    return text.removeprefix("runc: ").strip() or "no reason given"


def with_runcs_words(message: str, command: str, verb: str) -> str:
    """Replace crun's words for why ``command`` cannot be executed by runc's, which users of Docker know.

    Source: crun, src/libcrun/utils.c (find_executable), src/libcrun/container.c (container_init_setup);
    runc, libcontainer/standard_init_linux.go.
    """
    if found := re.search(r"executable file `(.*)` not found(?: in \$PATH)?: ", message):
        name = found[1]
        reason = (
            f"stat {name}: no such file or directory" if "/" in name else "executable file not found in $PATH"
        )
        words = f'exec: "{name}": {reason}'
    elif (
        found := re.search(
            r"(?:open executable|open `(.*)`|the path `.*` (?:exists but it is not executable|is not a regular file)): "
            "(?:Permission denied|Operation not permitted)",
            message,
        )
    ) and (found[1] is None or Path(found[1]).name == Path(command).name):  # it opens other files too
        words = f'exec: "{command}": permission denied'
    elif found := re.search(r"chdir (?:to )?`(.*)`: (.*)", message):
        words = f'chdir to cwd ("{found[1]}") set in config.json failed: {found[2].lower()}'
    else:
        return message
    failed = "exec failed" if verb == "exec" else f"crun {verb} failed"
    return f"{failed}: unable to start container process: {words}"


_LOGGED = re.compile(r'level=(?:error|fatal) msg="((?:[^"\\]|\\.)*)"')


def exit_code_of(message: str) -> int:
    """Return the exit code that Docker reports for a container that could not be started.

    Source: moby, daemon/start.go (setExitCodeFromError).
    """
    lower = message.lower()
    if "executable file not found" in lower or "no such file or directory" in lower:
        return 127
    if "permission denied" in lower or "is a directory" in lower or "not a directory" in lower:
        return 126
    return 128
