"""What one member of a simulated etcd is: its disk, its memory, whom it follows, who waits for it."""

import asyncio
from typing import TYPE_CHECKING

from skep.model.ids import NodeId
from skep.store.etcd import etcd_pb2 as pb

if TYPE_CHECKING:
    from sim.etcd.client import SimulatedWatchStream


class Entry:
    """A transaction on its way into the log."""

    def __init__(
        self,
        origin: "Member",
        request: pb.TxnRequest,
        answer: "asyncio.Future[pb.TxnResponse]",
        asked_at: float,
    ) -> None:
        self.asked_at = asked_at
        self.origin = origin
        self.request = request
        self.answer = answer
        self.holders: set[NodeId] = set()
        """Who has received it, committed or not."""


class Leadership:
    """One member's time in office."""

    def __init__(self, term: int, member: "Member") -> None:
        self.term = term
        self.member = member
        self.pending: list[Entry] = []
        self.is_over = False
        self.is_doubted = False
        """It has lost its quorum, and gives up if that stays so."""
        self.free_at = 0.0
        """When its disk has written what came before."""


class Member:
    """One member, as its own disk and memory have it."""

    def __init__(self, id: NodeId, number: int) -> None:
        self.id = id
        self.number = number
        self.is_running = False
        self.is_voter = True
        self.logged = 1
        """Revision up to which its disk has what is committed."""
        self.applied = 1
        """Revision that it shows: less than ``logged`` while it starts."""
        self.term = 0
        self.leadership: Leadership | None = None
        """Whom it follows (or it is its own), as far as it knows."""
        self.lag_s = 0.0
        """How much later than others it applies what is committed."""
        self.watch_lag_s = 0.0
        """How much later its watchers hear of what it has applied."""
        self.stall_s = 0.0
        """How long its disk takes for an entry beyond what is usual."""
        self.held: list[tuple[Leadership, Entry]] | None = None
        """Entries that its disk, which hangs, has not written; None: it does not hang."""
        self.deaf_until = 0.0
        """Until then its own status says what it said last."""
        self.rotten: dict[bytes, int] = {}
        """Keys whose value, as of this revision, has a flipped bit on this member's disk; every load meets it."""
        self.watchers: list[SimulatedWatchStream] = []
        self.waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.entries: list[Entry] = []
        """Entries for which somebody waits here."""
        self.is_standing = False
        """Whether its election timeout runs."""

    async def reached(self, revision: int) -> None:
        """Return once it has applied ``revision``."""
        if self.applied < revision:
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append((revision, arrived))
            await arrived


def resolve(future: asyncio.Future[None]) -> None:
    """Whoever waits for it goes on."""
    if not future.done():
        future.set_result(None)
