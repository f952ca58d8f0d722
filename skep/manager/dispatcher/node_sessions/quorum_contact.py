"""Whether this manager may still speak for the cluster: it ends its sessions when it has lost contact with a quorum."""

import asyncio

import msgspec
import structlog

from skep.aio.clock import Clock, tick
from skep.errors import Unavailable
from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import HeartbeatDeadlines
from skep.model.node_reports.conditions import NO_QUORUM
from skep.store.interface import Store

log = structlog.get_logger(__name__)

CHECK_S = 0.5
"""Seconds between checks for a quorum."""
LOST_AFTER_S = 2.0
"""A manager that cannot reach a quorum for so many seconds ends its sessions, so that its nodes reconnect elsewhere."""


class Contact(msgspec.Struct, frozen=True):
    """The last contact with a quorum."""

    at: float
    """Monotonic seconds."""
    is_lost: bool = False
    """Whether the sessions were ended since."""

    def after_failure(self, now: float) -> "Contact":
        """Return the contact after a barrier that was refused or timed out.

        A refused barrier alone does not mean that contact is lost, because etcd refuses waiting reads at once during
        an election.
        """
        return Contact(self.at, is_lost=self.is_lost or not self.is_current(now))

    def is_current(self, now: float) -> bool:
        """Whether there was contact within the last ``LOST_AFTER_S``, and it has not been lost."""
        return not self.is_lost and now - self.at < LOST_AFTER_S


class QuorumContact:
    """Checks for contact with a quorum, and ends all sessions when it is lost."""

    def __init__(self, store: Store, deadlines: HeartbeatDeadlines, clock: Clock) -> None:
        self._store = store
        self._deadlines = deadlines
        self._clock = clock
        self._contact = Contact(clock.monotonic())

    @property
    def is_lost(self) -> bool:
        """Whether the sessions were ended because contact was lost."""
        return self._contact.is_lost

    def is_current(self) -> bool:
        """Whether this manager had contact with a quorum within the last ``LOST_AFTER_S``."""
        return self._contact.is_current(self._clock.monotonic())

    def without_quorum_s(self) -> float:
        """Return the seconds since the last contact with a quorum.  0 while there is contact."""
        return 0.0 if self.is_current() else max(self._clock.monotonic() - self._contact.at, 0.001)

    def require(self) -> None:
        """Raise Unavailable if contact with the quorum is lost."""
        if self._contact.is_lost:
            raise Unavailable(NO_QUORUM)

    async def run(self) -> None:
        """Check every ``CHECK_S`` until cancelled."""
        while True:
            await tick(self._clock, CHECK_S)
            before = self._contact
            try:
                async with asyncio.timeout(LOST_AFTER_S):
                    await self._store.barrier()
            except (TimeoutError, Unavailable):
                self._contact = before.after_failure(self._clock.monotonic())
                if self._contact.is_lost and not before.is_lost:
                    lost = self._deadlines.release_all(Unavailable(NO_QUORUM))
                    log.warning("no quorum: sessions ended", nodes=lost)
            else:
                if before.is_lost:
                    log.info("quorum is back: sessions are accepted")
                    self._deadlines.start_recovery()
                self._contact = Contact(self._clock.monotonic())
