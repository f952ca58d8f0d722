"""Writes decisions.  Each transaction checks again that its tasks are pending and that their nodes exist."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from msgspec.structs import replace

from skep.errors import SkepError, Unavailable, Unreadable
from skep.manager.control_loops.failures import ERROR_CHARACTERS_MAX, write_each
from skep.manager.scheduler.nodes.accounting import holds_resources
from skep.manager.scheduler.nodes.requirements import overlays_of
from skep.manager.scheduler.nodes.volumes import still_fits
from skep.manager.scheduler.placement import Assignment, PlacementRefused
from skep.manager.scheduler.preemption.preemption import Preempt, is_leaving
from skep.manager.services.freezes import is_held_at_commit, stack_of_service
from skep.model.network import Network
from skep.model.networks.data_planes import PLANE_OPTION, plane_of, plane_of_node
from skep.model.node import Node, takes_tasks
from skep.model.service import Service
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.values.ids import NetworkId
from skep.model.values.times import Timestamp
from skep.model.volume import Volume
from skep.store.interface import Transaction, Updates, View
from skep.store.keys import HEAD
from skep.store.transactions.updates import batched

Decision: TypeAlias = Assignment | PlacementRefused | Preempt

TOGETHER = 50
"""Largest number of decisions in one transaction.

It follows from ``MAX_OPERATIONS``.  Each decision takes two keys, and the transaction also sets the data planes of
networks.
"""


async def write_decisions(
    term: Updates, decisions: Sequence[Decision], now: Timestamp
) -> list[SkepError | None]:
    """Write ``TOGETHER`` decisions per transaction, or one by one if their transaction is refused.

    A bad decision (a task that cannot be encoded, a transaction that is too large) must not delay the others.
    """
    writer = DecisionWriter(now)
    results = await write_each(term, writer.write_all, list(batched(decisions, TOGETHER)))
    written: list[SkepError | None] = []
    for together, result in zip(batched(decisions, TOGETHER), results, strict=True):
        is_refused = isinstance(result, Unreadable) or not isinstance(result, Unavailable)
        if isinstance(result, SkepError) and is_refused and len(together) > 1:
            written += await write_each(term, writer.write, together)
        else:
            written += [result] * len(together)
    return written


class DecisionWriter:
    """Writes decisions that were made at the same time."""

    def __init__(self, now: Timestamp) -> None:
        self._now = now
        self._assigned: dict[str, TaskStatus] = {}
        self._planes: _Planes | None = None
        """Data planes in the current transaction."""

    def write_all(self, tx: Transaction, decisions: Sequence[Decision]) -> None:
        """Write several decisions in one transaction."""
        for decision in decisions:
            self.write(tx, decision)

    def write(self, tx: Transaction, decision: Decision) -> None:
        """Write a decision, unless its task or node changed meanwhile.  A new decision then follows."""
        task = tx.lookup(Task, decision.task.id)
        if task is None or not is_pending(task):
            return
        match decision:
            case Assignment():
                node = tx.lookup(Node, decision.node_id)
                if node is None or not takes_tasks(node):
                    return
                if not all(still_fits(tx.rely_on(Volume, one.id), node.id) for one in decision.volumes):
                    return
                if task.networks_attachments and not self._settle_planes(tx, task, node):
                    return
                tx.put(
                    replace(
                        task,
                        node_id=decision.node_id,
                        generic_resources=decision.generic_resources,
                        volumes=decision.volumes,
                        placement_record=decision.record,
                        status=self._status(decision.message),
                    )
                )
            case PlacementRefused(_, reason):
                reason = reason[:ERROR_CHARACTERS_MAX]
                if task.status.err != reason:
                    tx.put(replace(task, status=replace(task.status, err=reason, timestamp=self._now)))
            case Preempt(_, ids, preemption):
                # The commit compares the task, because its victims need not stop if it is removed at the same time.
                tx.rely_on(Task, task.id, HEAD)
                victims = [victim for id in ids if (victim := tx.lookup(Task, id)) and not is_leaving(victim)]
                if len(victims) < len(ids):
                    return  # a new decision may need fewer victims
                services = {victim.service_id: tx.lookup(Service, victim.service_id) for victim in victims}
                if any(is_held_at_commit(tx, stack_of_service(service)) for service in services.values()):
                    return  # a freeze has begun
                for victim in victims:
                    tx.put(replace(victim, preemption=preemption))

    def _settle_planes(self, tx: Transaction, task: Task, node: Node) -> bool:
        if self._planes is None or self._planes.tx is not tx:
            self._planes = _Planes(tx)
        return self._planes.settle(task.networks_attachments, node)

    def _status(self, message: str) -> TaskStatus:
        """Return one status value for all tasks, so that it is encoded and decoded once."""
        status = self._assigned.get(message)
        if status is None:
            status = TaskStatus(timestamp=self._now, state=TaskState.ASSIGNED, message=message)
            self._assigned[message] = status
        return status


def is_pending(task: Task) -> bool:
    """Return whether the task waits for a node."""
    return task.status.state is TaskState.PENDING and task.is_wanted


def is_already_shown(decision: Assignment | PlacementRefused) -> bool:
    """Return whether the task already shows this refusal."""
    return isinstance(decision, PlacementRefused) and decision.task.status.err == decision.reason


def shows(view: View, decision: Assignment) -> bool:
    """Return whether the store shows an assignment exactly as decided, so that the accounting is up to date."""
    task = view.lookup(Task, decision.task.id)
    return (
        task is not None
        and task.node_id == decision.node_id
        and task.desired_state is decision.task.desired_state
        and holds_resources(task)
    )


class _Planes:
    """Data planes of overlay networks, as one transaction sets them."""

    def __init__(self, tx: Transaction) -> None:
        self.tx = tx
        self._last: tuple[tuple[NetworkAttachment, ...], str, bool] | None = None

    def settle(self, attachments: tuple[NetworkAttachment, ...], node: Node) -> bool:
        """Set the node's plane on overlay networks that have none yet.  Returns False if one has the other plane.

        The last result is cached, because tasks with the same attachments often follow each other.
        """
        plane = plane_of_node(node)
        if self._last is not None:
            known, known_plane, is_settled = self._last
            if known is attachments and known_plane == plane:
                return is_settled
        is_settled = self._settled(overlays_of(attachments), plane)
        self._last = attachments, plane, is_settled
        return is_settled

    def _settled(self, overlays: Iterable[NetworkId], plane: str) -> bool:
        networks = [self.tx.rely_on(Network, id) for id in overlays]
        if any(network is not None and plane_of(network) not in ("", plane) for network in networks):
            return False
        for network in networks:
            if network is not None and PLANE_OPTION not in network.driver_state.options:
                options = {**network.driver_state.options, PLANE_OPTION: plane}
                self.tx.put(replace(network, driver_state=replace(network.driver_state, options=options)))
        return True
