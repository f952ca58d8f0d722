"""Terms of leadership, as both stores implement them.

The leader is the manager that wrote the leader key last.  The revision of that write is the fence of its term, which
every write of its control loops compares.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from skep.errors import SkepError
from skep.model.values.ids import NodeId

log = structlog.get_logger()

SETTLE_S = 8.0
"""Seconds that a leader's cancelled update waits for the outcome of its write.  Two raft entries on slow disks take as
long.
"""


class LeaderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The value of the leader key.

    Attributes:
        term: Grows with each election.  With etcd it is raft's term.
        nonce: Identifies this write of the key.
    """

    node: NodeId
    addr: str = ""
    term: int = 0
    nonce: str = ""


def leader_named(record: bytes | None) -> NodeId | None:
    """Return the node id in the value of the leader key."""
    return msgspec.json.decode(record, type=LeaderRecord).node if record else None


class TermState:
    """The state of a term.  ``fence`` is the revision of the leader key that began it."""

    def __init__(self, number: int, fence: int, settle_s: float = SETTLE_S) -> None:
        self._settle_s = settle_s
        self.number = number
        self.fence = fence
        self._lost = asyncio.Event()

    @property
    def is_lost(self) -> bool:
        """Whether the term is over."""
        return self._lost.is_set()

    def lose(self) -> None:
        """End the term.  Idempotent."""
        self._lost.set()

    def abandon(self) -> None:
        """End the term because the outcome of one of its writes is unknown.  This manager may be elected again."""
        self.lose()

    async def wait_lost(self) -> None:
        """Wait until the term is over."""
        await self._lost.wait()

    async def settle(self, settled: Callable[[], Awaitable[None]]) -> None:
        """Wait until the outcome of a cancelled write of this term is known and visible in the replica.

        A loop that restarts from a snapshot has to see that write.  If ``settled`` does not return within ``SETTLE_S``,
        the term ends, because the next term begins with everything that was ever written.
        """
        if self.is_lost:
            return
        is_settled = False
        try:
            async with asyncio.timeout(self._settle_s):
                await settled()
            is_settled = True
        except (TimeoutError, SkepError) as error:
            log.warning("term ends: outcome of a write unknown", waited_s=self._settle_s, reason=str(error))
        finally:
            if not is_settled:
                self.abandon()
