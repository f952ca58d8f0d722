"""The nodes that can take tasks of one kind, found once for all services that ask for the same.

What depends on the node alone (is it ready, does it meet the constraints, which branch of the preferences is it in) is
looked at when the node changes, not for each task.  So a task of a service of its own costs a step down a heap, not
a walk over the cluster.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from skep.manager.scheduler.accounting import Account, Accounting
from skep.manager.scheduler.filters import filters_for
from skep.manager.scheduler.load import crowding, filled
from skep.manager.scheduler.ranking import Rank, Ranking
from skep.manager.scheduler.requirements import Requirements
from skep.model.constraints import ENGINE_LABEL, NODE_LABEL, label_of
from skep.model.ids import NodeId, ServiceId

KEPT = 32
"""Wishes whose candidates are remembered; with 5,000 nodes each takes 1 MB and 10 ms to find again."""

Leaf = tuple[str, ...]
"""A node's values of the labels that are spread over, one per level."""


class Candidates:
    """Nodes that meet the lasting part of a wish, by branch of its preferences and in order of preference."""

    def __init__(self, wish: Requirements, accounting: Accounting) -> None:
        """``wish``: of any service; neither the service nor its tasks are looked at."""
        self.levels: Sequence[str] = [over for over in wish.spread_over if _is_label(over)]
        self.leaves: dict[Leaf, Ranking] = {}
        self.leaf_of: dict[NodeId, Leaf] = {}
        """Of every node of the cluster, whether it will do or not."""
        self.can_pass: dict[NodeId, bool] = {}
        self.revision = 0
        """Grows when a node appears, leaves, or changes its branch or what it can take."""
        self._wish = wish
        self._accounting = accounting
        filters = filters_for(wish)
        self._lasting = [filter for filter in filters if filter.is_lasting]
        self._passing = [filter for filter in filters if not filter.is_lasting]
        self._reserves = bool(wish.nano_cpus or wish.memory_bytes)
        self._seen = -1
        self.catch_up()

    def catch_up(self) -> None:
        """Look again at the nodes that changed, or of which something became free, since the last time."""
        if self._seen == self._accounting.changes:
            return
        for id in self._accounting.changed_since(self._seen):
            self._look_at(id)
        self._seen = self._accounting.changes

    def rank(self, account: Account) -> Rank:
        """For all services alike: what is in use of the tightest resource afterwards, then the number of tasks."""
        load, tasks = account.load, account.active + 1
        crowd = crowding(tasks, load) if load else tasks  # asked some million times for 100,000 tasks
        if not self._reserves:
            return crowd, account.node.id
        return filled(fill(self._wish, account), load), crowd, account.node.id

    def has_room(self, account: Account, copies: int) -> bool:
        """Whether it can take one more task now; ``copies``: of the task's service, there already."""
        for one in self._passing:  # noqa: SIM110  it is asked for each choice, and `all` makes a generator
            if not one.passes(self._wish, account, copies):
                return False
        return True

    def _look_at(self, id: NodeId) -> None:
        account = self._accounting.accounts.get(id)
        before = self.leaf_of.get(id)
        if account is None:
            if before is not None:
                self.leaves[before].leave(id)
                del self.leaf_of[id], self.can_pass[id]
                self.revision += 1
            return
        leaf = tuple(label_of(account.node, level) or "" for level in self.levels)
        passes = all(one.passes(self._wish, account, 0) for one in self._lasting)
        if before is not None and before != leaf:
            self.leaves[before].leave(id)
        if before != leaf or self.can_pass[id] != passes:
            self.revision += 1
        self.leaf_of[id] = leaf
        self.can_pass[id] = passes
        ranking = self.leaves.get(leaf)
        if ranking is None:
            ranking = self.leaves[leaf] = Ranking(
                self.rank, self._has_room_for_a_first if self._passing else None
            )
        if passes:
            ranking.enter(account)
        else:
            ranking.leave(id)

    def _has_room_for_a_first(self, account: Account) -> bool:
        return self.has_room(account, 0)


class Pools:
    """The candidates for the wishes that were seen lately, over one accounting."""

    def __init__(self, accounting: Accounting) -> None:
        self.accounting = accounting
        self._pools: dict[Requirements, Candidates] = {}

    def candidates(self, wish: Requirements) -> Candidates:
        """Those for ``wish``, as things are now."""
        shape = shape_of(wish)
        pool = self._pools.pop(shape, None)
        if pool is None:
            pool = Candidates(shape, self.accounting)
            if len(self._pools) >= KEPT:
                del self._pools[next(iter(self._pools))]  # not used for longest
        else:
            pool.catch_up()
        self._pools[shape] = pool
        return pool


def shape_of(wish: Requirements) -> Requirements:
    """What is asked for, by whomever."""
    if not wish.service_id and not wish.version:
        return wish
    return replace(wish, service_id=ServiceId(""), version=0)


def fill(wish: Requirements, account: Account) -> float:
    """The share in use, after the task has come, of the tightest resource among those that it reserves.

    The others say nothing about it: a task that reserves no memory leaves the shares of memory as they are.
    """
    has = account.node.description.resources
    share = 0.0
    if wish.nano_cpus and has.nano_cpus:
        share = 1 - (account.free_nano_cpus - wish.nano_cpus) / has.nano_cpus
    if wish.memory_bytes and has.memory_bytes:
        share = max(share, 1 - (account.free_memory_bytes - wish.memory_bytes) / has.memory_bytes)
    return share


def _is_label(descriptor: str) -> bool:
    return descriptor.lower().startswith((NODE_LABEL, ENGINE_LABEL))
