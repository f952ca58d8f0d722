"""Keeps one detached process running: adopts a running one, replaces one of another version, restarts an ended one."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
import structlog

from skep import __version__
from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.errors import Unavailable
from skep.linux.detached import ProcessIdentity, identify, open_pidfd, read_pid_file
from skep.node.supervision.zygote import ZygoteGone
from skep.paths import Paths

log = structlog.get_logger()

STOP_GRACE_S = 15.0
"""Seconds for a process to end after SIGTERM, before it is killed."""
_LASTING_S = 15.0
"""Seconds after which a running process evidently lacks no resource."""
_RETRY_SECONDS_MAX = 5.0
"""Longest pause in seconds after a failure of the supervisor itself, for instance without a free descriptor."""

CRASHES_MAX = 5
"""Crashes within ``CRASH_WINDOW_S`` after which a process is not started again."""
CRASH_WINDOW_S = 60.0
"""Seconds in which crashes are counted."""
_FIRST_DELAY_S = 0.1
"""Seconds before the first new start."""
_GROWTH = 3.0
"""Factor between two pauses.  The sixth pause is ``_DELAY_S_MAX``, so that a short fault delays little."""
_DELAY_S_MAX = 10.0
"""Longest pause between two starts."""
_STEPS_MAX = 10
"""Limit for the exponent of the growing pause.  ``_DELAY_S_MAX`` is reached before."""


class Forks(Protocol):
    """Starts processes (``Zygote``)."""

    async def fork(self, entry: str, arguments: Sequence[str]) -> int:
        """Start the process of ``entry`` and return its pid.  Raises: ZygoteGone."""

    async def reap(self, pid: int) -> int | None:
        """Return the exit code of an ended child, or minus its signal, or None if unknown."""


class SupervisionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Supervision settings of one kind of process.

    Args:
        version: A running process of this version is adopted.  A process of another version is replaced.
        outlives_node: Whether it continues when the node stops as planned.
        hands_over: Whether a running process is replaced by a successor that takes over from it (net).  Otherwise it is
            stopped first (manager).
        gives_up: Whether five ends within a minute are final.  Otherwise it is restarted without limit.
        final: Exit codes after which it is not restarted, with the reason of each.
        futile: Exit code after which it is not restarted.  The process has written the reason into a file.
        starved: Exit code of a process that lacked a resource of the machine.  It is restarted without limit.
        show_condition: Called with the reason while the process is ``starved``, and with an empty text once it runs.
        wait_hung: Watches the running process, and returns the reason once it must be killed.
    """

    version: str = __version__
    outlives_node: bool = False
    hands_over: bool = False
    gives_up: bool = True
    final: Mapping[int, str] = MappingProxyType({})
    futile: int | None = None
    starved: int | None = None
    show_condition: Callable[[str], None] = lambda _: None
    wait_hung: Callable[[], Coroutine[Any, Any, str]] | None = None


_DEFAULT = SupervisionPolicy()


class StartAgain(msgspec.Struct, frozen=True):
    """Restart the process after ``after_s`` seconds."""

    after_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """Do not restart the process.  ``crashes`` is how often it ended within ``CRASH_WINDOW_S``."""

    crashes: int


def recent(ends: Sequence[float], now: float) -> tuple[float, ...]:
    """Return the ``ends`` (monotonic seconds) that are within ``CRASH_WINDOW_S`` before ``now``."""
    return tuple(end for end in ends if now - end < CRASH_WINDOW_S)


def after_end(ends: Sequence[float], now: float, rng: float, *, gives_up: bool) -> StartAgain | GiveUp:
    """Decide whether to restart after the last of ``ends``.

    The pause grows with every end within the last minute.  With ``gives_up``, the process is not restarted after the
    fifth.

    Args:
        rng: A number from 0 to 1, which spreads the pause over half to all of its length.
    """
    count = len(recent(ends, now))
    if gives_up and count >= CRASHES_MAX:
        return GiveUp(count)
    steps = min(max(count - 1, 0), _STEPS_MAX)
    pause_s = min(_FIRST_DELAY_S * _GROWTH**steps, _DELAY_S_MAX)
    return StartAgain(pause_s * (0.5 + rng / 2))


class Supervisor:
    """One detached process.  ``run`` keeps it alive.

    The process outlives ``run``, and the next node process adopts it.  So an exception in the node process does not
    stop a manager.  Only after ``dismiss``, or if the node stops as planned, ``run`` stops the process when it is
    cancelled.

    Args:
        rng: Returns numbers from 0 to 1.
        ends_with_node: Returns whether the node is stopping as planned.
    """

    def __init__(
        self,
        name: str,
        paths: Paths,
        *,
        zygote: Forks,
        clock: Clock,
        rng: Callable[[], float],
        ends_with_node: Callable[[], bool],
        policy: SupervisionPolicy = _DEFAULT,
    ) -> None:
        self._name = name
        self._paths = paths
        self._zygote = zygote
        self._clock = clock
        self._rng = rng
        self._ends_with_node = ends_with_node
        self.is_dismissed = False
        self._policy = policy
        self._ends: tuple[float, ...] = ()
        self._last_end = ""
        self.process: ProcessIdentity | None = None
        self.error = ""
        """A sentence for ``/info`` if the process is not restarted, or empty."""

    async def run(self) -> None:
        """Keep the process running until cancelled.

        Returns only after a ``final`` exit code.  After giving up, waits to be cancelled.

        Raises: ZygoteGone: the node process must be restarted.
        """
        try:
            while True:
                code = await retry(
                    self._live_once,
                    "process not supervised",
                    clock=self._clock,
                    longest_s=_RETRY_SECONDS_MAX,
                    rng=self._rng,
                    passes=(ZygoteGone,),
                    name=self._name,
                )
                if code is not None and code in self._policy.final:
                    self.error = self._policy.final[code]
                    log.warning("process ended for good", name=self._name, reason=self._last_end)
                    return
                await self._wait_restart(code)
        finally:
            if self.is_dismissed or (self._ends_with_node() and not self._policy.outlives_node):
                await self._stop()

    async def _wait_restart(self, code: int | None) -> None:
        """Wait until the process must be restarted after its end with ``code``.  Never returns if it is given up."""
        if code is not None and code == self._policy.futile:
            self.error = self._last_end
            log.error("process given up", name=self._name, last=self._last_end)
            await asyncio.Event().wait()
        self._ends = recent((*self._ends, self._clock.monotonic()), self._clock.monotonic())
        is_starved = code is not None and code == self._policy.starved
        if is_starved:
            self._policy.show_condition(
                f"the {self._name} process does not run: {self._last_end}. It is retried"
            )
        gives_up = self._policy.gives_up and not is_starved
        match after_end(self._ends, self._clock.monotonic(), self._rng(), gives_up=gives_up):
            case GiveUp(crashes):
                self.error = (
                    f"the {self._name} process ended {crashes} times within {CRASH_WINDOW_S:.0f} s "
                    f"({self._last_end}) and is not started again: see the log, then restart skep"
                )
                log.error("process given up", name=self._name, crashes=crashes, last=self._last_end)
                await asyncio.Event().wait()
            case again:
                log.warning(
                    "process ended",
                    name=self._name,
                    how=self._last_end,
                    again_in_s=round(again.after_s, 2),
                )
                await self._clock.sleep(again.after_s)

    def dismiss(self) -> None:
        """Let ``run`` stop the process when it is cancelled."""
        self.is_dismissed = True

    async def _stop(self) -> None:
        # The pid file also names a process whose start was cancelled before its pid arrived here.
        last = self.process or read_pid_file(self._paths.pid_file(self._name))
        if last is not None:
            await terminate(last, STOP_GRACE_S)
            await self._zygote.reap(last.pid)
            self.process = None

    def reload(self) -> None:
        """Send SIGHUP to the process.  A process that is just starting reads its settings anyway."""
        if self.process is not None:
            _send(self.process, signal.SIGHUP)

    async def _live_once(self) -> int | None:
        """Adopt or start the process and wait for its end.  Return its exit code if that is known."""
        running = read_pid_file(self._paths.pid_file(self._name))
        if running is not None and running.version == self._policy.version:
            log.info("process adopted", name=self._name, pid=running.pid)
            self.process = running
        else:
            if running is not None and not self._policy.hands_over:
                log.info("replacing process of another version", name=self._name, version=running.version)
                await terminate(running, STOP_GRACE_S)
            self.process, code = await self._start()
            if self.process is None:
                return code
        killed_for = await self._watch_to_end(self.process)
        code = await self._zygote.reap(self.process.pid)
        self._last_end = self._last_error_text() or killed_for or _how(code)
        self.process = None
        return code

    async def _watch_to_end(self, process: ProcessIdentity) -> str:
        """Wait until the process has ended.  Return the reason if it was killed from here, else an empty text."""
        async with asyncio.TaskGroup() as group:
            lasting = group.create_task(self._clear_condition_later(), name=f"start of {self._name}")
            try:
                return await self._watch(process)
            finally:
                lasting.cancel()

    async def _clear_condition_later(self) -> None:
        await self._clock.sleep(_LASTING_S)
        self._policy.show_condition("")

    async def _watch(self, process: ProcessIdentity) -> str:
        if self._policy.wait_hung is None:
            await wait_end(process)
            return ""
        async with asyncio.TaskGroup() as group:
            ending = group.create_task(wait_end(process), name=f"end of {self._name}")
            watching = group.create_task(self._policy.wait_hung(), name=f"answers of {self._name}")
            await asyncio.wait({ending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not watching.done():
                watching.cancel()
                return ""
            log.error("process killed", name=self._name, pid=process.pid, reason=watching.result())
            _send(process, signal.SIGKILL)
        return watching.result()

    def _last_error_text(self) -> str:
        """Return the error that the process wrote into its file before it ended, or an empty text."""
        path = self._paths.last_words(self._name)
        try:
            text = path.read_text().strip()
        except OSError:
            return ""
        path.unlink(missing_ok=True)
        return text

    async def _start(self) -> tuple[ProcessIdentity | None, int | None]:
        """Start the process.

        Return its identity, or None and the exit code if it could not be started or has already ended.
        """
        try:
            pid = await self._zygote.fork(self._name, (str(self._paths.data), str(self._paths.run)))
        except ZygoteGone:
            raise
        except Unavailable as error:
            self._last_end = str(error)
            return None, None
        log.info("process started", name=self._name, pid=pid)
        process = identify(pid, self._policy.version)
        if process is not None:
            return process, None
        code = await self._zygote.reap(pid)
        self._last_end = self._last_error_text() or _how(code)
        return None, code


async def wait_end(process: ProcessIdentity) -> None:
    """Wait until ``process`` has ended.  It need not be a child of this process."""
    descriptor = open_pidfd(process)
    if descriptor is None:
        return
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _resolve, ended)
    try:
        await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _resolve(ended: "asyncio.Future[None]") -> None:
    if not ended.done():
        ended.set_result(None)


async def terminate(process: ProcessIdentity, grace_s: float) -> None:
    """Stop ``process``: SIGTERM, then SIGKILL after ``grace_s``.  Returns when it has ended."""
    _send(process, signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_s):
            await wait_end(process)
    except TimeoutError:
        log.warning("process killed", pid=process.pid, after_s=grace_s)
        _send(process, signal.SIGKILL)
        await wait_end(process)


def _send(process: ProcessIdentity, number: signal.Signals) -> None:
    descriptor = open_pidfd(process)
    if descriptor is None:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)


def _how(code: int | None) -> str:
    match code:
        case None:
            return "for an unknown reason"
        case _ if code < 0:
            return f"signal {-code}"
        case _:
            return f"exit code {code}"
