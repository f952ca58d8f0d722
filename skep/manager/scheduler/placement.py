"""The scheduler's decision: nodes for a group of equal tasks, or the reason why there is none."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from skep.manager.scheduler.accounting import Account, Accounting, Usage
from skep.manager.scheduler.filters import explanation, filters_for
from skep.manager.scheduler.requirements import Requirements
from skep.manager.scheduler.spread import Choices
from skep.model.ids import NodeId
from skep.model.service import GenericResource
from skep.model.task import Task
from skep.store.interface import View

ASSIGNED = "scheduler assigned task to node"
CONFIRMED = "scheduler confirmed task can run on preassigned node"


class Assignment(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A wanted task gets a node, and the generic resources it asked for."""

    task: Task
    node_id: NodeId
    generic_resources: tuple[GenericResource, ...] = ()
    message: str = ASSIGNED


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """No node will do for now; ``reason`` is what the user reads on the task."""

    task: Task
    reason: str


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one batch."""

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    remaining: tuple[Task, ...] = ()
    """Tasks beyond the limit: ask again."""


def place(
    tasks: Sequence[Task],
    wish: Requirements,
    choices: Choices,
    *,
    now: float,
    limit: int,
    is_last: bool = True,
    leaving: Mapping[NodeId, int] = MappingProxyType({}),
) -> Placed:
    """Nodes for up to ``limit`` of ``tasks``, which all ask for ``wish`` (or for its shape: ``Choices.is_first``).

    Each assignment is entered into the accounting as it is made, so the next one counts with it; who cannot
    commit it takes it out again.  ``now``: on the clock that failures were noted with.  ``is_last``: no more tasks of
    this wish wait.  ``leaving``: how many tasks of the service, by node, give their slots to ``tasks``.
    """
    batch = tasks[:limit]
    accounting = choices.accounting
    choice = choices.spread(wish, now, is_last=is_last, leaving=leaving)
    assignments: list[Assignment] = []
    try:
        for task in batch:
            account = choice.next()
            if account is None:
                break
            assignments.append(_assigned(task, account, wish, accounting, ASSIGNED))
    finally:
        choice.close()
    refused = batch[len(assignments) :]
    refusals: list[Refusal] = []
    if refused:
        # What holds for one of them holds for all that ask for the same.
        reason = _reason(wish, accounting)
        refusals = [Refusal(task, reason) for task in (*refused, *tasks[limit:])]
    return Placed(
        assignments=tuple(assignments),
        refusals=tuple(refusals),
        remaining=() if refused else tuple(tasks[limit:]),
    )


def leaving(tasks: Iterable[Task], view: View) -> Counter[NodeId]:
    """How many tasks each node has in the slots of ``tasks``: they go when these run."""
    counts: Counter[NodeId] = Counter()
    for task in tasks:
        if task.slot:
            slot = view.find(Task, slot=f"{task.service_id}/{task.slot}")
            counts.update(other.node_id for other in slot if other.node_id and other.is_active)
    return counts


def confirm(task: Task, wish: Requirements, accounting: Accounting) -> Assignment | Refusal:
    """Whether the node that a global service's task was made for can take it.  Entered into ``accounting``."""
    account = accounting.accounts.get(task.node_id)
    if account is None:
        return Refusal(task, f"node {task.node_id} is not part of the cluster")
    copies = accounting.copies(task.service_id)
    if all(filter.passes(wish, account, copies[task.node_id]) for filter in filters_for(wish)):
        return _assigned(task, account, wish, accounting, CONFIRMED)
    return Refusal(task, explanation(wish, [account], copies))


def _assigned(
    task: Task, account: Account, wish: Requirements, accounting: Accounting, message: str
) -> Assignment:
    node_id = account.node.id
    generic = account.generic.chosen(wish.generic) if wish.generic else ()
    usage = Usage(
        service_id=task.service_id,
        nano_cpus=wish.nano_cpus,
        memory_bytes=wish.memory_bytes,
        generic=generic,
        host_ports=wish.host_ports,
        is_active=True,
    )
    accounting.book(task.id, node_id, usage)
    return Assignment(task=task, node_id=node_id, generic_resources=generic, message=message)


def _reason(wish: Requirements, accounting: Accounting) -> str:
    copies = accounting.copies(wish.service_id)
    refused = explanation(wish, accounting.accounts.values(), copies)
    return f"no suitable node ({refused})" if refused else "no suitable node"
