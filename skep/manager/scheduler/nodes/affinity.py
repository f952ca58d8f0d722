"""Affinity: which services a task must run near or apart from, and the domains in which their tasks are.

``AffinityIndex`` knows the labels of all services and resolves names.  A hard anti-affinity counts in both directions:
the tasks of the named service also stay apart from the service that declared it.  ``Domains`` counts tasks by domain.
It is updated with each reservation, so no decision loops over all nodes.

Tasks that are being stopped do not count, as for ``max_replicas``.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from skep.model.node import Node, takes_tasks
from skep.model.options.affinity import AffinityTerm, DeclaredAffinities, Skew, affinities_of, has_affinities
from skep.model.options.constraints import Constraint, label_of, meets
from skep.model.service import Service
from skep.model.values.ids import NodeId, ServiceId

WATCHED_MAX: Final = 10_000
"""Most services and topologies whose counts are kept.  All are dropped and counted again when there are more."""
MANY: Final = 256
"""Excluded nodes from which on a service has its own order of nodes, as with as many tasks of its own."""
_NONE: Final[Counter[str]] = Counter()


class OnNode(Protocol):
    """The state of a node, as in ``accounting.Account``."""

    @property
    def node(self) -> Node: ...


class AffinityRule(msgspec.Struct, frozen=True):
    """A resolved term.  ``services`` is empty if no service has the name."""

    name: str
    services: tuple[ServiceId, ...]
    topology: str
    is_apart: bool
    is_declared: bool = True
    """False for an anti-affinity that the other service declares."""

    @property
    def text(self) -> str:
        """``web@node.labels.zone``"""
        return AffinityTerm(self.name, self.topology).text


class AffinityRules(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """All rules for the tasks of one service."""

    hard: tuple[AffinityRule, ...] = ()
    soft: tuple[AffinityRule, ...] = ()
    skews: tuple[Skew, ...] = ()

    @property
    def topologies(self) -> tuple[str, ...]:
        """Labels whose values matter, in addition to the labels of ``skews``."""
        found = dict.fromkeys(one.topology for one in (*self.hard, *self.soft) if one.topology)
        return tuple(one for one in found if one not in {skew.topology for skew in self.skews})

    def keeps_apart(self, service_id: ServiceId) -> bool:
        """Return whether the tasks of this service must run apart from each other."""
        return any(one.is_apart and service_id in one.services for one in self.hard)

    def __bool__(self) -> bool:
        return bool(self.hard or self.soft or self.skews)


NO_RULES: Final = AffinityRules()


class AffinityIndex:
    """The affinities of all services."""

    def __init__(self) -> None:
        self._names: dict[ServiceId, str] = {}
        self._ids: dict[str, tuple[ServiceId, ...]] = {}
        """Services by their names in lower case.  A removed service keeps its name until its tasks have ended."""
        self._declared: dict[ServiceId, DeclaredAffinities] = {}
        self._resolved: dict[ServiceId, AffinityRules] = {}
        self._by_target: dict[str, list[tuple[ServiceId, AffinityTerm]]] | None = None
        """Anti-affinities by the named service, or None if they must be collected again."""
        self._near: dict[str, list[ServiceId]] = {}
        """Services with an affinity by the named service, valid as long as ``_by_target`` is."""

    def set(self, service: Service) -> bool:
        """Set a service's name and labels.  Returns whether the rules of any service may have changed."""
        declared = affinities_of(service.spec.labels) if has_affinities(service.spec.labels) else None
        is_new = service.id not in self._names
        if not is_new and declared == self._declared.get(service.id):
            return False
        had_some = bool(self._declared)
        if is_new:
            key = service.spec.name.lower()
            self._names[service.id] = service.spec.name
            self._ids[key] = (*self._ids.get(key, ()), service.id)
        if declared is not None:
            self._declared[service.id] = declared
        else:
            self._declared.pop(service.id, None)
        return self._drop(had_some)

    def forget(self, id: ServiceId) -> bool:
        """Forget a removed service.  Returns whether the rules of any service may have changed."""
        name = self._names.pop(id, None)
        if name is None:
            return False
        had_some = bool(self._declared)
        self._ids[name.lower()] = tuple(one for one in self._ids[name.lower()] if one != id)
        if not self._ids[name.lower()]:
            del self._ids[name.lower()]
        self._declared.pop(id, None)
        return self._drop(had_some)

    def followers(self, ids: Iterable[ServiceId]) -> frozenset[str]:
        """Return the services that a new task of one of these may help.

        They must run near it, or its own service limits the skew: another task of that one may now go elsewhere.
        """
        if not self._declared:
            return frozenset()
        self._targets()
        found: set[str] = set()
        for id in ids:
            found.update(self._near.get(self._names.get(id, "").lower(), ()))
            if id in self._declared and self._declared[id].skews:
                found.add(id)
        return frozenset(found)

    def of(self, id: ServiceId) -> AffinityRules:
        """Return the rules for a service's tasks."""
        if not self._declared:
            return NO_RULES
        rules = self._resolved.get(id)
        if rules is None:
            rules = self._resolved[id] = self._resolve(id)
        return rules

    def _drop(self, had_some: bool) -> bool:
        """Drop all derived state.  Returns whether there are or were any affinities."""
        self._resolved.clear()
        self._by_target = None
        return had_some or bool(self._declared)

    def _targets(self) -> Mapping[str, list[tuple[ServiceId, AffinityTerm]]]:
        if self._by_target is None:
            self._by_target, self._near = {}, {}
            for id, declared in self._declared.items():
                for term in declared.apart:
                    self._by_target.setdefault(term.key, []).append((id, term))
                for term in declared.near:
                    self._near.setdefault(term.key, []).append(id)
        return self._by_target

    def _resolve(self, id: ServiceId) -> AffinityRules:
        own, name = self._declared.get(id), self._names.get(id, "")
        declared = own or DeclaredAffinities()
        apart = [self._rule(one, is_apart=True) for one in declared.apart]
        known = {(one.key, one.topology) for one in declared.apart}
        for other, term in self._targets().get(name.lower(), ()):
            if other != id and (self._names[other].lower(), term.topology) not in known:
                apart.append(
                    AffinityRule(self._names[other], (other,), term.topology, True, is_declared=False)
                )
        if own is None and not apart:
            return NO_RULES
        return AffinityRules(
            hard=(*(self._rule(one) for one in declared.near), *apart),
            soft=(
                *(self._rule(one) for one in declared.preferred_near),
                *(self._rule(one, is_apart=True) for one in declared.preferred_apart),
            ),
            skews=declared.skews,
        )

    def _rule(self, term: AffinityTerm, *, is_apart: bool = False) -> AffinityRule:
        return AffinityRule(term.service, self._ids.get(term.key, ()), term.topology, is_apart)


class Domains:
    """Counts the wanted tasks of services by domain."""

    def __init__(
        self,
        accounts: Mapping[NodeId, OnNode],
        copies: Mapping[ServiceId, Counter[NodeId]],
        changes: Callable[[], int],
    ) -> None:
        """Start without counts.  The arguments are the accounting's, and change with it."""
        self._accounts = accounts
        self._changes = changes
        self._copies = copies
        self.watched: dict[ServiceId, dict[str, Counter[str]]] = {}
        """Counts by service, topology and domain."""
        self._number = 0
        self._eligible: dict[tuple[str, tuple[Constraint, ...]], tuple[int, frozenset[str]]] = {}

    def copies(self, id: ServiceId) -> Mapping[NodeId, int]:
        """Return the number of the service's tasks by node."""
        return self._copies.get(id, {})

    def counts(self, id: ServiceId, topology: str) -> Mapping[str, int]:
        """Return the number of the service's tasks by domain.  It is kept up to date."""
        topologies = self.watched.get(id)
        if topologies is None:
            if id not in self._copies:
                return _NONE
            topologies = self.watched[id] = {}
        counts = topologies.get(topology)
        if counts is None:
            if self._number >= WATCHED_MAX:
                self.forget()
                topologies = self.watched[id] = {}
            self._number += 1
            counts = topologies[topology] = Counter()
            for node_id, number in self.copies(id).items():
                if (account := self._accounts.get(node_id)) is not None:
                    counts[domain_of(account.node, topology)] += number
        return counts

    def move(self, id: ServiceId, node_id: NodeId, number: int) -> None:
        """Add tasks of a watched service on a node."""
        if (account := self._accounts.get(node_id)) is not None:
            for topology, counts in self.watched[id].items():
                counts[domain_of(account.node, topology)] += number

    def forget(self) -> None:
        """Drop all counts, because nodes were added, removed or labeled."""
        self.watched.clear()
        self._eligible.clear()
        self._number = 0

    def has_neighbor(self, rule: AffinityRule, account: OnNode) -> bool:
        """Return whether a task of the rule's services is in the node's domain."""
        if not rule.topology:
            return any(self.copies(id).get(account.node.id, 0) for id in rule.services)
        domain = domain_of(account.node, rule.topology)
        return bool(domain) and self.is_in(rule, domain)

    def is_in(self, rule: AffinityRule, domain: str) -> bool:
        """Return whether a task of the rule's services is in a domain of the rule's topology."""
        return any(self.counts(id, rule.topology).get(domain, 0) > 0 for id in rule.services)

    def is_first(self, rule: AffinityRule, service_id: ServiceId) -> bool:
        """Return whether an affinity of a service to itself has no effect yet, because it has no task."""
        return service_id in rule.services and not any(self._copies.get(id) for id in rule.services)

    def is_within(
        self, skew: Skew, service_id: ServiceId, constraints: tuple[Constraint, ...], account: OnNode
    ) -> bool:
        """Return whether the node's domain may have one more task of the service."""
        domain, eligible = domain_of(account.node, skew.topology), self.eligible(skew.topology, constraints)
        counts = self.counts(service_id, skew.topology)
        return domain in eligible and is_level(counts, _NONE, domain, eligible, skew.limit)

    def is_met(self, rule: AffinityRule, service_id: ServiceId, account: OnNode) -> bool:
        """Return whether a node meets ``rule`` for a task of the service."""
        if rule.is_apart:
            return not self.has_neighbor(rule, account)
        if rule.topology and not domain_of(account.node, rule.topology):
            return False
        return self.has_neighbor(rule, account) or self.is_first(rule, service_id)

    def eligible(self, topology: str, constraints: tuple[Constraint, ...]) -> frozenset[str]:
        """Return the domains with a ready and active node that meets ``constraints``."""
        key, changes = (topology, constraints), self._changes()
        known = self._eligible.get(key)
        if known is None or known[0] != changes:
            found = frozenset(
                domain
                for account in self._accounts.values()
                if takes_tasks(account.node) and meets(constraints, account.node)
                if (domain := domain_of(account.node, topology))
            )
            if len(self._eligible) >= WATCHED_MAX:
                self._eligible.clear()
            known = self._eligible[key] = changes, found
        return known[1]


def domain_of(node: Node, topology: str) -> str:
    """Return the node's value of the topology's label, or an empty text if it belongs to no domain."""
    return label_of(node, topology) or ""


def has_same_labels(one: Node, other: Node) -> bool:
    """Return whether two states of a node belong to the same domains of every topology."""
    return (
        one.spec.labels == other.spec.labels
        and one.description.engine.labels == other.description.engine.labels
    )


def nodes_near(rules: Iterable[AffinityRule], domains: Domains) -> set[NodeId]:
    """Return the nodes with a task of each rule's services."""
    found: set[NodeId] | None = None
    for rule in rules:
        nodes = {node_id for id in rule.services for node_id in domains.copies(id)}
        found = nodes if found is None else found & nodes
    return found or set()


class Neighborhood:
    """The rules for one service's next tasks, applied to nodes, and to leaves of the tree of domains."""

    def __init__(
        self,
        rules: AffinityRules,
        service_id: ServiceId,
        constraints: tuple[Constraint, ...],
        levels: Sequence[str],
        domains: Domains,
    ) -> None:
        """Start without leaving tasks.  ``levels`` are the labels whose values a leaf consists of."""
        self._rules = rules
        self._service_id = service_id
        self._constraints = constraints
        self._domains = domains
        self._index = {level: number for number, level in enumerate(levels)}
        self._hard_nodes = [one for one in rules.hard if not one.topology]
        self._soft_nodes = [one for one in rules.soft if not one.topology]
        self._hard_leaves = [one for one in rules.hard if one.topology]
        self._soft_leaves = [one for one in rules.soft if one.topology]
        self._leaving: dict[str, Counter[str]] = {}
        self._leaving_nodes: Mapping[NodeId, int] = {}
        self._eligible: dict[str, frozenset[str]] = {}
        self.special: dict[NodeId, int] = {}
        """Nodes that soft rules distinguish from the others, with the number of rules that each breaks."""
        self.usual_penalty = sum(not one.is_apart for one in self._soft_nodes)
        """Number of soft rules that all other nodes break."""
        self.only: set[NodeId] | None = None
        """The only nodes that hard rules allow, or None if they allow most."""
        self.has_tiers = bool(self._soft_leaves)
        self.excludes_many = False
        """Whether hard rules exclude so many nodes that skipping them for each task would be slow."""

    def update(self, leaving: Mapping[NodeId, int], accounts: Mapping[NodeId, OnNode]) -> set[NodeId]:
        """Look at the present tasks of the other services.  Returns the nodes that may be treated differently now.

        Args:
            leaving: Number of the service's tasks per node whose slots are being reassigned.
            accounts: All nodes.
        """
        self._leaving_nodes = leaving
        self._leaving = {}
        for topology in self._index if leaving else ():
            self._leaving[topology] = Counter()
            for id, number in leaving.items():
                if (account := accounts.get(id)) is not None:
                    self._leaving[topology][domain_of(account.node, topology)] += number
        self._eligible = {
            one.topology: self._domains.eligible(one.topology, self._constraints) for one in self._rules.skews
        }
        near = [
            one
            for one in self._hard_nodes
            if not one.is_apart and not self._domains.is_first(one, self._service_id)
        ]
        only = nodes_near(near, self._domains) if near else None
        apart = {
            node_id
            for one in self._hard_nodes
            if one.is_apart
            for id in one.services
            for node_id in self._domains.copies(id)
        }
        self.excludes_many = len(apart) > MANY
        special: dict[NodeId, int] = {}
        for one in self._soft_nodes:
            special.update((node_id, 0) for id in one.services for node_id in self._domains.copies(id))
        for node_id in special:
            special[node_id] = sum(
                any(self._domains.copies(id).get(node_id) for id in one.services) is one.is_apart
                for one in self._soft_nodes
            )
        changed = {id for id, _ in special.items() ^ self.special.items()} | (
            (only or set()) ^ (self.only or set())
        )
        self.special, self.only = special, only
        return changed

    def allows(self, account: OnNode) -> bool:
        """Return whether the rules by node allow a task on the node."""
        id = account.node.id
        if self.only is not None and id not in self.only:
            return False
        for rule in self._hard_nodes:
            if not rule.is_apart:
                continue
            for service_id in rule.services:
                present = self._domains.copies(service_id).get(id, 0)
                if service_id == self._service_id:
                    present -= self._leaving_nodes.get(id, 0)
                if present > 0:
                    return False
        return True

    def note(self, id: NodeId) -> bool:
        """Take a chosen node into account.  Returns whether all next tasks have to follow to that node."""
        if self.only is not None or not any(
            not one.is_apart and self._service_id in one.services for one in self._hard_nodes
        ):
            return False
        self.only = {id}
        return True

    def is_own(self, id: NodeId) -> bool:
        """Return whether the service's own order has the node, because the rules distinguish it from others."""
        return id in self.special or (self.only is not None and id in self.only)

    def penalty(self, id: NodeId) -> int:
        """Return the number of soft rules by node that a task on the node would break."""
        return self.special.get(id, self.usual_penalty)

    def tier(self, leaf: Sequence[str]) -> int:
        """Return the number of soft rules by label that a task in the leaf would break."""
        return sum(not self._is_met(one, leaf[self._index[one.topology]]) for one in self._soft_leaves)

    def allows_leaf(self, leaf: Sequence[str]) -> bool:
        """Return whether the rules by label allow a task in the leaf, with the tasks assigned so far."""
        for rule in self._hard_leaves:
            if not self._is_met(rule, leaf[self._index[rule.topology]]):
                return False
        for skew in self._rules.skews:
            domain, eligible = leaf[self._index[skew.topology]], self._eligible[skew.topology]
            if domain not in eligible or not is_level(
                self._domains.counts(self._service_id, skew.topology),
                self._leaving.get(skew.topology, _NONE),
                domain,
                eligible,
                skew.limit,
            ):
                return False
        return True

    def _is_met(self, rule: AffinityRule, domain: str) -> bool:
        if not domain:
            return rule.is_apart
        for id in rule.services:
            present = self._domains.counts(id, rule.topology).get(domain, 0)
            if rule.is_apart and id == self._service_id:
                present -= self._leaving.get(rule.topology, _NONE)[domain]
            if present > 0:
                return not rule.is_apart
        return rule.is_apart or self._domains.is_first(rule, self._service_id)


def is_level(
    counts: Mapping[str, int], leaving: Mapping[str, int], domain: str, eligible: Iterable[str], limit: int
) -> bool:
    """Return whether a domain may have one more task, if the eligible domains may differ by at most ``limit``."""
    least = min(counts.get(one, 0) - leaving.get(one, 0) for one in eligible)
    return counts.get(domain, 0) - leaving.get(domain, 0) - least < limit
