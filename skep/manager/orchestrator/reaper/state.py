"""State of the reaper: which slots and services are due, and which of their objects ``history`` no longer needs."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from random import Random
from typing import NewType

from skep.aio.clock import Clock
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.informer import batches_of
from skep.manager.control_loops.loop_driver import Decision, Recheck
from skep.manager.control_loops.work_queue import WorkQueue
from skep.manager.orchestrator.reaper.history import (
    attempts_kept,
    counted_from,
    history_limit,
    is_disposable,
    is_live,
    is_of_gone_slot,
    is_orphaned,
    is_past_attachment,
    surplus_history,
    updating_versions,
)
from skep.manager.orchestrator.reaper.kept_nodes import has_cut_report
from skep.manager.orchestrator.reaper.removals import (
    DeleteService,
    DeleteTask,
    DeleteVersion,
    Orphan,
    Removal,
)
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node
from skep.model.options.labels import VolumeAffinity, volume_affinity
from skep.model.options.slot_volumes import (
    FORGOTTEN_LABEL,
    created_ms,
    forgotten_in,
    had_volumes,
    local_volumes,
    may_be,
    slot_volumes_of,
)
from skep.model.service import ENDED, Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import ZERO_TIME, unix_ns
from skep.store.interface import Commit, Created, Deleted, Updated, View
from skep.store.kinds import (
    SpecVersion,
    as_before_update,
    as_run,
    has_unreadable_run,
    kept_versions,
    unused_versions,
)

Key = NewType("Key", str)
"""A slot (``<service>/<slot or node>``) or a service (its id)."""

VERSIONS_WITH_SERVICE_MAX = 50
"""Spec versions deleted in one transaction with their service.  More versions are deleted before it, one by one."""
RETRY_S = 0.1
"""Seconds until the reaper checks a removed service again whose versions are still being deleted."""

NO_LIMIT = -1
"""Unlimited history, as an argument of ``surplus_history``."""


def unreported(
    slot: Iterable[Task], service: Service, node_of: Callable[[NodeId], Node | None]
) -> dict[TaskId, NodeId]:
    """Return the ended tasks of one slot that must stay until their node has reported their data (decision 159).

    With ``skep.volume-affinity=required``, the tasks of a slot start only where the slot's data is, and the leader
    keeps a lost node that has the data.  At first managers know the location from the slot's tasks, and later from the
    node's report.  A node reports some seconds after a task's start, and managers accept a report only for slots whose
    tasks they have seen (decision 81).  So a slot's last task with data on a node must not be deleted before that
    report.

    Returns the node whose report each task waits for.  There is at most one for each node.  Docker Engines never
    report, so nothing waits for them.
    """
    if not keeps_data(service):
        return {}
    latest: dict[NodeId, Task] = {}
    for task in slot:
        if _has_data(task) and task.created_at >= latest.get(task.node_id, task).created_at:
            latest[task.node_id] = task
    return {
        task.id: id
        for id, task in latest.items()
        if (node := node_of(id)) is not None and not _is_reported(task, service, node)
    }


def keeps_data(service: Service) -> bool:
    """Return whether tasks of the service may have to wait for a report."""
    return service.removed_at is None and volume_affinity(service.spec.labels) is VolumeAffinity.REQUIRED


def _has_data(task: Task) -> bool:
    """Return whether the task has ended and has left local volumes on its node."""
    is_over = bool(task.slot) and task.status.state.is_terminal
    return is_over and had_volumes(task) and bool(local_volumes(task.spec))


def _is_reported(task: Task, service: Service, node: Node) -> bool:
    """Return whether the node's report lists each volume of the task, or never will.  Reports about earlier tasks do
    not count.
    """
    if is_docker_node(node) or has_cut_report(node):
        return True
    at_ms, key = created_ms(task), (service.spec.name, task.shown_slot)
    forgotten = forgotten_in(node.spec.labels.get(FORGOTTEN_LABEL, ""))
    known = {
        one.volume for one in slot_volumes_of(node) if (one.service, one.slot) == key and one.at_ms >= at_ms
    }
    known |= {volume for volume, until_ms in forgotten.items() if until_ms >= at_ms}
    return all(any(may_be(volume, name) for volume in known) for name in local_volumes(task.spec))


class ReaperState:
    """The slots and services that are due, and the slots that wait for a report of their node."""

    def __init__(self, view: Callable[[], View], clock: Clock, random: Random) -> None:
        self._view = view
        self._clock = clock
        self.queue: WorkQueue[Key] = WorkQueue(clock)
        self.failures = Failures(clock, random)
        self._waiting: dict[NodeId, set[Key]] = {}
        """Slots with a task that waits for a report of this node (``unreported``), until the node's next change."""
        self._youngest = ZERO_TIME
        """Creation time of the newest task of an unfinished update at the start of the term."""

    def start(self, snapshot: View) -> Iterator[None]:
        """Queue every service, and the slots that may have something to remove."""
        self._waiting.clear()
        self._youngest = ZERO_TIME
        services = snapshot.find(Service)
        self.queue.add(Key(service.id) for service in services)
        updated = ((service.id, service.update_status) for service in services)
        unfinished = {id for id, status in updated if status is not None and status.state not in ENDED}
        self.queue.add(Key(one.service_id) for one in snapshot.find(SpecVersion))
        yield
        # A slot has nothing to remove without a task that has ended, is not wanted, or has lost its node.
        for tasks in batches_of(self._view, Task):
            node = partial(self._view().lookup, Node)
            self.queue.add(_slot_key(task) for task in tasks if not is_live(task, node(task.node_id)))
            times = (task.created_at for task in tasks if task.service_id in unfinished)
            self._youngest = max((self._youngest, *times), key=unix_ns)
            yield

    def on_commit(self, commit: Commit) -> None:
        """Queue the slots and services that the commit concerns."""
        for event in commit.events:
            match event:
                case Created(Task() as task):
                    self.queue.add((_slot_key(task),))
                case Updated(Task() as old, Task() as new):
                    if old.desired_state != new.desired_state or new.status.state.is_terminal:
                        self.queue.add((_slot_key(new),))
                case Created(Service() as readable):
                    # A new service has no tasks. Tasks of a service that was unreadable are decided now.
                    tasks = self._view().find(Task, service_id=readable.id)
                    self.queue.add(_slot_key(task) for task in tasks)
                case Created(SpecVersion() as version):
                    # A version that was unreadable while its service was deleted may be left: only known versions are
                    # deleted with it.
                    self.queue.add((Key(version.service_id),))
                case Deleted(Task() as task) if task.service_id:
                    self.queue.add((Key(task.service_id),))
                case Updated(Service() as before, Service() as after):
                    if before.removed_at != after.removed_at or kept_versions(before) != kept_versions(after):
                        self.queue.add((Key(after.id),))
                    if keeps_data(before) and not keeps_data(after):
                        tasks = self._view().find(Task, service_id=after.id)
                        self.queue.add(_slot_key(task) for task in tasks)
                case Updated(Node() as old_node, Node() as node) if node.id in self._waiting:
                    if (old_node.description, old_node.spec) != (node.description, node.spec):
                        self.queue.add(self._waiting.pop(node.id))
                case Deleted(Node() as node):
                    self._waiting.pop(node.id, None)
                    tasks = self._view().find(Task, node_id=node.id)
                    self.queue.add(_slot_key(task) for task in tasks)
                case Updated(Swarm() as old_swarm, Swarm() as swarm) if _limit(old_swarm) != _limit(swarm):
                    self.queue.add(_slot_key(task) for task in self._view().find(Task))

    def decide(self, key: Key) -> Decision[Removal]:
        """Return the removals of a slot or a service."""
        view = self._view()
        return list(self._of_slot(view, key) if "/" in key else self._of_service(view, ServiceId(key)))

    def _of_slot(self, view: View, key: Key) -> Iterator[Removal | Recheck]:
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
            limit = history_limit(run, cluster_limit(view))
            kept = [task for task in tasks if task not in disposable]
            iteration = service.job_status.job_iteration if service.job_status is not None else None
            attempts = max(map(attempts_kept, (run, as_before_update(view, run))))
            times = counted_from(service, self._youngest)
            surplus = surplus_history(kept, limit, iteration, updating_versions(service), attempts, times)
            yield from (DeleteTask(task) for task in surplus if task.id not in waiting)

    def _of_service(self, view: View, service_id: ServiceId) -> Iterator[Removal | Recheck]:
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
            yield Recheck(self._clock.monotonic() + RETRY_S)
        if len(versions) > 1:
            yield from map(DeleteVersion, unused_versions(service, versions, tasks))


def _slot_key(task: Task) -> Key:
    """Return the task's key in the store's "slot" index."""
    return Key(f"{task.service_id}/{task.slot or task.node_id}")


def cluster_limit(view: View) -> int | None:
    """Return the history limit of the cluster, ``NO_LIMIT`` if it is unreadable, or None if it has the default."""
    swarms = view.find(Swarm)
    if not swarms and view.unreadable(Swarm):
        return NO_LIMIT
    return _limit(swarms[0]) if swarms else None


def _limit(swarm: Swarm) -> int | None:
    return swarm.spec.orchestration.task_history_retention_limit
