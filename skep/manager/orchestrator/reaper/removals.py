"""Removals: what the reaper writes, and under which conditions it still does when it writes."""

from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from skep.manager.orchestrator.reaper.history import is_orphaned
from skep.manager.services.spec_history import forget_specs
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.task_end import EndCause, TaskEnd
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction
from skep.store.kinds import SpecVersion, has_unreadable_status, unused_versions


class Orphan(msgspec.Struct, frozen=True):
    """Set a task's final state because its node was removed and no agent will report it."""

    task: Task


class DeleteTask(msgspec.Struct, frozen=True):
    """Delete a task that exceeds the history limit or was removed."""

    task: Task


class DeleteService(msgspec.Struct, frozen=True):
    """Delete a service that was removed and has no tasks left."""

    service: Service


class DeleteVersion(msgspec.Struct, frozen=True):
    """Delete a spec version that no task refers to."""

    version: SpecVersion


Removal: TypeAlias = Orphan | DeleteTask | DeleteService | DeleteVersion


def write(tx: Transaction, removal: Removal, now: Timestamp) -> None:
    """Write a removal, unless its preconditions no longer hold."""
    match removal:
        case Orphan(wanted):
            task = tx.lookup(Task, wanted.id)
            if task is None or has_unreadable_status(tx, task):
                return  # the manager that can read the status knows how it ended
            if is_orphaned(task, tx.lookup(Node, task.node_id)):
                message = "Task belonged to a node that has been deleted"
                status = TaskStatus(
                    timestamp=now,
                    state=TaskState.ORPHANED,
                    message=message,
                    end=TaskEnd(cause=EndCause.NODE_LOST.value),
                )
                tx.put(replace(task, status=status))
        case DeleteTask(wanted):
            if tx.lookup(Task, wanted.id) is not None:
                tx.delete(Task, wanted.id)
        case DeleteService(service):
            current = tx.rely_on(Service, service.id)
            has_tasks = bool(tx.find(Task, service_id=service.id))
            if current is not None and current.removed_at is not None and not has_tasks:
                forget_specs(
                    tx, service.id
                )  # an older manager may have removed the service, and does not know them
                tx.delete(Service, service.id)
        case DeleteVersion(version):
            owner = tx.lookup(Service, version.service_id)
            tasks = tx.find(Task, service_id=version.service_id)
            is_left = owner is None and version.service_id not in tx.unreadable(Service)
            if tx.lookup(SpecVersion, version.id) is None:
                return
            if is_left or (owner is not None and version in unused_versions(owner, (version,), tasks)):
                tx.delete(SpecVersion, version.id)
