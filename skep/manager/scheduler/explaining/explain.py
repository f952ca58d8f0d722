"""Explains why a task has no node yet, with every node of the cluster and all reasons against it.

The scheduler's loop only counts refusals by filter, which is cheap enough for every decision.  This module applies all
filters to one task on request.  It needs only a view, so every manager can serve the request.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from skep.aio.time_slices import SlicedWork
from skep.manager.scheduler.explaining.details import amounts_left
from skep.manager.scheduler.nodes.accounting import Account, Accounting, holds_resources, usage_in
from skep.manager.scheduler.nodes.filters import filters_for
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.preemption.preemption import AT_ONCE, Candidate, Occupants, making_nominations
from skep.manager.scheduler.preemption.priorities import Priorities
from skep.manager.services.freezes import held_by, why_held
from skep.model.node_reports.node_refusals import NodeRefusal
from skep.model.options.labels import PRIORITY_MAX, allows_preemption
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, TaskId
from skep.store.interface import View

ServiceNames = Callable[[Service], str]
"""Returns a service's name in the form that the reader of the text uses."""


class NodeVerdict(ApiObject):
    """Result of the filters for one node and one task.  Without ``refusals`` the node could run the task."""

    node_id: NodeId
    hostname: str = always("")
    reasons: tuple[str, ...] = always(())


def verdict(requirements: Requirements, account: Account, copies: int) -> NodeVerdict:
    """Return all reasons against this node, not only the first."""
    refusals = tuple(
        filter.detail(requirements, account, copies)
        for filter in filters_for(requirements)
        if not filter.passes(requirements, account, copies)
    )
    node = account.node
    return NodeVerdict(node_id=node.id, hostname=node.description.hostname, reasons=refusals)


def with_shown_names(requirements: Requirements, view: View, named: Callable[[Service], str]) -> Requirements:
    """Return ``requirements`` with names for the reader of the services whose anti-affinity keeps the task away."""
    hard = tuple(
        one
        if one.is_declared
        else replace(
            one,
            name=", ".join(
                sorted({named(each) for id in one.services if (each := view.lookup(Service, id))})
            ),
        )
        for one in requirements.rules.hard
    )
    return replace(requirements, rules=replace(requirements.rules, hard=hard))


def closest_node(requirements: Requirements, accounting: Accounting) -> str:
    """Return the node that comes closest to the resources that a task needs, with its free amounts.

    Only nodes that refuse the task for their resources alone count.  Without such a node, the text is empty.
    """
    copies = accounting.copies(requirements.service_id)
    filters = filters_for(requirements)
    found = [
        account
        for account in accounting.accounts.values()
        if [one.refusal for one in filters if not one.passes(requirements, account, copies[account.node.id])]
        == [NodeRefusal.RESOURCES]
    ]
    if not found:
        return ""
    best = min(
        found, key=lambda account: (_missing(requirements, account), account.node.description.hostname)
    )
    name = best.node.shown_name
    return f"{name} comes closest: {amounts_left(requirements, best)}"


def _missing(requirements: Requirements, account: Account) -> tuple[int, float]:
    """Return how far a node is from the resources that a task needs: missing kinds, and the largest missing share."""
    amounts = (
        (requirements.nano_cpus, account.free_nano_cpus),
        (requirements.memory_bytes, account.free_memory_bytes),
    )
    generic = sum(not account.generic.has(one) for one in requirements.generic)
    return generic, max(((wanted - free) / wanted for wanted, free in amounts if wanted), default=0.0)


def reserve_for(accounting: Accounting, task: Task, view: View) -> None:
    """Reserve the resources that ``task`` holds."""
    if holds_resources(task):
        accounting.reserve(task.id, task.node_id, usage_in(view, task))


def explaining_priority(
    task: Task, requirements: Requirements, accounting: Accounting, view: View, named: ServiceNames
) -> SlicedWork[str]:
    """Return which priorities hold the resources that a pending ``task`` needs, or an empty string."""
    priorities = priorities_of(view)
    own = priorities.of(task.service_id)
    if not priorities:
        return ""
    nodes = [task.node_id] if task.node_id else list(accounting.accounts)
    for least, below in ((-PRIORITY_MAX, own), (own + 1, PRIORITY_MAX + 1)):
        made = yield from making_nominations(
            [task],
            requirements,
            nodes,
            accounting,
            Occupants(lambda: view, priorities, below, least),
            claim=lambda _: None,
            victims_max=AT_ONCE,
        )
        candidate = made[0].candidate if made else None
        if candidate is None or not candidate.victims:
            continue
        owners, node = _owners(candidate, priorities, view, named), _hostname(accounting, candidate.node_id)
        where = f"{owners} hold the resources on {node}"
        if below > own:
            return f"{where}; its own priority is {own}"
        if preempts(view):
            return where
        held = held_by(view)
        return f"{where}; {held or 'preemption is off (skep cluster preemption)'}"
    return ""


def priorities_of(view: View) -> Priorities:
    """Return the priorities of all services."""
    priorities = Priorities()
    for service in view.find(Service):
        priorities.set(service)
    return priorities


def preempts(view: View) -> bool:
    """Return whether the cluster allows preemption, and is not frozen."""
    return any(allows_preemption(one.spec.labels) and not why_held(one) for one in view.find(Swarm))


def victims_by_service(victims: Iterable[TaskId], view: View, named: ServiceNames) -> Counter[str]:
    """Count the tasks by service name."""
    tasks = (view.lookup(Task, id) for id in victims)
    services = (view.lookup(Service, task.service_id) for task in tasks if task is not None)
    return Counter(named(service) for service in services if service is not None)


def _owners(candidate: Candidate, priorities: Priorities, view: View, named: ServiceNames) -> str:
    """Return a text such as ``tasks of web, priority 5``."""
    (name, _), *others = victims_by_service(candidate.victims, view, named).most_common()
    more = f" and {len(others)} other services" if others else ""
    return f"tasks of {name}{more}, priority {candidate.rank[0]},"


def _hostname(accounting: Accounting, id: NodeId) -> str:
    account = accounting.accounts.get(id)
    return (account.node.description.hostname if account is not None else "") or id
