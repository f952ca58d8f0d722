"""The state of one member of a simulated etcd: disk, memory, leader, waiting requests."""

import asyncio
from typing import Protocol

from skep.model.values.ids import NodeId
from skep.store.etcd import etcd_pb2 as pb

WATCH_LAG_S_MAX = 3.0
"""Longest ``watch_lag_s`` that the faults of a whole life draw."""


class Watcher(Protocol):
    """A watch at a member."""

    def show(self, revision: int, lag_s: float) -> None:
        """Record that the member has applied ``revision``.  The watch sends it ``lag_s`` later, in order."""

    def lose(self, reason: str) -> None:
        """Break the stream."""


class Entry:
    """A proposed transaction."""

    def __init__(
        self,
        origin: "Member",
        request: pb.TxnRequest,
        response_future: "asyncio.Future[pb.TxnResponse]",
        requested_at: float,
    ) -> None:
        self.requested_at = requested_at
        self.origin = origin
        self.request = request
        self.response_future = response_future
        self.holders: set[NodeId] = set()
        """Members that have received it, committed or not."""


class Leadership:
    """One member's term as leader."""

    def __init__(self, term: int, member: "Member") -> None:
        self.term = term
        self.member = member
        self.pending: list[Entry] = []
        self.is_over = False
        self.is_checking_quorum = False
        """Whether it has lost its quorum.  It resigns if that lasts for an election timeout."""
        self.free_at = 0.0
        """Time at which its disk has written the earlier entries."""


class Member:
    """One member, with the contents of its disk and memory."""

    def __init__(self, id: NodeId, number: int) -> None:
        self.id = id
        self.number = number
        self.is_running = False
        self.is_voter = True
        self.logged = 1
        """Revision up to which its disk holds the committed entries."""
        self.applied = 1
        """Revision up to which it has applied entries.  It is less than ``logged`` while the member starts."""
        self.term = 0
        self.leadership: Leadership | None = None
        """The leadership it follows or holds, as far as it has been informed."""
        self.lag_s = 0.0
        """Additional delay until it applies a committed entry."""
        self.watch_lag_s = 0.0
        """Additional delay until its watches send an applied entry."""
        self.stall_s = 0.0
        """Additional time that its disk takes for an entry."""
        self.held: list[tuple[Leadership, Entry]] | None = None
        """Entries that wait for its hanging disk, or None if the disk does not hang."""
        self.stale_until = 0.0
        """Time until which its status shows the previous leader."""
        self.corrupted: dict[bytes, int] = {}
        """Keys whose value of this revision has a flipped bit on this member's disk.  Every load reads that value."""
        self.watchers: list[Watcher] = []
        self.waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.entries: list[Entry] = []
        """Entries whose proposer waits for a response from this member."""
        self.is_campaigning = False
        """Whether its election timeout runs."""

    async def wait_applied(self, revision: int) -> None:
        """Return once the member has applied ``revision``."""
        if self.applied < revision:
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append((revision, arrived))
            await arrived


def resolve(future: asyncio.Future[None]) -> None:
    """Wake the task that waits for ``future``."""
    if not future.done():
        future.set_result(None)
