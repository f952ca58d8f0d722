"""Reasons why the leader keeps a lost node in the cluster.

A node that is down may still run its containers and write to its volumes, because perhaps only the managers cannot
reach it.  If the node is removed, its tasks are replaced, its cluster volumes are published elsewhere, and the data in
its local volumes is given up.  A person who runs ``docker node rm --force`` knows that the machine will not return.
The leader cannot know that, so it removes a node only if it is certain that nothing is lost.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from skep.manager.orchestrator.replacement.disconnection import policy_on, replaced_at
from skep.model.node import Node
from skep.model.node_reports.description_size import size_condition
from skep.model.options.labels import OnDisconnect, VolumeAffinity, volume_affinity
from skep.model.options.slot_volumes import (
    FORGOTTEN_LABEL,
    LABEL_CHARACTERS_MAX,
    SLOT_VOLUMES_LABEL,
    forgotten_in,
    local_volumes,
    may_be,
    slot_volumes_of,
)
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import has_unknown_service, specs_in_use

STATUS_PART, PUBLISH_PART = "status", "publish"
_CUT_CHARACTERS = LABEL_CHARACTERS_MAX - 512
"""A label of slot volumes that is longer than this may have been cut, because one word has at most about 350
characters.
"""


class KeptNodes:
    """The reasons in one state of the store.  Volumes are indexed at first use, for all nodes together."""

    def __init__(self, view: View) -> None:
        self._view = view

    def reason(self, node: Node, down_s: float) -> str:
        """Return why ``node`` must stay in the cluster, as a clause, or an empty text if nothing is lost with it.

        Args:
            down_s: Seconds since the node was marked down.  Tasks of a removed node are replaced at once, so the node
                must stay until their disconnect policy allows that.
        """
        reasons = (self._unread(node), self._published(node), self._stored(node), self._tasks(node, down_s))
        return next(filter(None, reasons), "")

    def _unread(self, node: Node) -> str:
        view = self._view
        if node.id in view.unreadable(Node) or STATUS_PART in view.damaged(Node).get(node.id, ()):
            return "its record in the store is unreadable"
        damaged = [id for id, parts in view.damaged(Volume).items() if PUBLISH_PART in parts]
        if volumes := sorted({*damaged, *view.unreadable(Volume)}):
            return f"the store's record of where cluster volume {volumes[0]} is published is unreadable"
        return ""

    def _published(self, node: Node) -> str:
        name = self._volume_on.get(node.id)
        return f"it may still write to cluster volume {name}" if name is not None else ""

    @cached_property
    def _volume_on(self) -> Mapping[NodeId, str]:
        """The name of a cluster volume that the driver may have published on a node, by node."""
        return {
            status.node_id: volume.spec.name
            for volume in self._view.find(Volume)
            for status in volume.publish_status
            if status.may_be_published
        }

    def _stored(self, node: Node) -> str:
        """Return a clause about local volumes of services whose tasks may start nowhere else, even if they have no task
        now.
        """
        forgotten = forgotten_in(node.spec.labels.get(FORGOTTEN_LABEL, ""))
        found = [one for one in slot_volumes_of(node) if one.at_ms > forgotten.get(one.volume, -1)]
        if found and any(
            self._view.lookup(Service, ServiceId(id)) is None for id in self._view.unreadable(Service)
        ):
            return "services cannot be read in the store, and their data may be on it"
        for one in found:
            if any(
                may_be(one.volume, name)
                for name in self._kept_volumes(self._view.find(Service, name=one.service))
            ):
                return f"it has the data of {one.service}.{one.slot} in volume {one.volume}"
        if has_cut_report(node) and any(self._kept_volumes(self._view.find(Service))):
            return "it has more volumes than it can report, and may have the data of any service"
        return ""

    def _kept_volumes(self, services: Iterable[Service]) -> Iterator[str]:
        """Yield the names, perhaps with placeholders, of local volumes to which tasks of the services return."""
        for service in services:
            if volume_affinity(service.spec.labels) is VolumeAffinity.REQUIRED and service.removed_at is None:
                for spec in specs_in_use(self._view, service):
                    yield from local_volumes(spec.task_template)

    def _tasks(self, node: Node, down_s: float) -> str:
        for task in self._view.find(Task, node_id=node.id):
            if has_unknown_service(self._view, task):
                return f"the service of its task {task.id} cannot be read in the store"
            service = self._view.lookup(Service, task.service_id) if task.service_id else None
            if service is None or service.removed_at is not None:
                continue
            policy, name = policy_on(node, service), service.spec.name
            if task.volumes and not task.status.state.is_terminal:
                # This includes volumes that no longer exist, because they may have been removed with force.
                return f"a task of {name} may still write to cluster volume {task.volumes[0].source}"
            if (
                policy.action is OnDisconnect.KEEP
                or volume_affinity(service.spec.labels) is VolumeAffinity.REQUIRED
            ):
                return f"tasks of {name} stay on it (skep.on-disconnect, skep.volume-affinity)"
            if not task.status.state.is_terminal and replaced_at(policy, task, 0.0) > down_s:
                return f"its tasks of {name} are not replaced yet (skep.on-disconnect-delay)"
        return ""


def has_cut_report(node: Node) -> bool:
    """Return whether the node may have more volumes with data than its report lists."""
    label = node.description.engine.labels.get(SLOT_VOLUMES_LABEL, "")
    return len(label) > _CUT_CHARACTERS or bool(size_condition(node.description))
