"""Slot volumes that a node may report: volumes of tasks that a manager has seen on it (decision 81)."""

from msgspec.structs import replace

from skep.model.node import Node, NodeDescription
from skep.model.options.slot_volumes import (
    SLOT_VOLUMES_LABEL,
    SlotVolume,
    created_ms,
    slot_volumes_label,
    slot_volumes_of,
)
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.store.interface import Transaction


def with_seen_volumes(tx: Transaction, node: Node, description: NodeDescription) -> NodeDescription:
    """Return ``description`` without reports of slots that have had no task on ``node``.

    A slot's task returns to its data, and with ``skep.volume-affinity=required`` runs nowhere else: a node that could
    report any slot would receive its tasks with their secrets, or keep them from running.  For the same reason no use
    of a volume is later than the tasks that a manager knows.
    """
    label = description.engine.labels.get(SLOT_VOLUMES_LABEL, "")
    if not label or label == node.description.engine.labels.get(SLOT_VOLUMES_LABEL):
        return description
    known = {_key(one): one.at_ms for one in slot_volumes_of(node)}
    seen = _seen(tx, node.id)
    kept: dict[tuple[str, str, int], SlotVolume] = {}
    for one in slot_volumes_of(replace(node, description=description)):
        # A use by a task that is gone, or was never seen, counts as one by the task before it.
        times = [at_ms for at_ms in seen.get((one.service, one.slot), ()) if at_ms <= one.at_ms]
        if _key(one) in known:
            times.append(known[_key(one)])
        if times:
            kept[_key(one)] = replace(one, at_ms=max(times))
    labels = dict(description.engine.labels)
    labels[SLOT_VOLUMES_LABEL] = slot_volumes_label(kept.values())
    return replace(description, engine=replace(description.engine, labels=labels))


def _key(one: SlotVolume) -> tuple[str, str, int]:
    return one.volume, one.service, one.slot


def _seen(tx: Transaction, node_id: NodeId) -> dict[tuple[str, int], list[int]]:
    """Return the times of the node's tasks by service and slot."""
    found: dict[tuple[str, int], list[int]] = {}
    for task in tx.find(Task, node_id=node_id):
        service = tx.lookup(Service, task.service_id)
        if service is not None:
            found.setdefault((service.spec.name, task.slot), []).append(created_ms(task))
    return found
