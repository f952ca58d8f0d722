"""Why a task has no node yet: every node of the cluster, with all reasons against it.

The loop counts refusals by filter, which is cheap enough for every decision; this applies all filters to one task
on request.  It needs only a view, so every manager can serve the request.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from skep.aio.time_slices import SlicedWork
from skep.manager.scheduler.accounting import Account, Accounting, holds_resources, usage_in
from skep.manager.scheduler.filters import filters_for
from skep.manager.scheduler.preemption import AT_ONCE, Occupants, Room, making_room
from skep.manager.scheduler.priorities import Priorities
from skep.manager.scheduler.requirements import Requirements
from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId, TaskId
from skep.model.labels import PRIORITY_MAX, allows_preemption
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.store.interface import View

ServiceNames = Callable[[Service], str]
"""How services are named to whom a text is for."""


class NodeVerdict(ApiObject):
    """The filters' result for one node and one task.  Without ``refusals`` the node could run it."""

    node_id: NodeId
    hostname: str = always("")
    reasons: tuple[str, ...] = always(())


def verdict(requirements: Requirements, account: Account, copies: int) -> NodeVerdict:
    """All reasons against this node, not only the first."""
    refusals = tuple(
        filter.detail(requirements, account, copies)
        for filter in filters_for(requirements)
        if not filter.passes(requirements, account, copies)
    )
    node = account.node
    return NodeVerdict(node_id=node.id, hostname=node.description.hostname, reasons=refusals)


def reserve_for(accounting: Accounting, task: Task, view: View) -> None:
    """Reserve what ``task`` has."""
    if holds_resources(task):
        accounting.reserve(task.id, task.node_id, usage_in(view, task))


def explaining_priority(
    task: Task, requirements: Requirements, accounting: Accounting, view: View, named: ServiceNames
) -> SlicedWork[str]:
    """Which priorities hold the room that a pending ``task`` needs; empty: priorities do not matter for it."""
    priorities = priorities_of(view)
    own = priorities.of(task.service_id)
    if not priorities:
        return ""
    nodes = [task.node_id] if task.node_id else list(accounting.accounts)
    for least, below in ((-PRIORITY_MAX, own), (own + 1, PRIORITY_MAX + 1)):
        made = yield from making_room(
            [task],
            requirements,
            nodes,
            accounting,
            Occupants(lambda: view, priorities, below, least),
            claim=lambda _: None,
            victims_max=AT_ONCE,
        )
        room = made[0].room if made else None
        if room is None or not room.victims:
            continue
        where = (
            f"{_owners(room, priorities, view, named)} hold the room on {_hostname(accounting, room.node_id)}"
        )
        if below > own:
            return f"{where}; its own priority is {own}"
        return where if preempts(view) else f"{where}; preemption is off (skep cluster preemption)"
    return ""


def priorities_of(view: View) -> Priorities:
    """Those of all services."""
    priorities = Priorities()
    for service in view.find(Service):
        priorities.set(service)
    return priorities


def preempts(view: View) -> bool:
    """Whether the cluster allows preemption."""
    return any(allows_preemption(one.spec.labels) for one in view.find(Swarm))


def victims_by_service(victims: Iterable[TaskId], view: View, named: ServiceNames) -> Counter[str]:
    """How many of the tasks are of which service."""
    tasks = (view.lookup(Task, id) for id in victims)
    services = (view.lookup(Service, task.service_id) for task in tasks if task is not None)
    return Counter(named(service) for service in services if service is not None)


def _owners(room: Room, priorities: Priorities, view: View, named: ServiceNames) -> str:
    """``tasks of web, priority 5``"""
    (name, _), *others = victims_by_service(room.victims, view, named).most_common()
    more = f" and {len(others)} other services" if others else ""
    return f"tasks of {name}{more}, priority {room.rank[0]},"


def _hostname(accounting: Accounting, id: NodeId) -> str:
    account = accounting.accounts.get(id)
    return (account.node.description.hostname if account is not None else "") or id
