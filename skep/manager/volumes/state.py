"""State of the loop for cluster volumes: which nodes need which volumes, and which steps have to wait."""

from collections.abc import Callable, Iterator, Sequence
from random import Random

import msgspec

from skep.aio.clock import Clock
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.work_queue import WorkQueue
from skep.manager.nodes.revocation import removal_of
from skep.manager.services.volume_index import VolumeIndex
from skep.manager.volumes.steps import Delete, Step, Unpublish, removal_wait_s
from skep.model.node import Node
from skep.model.task import Task
from skep.model.values.ids import NodeId, TaskId, VolumeId
from skep.model.volume import Volume
from skep.store.interface import Commit, Created, Deleted, Updated, View
from skep.store.kinds import Revocation

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
"""Limits of the delay before a failed step is repeated."""
SETTLED_S = 60.0
"""Seconds after the beginning of a term from which on no call of an earlier leader can be in progress."""
_STOPPING = "waiting until the removed node has stopped its containers"
_HELD = "waiting until no call of an earlier leader can be in progress"


class Wait(msgspec.Struct, frozen=True):
    """A step that may not be carried out yet."""

    reason: str
    until: float


class VolumesState:
    """The volumes that may need a step, and the nodes whose tasks use them.

    In the first ``SETTLED_S`` of a term it undoes nothing for the volumes that existed before: it may safely repeat a
    creation or publication that an earlier leader may have in progress, but not delete or unpublish.
    """

    def __init__(self, view: Callable[[], View], clock: Clock, random: Random) -> None:
        self._view = view
        self._clock = clock
        self.queue: WorkQueue[VolumeId] = WorkQueue(clock)
        self.failures = Failures(clock, random, FIRST_RETRY_S, LONGEST_RETRY_S)
        self._by_node = VolumeIndex()
        self._users: dict[VolumeId, dict[TaskId, NodeId]] = {}
        """Tasks that use each volume, with their nodes."""
        self._inherited: frozenset[VolumeId] | None = None
        """Volumes for which an earlier leader's calls may be in progress, or None before the first snapshot."""
        self._settled_at = 0.0
        self._stopped_at: dict[tuple[VolumeId, NodeId], float] = {}
        """When the removed nodes that hold volumes will have stopped their containers, in monotonic seconds."""
        self.doubted: set[VolumeId] = set()
        """Volumes that all nodes were asked to unpublish.

        That happens once per term, since a driver may refuse for other reasons."""

    def start(self, snapshot: View) -> Iterator[None]:
        """Queue every volume."""
        volumes = snapshot.find(Volume)
        if self._inherited is None:
            self._inherited = frozenset(volume.id for volume in volumes)
            self._settled_at = self._clock.monotonic() + SETTLED_S
        self._users.clear()
        for task in snapshot.find(Task) if volumes else ():
            self._enter(task)
        self._by_node.reset(volumes)
        self.queue.add(volume.id for volume in volumes)
        yield

    def on_commit(self, commit: Commit) -> None:
        """Queue the volumes that need a step because of the commit."""
        for event in commit.events:
            match event:
                case Updated(Task() as old, Task() as new):
                    if old.volumes or new.volumes:
                        self._leave(old)
                        self._enter(new)
                case Deleted(Task() as task):
                    self._leave(task)
                case Updated(Volume() as old, Volume() as new):
                    self._forget(old, but=new)
                    self._by_node.change(old, new)
                    if _decides(old) != _decides(new):
                        self.queue.add((new.id,))
                case Deleted(Volume() as volume):
                    self._forget(volume)
                    self._by_node.change(volume, None)
                    self.failures.clear(volume.id)
                    self.doubted.discard(volume.id)
                case Updated(Node() as old, Node() as new):
                    if old.status.state is not new.status.state or _drivers_of(old) != _drivers_of(new):
                        self.queue.add(self._by_node.on(new.id))
                case Deleted(Node() as node):
                    self.queue.add(self._by_node.on(node.id))
                case Created(Task() as task):
                    self._enter(task)
                case Created(Volume() as volume):
                    self._by_node.change(None, volume)
                    self.queue.add((volume.id,))

    def _enter(self, task: Task) -> None:
        if task.volumes and task.node_id and not task.status.state.is_terminal:
            for attachment in task.volumes:
                self._users.setdefault(VolumeId(attachment.id), {})[task.id] = task.node_id
                self.queue.add((VolumeId(attachment.id),))

    def _leave(self, task: Task) -> None:
        for attachment in task.volumes:
            id = VolumeId(attachment.id)
            users = self._users.get(id, {})
            if users.pop(task.id, None) is not None:
                self.queue.add((id,))
                if not users:
                    del self._users[id]

    def needed_on(self, id: VolumeId) -> frozenset[NodeId]:
        """Return the nodes whose tasks use the volume."""
        return frozenset(self._users.get(id, {}).values())

    def wait_of(self, step: Step, volume: Volume) -> Wait | None:
        """Return why a step has to wait, or None if it may be carried out now.

        It waits if it undoes something that an earlier leader may be doing, or takes a volume from a removed node that
        may still write to it.
        """
        now, is_inherited = self._clock.monotonic(), volume.id in (self._inherited or ())
        if is_inherited and now < self._settled_at and isinstance(step, Delete | Unpublish):
            return Wait(_HELD, self._settled_at)
        revocation = self._view().lookup(Revocation, step.node_id) if isinstance(step, Unpublish) else None
        wait_s = removal_wait_s(step, volume, removal_of(revocation), self._clock.now_ns())
        if not isinstance(step, Unpublish) or not wait_s:
            return None
        # Only the first look compares wall clocks: with a clock that was set back, each look would find the whole wait.
        stopped_at = self._stopped_at.setdefault((volume.id, step.node_id), now + wait_s)
        return Wait(_STOPPING, stopped_at) if now < stopped_at else None

    def _forget(self, volume: Volume, but: Volume | None = None) -> None:
        """Forget the waits for nodes that ``volume`` has entries for, unless ``but`` has them too."""
        for status in volume.publish_status:
            if but is None or but.status_on(status.node_id) is None:
                self._stopped_at.pop((volume.id, status.node_id), None)


def _decides(volume: Volume) -> tuple[object, ...]:
    """Return the inputs of decisions about the volume, without messages, so that failures are retried with a delay."""
    entries: Sequence[object] = [(one.node_id, one.state, one.is_closing) for one in volume.publish_status]
    return volume.pending_delete, volume.info, tuple(entries)


def _drivers_of(node: Node) -> tuple[object, ...]:
    return node.description.csi_info
