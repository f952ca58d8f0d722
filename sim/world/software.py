"""Faults in software: decisions that raise, and managers with stale state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import msgspec

from skep.errors import SkepError
from skep.model.swarm import Swarm
from skep.store.interface import LoopStore, Object, Store, Transaction, View, Watch
from skep.store.state import State

T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R")
Item = TypeVar("Item")
P = ParamSpec("P")


def is_before_rotation(past: View, present: View) -> bool:
    """Return whether nodes trusted another root in ``past``.

    No manager is that far behind, because a rotation of the root ends once all nodes have reported.
    """
    return _root_of(past) != _root_of(present)


def _root_of(view: View) -> str:
    return next((one.tls_info.trust_root for one in view.find(Swarm)), "")


class InjectedError(Exception):
    """An unexpected error in a decision."""


class FailingTerm:
    """A term whose view raises an error whenever the tasks of certain services are looked up."""

    def __init__(
        self, term: LoopStore, poisoned: set[str], visit: Callable[[int], None] = lambda _: None
    ) -> None:
        """Wrap a term.

        Args:
            poisoned: ids of services.  The set may change at any time.
            visit: called with the number of objects of each lookup.
        """
        self._term = term
        self._poisoned = poisoned
        self._visit = visit

    def view(self) -> View:
        return _FailingView(self._term.view(), self._poisoned, self._visit)

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        return self._term.watch(*kinds)

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return await self._term.update(body, *args, **kwargs)

    async def update_each(
        self, body: Callable[[Transaction, Item], R], items: Iterable[Item], /
    ) -> Sequence[R | SkepError]:
        return await self._term.update_each(body, items)


class _FailingView:
    """Implements ``store.interface.View``."""

    def __init__(self, view: View, poisoned: set[str], visit: Callable[[int], None]) -> None:
        self._view = view
        self._poisoned = poisoned
        self._visit = visit

    @property
    def revision(self) -> int:
        return self._view.revision

    @property
    def level(self) -> int:
        return self._view.level

    def get(self, kind: type[T], id: str) -> T:
        self._visit(1)
        return self._view.get(kind, id)

    def lookup(self, kind: type[T], id: str) -> T | None:
        self._visit(1)
        return self._view.lookup(kind, id)

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        if self._poisoned.intersection(by.values()):
            raise InjectedError(f"{kind.__name__} by {by}")
        found = self._view.find(kind, **by)
        self._visit(len(found))
        return found

    def ids(self, kind: type[Object]) -> Sequence[str]:
        return self._view.ids(kind)

    def unreadable(self, kind: type[Object]) -> Mapping[str, str]:
        return self._view.unreadable(kind)

    def why_unreadable(self, kind: type[Object], name: str) -> str:
        return self._view.why_unreadable(kind, name)

    def damaged(self, kind: type[Object]) -> Mapping[str, Mapping[str, str]]:
        return self._view.damaged(kind)

    def copied(self) -> State:
        """Copy the state.  The check of invariants does not decide about services, so no error is injected there."""
        return cast("State", self._view).copied()

    def resolve(self, kind: type[T], word: str, among: Callable[[T], bool] | None = None) -> T:
        return self._view.resolve(kind, word, among)


class StaleStore:
    """A store whose view can be set to an old state, as if the manager was restored from an old copy."""

    def __init__(self, store: Store) -> None:
        self.past: View | None = None
        self._store = store

    def view(self) -> View:
        return self.past if self.past is not None else self._store.view()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
