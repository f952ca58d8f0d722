"""Slot volumes that a node may report: volumes of tasks that a manager has seen on it (decision 81)."""

from msgspec.structs import replace

from skep.model.ids import NodeId
from skep.model.node import Node, NodeDescription
from skep.model.service import Service
from skep.model.slot_volumes import (
    SLOT_VOLUMES_LABEL,
    SlotVolume,
    created_ms,
    slot_volumes_label,
    slot_volumes_of,
)
from skep.model.task import Task
from skep.store.interface import Transaction


def with_seen_volumes(tx: Transaction, node: Node, description: NodeDescription) -> NodeDescription:
    """Return ``description`` without reports of slots that have had no task on ``node``.

    A slot's task returns to its data, and with ``skep.volume-affinity=required`` runs nowhere else: a node that could
    report any slot would receive its tasks with their secrets, or keep them from running.
    """
    label = description.engine.labels.get(SLOT_VOLUMES_LABEL, "")
    if not label or label == node.description.engine.labels.get(SLOT_VOLUMES_LABEL):
        return description
    known = {_key(one): one for one in slot_volumes_of(node)}
    seen = _seen(tx, node.id)
    reported = slot_volumes_of(replace(node, description=description))
    # For a slot that was reported before, the time stays as it was unless the newer task is known.
    kept = [
        one if (one.service, one.slot, one.at_ms) in seen else known[_key(one)]
        for one in reported
        if (one.service, one.slot, one.at_ms) in seen or _key(one) in known
    ]
    labels = dict(description.engine.labels)
    labels[SLOT_VOLUMES_LABEL] = slot_volumes_label(kept)
    return replace(description, engine=replace(description.engine, labels=labels))


def _key(one: SlotVolume) -> tuple[str, str, int]:
    return one.volume, one.service, one.slot


def _seen(tx: Transaction, node_id: NodeId) -> set[tuple[str, int, int]]:
    """Return service, slot and time of the node's tasks."""
    found = set()
    for task in tx.find(Task, node_id=node_id):
        service = tx.lookup(Service, task.service_id)
        if service is not None:
            found.add((service.spec.name, task.slot, created_ms(task)))
    return found
