"""Preemption: stopping tasks of a lower priority for a task of a higher one (label ``skep.preemption``).

The scheduler itself does not stop tasks.  It chooses a node and the *victims* there, and writes to each victim for
which task it has to leave (``Task.preemption``).  The orchestrator then replaces the victim as on a drained node.
Meanwhile the preempting task keeps waiting.  It has a *claim* on the node's resources, so that no task of a lower
priority takes what the victims release.

Claims are not stored.  When victims are chosen, a task that is leaving already counts as ended.  So a new leader, and
each later decision, chooses the same node without further victims.

The victims on a node are tasks of the lowest priorities that together free enough.  Afterwards, each victim that is not
needed after all is dropped from the list, the most important first.  Among tasks with the same priority, the first
victims are tasks whose service has other running tasks, then tasks that free most of the missing resources, then the
youngest.  The scheduler chooses the node whose most important victim is the least important.

Source: kubernetes, pkg/scheduler/framework/preemption (victims that can stay, nominated nodes); Nomad,
scheduler/preemption.go (services are not preempted unless the operator allows it).
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Final, TypeAlias

import msgspec

from skep.aio.time_slices import SlicedWork
from skep.manager.cluster import known_cluster
from skep.manager.scheduler.nodes.accounting import Account, Accounting
from skep.manager.scheduler.nodes.filters import filters_for
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.preemption.priorities import Priorities
from skep.manager.services.disruption_budget import budget_of, required
from skep.manager.services.freezes import held_stacks, stack_of_service
from skep.model.needs import Holdings, HostPort, VolumeUse, kind_and_amount, volume_uses
from skep.model.node import Node, NodeState
from skep.model.options.labels import PRIORITY_MAX
from skep.model.service import GenericResource, Service
from skep.model.task import Preemption, Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import View
from skep.store.kinds import has_unknown_service

AT_ONCE: Final = 20
"""Maximum number of victims that are stopping in the whole cluster.  A task that needs more gets them when no other
victim is stopping.
"""
STEP: Final = 10
"""Number of nodes checked between two pauses.  Each takes a tenth of a millisecond."""

Rank: TypeAlias = tuple[int, int, int, int, NodeId]
"""Rank of a node.  Smaller is better.

Its elements are the highest priority of a victim, the number of services that would have no running task left, the
number of the service's tasks on the node, the number of victims, and the node's id."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A node that can run a task after the ``victims``, and the tasks that leave anyway, have ended."""

    rank: Rank
    victims: tuple[TaskId, ...] = ()
    generic: tuple[GenericResource, ...] = ()
    """Generic resources that the task would get."""
    volumes: tuple[VolumeUse, ...] = ()
    """Cluster volumes that the task would get, all of which are free."""

    @property
    def node_id(self) -> NodeId:
        """The node's id."""
        return self.rank[-1]


class Nomination(msgspec.Struct, frozen=True):
    """The node chosen for a pending task by preemption."""

    task: Task
    candidate: Candidate


class Preempt(msgspec.Struct, frozen=True):
    """Decision to stop tasks for a pending one."""

    task: Task
    victims: tuple[TaskId, ...]
    preemption: Preemption


def reserve_candidate(
    accounting: Accounting, id: TaskId, candidate: Candidate, requirements: Requirements
) -> None:
    """Reserve a task's future resources on a node.  The task does not count as a task of its service yet."""
    usage = Holdings(
        service_id=requirements.service_id,
        nano_cpus=requirements.nano_cpus,
        memory_bytes=requirements.memory_bytes,
        generic=candidate.generic,
        host_ports=requirements.host_ports,
        is_active=False,
        volumes=candidate.volumes,
    )
    accounting.reserve(id, candidate.node_id, usage)


class Occupants:
    """Finds the tasks on nodes that may be stopped for a task of priority ``below``, and tasks that leave anyway."""

    def __init__(
        self, view: Callable[[], View], priorities: Priorities, below: int, least: int = -PRIORITY_MAX
    ) -> None:
        """Start a decision.  ``view`` returns the current view, and ``least`` is the lowest priority of a victim."""
        self._view = view
        self._priorities = priorities
        self._below = below
        self._least = least
        swarm = known_cluster(view())
        self._frozen = held_stacks(swarm) if swarm is not None else frozenset()
        self._chosen: set[TaskId] = set()
        """Victims of this decision, which the view does not show yet."""
        self._running: dict[ServiceId, int] = {}
        """Number of each service's running tasks that are not leaving."""
        self._spare: dict[ServiceId, float] = {}
        """Number of each service's available tasks that its disruption budget spares."""
        self.holds_back = False
        """Whether a disruption budget has excluded a victim, so that there may be more victims later."""

    def split(self, held: Mapping[TaskId, Holdings]) -> tuple[list[Holdings], list["_PossibleVictim"]]:
        """Return the reservations of a node's tasks that must stay, and the possible victims.  Others leave anyway."""
        view = self._view()
        staying: list[Holdings] = []
        possible: list[_PossibleVictim] = []
        for id, usage in held.items():
            task = view.lookup(Task, id)
            if task is not None and (id in self._chosen or is_leaving(task)):
                continue
            priority = self._priorities.of(usage.service_id)
            is_eligible = bool(usage.service_id) and self._least <= priority < self._below
            is_eligible = is_eligible and not self._is_frozen(usage.service_id)
            if task is None or usage.is_unknown or not is_eligible or has_unknown_service(view, task):
                staying.append(usage)  # an entry without a task record is a claim
            else:
                possible.append(_PossibleVictim(task, usage, priority))
        for one in self._beyond_budgets(possible):
            possible.remove(one)
            staying.append(one.usage)
        return staying, possible

    def _is_frozen(self, service_id: ServiceId) -> bool:
        """Return whether the service's stack has a change freeze or a closed window."""
        return (
            bool(self._frozen) and stack_of_service(self._view().lookup(Service, service_id)) in self._frozen
        )

    def _beyond_budgets(self, possible: Iterable["_PossibleVictim"]) -> list["_PossibleVictim"]:
        """Return the oldest possible victims of services whose disruption budget does not spare as many."""
        taken: Counter[ServiceId] = Counter()
        beyond: list[_PossibleVictim] = []
        for one in sorted(possible, key=lambda one: one.age, reverse=True):
            service_id = one.task.service_id
            if not _serves(one.task):
                continue
            taken[service_id] += 1
            if taken[service_id] > self._spare_of(service_id):
                beyond.append(one)
        self.holds_back |= bool(beyond)
        return beyond

    def running(self, service_id: ServiceId) -> int:
        """Return how many tasks of a service run and are not leaving."""
        if service_id not in self._running:
            tasks = self._view().find(Task, service_id=service_id)
            self._running[service_id] = sum(map(_serves, tasks))
        return self._running[service_id]

    def _spare_of(self, service_id: ServiceId) -> float:
        """Return how many available tasks of a service may be preempted."""
        if service_id not in self._spare:
            view = self._view()
            service = view.lookup(Service, service_id)
            self._spare[service_id] = inf
            if service is not None and required(service) is not None:
                tasks = view.find(Task, service_id=service_id)
                budget = budget_of(service, tasks, lambda node_id: view.lookup(Node, node_id))
                self._spare[service_id] = budget.spare
        return self._spare[service_id]

    def choose(self, victims: Iterable[TaskId]) -> None:
        """Count these tasks as victims from now on."""
        for id in victims:
            self._chosen.add(id)
            task = self._view().lookup(Task, id)
            if task is not None and _serves(task):
                self._running[task.service_id] = self.running(task.service_id) - 1
                self._spare[task.service_id] = self._spare_of(task.service_id) - 1


class _PossibleVictim(msgspec.Struct, frozen=True):
    """A possible victim."""

    task: Task
    usage: Holdings
    priority: int

    @property
    def age(self) -> tuple[str, str]:
        return self.task.created_at.rstrip("Z"), self.task.id


def is_leaving(task: Task) -> bool:
    """Return whether a task is leaving its node or has ended."""
    return not task.is_active or task.preemption is not None


def frees_own_resources(task: Task, accounting: Accounting, view: View) -> bool:
    """Return whether an earlier task of the slot, which an update stops, will soon release something that ``task`` may
    need.

    A stop-first update stops it for a prepared task that is refused.  A start-first update does not stop it before
    ``task`` runs.
    """
    is_prepared = task.desired_state < TaskState.RUNNING
    for one in view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}"):
        usage, account = accounting.held(one.node_id).get(one.id), accounting.accounts.get(one.node_id)
        if (
            one.id == task.id
            or usage is None
            or account is None
            or account.node.status.state is not NodeState.READY
        ):
            continue
        if not one.is_wanted or (is_prepared and usage.is_exclusive):
            return True
    return False


def making_nominations(
    tasks: Sequence[Task],
    requirements: Requirements,
    nodes: Iterable[NodeId],
    accounting: Accounting,
    occupants: Occupants,
    *,
    claim: Callable[[Nomination], None],
    victims_max: int,
) -> SlicedWork[list[Nomination]]:
    """Nominate nodes for as many ``tasks`` as possible.  They share ``requirements``, and no node can run one now.

    Args:
        nodes: The nodes that may be chosen.
        claim: Called with each nomination as it is made, to reserve its resources.
        victims_max: Maximum for all nominations together.  A first nomination may have more if this is ``AT_ONCE``.
    """
    found: list[tuple[Rank, Candidate]] = []
    for number, id in enumerate(nodes, 1):
        if (candidate := candidate_on(id, requirements, accounting, occupants)) is not None:
            heapq.heappush(found, (candidate.rank, candidate))
        if number % STEP == 0:
            yield
    made: list[Nomination] = []
    claimed: Counter[NodeId] = Counter()
    for number, task in enumerate(tasks, 1):
        if number % STEP == 0:
            yield  # earlier results are checked again below
        candidate = None
        while found and candidate is None:
            _, known = heapq.heappop(found)
            present = candidate_on(known.node_id, requirements, accounting, occupants, claimed[known.node_id])
            if present == known:
                candidate = present
            elif present is not None:  # the node has changed since it was found
                heapq.heappush(found, (present.rank, present))
        if candidate is None or (len(candidate.victims) > victims_max and (made or victims_max < AT_ONCE)):
            break
        victims_max -= len(candidate.victims)
        occupants.choose(candidate.victims)
        made.append(Nomination(task, candidate))
        claim(made[-1])
        claimed[candidate.node_id] += 1
        heapq.heappush(found, (candidate.rank, candidate))  # checked again for the next task
    return made


def candidate_on(
    id: NodeId, requirements: Requirements, accounting: Accounting, occupants: Occupants, claimed: int = 0
) -> Candidate | None:
    """Return the node with as few victims as possible, or None if it cannot run the task even then.

    Args:
        claimed: Number of claims on the node for other tasks of the service.
    """
    account = accounting.accounts.get(id)
    copies = accounting.copies(requirements.service_id)[id] + claimed
    filters = filters_for(requirements)
    if account is None or not all(
        one.passes(requirements, account, copies) for one in filters if one.is_lasting
    ):
        return None
    staying, possible = occupants.split(accounting.held(id))
    trial = _Trial(account, staying)

    def passes() -> bool:
        return all(one.passes(requirements, trial.account, copies) for one in filters if not one.is_lasting)

    if not passes():
        return None
    for one in possible:
        trial.put(one)
    leaving: list[tuple[_PossibleVictim, bool]] = []
    for one, is_last in _most_expendable_first(possible, _lacks(requirements, trial.account), occupants):
        if passes():
            break
        trial.take(one)
        leaving.append((one, is_last))
    assert passes(), "without all of them it does"
    victims: list[tuple[_PossibleVictim, bool]] = []
    for one, is_last in reversed(leaving):
        trial.put(one)
        if not passes():
            trial.take(one)
            victims.append((one, is_last))
    highest = max((one.priority for one, _ in victims), default=-PRIORITY_MAX - 1)
    return Candidate(
        rank=(highest, sum(is_last for _, is_last in victims), copies, len(victims), id),
        victims=tuple(sorted(one.task.id for one, _ in victims)),
        generic=trial.account.generic.chosen(requirements.generic),
        volumes=_volumes_for(requirements, account),
    )


def _volumes_for(requirements: Requirements, account: Account) -> tuple[VolumeUse, ...]:
    """Return the cluster volumes that the task would use, so that two tasks are not nominated for one volume."""
    if not requirements.cluster_volumes:
        return ()
    chosen = account.volumes.choose(requirements.cluster_volumes, account.node)
    assert not isinstance(chosen, str), "the filters have passed"
    return volume_uses(chosen, requirements.cluster_volumes)


class _Trial:
    """A node with some of its tasks."""

    def __init__(self, present: Account, staying: Sequence[Holdings]) -> None:
        self.account = Account(present.node, present.volumes, present.domains)
        self.account.add_all(staying)
        self._staying = staying
        self._added: dict[TaskId, Holdings] = {}

    def put(self, one: _PossibleVictim) -> None:
        """Add a task."""
        self._added[one.task.id] = one.usage
        self.account.add(one.usage)

    def take(self, one: _PossibleVictim) -> None:
        """Remove a task."""
        del self._added[one.task.id]
        self.account.remove(one.usage)
        if one.usage.generic:
            self.account.update(self.account.node, (*self._staying, *self._added.values()))


class _Lacks(msgspec.Struct, frozen=True):
    """The resources that a node lacks for a task: amounts, kinds of generic resources, and host ports."""

    nano_cpus: int
    memory_bytes: int
    kinds: frozenset[str]
    ports: frozenset[HostPort]

    def share(self, usage: Holdings) -> float:
        """Return the part of the lacking resources that the end of a task would free, from 0 to the number of
        resources.
        """
        share = float(sum(port in self.ports for port in usage.host_ports))
        share += sum(kind_and_amount(one)[0] in self.kinds for one in usage.generic)
        if self.nano_cpus > 0:
            share += min(usage.nano_cpus / self.nano_cpus, 1.0)
        if self.memory_bytes > 0:
            share += min(usage.memory_bytes / self.memory_bytes, 1.0)
        return share


def _lacks(wanted: Requirements, account: Account) -> _Lacks:
    return _Lacks(
        wanted.nano_cpus - account.free_nano_cpus,
        wanted.memory_bytes - account.free_memory_bytes,
        frozenset(kind_and_amount(one)[0] for one in wanted.generic if not account.generic.has(one)),
        frozenset(filter(account.has_port, wanted.host_ports)),
    )


def _most_expendable_first(
    possible: Iterable[_PossibleVictim], lacks: _Lacks, occupants: Occupants
) -> Iterator[tuple[_PossibleVictim, bool]]:
    """Yield the tasks whose end frees a lacking resource, and whether each is its service's last running task."""
    useful = [(one, share) for one in possible if (share := lacks.share(one.usage))]
    useful.sort(key=lambda item: item[0].age, reverse=True)
    useful.sort(key=lambda item: (item[0].priority, -item[1]))
    gone: Counter[ServiceId] = Counter()
    ranked: list[tuple[_PossibleVictim, bool]] = []
    for one, _ in useful:
        service_id, serves = one.task.service_id, _serves(one.task)
        gone[service_id] += serves
        ranked.append((one, serves and gone[service_id] >= occupants.running(service_id)))
    ranked.sort(key=lambda item: (item[0].priority, item[1]))
    return iter(ranked)


def _serves(task: Task) -> bool:
    return task.status.state is TaskState.RUNNING and not is_leaving(task)
