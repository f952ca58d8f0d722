"""Decides when namespaces are compared with their desired state.

The kernel reports changes of links, addresses, routes, neighbors and nftables.  After a report, its namespace is
compared, at most once a second.  Reports about nftables count only if another program made the change.  In addition, a
slow round compares one namespace after the other, to find changes that are not reported (sysctls) or whose report was
lost.
"""

import asyncio
import resource
import socket
from collections.abc import Callable
from functools import partial

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error, retry
from skep.aio.race import wait_first
from skep.dataplane.netns.kernel import netlink
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.kernel.nft_changes import TableWatch, open_notifications
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs

log = structlog.get_logger()

PAUSE_SECONDS = 1.0
"""Seconds between two comparisons of one namespace, so that many changes are repaired at once."""
GATHERING_SECONDS = 0.05
"""Seconds to wait after a report, because one change is reported in several messages."""
RETRY_SECONDS_MAX = 60.0
"""Longest pause in seconds between two attempts at a namespace that cannot be repaired."""
ROUND_PAUSE_SECONDS_MIN = 0.2
"""Shortest pause in seconds between two namespaces of the slow round, so that requests are served in between."""
ROUND_SECONDS_MIN = 5.0
"""Shortest duration of a slow round in seconds.

A node with few namespaces then uses less than ``SHARE``, and still repairs unreported changes within seconds.
"""
SHARE = 0.02
"""Share of one core (0 to 1) that the slow round may use."""

_GROUPS = (
    netlink.GROUP_LINK,
    netlink.GROUP_ADDRESS4,
    netlink.GROUP_ROUTE4,
    netlink.GROUP_ADDRESS6,
    netlink.GROUP_ROUTE6,
    netlink.GROUP_RULE4,
    netlink.GROUP_RULE6,
)
_NEIGHBOR_MESSAGES = (netlink.NEWNEIGH, netlink.DELNEIGH)
_BYTES_MAX = 1 << 16
"""Buffer size in bytes for one read of reports, which the kernel sends in pieces of at most 32 KiB."""


def processor_seconds() -> float:
    """Return the processor time of this process and of its finished child processes."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class _Failing:
    """Retry state of a namespace whose last comparison failed."""

    def __init__(self, backoff: Backoff) -> None:
        self.backoff = backoff
        self.again_at = 0.0
        self.reason = ""


class Healer:
    """Compares and repairs all namespaces of one process."""

    def __init__(
        self,
        namespaces: Namespaces,
        clock: Clock,
        repairs: Repairs,
        *,
        rng: Callable[[], float],
        processor_s: Callable[[], float] = processor_seconds,
    ) -> None:
        """Make a healer.

        Args:
            processor_s: Returns the processor time that this process has used.
        """
        self.repairs = repairs
        self._namespaces = namespaces
        self._clock = clock
        self._rng = rng
        self._processor_s = processor_s
        self.watched: dict[NetnsReconciler, list[socket.socket | TableWatch]] = {}
        self._watched: set[NetnsReconciler] = set()
        self._due: dict[NetnsReconciler, bool] = {}
        """The namespaces that are due for a comparison, and whether nftables must be listed for it."""
        self._failing: dict[NetnsReconciler, _Failing] = {}
        self._wake = asyncio.Event()

    async def watch(self, reconciler: NetnsReconciler) -> None:
        """Watch the namespace of ``reconciler`` for changes from now on.

        Raises: OSError: its changes cannot be watched.  Until another call succeeds, only the slow round compares it.
        """
        if reconciler in self._watched:
            return
        self._watched.add(reconciler)
        self.take_turns(reconciler)
        try:
            await self._open(reconciler)
        except BaseException:
            self._unwatch(reconciler)
            raise

    async def _open(self, reconciler: NetnsReconciler) -> None:
        groups = list(_GROUPS)
        if not reconciler.scope.is_container:  # a container may change its own neighbors
            groups.append(netlink.GROUP_NEIGHBOR)
        path = reconciler.path
        opened = await self._namespaces.run(path, netlink.open_listener, socket.NETLINK_ROUTE, groups)
        if self._keep(reconciler, opened):
            asyncio.get_running_loop().add_reader(opened, self._read_routes, reconciler, opened)
        if not reconciler.scope.is_container:
            await self.watch_tables(reconciler)

    async def watch_tables(self, reconciler: NetnsReconciler) -> None:
        """Also watch its nftables tables for changes by other writers.  Raises: OSError."""
        opened = await self._namespaces.run(reconciler.path, open_notifications)
        self._keep(reconciler, TableWatch(opened, reconciler.writer, partial(self._note_foreign, reconciler)))

    def _keep(self, reconciler: NetnsReconciler, opened: socket.socket | TableWatch) -> bool:
        if reconciler not in self.watched:  # forgotten meanwhile
            opened.close()
            return False
        self.watched[reconciler].append(opened)
        return True

    def take_turns(self, reconciler: NetnsReconciler) -> None:
        """Include ``reconciler`` in the slow round, whether its changes are reported or not."""
        self.watched[reconciler] = []

    def expect(self, reconciler: NetnsReconciler) -> None:
        """Compare ``reconciler`` soon, including its nftables."""
        self._mark_due(reconciler, is_thorough=True)

    def _mark_due(self, reconciler: NetnsReconciler, *, is_thorough: bool) -> None:
        self._due[reconciler] = self._due.get(reconciler, False) or is_thorough
        self._wake.set()

    def forget(self, reconciler: NetnsReconciler) -> None:
        """Stop comparing ``reconciler``."""
        self._unwatch(reconciler)
        self.watched.pop(reconciler, None)
        self._due.pop(reconciler, None)
        self._failing.pop(reconciler, None)

    def _unwatch(self, reconciler: NetnsReconciler) -> None:
        loop, opened = asyncio.get_running_loop(), self.watched.get(reconciler, [])
        while opened:
            one = opened.pop()
            if isinstance(one, socket.socket):
                loop.remove_reader(one)
            one.close()
        self._watched.discard(reconciler)

    def close(self) -> None:
        """Stop comparing all namespaces."""
        for reconciler in tuple(self.watched):
            self.forget(reconciler)

    async def run(self) -> None:
        """Compare and repair until cancelled."""
        keep = partial(retry, clock=self._clock, rng=self._rng)
        event = "healing of networks failed"
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(keep(self._heal_due, event), name="changed namespaces")
                group.create_task(keep(self.check_all, event), name="all namespaces")
        finally:
            self.close()

    # --- reports ----------------------------------------------------------------------------------------------

    def _read_routes(self, reconciler: NetnsReconciler, source: socket.socket) -> None:
        is_due = False
        while True:
            try:
                data = memoryview(source.recv(_BYTES_MAX))
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: a report was lost
                is_due = True
                break
            is_due = is_due or any(_concerns(reconciler, kind, body) for kind, body in netlink.messages(data))
        if is_due:
            self._mark_due(reconciler, is_thorough=False)

    def _note_foreign(self, reconciler: NetnsReconciler, tables: frozenset[str] | None) -> None:
        if tables is None:
            self._mark_due(reconciler, is_thorough=True)
        elif reconciler.note_foreign(tables):
            self._mark_due(reconciler, is_thorough=False)

    async def _heal_due(self) -> None:
        while True:
            await self._wait_due()
            await self._clock.sleep(GATHERING_SECONDS)
            self._wake.clear()
            for reconciler in [one for one in self._due if not self._waits(one)]:
                await self._heal(reconciler, is_thorough=self._due.pop(reconciler, False))
            await self._clock.sleep(PAUSE_SECONDS)

    async def _wait_due(self) -> None:
        """Wait until a namespace is due, or a failed one may be retried."""
        waiting = [
            self._failing[reconciler].again_at for reconciler in self._due if reconciler in self._failing
        ]
        if waiting:
            pause_s = max(0.0, min(waiting) - self._clock.monotonic())
            await wait_first(self._wake.wait(), self._clock.sleep(pause_s))
        else:
            await self._wake.wait()

    def _waits(self, reconciler: NetnsReconciler) -> bool:
        failing = self._failing.get(reconciler)
        return failing is not None and self._clock.monotonic() < failing.again_at

    async def check_all(self) -> None:
        while True:
            round_began = self._clock.monotonic()
            for reconciler in tuple(one for one in self.watched if not self._waits(one)):
                began, taken = self._clock.monotonic(), self._processor_s()
                await self._heal(reconciler, is_thorough=True)
                # Count processor time, not elapsed time: waiting for a processor or for a lock of the kernel costs
                # nothing, and on a busy machine it would delay the next round by minutes.  Other work of this process
                # counts too.
                spent = min(self._clock.monotonic() - began, self._processor_s() - taken)
                await self._clock.sleep(max(spent / SHARE - spent, ROUND_PAUSE_SECONDS_MIN))
            await self._clock.sleep(max(round_began + ROUND_SECONDS_MIN - self._clock.monotonic(), 0.0))

    async def _heal(self, reconciler: NetnsReconciler, *, is_thorough: bool) -> None:
        """Repair one namespace.  A failure is retried with growing pauses and does not delay other namespaces."""
        if reconciler not in self.watched:
            return
        try:
            await reconciler.heal(is_thorough=is_thorough)
        except Exception as error:
            if reconciler in self.watched:  # otherwise it was removed meanwhile
                self._note_failure(reconciler, error)
            return
        if self._failing.pop(reconciler, None) is not None:
            log.info("network repaired again", namespace=reconciler.name)
        if reconciler.needs_recheck and reconciler in self.watched:
            self._mark_due(reconciler, is_thorough=False)

    def _note_failure(self, reconciler: NetnsReconciler, error: Exception) -> None:
        failing = self._failing.get(reconciler)
        if failing is None:
            backoff = Backoff(PAUSE_SECONDS, RETRY_SECONDS_MAX, rng=self._rng)
            failing = self._failing[reconciler] = _Failing(backoff)
        delay_s = failing.backoff.next_delay_s()
        failing.again_at = self._clock.monotonic() + delay_s
        if failing.reason != describe_error(error):
            failing.reason = describe_error(error)
            log_error(
                error, "network not repaired yet", namespace=reconciler.name, again_in_s=round(delay_s, 1)
            )
        self._mark_due(reconciler, is_thorough=True)


def _concerns(reconciler: NetnsReconciler, kind: int, body: memoryview) -> bool:
    """Return whether a report may be about something that Skep has set.

    Neighbors of other devices change all the time.
    """
    if kind in _NEIGHBOR_MESSAGES and reconciler.indices is not None:
        return int.from_bytes(body[4:8], netlink.BYTE_ORDER) in reconciler.indices
    return True
