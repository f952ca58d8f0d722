"""Chooses among the nodes that can run a task.

Placement preferences come first.  They divide the nodes into a tree of branches by the values of labels.  Each task is
assigned to the branch with the fewest tasks of the service, and among equal branches to the branch with the best node.
Nodes are compared, in this order, by the service's repeated recent failures there, the number of its tasks, the used
share of the tightest resource that the task reserves, the number of all tasks, and finally their ids.  The used share
and the number of all tasks are relative to the part of the node that its measured load leaves free (``load.py``).
Tasks whose slots are being reassigned do not count as tasks of the service, because an update must not avoid the nodes
that it frees.

One ``Spread`` assigns tasks of one service with the same requirements.  Each choice must be reserved in the accounting
before the next one.  All services share one order of nodes.  A service on few nodes skips its own nodes in that order.
A service on many nodes has its own order of all nodes.

Source: swarmkit, manager/scheduler/{scheduler,decision_tree,nodeset}.go.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from skep.aio.time_slices import STEP, SlicedWork
from skep.manager.scheduler.nodes.accounting import Account, Accounting
from skep.manager.scheduler.nodes.affinity import Neighborhood
from skep.manager.scheduler.nodes.candidates import Candidates, Leaf, Pools
from skep.manager.scheduler.nodes.ranking import Entry, Rank, Ranking, Unfinished, rank_of
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.model.values.ids import NodeId

MAX_FAILURES = 5
"""Recent failures from which on a node is only chosen if no other passes, as in swarmkit (maxFailures)."""

KEPT_SPREADS = 16
"""Largest number of large groups whose spread is kept between their batches."""


class Spread:
    """Chooses nodes for tasks with the same requirements, one after another."""

    def __init__(self, requirements: Requirements, accounting: Accounting, candidates: Candidates) -> None:
        """Start without nodes.  ``catching_up`` adds them.  ``candidates`` are those for ``requirements``."""
        self.candidates = candidates
        self.failing: Mapping[NodeId, int] = {}
        """The result of ``failing_nodes``."""
        self.counts = bool(requirements.service_id)
        """Whether assigned tasks count for the next ones.

        False for tasks without a service, and for first tasks that are assigned by their shape.
        """
        self.ranks_all = False
        """Whether all nodes are in its own order, because the service runs on many."""
        self._requirements = requirements
        self._accounting = accounting
        self._leaving: Mapping[NodeId, int] = {}
        self._leaves: dict[Leaf, _Leaf] = {}
        self.place: dict[NodeId, Leaf] = {}
        """The leaf whose own order has the node."""
        self._outdated: dict[NodeId, None] = {}
        """Nodes for which ``assume`` changed something."""
        self._seen = -1
        self._root: _Leaf | _Fork | None = None
        self.near = (
            Neighborhood(
                requirements.rules,
                requirements.service_id,
                requirements.constraints,
                candidates.levels,
                accounting.domains,
            )
            if requirements.rules
            else None
        )
        """The service's affinities, or None without any."""

    def assume(self, failing: Mapping[NodeId, int], leaving: Mapping[NodeId, int]) -> None:
        """Set the assumptions that hold from the next ``catching_up`` on.

        Args:
            failing: The result of ``failing_nodes``.
            leaving: Number of the service's tasks per node that do not count there, although their reservations do.
        """
        for before, after in ((self.failing, failing), (self._leaving, leaving)):
            self._outdated.update((id, None) for id, _ in sorted(set(before.items()) ^ set(after.items())))
        self.failing, self._leaving = failing, leaving

    def catching_up(self) -> SlicedWork[None]:
        """Update after tasks were assigned or ended, or nodes changed.  Call it before the first choice.

        It pauses, and includes the changes during its pauses.
        """
        if len(self.candidates.levels) > 1:
            self._root = None
        while True:
            yield from self.candidates.catching_up()
            copies = self._accounting.copies(self._requirements.service_id)
            changes = self._accounting.changes
            if self.near is not None:
                changed = self.near.update(self._leaving, self._accounting.accounts)
                self._outdated.update(dict.fromkeys(sorted(changed)))
                self._root = None
            if not self.ranks_all and (
                len(copies) > STEP or (self.near is not None and self.near.excludes_many)
            ):
                self.ranks_all, self._seen = True, -1
            if self._seen == changes and not self._outdated:
                return
            self._root = None
            for number, id in enumerate(self._to_update(copies), 1):
                self._update_node(id)
                if number % STEP == 0:
                    yield
            self._seen = changes

    def choosing(self) -> SlicedWork[Account | None]:
        """Return the node for the next task, or None if no node passes.  Pauses if many nodes are full."""
        while True:
            try:
                is_new = self._root is None
                if self._root is None:
                    self._root = self._tree()
                account = self._root.take()
                if account is not None and self.near is not None and self.near.note(account.node.id):
                    self._leaf(self.candidates.leaf_of[account.node.id]).enter(account)
                if account is not None or is_new or self.near is None:
                    return account
                self._root = None  # a domain that was refused may be allowed by now
                continue
            except Unfinished:
                self._root = None
            self.close()
            yield
            yield from self.catching_up()

    def close(self) -> None:
        """End this batch, so that other spreads can choose next."""
        for leaf in self._leaves.values():
            leaf.put_back()

    def copies(self, account: Account) -> int:
        """Return the number of the service's tasks that will stay on the node."""
        id = account.node.id
        return self._accounting.copies(self._requirements.service_id).get(id, 0) - self._leaving.get(id, 0)

    def rank(self, account: Account) -> Rank:
        """Return the rank of a node that has tasks of the service, or where they failed."""
        failing = self.failing.get(account.node.id, 0)
        if self.near is not None:
            penalty = self.near.penalty(account.node.id)
            return failing, penalty, self.copies(account), *self.candidates.rank(account)
        return failing, self.copies(account), *self.candidates.rank(account)

    def has_capacity(self, account: Account) -> bool:
        """Return whether ``max_replicas``, affinities and the node's resources allow one more task."""
        if self.near is not None and not self.near.allows(account):
            return False
        return self.candidates.has_capacity(account, self._present(account))

    # -- inside ------------------------------------------------------------------------------------------------

    def _present(self, account: Account) -> int:
        """Return the number of the service's wanted tasks on the node."""
        return self._accounting.copies(self._requirements.service_id).get(account.node.id, 0)

    def _to_update(self, copies: Mapping[NodeId, int]) -> Collection[NodeId]:
        """Return the nodes to check after the candidates were updated."""
        outdated, self._outdated = self._outdated, {}
        if self._seen >= 0:
            mounts = self._requirements.cluster_volumes
            return dict.fromkeys((*self._accounting.changed_since(self._seen, mounts), *outdated))
        return dict.fromkeys(
            (
                *self.place,
                *(self.candidates.leaf_of if self.ranks_all else copies),
                *self.failing,
                *outdated,
            )
        )

    def _update_node(self, id: NodeId) -> None:
        """Put a node into its leaf's own order if the service runs or has failed there, or runs on many nodes."""
        leaf = self.candidates.leaf_of.get(id)
        account = self._accounting.accounts.get(id)
        is_own = (
            leaf is not None
            and account is not None
            and self.candidates.can_pass[id]
            and (
                self.ranks_all
                or id in self.failing
                or bool(self.copies(account))
                or (self.near is not None and self.near.is_own(id))
            )
            and (self.near is None or self.near.allows(account))
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
        """Return the branches with the current number of tasks in each.  Raises Unfinished."""
        levels = len(self.candidates.levels)
        if not levels:
            return self._leaf(())
        tasks: Counter[Leaf] = Counter()
        for id, count in self._accounting.copies(self._requirements.service_id).items():
            leaf = self.candidates.leaf_of.get(id)
            for depth in range(self.candidates.ranked if leaf is not None else 0):
                tasks[leaf[: depth + 1]] += count - self._leaving.get(id, 0)  # type: ignore[index]
        if self.near is None or not self.near.has_tiers:
            return self._branches(self.candidates.leaves, tasks)
        tiers: dict[int, list[Leaf]] = {}
        for leaf in self.candidates.leaves:
            tiers.setdefault(self.near.tier(leaf), []).append(leaf)
        children: list[tuple[int, Leaf, _Leaf | _Fork]] = [
            (tier, (), self._branches(leaves, tasks)) for tier, leaves in sorted(tiers.items())
        ]
        return _Fork(children, counts=False)

    def _branches(self, leaves: Iterable[Leaf], tasks: Mapping[Leaf, int]) -> "_Leaf | _Fork":
        """Return the tree of these leaves.  ``tasks`` has the number of tasks per branch."""
        branches: dict[Leaf, _Leaf | _Fork] = {leaf: self._leaf(leaf) for leaf in leaves}
        for depth in reversed(range(len(self.candidates.levels))):
            forks: dict[Leaf, list[tuple[int, Leaf, _Leaf | _Fork]]] = {(): []} if depth == 0 else {}
            for path in sorted(branches):
                forks.setdefault(path[:depth], []).append((tasks[path], path, branches[path]))
            counts = self.counts and depth < self.candidates.ranked
            branches = {path: _Fork(children, counts=counts) for path, children in forks.items()}
        return branches[()]

    def _leaf(self, path: Leaf) -> "_Leaf":
        leaf = self._leaves.get(path)
        if leaf is None:
            leaf = self._leaves[path] = _Leaf(self, path)
        return leaf


class CachedSpreads:
    """Keeps spreads for reuse, by the batches of large groups and by the first tasks of all services."""

    def __init__(self, accounting: Accounting) -> None:
        self.accounting = accounting
        self._pools = Pools(accounting)
        self._kept: dict[Requirements, Spread] = {}

    def is_first(self, requirements: Requirements, now: float) -> bool:
        """Return whether a single task may be assigned by the shape of its requirements, together with others.

        It may if the service has no tasks and failures, because all nodes are then alike.  ``now`` is on the clock of
        ``record_failure``.
        """
        return (
            not requirements.rules
            and not self.accounting.copies(requirements.service_id)
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
        """Return the spread for one batch, to be closed after it.  ``is_last`` marks the group's last tasks."""
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
    """Return the nodes where such tasks failed too often recently, and how often.

    ``now`` is on the clock of ``record_failure``.  Failures of tasks without a service do not count, because such tasks
    have nothing in common.
    """
    if not requirements.service_id:
        return {}
    failures = accounting.failures(requirements, now)
    return {id: count for id, count in failures.items() if count >= MAX_FAILURES} if failures else {}


class _Leaf:
    """Nodes of one branch: first the nodes without a task of the service, then the others.

    ``best`` and ``take`` raise Unfinished, as ``Ranking.first`` does.  The tree is then rebuilt.
    """

    def __init__(self, spread: Spread, path: Leaf) -> None:
        self.own = Ranking(spread.rank, spread.has_capacity)
        self._spread = spread
        self._path = path
        self._aside: list[Entry] = []

    def enter(self, account: Account) -> None:
        """Put a node into the service's own order."""
        self._spread.place[account.node.id] = self._path
        self.own.enter(account)

    def best(self) -> Rank | None:
        """Return the rank of the node that ``take`` would return."""
        near = self._spread.near
        if near is not None:
            found = self._near_first(near)
            return found[0] if found is not None else None
        fresh = self._fresh_first()
        if fresh is not None:
            return 0, 0, *rank_of(fresh)
        first = self.own.first()
        return rank_of(first) if first is not None else None

    def _near_first(self, near: Neighborhood) -> tuple[Rank, Account] | None:
        """Return the best node by the service's affinities, and its rank."""
        if not near.allows_leaf(self._path):
            return None
        fresh = self._fresh_first() if near.only is None else None
        first = self.own.first()
        ranks: list[tuple[Rank, Account]] = []
        if fresh is not None:
            ranks.append(((0, near.usual_penalty, 0, *rank_of(fresh)), fresh[-1]))
        if first is not None:
            ranks.append((rank_of(first), first[-1]))
        return min(ranks, key=lambda one: one[0], default=None)

    def take(self) -> Account | None:
        """Return the best node, or None."""
        if self._spread.near is not None:
            found = self._near_first(self._spread.near)
            return found[1] if found is not None else None
        first = self._fresh_first() or self.own.first()
        return first[-1] if first is not None else None

    def put_back(self) -> None:
        """Return the nodes that this service skipped to the common ranking."""
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
            near = self._spread.near
            is_special = near is not None and near.is_own(id)
            if id not in self._spread.failing and not self._spread.copies(account) and not is_special:
                if self._spread.has_capacity(account):
                    return first  # a task that is leaving does not count, so one more fits anyway
            elif id not in self.own and self._spread.has_capacity(account):
                self.enter(account)
            self._aside.append(fresh.set_aside())
        return None


class _Fork:
    """Inner node of the tree: nodes that are divided further."""

    def __init__(self, children: list[tuple[int, Leaf, "_Leaf | _Fork"]], *, counts: bool) -> None:
        """``counts`` has the meaning of ``Spread.counts``."""
        self._counts = counts
        self._heap: list[tuple[int, Rank, Leaf, _Leaf | _Fork]] = []
        self._last_taken: tuple[int, Leaf, _Leaf | _Fork] | None = None
        """The child that returned the last node.

        It is ranked again before the next choice, after that node is reserved.  A child that is divided further may
        have become better, because another of its branches now has the fewest tasks.
        """
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
