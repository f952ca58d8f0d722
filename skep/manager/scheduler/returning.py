"""Lets tasks return to the node where a local volume has their slot's data (label ``skep.volume-affinity``)."""

from collections.abc import Sequence

from msgspec.structs import replace

from skep.manager.scheduler.nodes.accounting import Account, Accounting, holds_resources
from skep.manager.scheduler.nodes.filters import Filter, first_refusing
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.placement import ASSIGNED, Assignment, PlacementRefused, assigned
from skep.manager.services.disruption_budget import starts_first
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import VolumeAffinity, volume_affinity
from skep.model.options.slot_volumes import Home, SlotVolumeIndex, homes_of, local_volumes
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.store.interface import View


class Returning:
    """Decides about tasks whose slot has data in a node's local volume."""

    def __init__(self, accounting: Accounting) -> None:
        self.volumes = SlotVolumeIndex()
        self._accounting = accounting

    def has_home(self, task: Task, view: View) -> bool:
        """Return whether the slot of a pending task has such data and the service's volume affinity is not ``none``."""
        if task.node_id or task.spec_version is None or not local_volumes(task.spec):
            return False
        service = view.lookup(Service, task.service_id)
        return service is not None and any(data_homes(task, service, view, self.volumes))

    def nodes(self, task: Task, view: View) -> Sequence[NodeId]:
        """Return the nodes with such data, the latest data first."""
        service = view.lookup(Service, task.service_id)
        return (
            [one.node_id for one in data_homes(task, service, view, self.volumes)]
            if service is not None
            else ()
        )

    def decide(
        self, task: Task, requirements: Requirements, view: View
    ) -> Assignment | PlacementRefused | str:
        """Assign the task to the node with its data, refuse it with a reason to wait, or return why it starts away from
        its data.

        An empty string means that the slot has no data.  An assignment is reserved in the accounting.
        """
        service = view.lookup(Service, task.service_id)
        if service is None:
            return ""
        found = data_homes(task, service, view, self.volumes)
        is_kept = volume_affinity(service.spec.labels) is VolumeAffinity.REQUIRED
        # The data exists already, even on a disk that is full.
        requirements = replace(requirements, needs_disk=False)
        away = ""
        for home in found:
            account = self._accounting.accounts.get(home.node_id)
            if account is None:
                continue  # a removed node's volumes are given up
            copies = self._accounting.copies(task.service_id)[home.node_id]
            refusing = first_refusing(requirements, account, copies)
            if refusing is None:
                return assigned(task, account, requirements, self._accounting, ASSIGNED)
            words = away_words(task, home, account.node, _why(refusing, requirements, account, copies))
            is_soon_free = not refusing.is_lasting and (
                _frees(task, service, home.node_id, view)
                or account.volumes.is_leaving(requirements.cluster_volumes, home.node_id)
            )
            if is_kept or is_soon_free:
                return PlacementRefused(task, words)
            away = away or words
        return away


def decides_otherwise(before: Service, after: Service) -> bool:
    """Return whether a changed service may return its tasks to other nodes, or let them start away from their data."""
    return volume_affinity(before.spec.labels) is not volume_affinity(after.spec.labels) or (
        starts_first(before) is not starts_first(after)
    )


def data_homes(task: Task, service: Service, view: View, index: SlotVolumeIndex) -> Sequence[Home]:
    """Return the nodes with local volumes of the slot of ``task``, the latest data first."""
    if volume_affinity(service.spec.labels) is VolumeAffinity.NONE:
        return ()
    past = view.find(Task, slot=f"{task.service_id}/{task.slot}")
    return homes_of(task, service.spec.name, past, index)


def _frees(task: Task, service: Service, node_id: NodeId, view: View) -> bool:
    """Return whether an earlier task of the slot will soon release resources of the node.

    A stop-first update or rollback stops it when the new task is refused.  A start-first one never does.
    """
    keeps_wanted = starts_first(service)
    return any(
        other.node_id == node_id and holds_resources(other) and not (other.is_wanted and keeps_wanted)
        for other in view.find(Task, slot=f"{task.service_id}/{task.slot}")
        if other.id != task.id
    )


def _why(filter: Filter, requirements: Requirements, account: Account, copies: int) -> str:
    return absence(account.node) or f": {filter.detail(requirements, account, copies)}"


def absence(node: Node) -> str:
    """Return why ``node`` takes no tasks, like ``, which is down``, or an empty text if it may."""
    if node.status.state is not NodeState.READY:
        return f", which is {node.status.state.value}"
    if node.spec.availability is not Availability.ACTIVE:
        return f", whose availability is {node.spec.availability.value}"
    return ""


def volumes_elsewhere(task: Task, view: View) -> Sequence[tuple[NodeId, str]]:
    """Return the other nodes with volumes of the task's slot, the latest data first, and a sentence about each."""
    service = view.lookup(Service, task.service_id)
    if service is None or not local_volumes(task.spec):
        return ()
    past = view.find(Task, slot=f"{task.service_id}/{task.slot}")
    found = homes_of(task, service.spec.name, past, SlotVolumeIndex(view.find(Node)))
    nodes = ((home, view.lookup(Node, home.node_id)) for home in found)
    return [
        (node.id, away_words(task, home, node, absence(node)))
        for home, node in nodes
        if node is not None and node.id != task.node_id
    ]


def must_wait(task: Task, view: View) -> bool:
    """Return whether the task may only run on the first of these nodes."""
    service = view.lookup(Service, task.service_id)
    return service is not None and volume_affinity(service.spec.labels) is VolumeAffinity.REQUIRED


def away_words(task: Task, home: Home, node: Node, why: str) -> str:
    """Return a text such as ``volume data of slot 2 is on node w1, which is down``."""
    name = node.shown_name
    return f"volume {home.volume} of slot {task.shown_slot} is on node {name}{why}"
