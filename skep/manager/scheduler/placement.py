"""The scheduler's decision: nodes for a group of equal tasks, or the reason for refusing them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

from skep.aio.time_slices import SlicedWork, run_at_once
from skep.manager.scheduler.nodes.accounting import Account, Accounting
from skep.manager.scheduler.nodes.affinity import NO_RULES
from skep.manager.scheduler.nodes.candidates import fill
from skep.manager.scheduler.nodes.filters import explaining, explanation, filters_for
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.model.needs import Holdings, volume_uses
from skep.model.node_reports.node_refusals import BY_RULES, no_node_text
from skep.model.service import GenericResource
from skep.model.task import Task, VolumeAttachment
from skep.model.values.ids import NodeId
from skep.store.interface import View

ASSIGNED = "scheduler assigned task to node"
RECORD_CHARACTERS_MAX: Final = 400
"""Longest record of a placement, because every task has one in the store and in each of its commits.  A record of eight
nodes with long names has about 300 characters.
"""
CONFIRMED = "scheduler confirmed task can run on preassigned node"


class Assignment(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Assignment of a pending task to a node, with the generic resources it requires."""

    task: Task
    node_id: NodeId
    generic_resources: tuple[GenericResource, ...] = ()
    volumes: tuple[VolumeAttachment, ...] = ()
    message: str = ASSIGNED
    record: str = ""
    """Nodes that were refused, and the chosen node's figures (``placement_text``), or empty without a choice."""


class PlacementRefused(msgspec.Struct, frozen=True, gc=False):
    """No node can run the task now.  The task shows ``reason``."""

    task: Task
    reason: str
    """The text, or empty if it is computed later (``reasoning``)."""


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one batch."""

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[PlacementRefused, ...] = ()
    remaining: tuple[Task, ...] = ()
    """Tasks beyond the limit, to decide later."""


def place(
    tasks: Sequence[Task],
    requirements: Requirements,
    choices: CachedSpreads,
    *,
    now: float,
    limit: int,
    is_last: bool = True,
    leaving: Mapping[NodeId, int] = MappingProxyType({}),
) -> Placed:
    """Run ``placing`` without pauses, with the reasons of refusals."""
    return run_at_once(
        placing(
            tasks,
            requirements,
            choices,
            now=now,
            limit=limit,
            is_last=is_last,
            leaving=leaving,
            explains=True,
        )
    )


def placing(
    tasks: Sequence[Task],
    requirements: Requirements,
    choices: CachedSpreads,
    *,
    now: float,
    limit: int,
    is_last: bool = True,
    leaving: Mapping[NodeId, int] = MappingProxyType({}),
    explains: bool = False,
) -> SlicedWork[Placed]:
    """Choose nodes for up to ``limit`` of ``tasks``, which share ``requirements`` (or its shape:
    ``CachedSpreads.is_first``).

    Each assignment is reserved in the accounting as it is made, so the next one takes it into account.  A caller that
    cannot commit it must remove the reservation.

    Pauses while it finds candidates among thousands of nodes, skips full nodes, and explains a refusal.

    Args:
        now: The time on the clock of ``record_failure``.
        is_last: Whether these are the last waiting tasks with these requirements.
        leaving: Number of the service's tasks per node whose slots ``tasks`` will take over.
        explains: Whether to add the reason to refusals (``reasoning``), for which each node is checked.
    """
    batch = tasks[:limit]
    accounting = choices.accounting
    choice = yield from choices.spreading(requirements, now, is_last=is_last, leaving=leaving)
    assignments: list[Assignment] = []
    summary = choice.candidates.summary()[:RECORD_CHARACTERS_MAX]
    if requirements.rules != NO_RULES:
        summary += f",{BY_RULES}"
    reserves = requirements.nano_cpus or requirements.memory_bytes
    try:
        for task in batch:
            account = yield from choice.choosing()
            if account is None:
                break
            own = accounting.copies(requirements.service_id).get(account.node.id, 0)
            share = f"{fill(requirements, account):.0%}" if reserves else ""
            record = f"{summary}|{account.active}|{own}|{share}"
            if scores := choice.candidates.scores(requirements, account.node.id):
                record += f"|{scores}"
            assignments.append(assigned(task, account, requirements, accounting, ASSIGNED, record))
    finally:
        choice.close()
    refused = batch[len(assignments) :]
    refusals: list[PlacementRefused] = []
    if refused:
        # A refusal holds for all tasks with the same requirements.
        reason = (yield from reasoning(requirements, accounting)) if explains else ""
        refusals = [PlacementRefused(task, reason) for task in (*refused, *tasks[limit:])]
    return Placed(
        assignments=tuple(assignments),
        refusals=tuple(refusals),
        remaining=() if refused else tuple(tasks[limit:]),
    )


def placing_slots(
    tasks: Sequence[Task],
    requirements: Requirements,
    choices: CachedSpreads,
    view: View,
    *,
    now: float,
    limit: int,
    is_last: bool,
    explains: bool = False,
) -> SlicedWork[Placed]:
    """Choose nodes as ``placing`` does, where tasks that leave the slots of ``tasks`` do not count.

    If tasks of the service must run apart from each other, each task is placed alone, since another slot's task runs on
    until its own successor has a node.
    """
    # A service without any assigned task, the usual case, has nothing in its slots.
    gone = leaving(tasks, view) if choices.accounting.copies(requirements.service_id) else {}
    if not gone or not requirements.rules.keeps_apart(requirements.service_id):
        return (
            yield from placing(
                tasks,
                requirements,
                choices,
                now=now,
                limit=limit,
                is_last=is_last,
                leaving=gone,
                explains=explains,
            )
        )
    assignments: list[Assignment] = []
    refusals: list[PlacementRefused] = []
    for task in tasks[:limit]:
        placed = yield from placing(
            (task,),
            requirements,
            choices,
            now=now,
            limit=1,
            is_last=is_last and task is tasks[-1],
            leaving=leaving((task,), view),
            explains=explains,
        )
        assignments += placed.assignments
        refusals += placed.refusals
    return Placed(assignments=tuple(assignments), refusals=tuple(refusals), remaining=tuple(tasks[limit:]))


def leaving(tasks: Iterable[Task], view: View) -> Counter[NodeId]:
    """Count the active tasks per node in the slots of ``tasks``.  They are stopped once ``tasks`` run."""
    counts: Counter[NodeId] = Counter()
    for task in tasks:
        if task.slot:
            slot = view.find(Task, slot=f"{task.service_id}/{task.slot}")
            counts.update(other.node_id for other in slot if other.node_id and other.is_active)
    return counts


def confirm(task: Task, requirements: Requirements, accounting: Accounting) -> Assignment | PlacementRefused:
    """Assign a global service's task to the node it was created for, or refuse it.  Reserved in ``accounting``."""
    account = accounting.accounts.get(task.node_id)
    if account is None:
        return PlacementRefused(task, f"node {task.node_id} is not part of the cluster")
    copies = accounting.copies(task.service_id)
    if all(
        filter.passes(requirements, account, copies[task.node_id]) for filter in filters_for(requirements)
    ):
        return assigned(task, account, requirements, accounting, CONFIRMED)
    return PlacementRefused(task, explanation(requirements, [account], copies))


def assigned(
    task: Task,
    account: Account,
    requirements: Requirements,
    accounting: Accounting,
    message: str,
    record: str = "",
) -> Assignment:
    """Return the assignment of ``task`` to a node, reserved in ``accounting``."""
    node_id = account.node.id
    generic = account.generic.chosen(requirements.generic) if requirements.generic else ()
    volumes: tuple[VolumeAttachment, ...] = ()
    if requirements.cluster_volumes:
        chosen = account.volumes.choose(requirements.cluster_volumes, account.node)
        assert not isinstance(chosen, str), "the filters have passed"
        volumes = chosen
    usage = Holdings(
        service_id=task.service_id,
        nano_cpus=requirements.nano_cpus,
        memory_bytes=requirements.memory_bytes,
        generic=generic,
        host_ports=requirements.host_ports,
        is_active=True,
        volumes=volume_uses(volumes, requirements.cluster_volumes) if volumes else (),
    )
    accounting.reserve(task.id, node_id, usage)
    return Assignment(
        task=task,
        node_id=node_id,
        generic_resources=generic,
        volumes=volumes,
        message=message,
        record=record,
    )


def reasoning(requirements: Requirements, accounting: Accounting) -> SlicedWork[str]:
    """Return why no node can run tasks with these requirements."""
    copies = accounting.copies(requirements.service_id)
    refused = yield from explaining(requirements, tuple(accounting.accounts.values()), copies)
    return no_node_text(refused)
