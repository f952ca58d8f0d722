"""Encodes table changes, once for all streams that need the same change."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.manager.discovery.versioned_table import VersionedTable
from skep.wire import skep_pb2 as skep
from skep.wire.convert.tables import pieces_of

CACHED_MAX = 4
"""Cached changes per network: the whole table, and the changes since the last few revisions sent to streams."""


class Encoder:
    """Caches encoded changes until the table changes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._encoded: WeakKeyDictionary[VersionedTable, _Encoded] = WeakKeyDictionary()

    async def pieces(
        self, table: VersionedTable, sent: int | None, revision: int
    ) -> Sequence[skep.NetworkChange]:
        """Return the change from revision ``sent`` of the table to the current one, perhaps later than ``revision``."""
        kept = self._encoded.get(table)
        if kept is None or kept.changed_at != table.changed_at:
            kept = self._encoded[table] = _Encoded(table.changed_at)
        async with kept.one_at_a_time:
            if sent not in kept.pieces:
                slices = TimeSlices(self._clock)
                pieces = []
                for piece in pieces_of(table.since(sent, revision)):
                    pieces.append(piece)
                    await slices.yield_if_due()
                kept.pieces[sent] = pieces
                if len(kept.pieces) > CACHED_MAX:
                    kept.pieces.popitem(last=False)
            return kept.pieces[sent]


class _Encoded:
    """The encoded changes of one table, as of its last change."""

    def __init__(self, changed_at: int) -> None:
        self.changed_at = changed_at
        self.pieces: OrderedDict[int | None, Sequence[skep.NetworkChange]] = OrderedDict()
        """Encoded changes by the revision sent before."""
        self.one_at_a_time = asyncio.Lock()
        """A thousand streams may need the same change at once.  The first one encodes it."""
