"""Tasks return to the local volumes of their slots (decision 78)."""

from collections.abc import Callable, Collection, Iterator
from math import inf

from sim.invariants.nodes.placement import could_take, has_left_data
from sim.world.committed import Change
from skep.model.node import Node
from skep.model.options.labels import VolumeAffinity, volume_affinity
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, TaskId
from skep.model.volume import Volume, VolumeScope
from skep.store.interface import Created, Deleted, Updated, View

UNNOTICED_S = 10.0
"""A leader whose replica lags may not show newer changes."""
FREED_S = 1.0
"""Time for which a leader may not show that another slot's task has ended.  A longer time would exempt most
placements.
"""


class LocalVolumesStay:
    """A task gets a node that has a volume of its slot, according to the slot's tasks in the store.

    With ``keep`` it gets no other node.  With ``return``, the default, it gets another node only if none of these nodes
    can have tasks.
    """

    def __init__(self, unreadable: Callable[[], Collection[NodeId]] = tuple) -> None:
        """``unreadable`` returns the nodes whose values are damaged on some manager's disk."""
        self._unreadable = unreadable
        self._since: dict[TaskId, float] = {}
        """Time at which a task got its volumes."""
        self._able: dict[NodeId, float] = {}
        """Time since which a node has been in its current state."""
        self._freed: dict[NodeId, tuple[float, str]] = {}
        """Time at which the last task on a node ended, and its slot."""

    def __call__(self, change: Change, view: View) -> Iterator[str]:
        for event in change.events:
            match event:
                case Created(Node() as node):
                    self._able[node.id] = change.time_s
                case Updated(Node() as old, Node() as node) if (
                    old.status.state is not node.status.state or old.spec != node.spec
                ):
                    self._able[node.id] = change.time_s
                case Updated(Task() as old, Task() as task):
                    state = task.status.state
                    if state.is_terminal and not old.status.state.is_terminal:
                        self._freed[task.node_id] = change.time_s, _slot(task)
                    if has_left_data(task):
                        self._since.setdefault(task.id, change.time_s)
                    if not old.node_id and task.node_id and task.slot:
                        yield from self._misplaced(task, change.time_s, view)
                case Deleted(Task() as task):
                    self._since.pop(task.id, None)

    def _misplaced(self, task: Task, now: float, view: View) -> Iterator[str]:
        service, names = view.lookup(Service, task.service_id), _volumes(task)
        policy = volume_affinity(service.spec.labels) if service is not None else VolumeAffinity.NONE
        if service is None or policy is VolumeAffinity.NONE or not names:
            return
        homes = {
            other.node_id
            for other in view.find(Task, slot=f"{task.service_id}/{task.slot}")
            if other.id != task.id
            and names & _volumes(other)
            and self._since.get(other.id, inf) + UNNOTICED_S <= now
            and view.lookup(Node, other.node_id) is not None
        }
        if policy is VolumeAffinity.PREFERRED:
            homes = {
                id
                for id in homes
                if self._could_have_it(view.get(Node, id), task, service, now, view)
                and not self._was_just_freed(id, task, now)
            }
        if homes and task.node_id not in self._homes_of_any_age(task, names, view):
            yield (
                f"task {task.id} of {service.spec.name} got {task.node_id}: its volumes are on {sorted(homes)}"
            )

    def _homes_of_any_age(self, task: Task, names: set[str], view: View) -> set[NodeId]:
        return {
            other.node_id
            for other in view.find(Task, slot=f"{task.service_id}/{task.slot}")
            if other.id != task.id and names & _volumes(other) and other.id in self._since
        }

    def _was_just_freed(self, id: NodeId, task: Task, now: float) -> bool:
        """Return whether another slot's task has just ended, so that the leader may have considered the node full."""
        at, slot = self._freed.get(id, (-inf, ""))
        return slot != _slot(task) and now - at < FREED_S

    def _could_have_it(self, node: Node, task: Task, service: Service, now: float, view: View) -> bool:
        is_settled = self._able.get(node.id, -inf) + UNNOTICED_S <= now
        return (
            is_settled
            and node.id not in self._unreadable()  # the leader may not know whether it is ready
            and could_take(node, task, service, view)
            and not _is_published_elsewhere(task, node, view)
        )


Stored = set[tuple[str, str, int]]
"""Names of local volumes on a machine's disk, with the service and slot that their data belongs to."""


class OnlyCopiesStay:
    """The leader never removes a node with the only data of a slot whose tasks have to return to that data."""

    def __init__(self, stored: Callable[[NodeId], Stored], is_requested: Callable[[NodeId], bool]) -> None:
        """Observe removals of nodes.

        Args:
            stored: returns the volumes on the disk of a node's machine.
            is_requested: returns whether an operator requested the removal of a node.
        """
        self._stored = stored
        self._is_requested = is_requested

    def __call__(self, change: Change, view: View) -> Iterator[str]:
        for event in change.events:
            match event:
                case Deleted(Node() as node) if not self._is_requested(node.id):
                    yield from self._lost_with(node.id, view)

    def _lost_with(self, id: NodeId, view: View) -> Iterator[str]:
        elsewhere: Stored = set().union(*(self._stored(node.id) for node in view.find(Node)))
        for volume, name, slot in sorted(self._stored(id) - elsewhere):
            for service in view.find(Service, name=name):
                if (
                    service.removed_at is None
                    and volume_affinity(service.spec.labels) is VolumeAffinity.REQUIRED
                ):
                    yield f"{id} was removed, which has the only data of {name}.{slot} in {volume}"


def _is_published_elsewhere(task: Task, node: Node, view: View) -> bool:
    """Return whether the task needs a cluster volume for one node that is still published on another node."""
    container = task.spec.container_spec
    needed = (
        {one.source for one in container.mounts if one.type == "cluster"} if container is not None else ()
    )
    return any(
        one.spec.name in needed
        and one.spec.access_mode.scope is VolumeScope.SINGLE
        and any(entry.node_id != node.id for entry in one.publish_status)
        for one in view.find(Volume)
    )


def _slot(task: Task) -> str:
    """Return the task's key in the schema's index "slot"."""
    return f"{task.service_id}/{task.slot or task.node_id}"


def _volumes(task: Task) -> set[str]:
    """Return the names of the task's volumes of the driver ``local``."""
    container = task.spec.container_spec
    mounts = container.mounts if container is not None else ()
    return {
        one.source for one in mounts if one.type == "volume" and one.source and one.volume_options is None
    }
