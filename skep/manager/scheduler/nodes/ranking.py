"""Keeps nodes in order of preference over many decisions, without sorting them again.

A node's rank gets worse (by an assigned task) far more often than better, so it is only recalculated when the node
comes first.  A caller that improves a rank (after a task ended or the node changed) must enter the node again.
"""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any, TypeAlias

from skep.manager.scheduler.nodes.accounting import Account
from skep.model.values.ids import NodeId

Rank: TypeAlias = tuple[Any, ...]
"""Rank of a node.  Smaller is better.

The last element is the node's id, so no two nodes are equal and the order of entering is irrelevant."""

Entry: TypeAlias = tuple[Any, ...]
"""``(*rank, serial, changes of the account, account)``.  The tuple is flat, because nested tuples compare at half the
speed.
"""


CHECKED_MAX = 100
"""Largest number of accounts that ``first`` drops or ranks again in one call, which takes a millisecond."""

STALE_MAX = 64
"""When there are this many more outdated entries than nodes, they are dropped."""


def rank_of(entry: Entry) -> Rank:
    """Return the rank of an entry's account."""
    return entry[:-3]


class Unfinished(Exception):
    """``first`` has checked so many accounts that other work should run.  Call it again afterwards."""


class Ranking:
    """Accounts by rank, best first."""

    def __init__(self, rank: Callable[[Account], Rank], fits: Callable[[Account], bool] | None) -> None:
        """Start without accounts.

        Args:
            rank: Returns an account's rank, which changes only when the account does (``Account.changes``).
            fits: Whether an account can run another task, or None if always.  An account that cannot is left out until
                it is entered again.
        """
        self._rank = rank
        self.fits = fits
        self.heap: list[Entry] = []
        self._serials: dict[NodeId, int] = {}
        """The latest entry of each node.  Older entries in the heap are ignored."""
        self._next_serial = count()
        self._changes = 0
        """Number of changes of the set of nodes."""
        self._within: tuple[Ranking, int, int, bool] | None = None
        """Last result of ``is_within``, and its inputs."""

    def __len__(self) -> int:
        return len(self._serials)

    def __contains__(self, id: NodeId) -> bool:
        return id in self._serials

    def is_within(self, other: "Ranking") -> bool:
        """Return whether all its nodes are also in ``other``."""
        if len(self) > len(other):
            return False
        known = self._within  # cached, because each choice needs it and it compares thousands of ids
        if known is not None and known[:3] == (other, self._changes, other._changes):
            return known[3]
        is_within = self._serials.keys() <= other._serials.keys()
        self._within = other, self._changes, other._changes, is_within
        return is_within

    def enter(self, account: Account) -> None:
        """Add ``account``, or update it after its rank may have improved."""
        self._changes += account.node.id not in self._serials
        serial = self._serials[account.node.id] = next(self._next_serial)
        heapq.heappush(self.heap, self._entry(account, serial))
        if len(self.heap) > STALE_MAX + 2 * len(self._serials):
            self._drop_stale()

    def leave(self, id: NodeId) -> None:
        """Remove the node."""
        self._changes += self._serials.pop(id, None) is not None

    def first(self) -> Entry | None:
        """Return the best account that fits, with its current rank, without removing it.

        Raises:
            Unfinished: Too many accounts were checked in this call.
        """
        heap, serials = self.heap, self._serials
        looked = 0
        while heap:
            if looked == CHECKED_MAX:
                raise Unfinished
            looked += 1
            entry = heap[0]
            serial, changes, account = entry[-3:]
            if serials.get(account.node.id) != serial:
                heapq.heappop(heap)
            elif account.changes != changes:
                heapq.heapreplace(heap, self._entry(account, serial))
            elif self.fits is None or self.fits(account):
                return entry
            else:
                heapq.heappop(heap)
                del serials[account.node.id]
                self._changes += 1
        return None

    def _entry(self, account: Account, serial: int) -> Entry:
        return *self._rank(account), serial, account.changes, account

    def _drop_stale(self) -> None:
        """Drop outdated entries.  Each change of a node adds an entry, which would stay forever if the node never comes
        first.
        """
        self.heap = [entry for entry in self.heap if self._serials.get(entry[-1].node.id) == entry[-3]]
        heapq.heapify(self.heap)

    def set_aside(self) -> Entry:
        """Remove the result of ``first`` from the order until ``put_back``."""
        return heapq.heappop(self.heap)

    def put_back(self, entry: Entry) -> None:
        """Undo ``set_aside``."""
        heapq.heappush(self.heap, entry)
