"""Counts the objects that a control loop reads from the store.  The number is the same on any machine, however
busy.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import msgspec

from skep.store.interface import LoopStore, Object, View, Watch

T = TypeVar("T", bound=msgspec.Struct)


class CountingStore:
    """A loop's store that counts the objects in the results of ``lookup`` and ``find``."""

    def __init__(self, store: LoopStore) -> None:
        self._store = store
        self.visited = 0

    def view(self) -> "_CountingView":
        return _CountingView(self, self._store.view())

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        return self._store.watch(*kinds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _CountingView:
    def __init__(self, counts: CountingStore, view: View) -> None:
        self._counts = counts
        self._view = view

    def lookup(self, kind: type[T], id: str) -> T | None:
        self._counts.visited += 1
        return self._view.lookup(kind, id)

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        found = self._view.find(kind, **by)
        self._counts.visited += len(found)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)
