"""The reaper's loop: deletes the objects that ``history`` no longer needs."""

from collections.abc import Iterable, Iterator
from functools import partial
from random import Random
from typing import NewType, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices, run_in_slices
from skep.manager.failures import Failures, write_each
from skep.manager.informer import batches_of, run_informer
from skep.manager.orchestrator.reaper.history import (
    attempts_kept,
    history_limit,
    is_disposable,
    is_live,
    is_of_gone_slot,
    is_orphaned,
    is_past_attachment,
    surplus_history,
    unused_versions,
)
from skep.manager.orchestrator.reaper.unreported import keeps_data, unreported
from skep.manager.work_queue import WorkQueue
from skep.model.ids import IdSource, NodeId, ServiceId
from skep.model.meta import Version
from skep.model.node import Node
from skep.model.service import UNDER_WAY, Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.task_end import EndCause, TaskEnd
from skep.model.times import Timestamp, timestamp
from skep.store.interface import Commit, Created, Deleted, LoopStore, Transaction, Updated, View
from skep.store.kinds import SpecVersion, as_run, has_unreadable_run, has_unreadable_status

BATCH = 500
"""Slots and services decided before their changes are committed together."""

Key = NewType("Key", str)
"""A slot (``<service>/<slot or node>``) or a service (its id)."""


VERSIONS_WITH_SERVICE_MAX = 50
"""Spec versions deleted in one transaction with their service.  More versions are deleted before it, one by one."""
RETRY_S = 0.1
"""Seconds until the reaper checks a removed service again whose versions are still being deleted."""

NO_LIMIT = -1
"""Unlimited history, as an argument of ``surplus_history``."""


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


class Reaper:
    """Keeps task history within its limit, and deletes objects that users have removed."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._queue: WorkQueue[Key] = WorkQueue(clock)
        self._failures = Failures(clock, random)
        self._loading: Iterator[None] = iter(())
        self._waiting: dict[NodeId, set[Key]] = {}
        """Slots with a task that waits for a report of this node (``unreported``), until the node's next change."""

    async def run(self) -> None:
        """Delete until cancelled.  Runs on the leader only."""
        kinds = (Service, Task, Node, Swarm, SpecVersion)
        await run_informer(
            self._term, kinds, on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, snapshot: View) -> None:
        self._waiting.clear()
        self._queue.add(Key(service.id) for service in snapshot.find(Service))
        self._queue.add(Key(one.service_id) for one in snapshot.find(SpecVersion))
        self._loading = self._load()

    def _load(self) -> Iterator[None]:
        # A slot has nothing to remove without a task that has ended, is not wanted, or has lost its node.
        for tasks in batches_of(self._term.view, Task):
            node = partial(self._term.view().lookup, Node)
            self._queue.add(_slot_key(task) for task in tasks if not is_live(task, node(task.node_id)))
            yield

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Task() as task):
                    self._queue.add((_slot_key(task),))
                case Updated(Task() as old, Task() as new):
                    if old.desired_state != new.desired_state or new.status.state.is_terminal:
                        self._queue.add((_slot_key(new),))
                case Created(Service() as readable):
                    # A new service has no tasks. Tasks of a service that was unreadable are decided now.
                    tasks = self._term.view().find(Task, service_id=readable.id)
                    self._queue.add(_slot_key(task) for task in tasks)
                case Created(SpecVersion() as version):
                    # A version that was unreadable while its service was deleted may be left: only known versions are
                    # deleted with it.
                    self._queue.add((Key(version.service_id),))
                case Deleted(Task() as task) if task.service_id:
                    self._queue.add((Key(task.service_id),))
                case Updated(Service() as before, Service() as after):
                    if before.removed_at != after.removed_at or before.spec_version != after.spec_version:
                        self._queue.add((Key(after.id),))
                    if keeps_data(before) and not keeps_data(after):
                        tasks = self._term.view().find(Task, service_id=after.id)
                        self._queue.add(_slot_key(task) for task in tasks)
                case Updated(Node() as old_node, Node() as node) if node.id in self._waiting:
                    if (old_node.description, old_node.spec) != (node.description, node.spec):
                        self._queue.add(self._waiting.pop(node.id))
                case Deleted(Node() as node):
                    self._waiting.pop(node.id, None)
                    tasks = self._term.view().find(Task, node_id=node.id)
                    self._queue.add(_slot_key(task) for task in tasks)
                case Updated(Swarm() as old_swarm, Swarm() as swarm) if _limit(old_swarm) != _limit(swarm):
                    self._queue.add(_slot_key(task) for task in self._term.view().find(Task))

    async def _work(self) -> None:
        await run_in_slices(self._loading, self._clock)
        while True:
            removals: list[tuple[Key, Removal]] = []
            due = await self._queue.take(BATCH)
            slices = TimeSlices(self._clock)
            for key in due:
                await slices.yield_if_due()
                with self._failures.caught(key):
                    removals += [(key, removal) for removal in self._removals(key)]
                if (failure := self._failures.of(key)) is not None:
                    self._queue.add_at(key, failure.retry_at)
            await self._commit(removals)

    def _removals(self, key: Key) -> list[Removal]:
        view = self._term.view()
        return list(self._of_slot(view, key) if "/" in key else self._of_service(view, ServiceId(key)))

    def _of_slot(self, view: View, key: Key) -> Iterable[Removal]:
        tasks = view.find(Task, slot=key)
        for task in tasks:
            node = view.lookup(Node, task.node_id)
            if is_orphaned(task, node) and not is_past_attachment(task, node):
                yield Orphan(task)
        service_id = ServiceId(key.partition("/")[0])
        service = view.lookup(Service, service_id)
        if service is None and service_id in view.unreadable(Service):
            return  # whether the data of its tasks must be kept is not known
        waiting = unreported(tasks, service, partial(view.lookup, Node)) if service is not None else {}
        for node_id in waiting.values():
            self._waiting.setdefault(node_id, set()).add(key)
        disposable = [
            task
            for task in tasks
            if (is_disposable(task) and task.id not in waiting)
            or is_past_attachment(task, node := view.lookup(Node, task.node_id))
            or is_of_gone_slot(task, node)
        ]
        yield from map(DeleteTask, disposable)
        # Without a readable run its completed tasks are unknown, and deleting them would run them once more.
        if service is not None and not has_unreadable_run(view, service.id):
            run = as_run(view, service)
            limit = history_limit(run, _cluster_limit(view))
            kept = [task for task in tasks if task not in disposable]
            iteration = service.job_status.job_iteration if service.job_status is not None else None
            surplus = surplus_history(kept, limit, iteration, _updating(service), attempts_kept(run))
            yield from (DeleteTask(task) for task in surplus if task.id not in waiting)

    def _of_service(self, view: View, service_id: ServiceId) -> Iterable[Removal]:
        service = view.lookup(Service, service_id)
        versions = view.find(SpecVersion, service_id=service_id)
        if service is None:
            if service_id not in view.unreadable(Service):
                yield from map(DeleteVersion, versions)
            return
        if service.removed_at is None and len(versions) <= 1:
            return
        tasks = view.find(Task, service_id=service_id)
        if service.removed_at is not None and not tasks:
            if len(versions) <= VERSIONS_WITH_SERVICE_MAX:
                yield DeleteService(service)
                return
            self._queue.add_at(Key(service_id), self._clock.monotonic() + RETRY_S)
        if len(versions) > 1:
            yield from map(DeleteVersion, unused_versions(service, versions, tasks))

    async def _commit(self, removals: list[tuple[Key, Removal]]) -> None:
        """Write each removal in its own transaction, in as few raft entries as possible."""
        if not removals:
            return
        now = timestamp(self._clock.now_ns())

        def write(tx: Transaction, removal: Removal) -> None:
            _write(tx, removal, now)

        results = await write_each(self._term, write, [removal for _, removal in removals])
        keys = [key for key, _ in removals]
        self._failures.requeue_failed(self._queue, "removals", zip(keys, results, strict=True))


def _write(tx: Transaction, removal: Removal, now: Timestamp) -> None:
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
                tx.delete(Service, service.id)
        case DeleteVersion(version):
            owner = tx.lookup(Service, version.service_id)
            tasks = tx.find(Task, service_id=version.service_id)
            is_left = owner is None and version.service_id not in tx.unreadable(Service)
            if tx.lookup(SpecVersion, version.id) is None:
                return
            if is_left or (owner is not None and version in unused_versions(owner, (version,), tasks)):
                tx.delete(SpecVersion, version.id)


def _slot_key(task: Task) -> Key:
    """Return the task's key in the store's "slot" index."""
    return Key(f"{task.service_id}/{task.slot or task.node_id}")


def _updating(service: Service) -> Version | None:
    status = service.update_status
    return service.spec_version if status is not None and status.state in UNDER_WAY else None


def _cluster_limit(view: View) -> int | None:
    swarms = view.find(Swarm)
    if not swarms and view.unreadable(Swarm):
        return NO_LIMIT
    return _limit(swarms[0]) if swarms else None


def _limit(swarm: Swarm) -> int | None:
    return swarm.spec.orchestration.task_history_retention_limit
