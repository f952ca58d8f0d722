"""The moves that spread running tasks more evenly: a pure function of the state and the load of each node.

A move takes one task of a replicated service from its node to another node.  The target passes all filters of the
scheduler while the task still runs, because its successor starts first.  Three measures say how even the spread is: the
squares of a service's tasks per node, the squares of its tasks per domain (placement preferences and
``skep.max-skew``), and the squares of all lasting tasks per node.  A move makes none of them worse and at least one of
them better, so the plan ends.
Nor does it make the target fuller or busier than the source was.

Tasks of jobs, and tasks that a service starts again and again because they fail, do not count as lasting.  They start
on other nodes each time, and each time tasks of healthy services would move after them.

Tasks stay if something depends on where they are: data that they write or keep, a port of the machine, a cluster
volume, or an affinity of any service.  So do tasks of services that are not settled, or that a freeze holds.

A plan for 100,000 tasks tries few pairs of nodes again.  A move makes its target a worse one, and leaves all others as
they are.  So a source without a move gets one only with targets that are new among the first ones (``_Ranks``), with
a service whose tasks per domain have changed, or with a service that hard affinities bind to others.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from skep.aio.time_slices import STEP, SlicedWork
from skep.manager.control_loops.failures import isolated
from skep.manager.scheduler.explaining.explain import reserve_for
from skep.manager.scheduler.nodes.accounting import Account, Accounting, holds_resources
from skep.manager.scheduler.nodes.affinity import domain_of
from skep.manager.scheduler.nodes.filters import first_refusing
from skep.manager.scheduler.nodes.requirements import Requirements, planes_of, requirements_of
from skep.manager.services.freezes import held_by, stack_of_service
from skep.model.needs import cluster_mounts
from skep.model.network import Network
from skep.model.node import Node, takes_tasks
from skep.model.options.affinity import affinities_of, has_affinities
from skep.model.options.labels import MAINTENANCE
from skep.model.options.overlap import written_data
from skep.model.options.slot_volumes import local_volumes
from skep.model.service import PAUSED, UNDER_WAY, PublishMode, RestartCondition, Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS, unix_ns
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import spec_of

MOVES_MAX = 500
"""Moves of one plan.  The next plan has the others."""
LASTING_S = 300
"""Seconds after which a task that followed a failed one counts as lasting.  Failing services seldom run so long.
"""
TRIES_MAX = 64
"""Targets that are tried for one service on one node, from the node with the fewest tasks.  Without a limit, a service
that fits nowhere would be compared with all of 5,000 nodes for each of its nodes.
"""


class MoveGain(ApiObject):
    """Tasks on the two nodes of a move, before and afterwards."""

    source_before: int = always(0)
    source_after: int = always(0)
    target_before: int = always(0)
    target_after: int = always(0)


class PlannedMove(ApiObject):
    """One move and its gain.

    Attributes:
        own: Tasks of its service on both nodes.
        every: Lasting tasks of all services on both nodes.
        domains: Tasks of its service in both domains, if they differ.
    """

    task_id: TaskId
    service_id: ServiceId = ServiceId("")
    service: str = always("")
    slot: int = always(0)
    source: NodeId = NodeId("")
    target: NodeId = NodeId("")
    source_name: str = always("")
    target_name: str = always("")
    own: MoveGain = always(MoveGain())
    every: MoveGain = always(MoveGain())
    domains: tuple[MoveGain, ...] = ()


class _Group(msgspec.Struct):
    """The tasks of one service on one node, of which any may move."""

    service: Service
    requirements: Requirements
    tasks: list[Task]


class _Ranks:
    """The nodes in the order in which they are tried as targets: by their tasks, and then by their load."""

    def __init__(self, ranks: Iterable[tuple[int, float, NodeId]]) -> None:
        self._sorted = sorted(ranks)
        self._of = {rank[2]: rank for rank in self._sorted}
        self.opened = self.targets()
        """Nodes that became one of the first targets, or a better one, in order of time."""

    def targets(self) -> list[NodeId]:
        """Return the first targets, which are tried."""
        return [id for _, _, id in self._sorted[:TRIES_MAX]]

    def sources(self) -> Iterator[NodeId]:
        """Yield all nodes in the order in which they are tried as sources."""
        return (id for _, _, id in reversed(self._sorted))

    def move(self, source: tuple[int, float, NodeId], target: tuple[int, float, NodeId]) -> None:
        """Set the ranks of both nodes after a move from ``source`` to ``target``."""
        before = set(self.targets())
        for rank in (source, target):
            del self._sorted[bisect_left(self._sorted, self._of[rank[2]])]
            insort(self._sorted, rank)
            self._of[rank[2]] = rank
        self.opened += [id for id in self.targets() if id not in before or id == source[2]]


class _Targets:
    """The targets of the next move."""

    def __init__(self, accounting: Accounting, ranks: _Ranks) -> None:
        self._accounting = accounting
        self._opened = ranks.opened
        self.all = [accounting.accounts[id] for id in ranks.targets()]
        self._since: dict[int, list[Account]] = {}
        self._fitting: dict[tuple[int, ServiceId], list[Account]] = {}

    def since(self, tried: int) -> list[Account]:
        """Return the targets that were opened after the first ``tried`` openings, or all targets for 0."""
        if tried not in self._since:
            ids = set(self._opened[tried:])
            self._since[tried] = [one for one in self.all if one.node.id in ids]
        return self._since[tried]

    def fitting(self, group: _Group, tried: int) -> list[Account]:
        """Return the targets of ``since`` that accept a task of a group."""
        key = tried, group.service.id
        if key not in self._fitting:
            copies = self._accounting.copies(group.service.id)
            self._fitting[key] = [
                one
                for one in self.since(tried)
                if first_refusing(group.requirements, one, copies[one.node.id]) is None
            ]
        return self._fitting[key]


class Balance:
    """The nodes, their loads, and the tasks that may move."""

    def __init__(self, view: View, loads: Mapping[NodeId, float], now_ns: int) -> None:
        self._view = view
        self._now_ns = now_ns
        mean = sum(loads.values()) / len(loads) if loads else 0.0
        self._loads = {node.id: loads.get(node.id, mean) for node in view.find(Node)}
        """Loads.  A node that reports none counts as the mean of the others, as in the scheduler."""
        self._accounting = Accounting()
        self._lasting: Counter[NodeId] = Counter()
        """Lasting tasks of each node."""
        self._groups: dict[NodeId, dict[ServiceId, _Group]] = {}
        self._bound: set[ServiceId] = set()
        """Services in ``_groups`` whose places depend on other services."""
        self._ranks = _Ranks(())
        self._tried: dict[NodeId, int] = {}
        """Nodes without a move to the first targets, with the length of ``_ranks.opened`` when these were tried."""
        self._locked: Collection[str] = locked_nodes(view)
        self.moves: list[PlannedMove] = []

    def planning(self, skipped: Collection[ServiceId] = ()) -> SlicedWork[list[PlannedMove]]:
        """Return the moves in the order in which they are made.

        Args:
            skipped: Services that stay where they are.
        """
        yield from self._load(skipped)
        ranks: list[tuple[int, float, NodeId]] = []
        for number, account in enumerate(self._accounting.accounts.values()):
            if self._takes_part(account):
                ranks.append(self._rank(account))
            if number % STEP == 0:
                yield
        self._ranks = _Ranks(ranks)
        while len(self.moves) < MOVES_MAX:
            found = yield from self._next()
            if found is None:
                break
            yield  # the search since its last pause and the move both take milliseconds
            self._move(*found)
        while self._groups:
            # freed in slices: the groups of 5,000 nodes would hold the loop for 40 ms
            self._groups.popitem()
            if len(self._groups) % STEP == 0:
                yield
        return self.moves

    def _load(self, skipped: Collection[ServiceId]) -> SlicedWork[None]:
        view, accounting = self._view, self._accounting
        for number, service in enumerate(view.find(Service)):
            with isolated("service in a rebalance plan", service.id):
                accounting.affinities.set(service)
            if number % STEP == 0:
                yield
        for volume in view.find(Volume):
            accounting.update_volume(volume.id, volume)
        for number, node in enumerate(view.find(Node)):
            accounting.set_node(node)
            if number % STEP == 0:
                yield
        for number, id in enumerate(view.ids(Task)):  # a list of all tasks takes longer than a slice
            task = view.lookup(Task, id)
            if task is not None:
                with isolated("task in a rebalance plan", id):
                    reserve_for(accounting, task, view)
                    self._lasting[task.node_id] += holds_resources(task) and is_lasting(task, self._now_ns)
            if number % STEP == 0:
                yield
        named = _named_services(view)
        for service in view.find(Service):
            yield
            if service.id not in skipped and service.spec.name.lower() not in named:
                with isolated("service in a rebalance plan", service.id):
                    yield from self._add_group(service)

    def _add_group(self, service: Service) -> SlicedWork[None]:
        """Add the tasks of a service if they may move."""
        view = self._view
        if not is_movable(service, view):
            return
        active = [
            task for task in view.find(Task, service_id=service.id) if not task.status.state.is_terminal
        ]
        yield
        if not (yield from _is_settled(service, active, self._now_ns)):
            return
        requirements = requirements_of(
            active[0],
            spec_of(view, active[0]),
            planes_of(active[0], partial(view.lookup, Network)),
            self._accounting.affinities.of(service.id),
        )
        if requirements.rules.soft:
            return
        if requirements.rules.hard:
            self._bound.add(service.id)
        nodes: dict[NodeId, list[Task]] = {}
        for number, task in enumerate(active):
            nodes.setdefault(task.node_id, []).append(task)
            if number % STEP == 0:
                yield
        for number, (node_id, tasks) in enumerate(nodes.items()):
            tasks.sort(key=lambda one: (-one.slot, one.id))
            self._groups.setdefault(node_id, {})[service.id] = _Group(service, requirements, tasks)
            if number % STEP == 0:
                yield

    def _next(self) -> SlicedWork[tuple[Account, Account, _Group] | None]:
        """Return the next move: from the node with the most tasks to the node with the fewest, if it may be made."""
        targets = _Targets(self._accounting, self._ranks)
        for number, id in enumerate(self._ranks.sources()):
            if number % STEP == 0:
                yield
            source = self._accounting.accounts[id]
            if self._lasting[id] <= self._lasting[targets.all[0].node.id]:
                return None
            found = yield from self._from(source, targets)
            if found is not None:
                return found
            self._tried[id] = len(self._ranks.opened)
        return None

    def _from(self, source: Account, targets: _Targets) -> SlicedWork[tuple[Account, Account, _Group] | None]:
        """Return the first move from ``source`` that may be made."""
        tried = self._tried.get(source.node.id, 0)
        if not targets.since(tried) and self._bound.isdisjoint(self._groups.get(source.node.id, ())):
            return None
        for id, group in self._by_copies(source):
            yield
            copies = self._accounting.copies(id)
            for target in targets.fitting(group, 0 if id in self._bound else tried):
                every = self._lasting[source.node.id] - self._lasting[target.node.id]
                is_by_tasks = not group.requirements.spread_over
                if every < 1 or (is_by_tasks and max(every, copies[source.node.id]) < 2):
                    break  # nor do the targets after it, which have more tasks
                if self._may_move(source, target, group, copies):
                    return source, target, group
        return None

    def _rank(self, account: Account) -> tuple[int, float, NodeId]:
        return self._lasting[account.node.id], self._loads[account.node.id], account.node.id

    def _takes_part(self, account: Account) -> bool:
        return takes_tasks(account.node) and account.node.id not in self._locked

    def _by_copies(self, source: Account) -> list[tuple[ServiceId, _Group]]:
        """Return the movable groups of a node, services with the most tasks there first."""
        groups = self._groups.get(source.node.id, {})
        return sorted(
            ((id, group) for id, group in groups.items() if group.tasks),
            key=lambda item: (-len(item[1].tasks), item[1].service.spec.name, item[0]),
        )

    def _may_move(self, source: Account, target: Account, group: _Group, copies: Counter[NodeId]) -> bool:
        """Return whether a move to a target that accepts the task makes nothing worse and something better."""
        own = copies[source.node.id] - copies[target.node.id]
        every = self._lasting[source.node.id] - self._lasting[target.node.id]
        domains = [one - other for one, other in self._domains(source, target, group)]
        differences = (own, every, *domains)
        if min(differences) < 1 or max(differences) < 2:
            return False
        return _is_no_fuller(source, target, group.requirements) and self._is_no_busier(source, target)

    def _domains(self, source: Account, target: Account, group: _Group) -> Iterator[tuple[int, int]]:
        """Yield the service's tasks in the domains of both nodes, for each label by which its tasks are spread."""
        for topology in group.requirements.spread_over:
            one, other = domain_of(source.node, topology), domain_of(target.node, topology)
            if one != other:
                counts = self._accounting.domains.counts(group.service.id, topology)
                yield counts.get(one, 0), counts.get(other, 0)

    def _is_no_busier(self, source: Account, target: Account) -> bool:
        """Return whether the target is at most as busy as the source was.  A task has an equal share of its load."""
        before, busy = self._loads[source.node.id], self._loads[target.node.id]
        return busy + before / max(source.active, 1) <= before

    def _move(self, source: Account, target: Account, group: _Group) -> None:
        """Make a move: its task is then on the target, and stays there."""
        task, accounting = group.tasks.pop(0), self._accounting
        copies = accounting.copies(group.service.id)
        ids = (source.node.id, target.node.id)
        own, every = [(counts[ids[0]], counts[ids[1]]) for counts in (copies, self._lasting)]
        self.moves.append(
            PlannedMove(
                task_id=task.id,
                service_id=group.service.id,
                service=group.service.spec.name,
                slot=task.slot,
                source=source.node.id,
                target=target.node.id,
                source_name=source.node.shown_name,
                target_name=target.node.shown_name,
                own=_spread(*own),
                every=_spread(*every),
                domains=tuple(_spread(*one) for one in self._domains(source, target, group)),
            )
        )
        share = self._loads[source.node.id] / max(source.active, 1)
        self._loads[source.node.id] -= share
        self._loads[target.node.id] += share
        usage = accounting.held(source.node.id)[task.id]
        accounting.reserve(task.id, target.node.id, usage)
        self._lasting[source.node.id] -= 1
        self._lasting[target.node.id] += 1
        groups = self._groups.setdefault(target.node.id, {})
        moved = groups.setdefault(group.service.id, _Group(group.service, group.requirements, []))
        moved.tasks.append(task)
        self._ranks.move(self._rank(source), self._rank(target))
        changed = (source.node.id, target.node.id)
        for id in (
            (*changed, *accounting.copies(group.service.id)) if group.requirements.spread_over else changed
        ):
            self._tried.pop(id, None)


def _spread(source: int, target: int) -> MoveGain:
    return MoveGain(
        source_before=source, source_after=source - 1, target_before=target, target_after=target + 1
    )


def _is_no_fuller(source: Account, target: Account, requirements: Requirements) -> bool:
    """Return whether the target is at most as full as the source was, by each resource that the task reserves."""
    if not requirements.nano_cpus and not requirements.memory_bytes:
        return True
    return _fullness(target, requirements.nano_cpus, requirements.memory_bytes) <= _fullness(source, 0, 0)


def _fullness(account: Account, nano_cpus: int, memory_bytes: int) -> float:
    """Return the reserved part of the node's tightest resource, with so much more reserved."""
    has = account.capacity
    cpus = 1 - (account.free_nano_cpus - nano_cpus) / has.nano_cpus if has.nano_cpus else 0.0
    memory = 1 - (account.free_memory_bytes - memory_bytes) / has.memory_bytes if has.memory_bytes else 0.0
    return max(cpus, memory)


def is_lasting(task: Task, now_ns: int) -> bool:
    """Return whether a task is likely to stay where it is."""
    if task.job_iteration is not None:
        return False
    follows_failures = task.restart is not None and task.restart.failures > 0
    return not follows_failures or now_ns - unix_ns(task.status.timestamp) >= LASTING_S * SECOND_NS


# -- what may move -----------------------------------------------------------------------------------------------------


def is_movable(service: Service, view: View) -> bool:
    """Return whether the tasks of ``service`` depend on nothing at their nodes, and nothing holds them back."""
    spec, status = service.spec, service.update_status
    template = spec.task_template
    policy = template.restart_policy
    ports = spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()
    return not (
        spec.mode.name != "replicated"
        or service.removed_at is not None
        or (status is not None and status.state in (*UNDER_WAY, *PAUSED))
        or (policy is not None and policy.condition is RestartCondition.NONE)
        or written_data(template)
        or local_volumes(template)
        or cluster_mounts(template)
        or any(port.publish_mode is PublishMode.HOST for port in ports)
        or held_by(view, stack_of_service(service))
    )


def _is_settled(service: Service, active: Sequence[Task], now_ns: int) -> SlicedWork[bool]:
    """Return whether each slot has one lasting task of the current spec, and nothing starts, stops or moves."""
    if not len(active) == service.spec.replicas > 0:
        return False
    slots: set[int] = set()
    for number, task in enumerate(active):
        slots.add(task.slot)
        is_steady = (
            task.status.state is TaskState.RUNNING
            and task.desired_state is TaskState.RUNNING
            and task.spec_version == service.spec_version
            and task.preemption is None
            and task.relocation is None
            and not task.volumes
            and is_lasting(task, now_ns)
        )
        if not is_steady:
            return False
        if number % STEP == 0:
            yield
    return len(slots) == len(active)


def _named_services(view: View) -> frozenset[str]:
    """Return the names of services that must, or prefer to, be near or apart from other services' tasks.

    A move of their tasks may break or worsen a rule of the service that names them.  The scheduler's filters check hard
    rules to run apart, in both directions.
    """
    found: set[str] = set()
    for service in view.find(Service):
        if has_affinities(service.spec.labels):
            declared = affinities_of(service.spec.labels)
            named = (*declared.near, *declared.preferred_near, *declared.preferred_apart)
            found.update(term.key for term in named)
    return frozenset(found)


class _LockHolder(msgspec.Struct, frozen=True):
    node: str = ""


class _Lock(msgspec.Struct, frozen=True):
    holders: tuple[_LockHolder, ...] = ()


def locked_nodes(view: View) -> frozenset[str]:
    """Return the nodes that hold the reboot lock (``skep reboot-lock``).  All nodes of a damaged lock count as none."""
    text = "".join(one.spec.labels.get(MAINTENANCE, "") for one in view.find(Swarm))
    try:
        return (
            frozenset(one.node for one in msgspec.json.decode(text, type=_Lock).holders)
            if text
            else frozenset()
        )
    except msgspec.MsgspecError:
        return frozenset()


def loads_of(view: View) -> Mapping[NodeId, float]:
    """Return the load that each node has reported."""
    return {node.id: node.load for node in view.find(Node) if node.load is not None}


def first_moves(moves: Sequence[PlannedMove], moving: Sequence[Task], limit: int) -> Iterator[PlannedMove]:
    """Yield the moves that may be made at the same time: of different services, and none needs another one's space."""
    services = {task.service_id for task in moving}
    sources = {task.node_id for task in moving}
    for move in moves:
        if limit <= 0:
            return
        if move.service_id in services or move.target in sources:
            continue
        services.add(move.service_id)
        sources.add(move.source)
        limit -= 1
        yield move
