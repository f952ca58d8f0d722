"""How decisions are written: each transaction checks again that its tasks still wait and that their nodes are there."""

from collections.abc import Sequence
from typing import TypeAlias

from msgspec.structs import replace

from skep.manager.scheduler.placement import Assignment, Refusal
from skep.manager.scheduler.requirements import overlays_of
from skep.model.ids import NodeId
from skep.model.network import Network
from skep.model.node import Availability, Node, NodeState
from skep.model.planes import PLANE_OPTION, plane_of, plane_of_node
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.times import Timestamp
from skep.store.interface import Transaction

Decision: TypeAlias = Assignment | Refusal


class DecisionWriter:
    """Writes decisions that were made at one moment."""

    def __init__(self, now: Timestamp) -> None:
        self._now = now
        self._assigned: dict[str, TaskStatus] = {}

    def write_all(self, tx: Transaction, decisions: Sequence[Decision]) -> None:
        """Write several decisions in one transaction."""
        for decision in decisions:
            self.write(tx, decision)

    def write(self, tx: Transaction, decision: Decision) -> None:
        """Write a decision, unless its task or its node changed meanwhile: then a new one is due."""
        task = tx.lookup(Task, decision.task.id)
        if task is None or not is_pending(task):
            return
        match decision:
            case Assignment():
                if not _is_available(tx, decision.node_id) or not _settle_planes(tx, task, decision.node_id):
                    return
                tx.put(
                    replace(
                        task,
                        node_id=decision.node_id,
                        generic_resources=decision.generic_resources,
                        status=self._status(decision.message),
                    )
                )
            case Refusal(_, reason):
                if task.status.err != reason:
                    tx.put(replace(task, status=replace(task.status, err=reason, timestamp=self._now)))

    def _status(self, message: str) -> TaskStatus:
        """One value for all tasks: it is encoded and decoded once."""
        status = self._assigned.get(message)
        if status is None:
            status = TaskStatus(timestamp=self._now, state=TaskState.ASSIGNED, message=message)
            self._assigned[message] = status
        return status


def is_pending(task: Task) -> bool:
    """Whether the task waits for a node."""
    return task.status.state is TaskState.PENDING and task.is_wanted


def _settle_planes(tx: Transaction, task: Task, node_id: NodeId) -> bool:
    """Overlay networks that belong to no data plane yet take the node's; False: one belongs to the other."""
    overlays = list(overlays_of(task)) if task.networks_attachments else ()
    node = tx.lookup(Node, node_id) if overlays else None
    if node is None:
        return True
    plane = plane_of_node(node)
    networks = [tx.rely_on(Network, id) for id in overlays]
    if any(network is not None and plane_of(network) not in ("", plane) for network in networks):
        return False
    for network in networks:
        if network is not None and PLANE_OPTION not in network.driver_state.options:
            options = {**network.driver_state.options, PLANE_OPTION: plane}
            tx.put(replace(network, driver_state=replace(network.driver_state, options=options)))
    return True


def _is_available(tx: Transaction, node_id: NodeId) -> bool:
    node = tx.lookup(Node, node_id)
    return (
        node is not None
        and node.status.state is NodeState.READY
        and node.spec.availability is Availability.ACTIVE
    )
