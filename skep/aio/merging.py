"""A bounded queue that merges several sources, each in its own order, into one sequence in key order.

The queue returns an item once no awaited source can still produce an earlier one.  A source is awaited from ``open``
until ``end``.  A reader that does not want to wait for a silent source any longer skips it with ``pass_over``, until it
produces an item again.  The order within a source never changes: an item with a smaller key than its predecessor stays
behind that.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

T = TypeVar("T")


class MergeQueue(Generic[T]):
    """Items of several sources in the order of ``key_of``."""

    def __init__(self, key_of: Callable[[T], int], items_max: int) -> None:
        """``items_max`` limits the number of queued items.  A source for which the others wait can add items even
        beyond it.
        """
        self._key_of = key_of
        self._items_max = items_max
        self._sources: dict[Hashable, _Source[T]] = {}
        self._missing: set[Hashable] = set()
        """Awaited sources without items.  The queue returns nothing while there is one."""
        self._open: set[Hashable] = set()
        self._merged: list[T] = []
        self._held = 0
        """Number of items that are not merged yet."""
        self._updated = asyncio.Event()
        self._room = asyncio.Event()
        self.is_closed = False

    @property
    def is_waiting(self) -> bool:
        """Whether sources are awaited."""
        return bool(self._open)

    @property
    def is_holding(self) -> bool:
        """Whether the queue has items that wait for sources without items."""
        return bool(self._held and self._missing)

    def has_items(self, source: Hashable) -> bool:
        """Return whether items of ``source`` wait until ``take`` can return them."""
        return source in self._sources

    def open(self, source: Hashable) -> None:
        """Await the items of ``source``."""
        self._open.add(source)
        if source not in self._sources:
            self._missing.add(source)

    def end(self, source: Hashable) -> None:
        """Stop awaiting items of ``source``, which may still add some."""
        self._open.discard(source)
        self._missing.discard(source)
        self.wake()

    def pass_over(self) -> frozenset[Hashable]:
        """Skip the sources that have no items, until they have some, and return them."""
        missing = frozenset(self._missing)
        self._missing.clear()
        self.wake()
        return missing

    def wake(self) -> None:
        """End ``wait_update``."""
        self._updated.set()
        self._room.set()

    def close(self) -> None:
        """Discard all items, because the reader has ended."""
        self.is_closed = True
        self._sources.clear()
        self._merged.clear()
        self._held = 0
        self.wake()

    async def put(self, source: Hashable, items: Sequence[T]) -> bool:
        """Wait for space and add ``items``.  Return False if the reader has ended."""
        if not await self.wait_room(source):
            return False
        self.add(source, items)
        return True

    async def wait_room(self, source: Hashable) -> bool:
        """Wait until ``source`` may add items.  Return False if the reader has ended."""
        while not self.is_closed and not self._has_room(source):
            self._room.clear()
            await self._room.wait()
        return not self.is_closed

    def add(self, source: Hashable, items: Sequence[T]) -> None:
        """Add ``items``, even beyond the limit."""
        if items:
            held = self._sources.get(source)
            if held is None:
                held = self._sources[source] = _Source()
            held.add(items, self._key_of)
            self._held += len(items)
            self._missing.discard(source)
        self._updated.set()

    async def wait_update(self) -> None:
        """Wait until an item can be taken, or a source has ended."""
        await self._updated.wait()
        self._updated.clear()

    def take(self, most: int) -> list[T]:
        """Return the next items, at most ``most``."""
        if not self._merged and not self._missing:
            self._merge()
        items = self._merged[:most]
        del self._merged[:most]
        if items:
            self._room.set()
        return items

    def _has_room(self, source: Hashable) -> bool:
        return self._held + len(self._merged) < self._items_max or source in self._missing

    def _merge(self) -> None:
        """Move the items that no awaited source can still precede."""
        last = min((self._sources[one].keys[-1] for one in self._open if one in self._sources), default=None)
        keys, items, parts = list[int](), list[T](), 0
        for source in tuple(self._sources):
            held = self._sources[source]
            count = len(held.keys) if last is None else bisect_right(held.keys, last)
            keys += held.keys[:count]
            items += held.items[:count]
            parts += bool(count)
            if count < len(held.keys):
                held.drop(count)
                continue
            del self._sources[source]
            if source in self._open:
                self._missing.add(source)
        self._held -= len(items)
        if parts > 1:  # each part is sorted, which the sort exploits; it is stable for equal keys
            items = [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]
        self._merged += items


class _Source(Generic[T]):
    """The queued items of one source.  ``keys`` never decrease."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.items: list[T] = []

    def add(self, items: Sequence[T], key_of: Callable[[T], int]) -> None:
        keys = [*self.keys[-1:], *map(key_of, items)]
        if keys != sorted(keys):
            keys = list(accumulate(keys, max))
        self.keys += keys[-len(items) :]
        self.items += items

    def drop(self, count: int) -> None:
        del self.keys[:count], self.items[:count]
