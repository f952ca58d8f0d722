"""The supervisor of this manager's etcd process.

The kernel kills etcd when its manager dies (``setpriv --pdeathsig``).  Otherwise, etcd would keep raft's leadership,
and no manager would lead.  A member is ready when it has a leader and has finished a write.  Reads prove nothing,
because a member that has lost its log serves reads but never finishes a write.
"""

import asyncio
import errno
import json
import os
import shutil
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.aio.groups import errors_as_they_are
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.linux.files import file_exists, replace_file
from skep.paths import SOCKET_PATH_BYTES_MAX
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.errors import OutOfSpace
from skep.store.etcd.peers import load_peers, write_hosts
from skep.store.etcd.process import damage
from skep.store.etcd.process.binary import Binary, check_upgrade
from skep.store.etcd.process.campaign import campaign
from skep.store.etcd.process.damage import check_files
from skep.store.etcd.process.deadlines import Deadlines
from skep.store.etcd.process.flags import MemberSettings, arguments, environment
from skep.store.etcd.process.orphans import end_orphan, locked, remove_pid, write_pid
from skep.store.etcd.requests import PREFIX

log = structlog.get_logger()

FRESH_BYTES = 200 * 1024 * 1024
"""Free bytes that a new member needs, because it preallocates a log of 123 MB."""

KNOWN_BYTES = 80 * 1024 * 1024
"""Free bytes that a member with data needs for the next file of its log."""

POLL_S = 0.01
"""Seconds between checks whether etcd serves.  A start takes 40 ms."""
PROBE_S = 5.0
"""Timeout of the first write in seconds."""
DEADLINES_S = 1.0
"""Seconds between passes that set the timeouts of etcd's new connections.  A pass takes 0.2 ms."""
STOP_S = 5.0
"""Seconds for etcd to end after a signal before it gets the next one."""
NO_SPACE = "no space left on device"
CRASHES_MAX = 5
"""Number of crashes within ``CRASHES_WITHIN_S`` after which the manager fails."""
CRASHES_WITHIN_S = 60.0
"""Seconds in which crashes are counted."""

_NOISE = (
    "Running http and grpc server on single port",
    "simple token is not cryptographically signed",
)
"""Messages that every member logs and that are left out."""

_LEVELS = {"debug": "debug", "info": "info", "warn": "warning"}

_MAX_PLAIN = 500
"""Characters of a line that is not JSON, such as a panic, that are logged and shown as the reason."""


_REPEATED_S = 10.0
"""Seconds in which an equal warning is logged once.  etcd warns 70 times a second of a peer that does not listen."""
_REPEATED_MAX = 100
"""Most warnings whose repetitions are counted."""


class EtcdOutput:
    """Reads one process's stderr to its end.  ``reason`` is the last fatal line, or else the last line."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._fatal = ""
        self._last = ""
        self._repeated: dict[tuple[str, str], tuple[float, int]] = {}
        """Each warning and peer has the time of its last line, and the number of repetitions since."""

    @property
    def reason(self) -> str:
        """Reason why the process ended, as far as its log shows, or "no output"."""
        return self._fatal or self._last or "no output"

    async def read(self, stderr: asyncio.StreamReader) -> None:
        """Log line by line until the process closes its end."""
        while True:
            try:
                line = await stderr.readline()
            except ValueError:
                continue  # longer than the buffer: dropped by asyncio
            if not line:
                return
            self.take(line)

    def take(self, line: bytes) -> None:
        """Log one line."""
        entry = _parsed(line)
        if entry is None:
            text = line.decode(errors="replace").strip()[:_MAX_PLAIN]
            if text.startswith("panic:") or not self._last:
                self._fatal = self._fatal or (text if text.startswith("panic:") else "")
            self._last = self._last or text
            log.warning("etcd output", line=text)
            return
        message = str(entry.pop("msg", ""))
        if any(noise in message for noise in _NOISE) or _is_probe(message, entry):
            return
        level = str(entry.pop("level", "warn"))
        for name in ("ts", "caller", "stacktrace", "logger"):
            entry.pop(name, None)
        summary = f"{message}: {entry['error']}" if "error" in entry else message
        self._last = summary
        if level in ("fatal", "panic", "dpanic"):
            self._fatal = summary
        details = {f"etcd_{name.replace('-', '_')}": value for name, value in entry.items()}
        if level == "warn":
            left_out = self._left_out(summary, str(entry.get("remote-peer-id", "")))
            if left_out is None:
                return
            details |= {"repeated": left_out} if left_out else {}
        getattr(log, _LEVELS.get(level, "error"))(message, **details)

    def _left_out(self, summary: str, peer: str) -> int | None:
        """Return how often this warning was left out since it was logged, or None to leave it out now."""
        now = self._monotonic()
        logged_at, count = self._repeated.get((summary, peer), (-_REPEATED_S, 0))
        if now < logged_at + _REPEATED_S:
            self._repeated[summary, peer] = logged_at, count + 1
            return None
        if len(self._repeated) >= _REPEATED_MAX:
            self._repeated.clear()
        self._repeated[summary, peer] = now, 0
        return count


def _is_probe(message: str, entry: dict[str, Any]) -> bool:
    """Return whether the line reports a probe by another manager, which closes its connection before the handshake."""
    return message.startswith("rejected connection") and entry.get("error") == "EOF"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


class MemberFailed(SkepError):
    """etcd crashes repeatedly, or does not become ready.  The message has the reason."""


class MemberRemoved(SkepError):
    """The other managers removed this member: this node was demoted to worker."""


class EtcdMember:
    """One supervised etcd process.  ``running`` starts and stops it."""

    def __init__(
        self,
        settings: MemberSettings,
        binary: Binary,
        clock: Clock,
        backoff: Backoff,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``on_error`` is called with the value of ``error`` whenever it changes."""
        self.settings = settings
        self.starts = 0
        """Number of starts of the process."""
        self.error = ""
        """Reason why it cannot be started now, for users.  Empty if it can."""
        self._binary = binary
        self._clock = clock
        self._backoff = backoff
        self._on_error = on_error
        self._process: asyncio.subprocess.Process | None = None
        self._had_data = False
        self._ready = asyncio.Event()
        self._is_restarting = False
        self._is_only_voter = False
        """Whether it restarts to become one of several, and does not have to wait for an election timeout."""

    @property
    def pid(self) -> int | None:
        """The pid of the running process."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator["EtcdMember"]:
        """Run the member, and restart it after crashes, until the block ends.  Yields when it is ready.

        Raises:
            FailedPrecondition: The state of this machine prevents a start.
            MemberFailed: etcd crashes repeatedly, now or later from the block.
            MemberRemoved: The member was removed, now or later from the block.
        """
        self._prepare()
        with locked(self.settings.directory):
            await end_orphan(self.settings.directory, self._clock)
            async with errors_as_they_are(), asyncio.TaskGroup() as group:
                supervising = group.create_task(self._supervise(), name="etcd-member")
                try:
                    await self._ready.wait()
                    yield self
                finally:
                    supervising.cancel()
                    self._set_error("")

    async def wait_ready(self) -> None:
        """Wait until the member is ready, also after a restart."""
        await self._ready.wait()

    async def expect_others(self) -> None:
        """Restart a single member with the settings of several, before another one is added.  Returns when it is ready.

        With the timers of a single member it would send its heartbeats too rarely for others.
        """
        if self.settings.is_solo:
            self._is_only_voter = True
            try:
                await self.restart(msgspec.structs.replace(self.settings, is_solo=False))
            finally:
                self._is_only_voter = False

    async def restart(self, settings: MemberSettings) -> None:
        """Restart with other ``settings`` (of the same directory).  Returns when the member is ready again."""
        self.settings = settings
        process = self._process
        if process is not None and process.returncode is None:
            self._is_restarting = True
            self._ready.clear()
            process.send_signal(signal.SIGTERM)
        await self._ready.wait()

    # -- before the start --------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        settings = self.settings
        if len(os.fsencode(settings.socket)) > SOCKET_PATH_BYTES_MAX:
            raise FailedPrecondition(
                f"the path of a unix socket may have {SOCKET_PATH_BYTES_MAX} bytes, and {settings.socket} is longer: "
                "choose a shorter run directory"
            )
        for tool in ("setpriv", "unshare", "mount"):
            if shutil.which(tool) is None:
                raise FailedPrecondition(f"{tool} is missing: install util-linux")
        settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.directory.chmod(0o700)
        settings.socket.parent.mkdir(parents=True, exist_ok=True)
        if settings.has_hosts:
            write_hosts(settings.directory, load_peers(settings.directory))
        check_upgrade(read_version(settings.directory), self._binary.version)
        check_files(settings.data)
        missing = missing_bytes(settings.data)
        if missing and not file_exists(settings.data / "member"):
            raise FailedPrecondition(
                f"{settings.directory}: {_megabytes(missing)} MB of disk space are missing for the store"
            )

    # -- while it runs -----------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        crashes: deque[float] = deque()
        while True:
            await self._wait_for_space()
            check_files(self.settings.data)
            started = self._clock.monotonic()
            output = EtcdOutput(self._clock.monotonic)
            return_code = await self._run_once(output)
            if self._is_restarting:
                self._is_restarting = False
                continue
            if return_code == 0:
                raise MemberRemoved("this node is no longer a manager: the other managers removed its store")
            now = self._clock.monotonic()
            log.error("etcd exited", return_code=return_code, reason=output.reason)
            if now - started > CRASHES_WITHIN_S:
                self._backoff.reset()
            if missing_bytes(self.settings.data) or NO_SPACE in output.reason:
                self._set_error(full(self.settings.directory))
                await self._backoff.sleep(self._clock)
                continue
            if (damaged := damage.damage_reported(output.reason, self.settings.data)) is not None:
                raise damaged
            crashes.append(now)
            while now - crashes[0] > CRASHES_WITHIN_S:
                crashes.popleft()
            if len(crashes) >= CRASHES_MAX:
                raise MemberFailed(f"etcd exited {CRASHES_MAX} times in a minute: {output.reason}")
            await self._backoff.sleep(self._clock)

    async def _run_once(self, output: EtcdOutput) -> int:
        """Start the process, signal when it is ready, and return its exit code."""
        settings = self.settings
        settings.socket.unlink(missing_ok=True)
        # The kernel sends the signal when the thread that forked ends, so this must run in the main thread, as event
        # loops do.
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "TERM"),
            *_with_own_hosts(settings),
            str(self._binary.path),
            *arguments(settings, self._binary.version),
            env={"PATH": os.environ.get("PATH", os.defpath), **environment(settings)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=1024 * 1024,
            process_group=0,
        )
        assert process.stderr is not None, "stderr=PIPE"
        self._process = process
        self.starts += 1
        try:
            write_pid(settings.directory, process.pid)
            async with errors_as_they_are(), asyncio.TaskGroup() as group:
                group.create_task(output.read(process.stderr), name="etcd-output")
                probing = group.create_task(self._wait_serving(), name="etcd-probe")
                keeping = () if settings.is_solo else (self._apply_deadlines(process.pid),)
                others = [group.create_task(one, name="etcd-deadlines") for one in keeping]
                return_code = await process.wait()
                probing.cancel()
                for task in others:
                    task.cancel()
            return return_code
        finally:
            self._ready.clear()
            await self._end(process)
            remove_pid(settings.directory)

    async def _apply_deadlines(self, pid: int) -> None:
        deadlines = Deadlines(pid)
        while True:
            await tick(self._clock, DEADLINES_S)
            try:
                deadlines.apply()
            except (ProcessLookupError, FileNotFoundError):
                return
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOSYS):
                    log.warning("peer connections of etcd have no timeouts", reason=str(error))
                    return
                log.debug("peer connections of etcd not listed", error=str(error))

    async def _wait_serving(self) -> None:
        started = self._clock.monotonic()
        self._had_data = file_exists(self.settings.directory / "etcd-version")
        async with (
            EtcdClient(self.settings.socket) as client,
            errors_as_they_are(),
            asyncio.TaskGroup() as group,
        ):
            campaigning = group.create_task(self._campaign(), name="etcd-campaign")
            while not await self._has_leader(client):
                if self.settings.is_solo and self._clock.monotonic() - started > self.settings.ready_s:
                    raise MemberFailed(self._not_ready())
                await self._clock.sleep(POLL_S)
            campaigning.cancel()
            await self._probe(client, started)
        write_version(self.settings.directory, self._binary.version)
        log.info("etcd ready", seconds=round(self._clock.monotonic() - started, 3))
        self._ready.set()

    async def _campaign(self) -> None:
        if (self.settings.is_solo or self._is_only_voter) and not self.settings.is_sealed_off:
            await campaign(self.settings, self._binary.version, self._clock)

    async def _probe(self, client: EtcdClient, started: float) -> None:
        """Wait until a write has finished.  A learner finishes one after its promotion, and one of several members
        needs a quorum.

        A single member may take long on a slow disk.  A member that has lost its log never finishes a write.
        """
        while True:
            try:
                await client.put(PREFIX + b"probe/" + self.settings.name.encode(), b"", timeout_s=PROBE_S)
            except OutOfSpace as error:
                # The member serves, and accepts Skep's writes. The leader will free space.
                log.warning("etcd has reached its quota", reason=str(error))
                return
            except Unavailable as error:
                if self.settings.is_solo and self._clock.monotonic() - started > self.settings.ready_s:
                    raise MemberFailed(self._not_ready()) from error
                await self._clock.sleep(POLL_S)
            else:
                return

    def _not_ready(self) -> str:
        """Return the error of a single member.  If it has data but no leader or no finished write, its log is
        incomplete.
        """
        if missing := missing_bytes(self.settings.data):
            return no_space(self.settings.directory, missing)
        if self._had_data:
            return damage.LOG.format(directory=self.settings.directory)
        return f"etcd was not ready after {self.settings.ready_s:.0f} s"

    async def _has_leader(self, client: EtcdClient) -> bool:
        try:
            status = await client.status(timeout_s=1.0)
        except Unavailable:
            return False
        return status.leader != 0

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Send SIGTERM, after which etcd transfers leadership and exits within milliseconds."""
        for stop in (signal.SIGTERM, signal.SIGKILL):
            if process.returncode is not None:
                return
            process.send_signal(stop)
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                log.warning("etcd does not exit", signal=stop.name)

    async def _wait_for_space(self) -> None:
        while missing := missing_bytes(self.settings.data):
            if not self.error:
                log.error(
                    "no disk space for the store", path=str(self.settings.directory), missing_bytes=missing
                )
            self._set_error(no_space(self.settings.directory, missing))
            await self._clock.sleep(1.0)
        self._set_error("")

    def _set_error(self, error: str) -> None:
        if error != self.error:
            self.error = error
            self._on_error(error)


def _with_own_hosts(settings: MemberSettings) -> tuple[str, ...]:
    """Return the start of a command line that runs the rest with its own hosts file.

    The mount propagation is ``slave``, so that unmounts on this machine also apply in etcd's namespace.
    """
    if settings.is_sealed_off:
        return ("unshare", "--net", "--")
    if settings.hosts is None:
        return ()
    mount = 'mount --bind "$0" /etc/hosts && exec "$@"'
    return ("unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", mount, str(settings.hosts))


def missing_bytes(data: Path) -> int:
    """Return the bytes of disk space that a start lacks, or 0."""
    existing = data
    while not file_exists(existing):
        existing = existing.parent
    disk = os.statvfs(existing)
    needed = KNOWN_BYTES if file_exists(data / "member") else FRESH_BYTES
    return max(0, needed - disk.f_bavail * disk.f_frsize)


def full(directory: Path) -> str:
    """Return the error text if the missing amount is unknown, because inodes may be missing instead of bytes."""
    return (
        f"{directory}: the store of this manager has run out of disk space. Make room: it goes on by itself."
    )


def no_space(directory: Path, missing: int) -> str:
    """Return the error text if the missing space is known."""
    return (
        f"{directory}: {_megabytes(missing)} MB of disk space are missing for the store of this manager. "
        "Make room: it goes on by itself."
    )


def _megabytes(missing: int) -> int:
    return missing // 1024**2 + 1


def read_version(directory: Path) -> tuple[int, int, int] | None:
    """Return the version of etcd that used this directory last."""
    try:
        major, minor, patch = map(int, (directory / "etcd-version").read_text().strip().split("."))
    except (FileNotFoundError, ValueError):
        return None
    return major, minor, patch


def write_version(directory: Path, version: tuple[int, int, int]) -> None:
    """Record the version of etcd that uses this directory."""
    content = ".".join(map(str, version)) + "\n"
    replace_file(directory / "etcd-version", content.encode(), is_durable=False)
