"""Nodes that can run tasks with given requirements, cached for all services with the same requirements.

Conditions that depend on the node alone (its readiness, the constraints, its branch of the placement preferences) are
checked only when the node changes, and not for each task.  So assigning the only task of a service costs a heap
operation instead of a loop over all nodes.
"""

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from skep.aio.time_slices import STEP, SlicedWork
from skep.manager.scheduler.nodes.accounting import Account, Accounting
from skep.manager.scheduler.nodes.affinity import NO_RULES
from skep.manager.scheduler.nodes.filters import filters_for
from skep.manager.scheduler.nodes.load import effective_tasks, used_share
from skep.manager.scheduler.nodes.ranking import Rank, Ranking
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.model.node_reports.node_refusals import FULL, NodeRefusal, named
from skep.model.options.affinity import is_label
from skep.model.options.constraints import label_of
from skep.model.values.ids import NodeId, ServiceId

KEPT = 32
"""Number of requirements whose candidates are cached.  With 5,000 nodes, each takes 1 MB of memory, or 10 ms to compute
again.
"""

NAMED_MAX = 8
"""Most nodes whose names a placement's record has.  With more nodes it has numbers, because every task has a record."""
Leaf = tuple[str, ...]
"""A node's values of the labels that tasks are spread over, one per level."""


class Candidates:
    """Nodes that meet the lasting part of the requirements, by preference branch and in order of preference."""

    def __init__(self, requirements: Requirements, accounting: Accounting) -> None:
        """Start without nodes.  The first ``catching_up`` adds them.

        Args:
            requirements: The requirements of any service.  The service and its tasks are not used.
            accounting: All nodes.
        """
        self.levels: Sequence[str] = [
            over for over in (*requirements.spread_over, *requirements.topologies) if is_label(over)
        ]
        self.ranked = sum(map(is_label, requirements.spread_over))
        """Number of levels at which the branch with the fewest tasks comes first.  The others only divide the nodes."""
        self.leaves: dict[Leaf, Ranking] = {}
        self.leaf_of: dict[NodeId, Leaf] = {}
        """Preference branch of every node, including nodes that do not pass."""
        self.can_pass: dict[NodeId, bool] = {}
        self.refused: Counter[NodeRefusal] = Counter()
        """Number of nodes by the first lasting filter that they do not pass."""
        self._refusal_of: dict[NodeId, NodeRefusal] = {}
        self.revision = 0
        """Incremented when a node is created or removed, or changes its branch or whether it passes."""
        self._requirements = requirements
        self.accounting = accounting
        filters = filters_for(requirements)
        self._lasting = [filter for filter in filters if filter.is_lasting]
        self._passing = [filter for filter in filters if not filter.is_lasting]
        self._reserves = bool(requirements.nano_cpus or requirements.memory_bytes)
        self._seen = -1

    def catching_up(self) -> SlicedWork[None]:
        """Check the nodes that changed, or on which something was released, since the last call.

        Pauses in between.  Nodes that change in a pause are checked once more.
        """
        while self._seen != (changes := self.accounting.changes):
            mounts = self._requirements.cluster_volumes
            for number, id in enumerate(self.accounting.changed_since(self._seen, mounts), 1):
                self._update_node(id)
                if number % STEP == 0:
                    yield
            self._seen = changes

    def rank(self, account: Account) -> Rank:
        """Return a node's rank, which is the same for all services.

        It consists of the used share of the tightest resource after the assignment, and the number of tasks.
        """
        load, tasks = account.load, account.active + 1
        effective = (
            effective_tasks(tasks, load) if load else tasks
        )  # This is called some million times for 100,000 tasks.
        if not self._reserves:
            return effective, account.node.id
        return used_share(fill(self._requirements, account), load), effective, account.node.id

    def has_capacity(self, account: Account, copies: int) -> bool:
        """Return whether the node can run one more task now, given its ``copies`` of the same service's tasks."""
        for one in self._passing:  # noqa: SIM110  called for each choice, and `all` makes a generator
            if not one.passes(self._requirements, account, copies):
                return False
        return True

    def _update_node(self, id: NodeId) -> None:
        account = self.accounting.accounts.get(id)
        before = self.leaf_of.get(id)
        if account is None:
            if before is not None:
                self.leaves[before].leave(id)
                del self.leaf_of[id], self.can_pass[id]
                self.revision += 1
                self._forget_refusal(id)
            return
        leaf = tuple(label_of(account.node, level) or "" for level in self.levels)
        passes = self._note_refusal(id, account)
        if before is not None and before != leaf:
            self.leaves[before].leave(id)
        if before != leaf or self.can_pass[id] != passes:
            self.revision += 1
        self.leaf_of[id] = leaf
        self.can_pass[id] = passes
        ranking = self.leaves.get(leaf)
        if ranking is None:
            ranking = self.leaves[leaf] = Ranking(
                self.rank, self._has_capacity_for_first if self._passing else None
            )
        if passes:
            ranking.enter(account)
        else:
            ranking.leave(id)

    def summary(self) -> str:
        """Return how many nodes can run such tasks, and how many each filter refuses, for ``placement_text``.

        Nodes count as full as far as earlier choices have found them full.
        """
        suitable = len(self.can_pass) - self.refused.total()
        refused = sorted(self.refused.items(), key=lambda item: (-item[1], item[0].value))
        full = suitable - sum(map(len, self.leaves.values()))
        names: dict[NodeRefusal, list[str]] = {}
        if len(self.can_pass) <= NAMED_MAX:
            for id, refusal in sorted(self._refusal_of.items()):
                if (account := self.accounting.accounts.get(id)) is not None:
                    names.setdefault(refusal, []).append(account.node.shown_name)
        parts = [f"{suitable}/{len(self.can_pass)}"]
        parts += [f"{one.name}={count}{named(names.get(one, ()))}" for one, count in refused if count]
        return ",".join([*parts, f"{FULL}={full}"] if full > 0 else parts)

    def scores(self, requirements: Requirements, chosen: NodeId) -> str:
        """Return the figures of the suitable nodes except ``chosen``, for ``placement_text``.  Empty for many nodes."""
        if len(self.can_pass) > NAMED_MAX:
            return ""
        copies = self.accounting.copies(requirements.service_id)
        found = []
        for id in sorted(id for id, passes in self.can_pass.items() if passes and id != chosen):
            account = self.accounting.accounts.get(id)  # None if it was removed during a pause
            if account is not None and (name := named((account.node.shown_name,))):
                share = f"{fill(requirements, account):.0%}" if self._reserves else ""
                found.append(f"{name[1:]}:{account.active}:{copies.get(id, 0)}:{share}")
        return " ".join(found)

    def _note_refusal(self, id: NodeId, account: Account) -> bool:
        """Count the first lasting filter that the node does not pass.  Returns whether it passes all."""
        self._forget_refusal(id)
        for one in self._lasting:
            if not one.passes(self._requirements, account, 0):
                self._refusal_of[id] = one.refusal
                self.refused[one.refusal] += 1
                return False
        return True

    def _forget_refusal(self, id: NodeId) -> None:
        if (before := self._refusal_of.pop(id, None)) is not None:
            self.refused[before] -= 1

    def _has_capacity_for_first(self, account: Account) -> bool:
        return self.has_capacity(account, 0)


class Pools:
    """The candidates for recently used requirements, based on one accounting."""

    def __init__(self, accounting: Accounting) -> None:
        self.accounting = accounting
        self._pools: dict[Requirements, Candidates] = {}

    def pool(self, requirements: Requirements) -> Candidates:
        """Return the candidates for ``requirements`` as of their last update."""
        shape = shape_of(requirements)
        pool = self._pools.pop(shape, None)
        if pool is None:
            pool = Candidates(shape, self.accounting)
            if len(self._pools) >= KEPT:
                del self._pools[next(iter(self._pools))]  # least recently used
        self._pools[shape] = pool
        return pool


def shape_of(requirements: Requirements) -> Requirements:
    """Return the requirements without their service."""
    if not requirements.service_id and not requirements.version and not requirements.rules:
        return requirements
    return replace(requirements, service_id=ServiceId(""), version=0, rules=NO_RULES)


def fill(requirements: Requirements, account: Account) -> float:
    """Return the used share, after the assignment, of the tightest resource that the task reserves.

    Other resources are ignored, because a task that reserves no memory does not change the used share of memory.
    """
    has = account.capacity
    share = 0.0
    if requirements.nano_cpus and has.nano_cpus:
        share = 1 - (account.free_nano_cpus - requirements.nano_cpus) / has.nano_cpus
    if requirements.memory_bytes and has.memory_bytes:
        share = max(share, 1 - (account.free_memory_bytes - requirements.memory_bytes) / has.memory_bytes)
    return share
