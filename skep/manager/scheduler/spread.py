"""Which of the nodes that can run a task is chosen.

Nodes are compared by, in this order: repeated recent failures of the service there, tasks of the service, the used
share of the tightest resource that the task reserves, all tasks (both relative to the part of the node that its
measured load leaves free, ``load.py``), and last their ids.  Tasks whose slots are being assigned anew do not count
as tasks of the service: an update must not avoid the nodes that it frees.  Placement preferences come before that:
they divide the nodes into a tree of branches (by a label's values), and each task goes to the branch with the fewest
tasks of the service; among branches with equally many to the one with the best node.

One ``Spread`` assigns tasks of one service with the same requirements.  Each choice must be reserved in the
accounting before the next.  For a service on few nodes it skips those in the order that all services share; one on
many nodes has an order of all nodes of its own.

Source: swarmkit, manager/scheduler/{scheduler,decision_tree,nodeset}.go.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType

from skep.aio.time_slices import STEP, SlicedWork
from skep.manager.scheduler.accounting import Account, Accounting
from skep.manager.scheduler.candidates import Candidates, Leaf, Pools
from skep.manager.scheduler.ranking import Entry, Rank, Ranking, Unfinished, rank_of
from skep.manager.scheduler.requirements import Requirements
from skep.model.ids import NodeId

MAX_FAILURES = 5
"""From this many recent failures on, a node is only chosen if no other passes."""

KEPT_SPREADS = 16
"""Large groups whose spread is kept between their batches."""


class Spread:
    """Chooses nodes for tasks with the same requirements, one after another."""

    def __init__(self, requirements: Requirements, accounting: Accounting, candidates: Candidates) -> None:
        """Of no node before ``catching_up``.  ``candidates``: for ``requirements``."""
        self.candidates = candidates
        self.failing: Mapping[NodeId, int] = {}
        """See ``failing_nodes``."""
        self.counts = bool(requirements.service_id)
        """Whether assigned tasks count for the next ones.  Not for tasks without a service, nor for first tasks that
        are assigned by their shape."""
        self.ranks_all = False
        """Whether all nodes are in its own order, as the service is on many."""
        self._requirements = requirements
        self._accounting = accounting
        self._leaving: Mapping[NodeId, int] = {}
        self._leaves: dict[Leaf, _Leaf] = {}
        self.place: dict[NodeId, Leaf] = {}
        """In which leaf's own order a node is."""
        self._outdated: dict[NodeId, None] = {}
        """Nodes of which ``assume`` said something new."""
        self._seen = -1
        self._root: _Leaf | _Fork | None = None

    def assume(self, failing: Mapping[NodeId, int], leaving: Mapping[NodeId, int]) -> None:
        """What is to hold from the next ``catching_up`` on.

        Args:
            failing: see ``failing_nodes``.
            leaving: tasks of the service, by node, that do not count there; their reservations do.
        """
        for before, after in ((self.failing, failing), (self._leaving, leaving)):
            self._outdated.update((id, None) for id, _ in sorted(set(before.items()) ^ set(after.items())))
        self.failing, self._leaving = failing, leaving

    def catching_up(self) -> SlicedWork[None]:
        """Update after tasks were assigned or ended, or nodes changed, since the last choice; before the first one.

        It pauses; what changes meanwhile is caught up with, too.
        """
        if len(self.candidates.levels) > 1:
            self._root = None
        while True:
            yield from self.candidates.catching_up()
            copies = self._accounting.copies(self._requirements.service_id)
            if not self.ranks_all and len(copies) > STEP:
                self.ranks_all, self._seen = True, -1
            changes = self._accounting.changes
            if self._seen == changes and not self._outdated:
                return
            self._root = None
            for number, id in enumerate(self._to_update(copies), 1):
                self._update_node(id)
                if number % STEP == 0:
                    yield
            self._seen = changes

    def choosing(self) -> SlicedWork[Account | None]:
        """The node for the next task; None if no further node passes.  It pauses where many nodes are full."""
        while True:
            try:
                if self._root is None:
                    self._root = self._tree()
                return self._root.take()
            except Unfinished:
                self._root = None
            self.close()
            yield
            yield from self.catching_up()

    def close(self) -> None:
        """End this batch: other spreads choose next."""
        for leaf in self._leaves.values():
            leaf.put_back()

    def copies(self, account: Account) -> int:
        """Tasks of the service that will stay on the node."""
        id = account.node.id
        return self._accounting.copies(self._requirements.service_id).get(id, 0) - self._leaving.get(id, 0)

    def rank(self, account: Account) -> Rank:
        """Rank of a node that has tasks of the service, or where they failed."""
        failing = self.failing.get(account.node.id, 0)
        return failing, self.copies(account), *self.candidates.rank(account)

    def has_room(self, account: Account) -> bool:
        """Whether ``max_replicas`` and the node's resources admit one more task."""
        return self.candidates.has_room(account, self._present(account))

    # -- inside ------------------------------------------------------------------------------------------------

    def _present(self, account: Account) -> int:
        """Wanted tasks of the service on the node."""
        return self._accounting.copies(self._requirements.service_id).get(account.node.id, 0)

    def _to_update(self, copies: Mapping[NodeId, int]) -> Collection[NodeId]:
        """The nodes to look at, after the candidates were updated."""
        outdated, self._outdated = self._outdated, {}
        if self._seen >= 0:
            mounts = self._requirements.cluster_volumes
            return dict.fromkeys((*self._accounting.changed_since(self._seen, mounts), *outdated))
        return dict.fromkeys(
            (*self.place, *(self.candidates.leaf_of if self.ranks_all else copies), *self.failing)
        )

    def _update_node(self, id: NodeId) -> None:
        """Take a node into its leaf's own order if the service is, or has failed, there, or is on many nodes."""
        leaf = self.candidates.leaf_of.get(id)
        account = self._accounting.accounts.get(id)
        is_own = (
            leaf is not None
            and account is not None
            and self.candidates.can_pass[id]
            and (self.ranks_all or id in self.failing or bool(self.copies(account)))
        )
        before = self.place.get(id)
        if before is not None and (not is_own or before != leaf):
            self._leaf(before).own.leave(id)
            del self.place[id]
        if is_own:
            assert leaf is not None
            assert account is not None
            self._leaf(leaf).enter(account)

    def _tree(self) -> "_Leaf | _Fork":
        """The branches with the present number of tasks in each.  Raises: Unfinished."""
        levels = len(self.candidates.levels)
        if not levels:
            return self._leaf(())
        tasks: Counter[Leaf] = Counter()
        for id, count in self._accounting.copies(self._requirements.service_id).items():
            leaf = self.candidates.leaf_of.get(id)
            for depth in range(levels if leaf is not None else 0):
                tasks[leaf[: depth + 1]] += count - self._leaving.get(id, 0)  # type: ignore[index]
        branches: dict[Leaf, _Leaf | _Fork] = {leaf: self._leaf(leaf) for leaf in self.candidates.leaves}
        for depth in reversed(range(levels)):
            forks: dict[Leaf, list[tuple[int, Leaf, _Leaf | _Fork]]] = {(): []} if depth == 0 else {}
            for path in sorted(branches):
                forks.setdefault(path[:depth], []).append((tasks[path], path, branches[path]))
            branches = {path: _Fork(children, counts=self.counts) for path, children in forks.items()}
        return branches[()]

    def _leaf(self, path: Leaf) -> "_Leaf":
        leaf = self._leaves.get(path)
        if leaf is None:
            leaf = self._leaves[path] = _Leaf(self, path)
        return leaf


class Choices:
    """Spreads that are used again: of large groups from batch to batch, and of the first tasks of all services."""

    def __init__(self, accounting: Accounting) -> None:
        self.accounting = accounting
        self._pools = Pools(accounting)
        self._kept: dict[Requirements, Spread] = {}

    def is_first(self, requirements: Requirements, now: float) -> bool:
        """Whether a single task may be assigned by the shape of its requirements, together with others.

        For a service without tasks and failures all nodes are alike.  ``now``: on the clock of ``record_failure``.
        """
        return (
            not self.accounting.copies(requirements.service_id)
            and not requirements.max_replicas  # two versions of one service share the limit
            and not failing_nodes(self.accounting, requirements, now)
        )

    def spreading(
        self,
        requirements: Requirements,
        now: float,
        *,
        is_last: bool,
        leaving: Mapping[NodeId, int] = MappingProxyType({}),
    ) -> SlicedWork[Spread]:
        """The spread for one batch, to be closed after it.  ``is_last``: no more tasks of the group wait."""
        candidates = self._pools.pool(requirements)
        spread = self._kept.pop(requirements, None)
        if spread is None or spread.candidates is not candidates:
            spread = Spread(requirements, self.accounting, candidates)
        spread.assume(failing_nodes(self.accounting, requirements, now), leaving)
        yield from spread.catching_up()
        if not is_last or spread.ranks_all:
            self._keep(requirements, spread)
        return spread

    def _keep(self, requirements: Requirements, spread: Spread) -> None:
        self._kept[requirements] = spread
        if len(self._kept) > KEPT_SPREADS:
            del self._kept[next(iter(self._kept))]  # least recently used


def failing_nodes(accounting: Accounting, requirements: Requirements, now: float) -> dict[NodeId, int]:
    """Nodes where such tasks failed too often recently, and how often (``now``: the clock of ``record_failure``).

    Tasks without a service are unrelated, so a failure of one says nothing about the next.
    """
    if not requirements.service_id:
        return {}
    failures = accounting.failures(requirements, now)
    return {id: count for id, count in failures.items() if count >= MAX_FAILURES} if failures else {}


class _Leaf:
    """The nodes of one branch: first those without a task of the service, then the others.

    ``best`` and ``take`` raise Unfinished, as ``Ranking.first`` does; the tree is made anew then.
    """

    def __init__(self, spread: Spread, path: Leaf) -> None:
        self.own = Ranking(spread.rank, spread.has_room)
        self._spread = spread
        self._path = path
        self._aside: list[Entry] = []

    def enter(self, account: Account) -> None:
        """Take a node into the service's own order."""
        self._spread.place[account.node.id] = self._path
        self.own.enter(account)

    def best(self) -> Rank | None:
        """The rank of the node that ``take`` would return."""
        fresh = self._fresh_first()
        if fresh is not None:
            return 0, 0, *rank_of(fresh)
        first = self.own.first()
        return rank_of(first) if first is not None else None

    def take(self) -> Account | None:
        """The best node, if there is one."""
        first = self._fresh_first() or self.own.first()
        return first[-1] if first is not None else None

    def put_back(self) -> None:
        """Return what this service skipped to the common ranking."""
        if self._aside:
            fresh = self._spread.candidates.leaves[self._path]
            for entry in self._aside:
                fresh.put_back(entry)
            self._aside.clear()

    def _fresh_first(self) -> Entry | None:
        fresh = self._spread.candidates.leaves.get(self._path)
        if fresh is None or self._spread.ranks_all:
            return None
        if not self._spread.counts:
            return fresh.first()
        if not self._aside and len(self.own) and fresh.is_within(self.own):
            return None
        while (first := fresh.first()) is not None:
            account = first[-1]
            id = account.node.id
            if id not in self._spread.failing and not self._spread.copies(account):
                if self._spread.has_room(account):
                    return first  # if a task is to leave, there is room for one more anyway
            elif id not in self.own and self._spread.has_room(account):
                self.enter(account)
            self._aside.append(fresh.set_aside())
        return None


class _Fork:
    """An inner node of the tree: nodes that are divided further."""

    def __init__(self, children: list[tuple[int, Leaf, "_Leaf | _Fork"]], *, counts: bool) -> None:
        """``counts``: see ``Spread``."""
        self._counts = counts
        self._heap: list[tuple[int, Rank, Leaf, _Leaf | _Fork]] = []
        self._last_taken: tuple[int, Leaf, _Leaf | _Fork] | None = None
        """The child that returned the last node.  It is ranked again before the next choice, when that node is
        reserved: a child that is divided further may have become better, as another of its branches has the fewest
        tasks now."""
        for tasks, path, child in children:
            self._enter(tasks, path, child)

    def _enter(self, tasks: int, path: Leaf, child: "_Leaf | _Fork") -> None:
        rank = child.best()
        if rank is not None:
            heapq.heappush(self._heap, (tasks, rank, path, child))

    def best(self) -> Rank | None:
        if self._last_taken is not None:
            taken, self._last_taken = self._last_taken, None
            self._enter(*taken)
        while self._heap:
            tasks, rank, path, child = self._heap[0]
            present = child.best()
            if present == rank:
                return rank
            if present is None:
                heapq.heappop(self._heap)
            else:
                heapq.heapreplace(self._heap, (tasks, present, path, child))
        return None

    def take(self) -> Account | None:
        if self.best() is None:
            return None
        tasks, _, path, child = heapq.heappop(self._heap)
        self._last_taken = tasks + self._counts, path, child
        return child.take()
