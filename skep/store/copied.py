"""A copy of the cluster's state, on which transactions are carried out at once and nothing is written.

Decisions of control loops run on it, to predict their changes.  Like a term, it has a view and runs transactions,
but it has neither a leader nor waits, and encodes nothing.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Concatenate, ParamSpec, TypeVar

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.store.interface import Commit, Object, Transaction, View, Watch
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class CopiedStore:
    """A copied state.  ``committed`` are called with each commit, before the transaction's result is returned."""

    def __init__(self, view: View, clock: Clock) -> None:
        """Copy ``view``, the current state of a store.  It takes some milliseconds for 100,000 tasks."""
        assert isinstance(view, State), "only whole states can be copied"
        self._state = view.copied()
        self._clock = clock
        self.committed: list[Callable[[Commit], None]] = []

    def view(self) -> View:
        """Return the current state."""
        return self._state

    def apply(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run ``body(tx, ...)`` and apply its writes.  Raises the errors of ``body``."""
        tx = LocalTransaction(self._state, self._clock.now_ns())
        result = body(tx, *args, **kwargs)
        events = tx.adopt_into(self._state)
        if events:
            commit = Commit(self._state.revision, events)
            for listener in self.committed:
                listener(commit)
        return result

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """See ``interface.Updates.update``.  Never waits."""
        return self.apply(body, *args, **kwargs)

    async def update_each(
        self, body: Callable[[Transaction, T], R], items: Iterable[T], /
    ) -> list[R | SkepError]:
        """See ``interface.Updates.update_each``.  Never waits."""
        results: list[R | SkepError] = []
        for item in items:
            try:
                results.append(self.apply(body, item))
            except SkepError as error:
                results.append(error)
        return results

    def watch(self, *_: type[Object]) -> AbstractAsyncContextManager[Watch]:
        """Not available: ``committed`` has each commit at once."""
        raise NotImplementedError
