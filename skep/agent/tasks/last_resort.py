"""Stops tasks that must not run without a manager (``skep.on-disconnect=stop``) if the node process cannot.

A node process that is dead, or ends repeatedly, has no session, so the managers replace these tasks after their delay.
The net process, which does not end with the node process, runs this check.  It reads three kinds of files: the time
when a manager last responded to this node, the tasks with their services' labels, and the containers' records.  A
running node process stops the tasks itself, a moment earlier.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import structlog

from skep.agent.session.last_seen import seen_at
from skep.agent.tasks.task_files import read_tasks
from skep.aio.clock import SystemClock
from skep.aio.failures import log_error, retry
from skep.engine.containers import records
from skep.engine.containers.container import Container, ProcessName
from skep.engine.containers.signals import signal_number
from skep.engine.runtime.processes import send_signal
from skep.errors import InvalidArgument, Unavailable
from skep.linux.processes import boot_id
from skep.model.options.labels import LABEL_TASK_ID, OnDisconnect, disconnect_policy
from skep.model.values.ids import TaskId
from skep.paths import Paths

log = structlog.get_logger()

CHECK_S = 1.0
"""Seconds between two checks during a silence.  Otherwise, the next check is when one may last ``AWAKE_S``."""
AWAKE_S = 3.0
"""Shortest silence of the managers, in seconds, before any task is stopped."""
RESCAN_S = 5.0
"""Seconds between two scans of the containers during a silence."""
LATER_S = 2.0
"""Extra seconds that a running node process gets to stop a container itself before it is killed here."""


class PendingStop(msgspec.Struct, frozen=True):
    """A container to stop when no manager has responded to the node for ``delay_s``."""

    id: str
    process: ProcessName
    delay_s: float
    grace_s: float
    stop_signal: int


def due_signal(one: PendingStop, silence_s: float, *, has_node_process: bool, was_signalled: bool) -> int:
    """Return the signal to send to the container now, or 0."""
    if silence_s >= one.delay_s + one.grace_s + LATER_S:
        return signal.SIGKILL
    if silence_s >= one.delay_s and not has_node_process and not was_signalled:
        return one.stop_signal
    return 0


class LastResort:
    """Checks the containers of one node.

    ``send`` sends a signal to exactly the given process, and returns False if it has ended.
    """

    def __init__(
        self, paths: Paths, clock: SystemClock, *, send: Callable[[ProcessName, int], bool] = send_signal
    ) -> None:
        self._paths = paths
        self._clock = clock
        self._send = send
        self._boot_id = boot_id()
        self._pending: tuple[PendingStop, ...] = ()
        self._scan_at = 0.0
        self._signalled: set[ProcessName] = set()

    async def run(self) -> None:
        """Check until cancelled."""

        async def check() -> None:
            while True:
                silence_s = await asyncio.to_thread(self.check)
                await self._clock.sleep(max(CHECK_S, AWAKE_S - silence_s))

        await retry(check, "tasks not checked for stopping without a manager", clock=self._clock)

    def check(self) -> float:
        """Signal the containers whose delay has passed.  Return the seconds of silence of the managers.  Blocks."""
        at = seen_at(self._paths.last_seen, self._boot_id)
        silence_s = self._clock.since_boot() - at if at is not None else 0.0
        if silence_s < AWAKE_S:
            self._pending, self._scan_at = (), 0.0
            self._signalled.clear()
            return silence_s
        if self._clock.monotonic() >= self._scan_at:
            self._pending = tuple(_pending_stops(self._paths))
            self._scan_at = self._clock.monotonic() + RESCAN_S
        has_node_process = bool(self._pending) and is_locked(self._paths.data_lock)
        for one in self._pending:
            self._signal(one, silence_s, has_node_process=has_node_process)
        return silence_s

    def _signal(self, one: PendingStop, silence_s: float, *, has_node_process: bool) -> None:
        number = due_signal(
            one, silence_s, has_node_process=has_node_process, was_signalled=one.process in self._signalled
        )
        if number and self._send(one.process, number):
            self._signalled.add(one.process)
            log.warning("container stopped without a node process", container=one.id, signal=number)


def _pending_stops(paths: Paths) -> Iterator[PendingStop]:
    delays = {
        one.assigned.task.id: policy.delay_s
        for one in read_tasks(paths.tasks)
        if (policy := disconnect_policy(one.assigned.service_labels)).action is OnDisconnect.STOP
    }
    if not delays or not paths.containers.is_dir():
        return
    for directory in sorted(paths.containers.iterdir()):
        try:
            container = records.read(directory / records.NAME)
        except Unavailable as error:  # the next scan tries again
            log_error(error, "container not checked", directory=str(directory))
            continue
        if container is None or container.process is None or not container.is_running:
            continue
        delay_s = delays.get(TaskId(container.labels.get(LABEL_TASK_ID, "")))
        if delay_s is not None:
            yield _pending_stop(container, container.process, delay_s)


def _pending_stop(container: Container, process: ProcessName, delay_s: float) -> PendingStop:
    try:
        stop_signal = signal_number(container.config.stop_signal or "SIGTERM")
    except InvalidArgument:
        stop_signal = signal.SIGTERM
    return PendingStop(container.id, process, delay_s, container.config.stop_grace_ns / 1e9, stop_signal)


def is_locked(path: Path) -> bool:
    """Return whether a process holds a flock on ``path``, without disturbing a process that is about to take it."""
    try:
        inode = path.stat().st_ino
    except FileNotFoundError:
        return False
    locks = Path("/proc/locks").read_text().splitlines()
    return any(f":{inode} " in line and "FLOCK" in line and "->" not in line for line in locks)
