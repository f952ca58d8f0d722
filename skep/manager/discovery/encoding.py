"""Changes as messages' parts, made once for all streams that know the same."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from skep.aio.clock import Clock
from skep.aio.slices import Slices
from skep.manager.discovery.book import Book
from skep.wire import skep_pb2 as skep
from skep.wire.convert.tables import pieces_of

KEPT_MAX = 4
"""Of one network: the whole table, and differences to the last few revisions that streams had been told."""


class Encoder:
    """Keeps what was encoded for as long as the table stays as it is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: WeakKeyDictionary[Book, _Kept] = WeakKeyDictionary()

    async def pieces(self, book: Book, told: int | None, revision: int) -> Sequence[skep.NetworkChange]:
        """What leads from the table as of ``told`` to the present one, which may be later than ``revision``."""
        kept = self._kept.get(book)
        if kept is None or kept.changed_at != book.changed_at:
            kept = self._kept[book] = _Kept(book.changed_at)
        async with kept.one_at_a_time:
            if told not in kept.pieces:
                slices = Slices(self._clock)
                pieces = []
                for piece in pieces_of(book.since(told, revision)):
                    pieces.append(piece)
                    await slices.give_way()
                kept.pieces[told] = pieces
                if len(kept.pieces) > KEPT_MAX:
                    kept.pieces.popitem(last=False)
            return kept.pieces[told]


class _Kept:
    def __init__(self, changed_at: int) -> None:
        self.changed_at = changed_at
        self.pieces: OrderedDict[int | None, Sequence[skep.NetworkChange]] = OrderedDict()
        """By what was told before."""
        self.one_at_a_time = asyncio.Lock()
        """A thousand streams may want the same at once: the first one makes it."""
