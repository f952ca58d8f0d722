"""This node's identity in its cluster, and whether and since when it has a session with a manager.

The agent records this state.  The worker reads it, because what a task may do without a manager depends on it.  Objects
that are created before the node joins later read its id and the session's connection here.  A planned stop of the node
process is announced here, and the session sends it to its manager.
"""

import asyncio

import structlog

from skep.agent.session.last_seen import LastSeen
from skep.aio.clock import Clock
from skep.aio.race import LostRace, is_set_within, run_unless
from skep.errors import Unavailable
from skep.model.node_reports.node_removal import NodeRemoval
from skep.model.values.ids import NodeId
from skep.wire.client import ManagerChannel

log = structlog.get_logger()

STOP_ANNOUNCEMENT_S_MAX = 1.0
"""Upper limit in seconds for how long an announcement may delay a planned stop."""


class SessionState:
    """State of this node's session with its managers.  Times are the clock's monotonic seconds."""

    def __init__(self, clock: Clock, last_seen: LastSeen | None = None) -> None:
        """``last_seen`` includes the responses that earlier processes recorded.  None keeps the time only in memory."""
        self._clock = clock
        self._last_seen = last_seen or LastSeen(clock.monotonic, clock.monotonic())
        self._responded_at = clock.monotonic()
        self._node_id = NodeId("")
        self._joined = asyncio.Event()
        self.removal: NodeRemoval | None = None
        """Set by the agent while the managers refuse this node because it was removed from the cluster."""
        self.data_path_port = 0
        """UDP port of the cluster's overlay networks, written by the agent, or 0 while unknown."""
        self.description_changed = asyncio.Event()
        """Set when managers should get the node's description at once.  Cleared by the session."""
        self._channel: ManagerChannel | None = None
        self._session = asyncio.Event()
        self._no_session = asyncio.Event()
        self._no_session.set()
        self._stopping = asyncio.Event()
        self._announced = asyncio.Event()

    # --- the cluster ------------------------------------------------------------------------------------------

    @property
    def node_id(self) -> NodeId:
        """The node's id in its current cluster, or empty if it is not known to be in one."""
        return self._node_id

    def join(self, node_id: NodeId) -> None:
        """Record that this node is ``node_id`` of a cluster.  Idempotent."""
        self._node_id = node_id
        self._joined.set()

    def leave(self) -> None:
        """Record that this node is no longer in a cluster."""
        self._node_id = NodeId("")
        self.removal = None
        self._joined.clear()

    async def wait_joined(self) -> None:
        """Wait until ``node_id`` is known."""
        await self._joined.wait()

    # --- the session ------------------------------------------------------------------------------------------

    @property
    def has_session(self) -> bool:
        """Whether a manager has accepted a session that has not ended."""
        return self._channel is not None

    @property
    def channel(self) -> ManagerChannel:
        """The connection of the session.  Raises: Unavailable."""
        if self._channel is None:
            raise Unavailable("no manager can be reached now")
        return self._channel

    def begin(self, channel: ManagerChannel) -> None:
        """Record that a manager has accepted a session."""
        self._channel = channel
        self.removal = None
        self._responded_at = self._clock.monotonic()
        self._last_seen.record(0.0)
        self._session.set()
        self._no_session.clear()

    def record_response(self, requested_at: float) -> None:
        """Record a manager's response to a request sent at ``requested_at``.

        The time of the request counts, because the manager knows that the node was alive then, and nothing about later.
        """
        self._responded_at = max(self._responded_at, requested_at)
        self._last_seen.record(self._clock.monotonic() - self._responded_at)

    def end(self) -> None:
        """Record that the session has ended."""
        self._channel = None
        self._session.clear()
        self._no_session.set()

    def silence_s(self) -> float:
        """Return the seconds since a manager responded, or since this process first tried to reach one."""
        return self._clock.monotonic() - self._responded_at

    def total_silence_s(self) -> float:
        """Return the seconds since a manager responded to this node, including earlier processes."""
        return self._last_seen.silence_s()

    async def wait_session(self) -> None:
        """Wait until there is a session."""
        await self._session.wait()

    async def wait_no_session(self) -> None:
        """Wait until the session has ended."""
        await self._no_session.wait()

    # --- a planned stop ---------------------------------------------------------------------------------------

    async def announce_stop(self) -> None:
        """Announce to the manager that this process restarts, so that it waits longer before it replaces tasks.

        Returns when the manager has confirmed it, at once without a session, or after a second.
        """
        if not self.has_session:
            return
        self._stopping.set()
        try:
            await run_unless(self._announced.wait(), self._clock.sleep(STOP_ANNOUNCEMENT_S_MAX))
        except LostRace:
            log.warning("planned stop not announced to a manager")

    @property
    def is_stopping(self) -> bool:
        """Whether this process is about to stop as planned."""
        return self._stopping.is_set()

    async def is_stopping_within(self, seconds: float) -> bool:
        """Wait until this process is about to stop as planned, at most ``seconds``.  Return whether it is."""
        return await is_set_within(self._stopping, seconds)

    def stop_announced(self) -> None:
        """Record that the manager has confirmed the planned stop."""
        self._announced.set()
