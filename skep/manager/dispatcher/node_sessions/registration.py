"""The parts of a node that the dispatcher writes: its session's owner, its description, and whether it is up.

Registering is a compare-and-swap: a manager without a quorum cannot take a session, and the new owner's messages are at
least as new as the messages of any earlier manager.
"""

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from skep.manager.nodes.revocation import removal_of
from skep.model.networks.addresses import host_of, parsed
from skep.model.networks.data_planes import (
    DATA_PATH_LABEL,
    REFUSED_DATA_PATH_LABEL,
    REFUSED_TUNNEL_LABEL,
    SEEN_NAT_LABEL,
    TUNNEL_LABEL,
    seen_nat,
    tunnel_key_in,
)
from skep.model.node import Node, NodeDescription, NodeState, NodeStatus, SessionOwner
from skep.model.node_reports.description_size import within_size
from skep.model.options.slot_volumes import (
    SLOT_VOLUMES_LABEL,
    SlotVolume,
    created_ms,
    slot_volumes_label,
    slot_volumes_of,
)
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, SessionId
from skep.model.values.times import SECOND_NS, timestamp, unix_ns
from skep.store.interface import Transaction
from skep.store.kinds import Revocation

RATE_PERIOD_S = 8.0
"""Seconds of the period in which registrations are counted."""
RATE_MAX = 5
"""Maximum registrations of one node within the period."""
RATE_NODES_MAX = 10_000
"""Above this number, nodes without a registration in the last period are dropped."""

HEARTBEAT_FAILURE = "heartbeat failure"
"""Message of a node that is down, in SwarmKit's words."""


class SessionInvalid(InvalidArgument):
    """The node has registered again since.  An engine registers again on this error."""

    def __init__(self) -> None:
        super().__init__("session invalid")


class NotRegistered(NotFound):
    """This manager has no session of the node.  An engine registers again on this error."""

    def __init__(self) -> None:
        super().__init__("node not registered")


class RegistrationRate:
    """Limits how often each node registers or describes itself, so that it cannot fill the store.

    Source: swarmkit, manager/dispatcher/nodes.go (rateLimitPeriod, rateLimitCount).
    """

    def __init__(self) -> None:
        self._times: dict[NodeId, list[float]] = {}

    def note(self, node_id: NodeId, now: float) -> None:
        """Record a registration at ``now`` (monotonic seconds).  Raises Unavailable if there are too many."""
        recent = [at for at in self._times.get(node_id, ()) if at > now - RATE_PERIOD_S]
        if len(recent) >= RATE_MAX:
            raise Unavailable(f"node {node_id} registers too often")
        self._times[node_id] = [*recent, now]
        if len(self._times) > RATE_NODES_MAX:
            self._times = {id: times for id, times in self._times.items() if times[-1] > now - RATE_PERIOD_S}


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """A node's request for a session with this manager."""

    node_id: NodeId
    manager_id: NodeId
    session_id: SessionId
    description: NodeDescription
    address: str
    """IP address the node connects from."""


def take_session(tx: Transaction, registration: Registration) -> Node:
    """Make this manager the owner of the node's session, and mark the node ready.

    Raises:
        PermissionDenied: The node was removed, or the store has no such node because it is older than the node.
    """
    # The status counts too: a replica that does not show the node as down yet would write nothing there.
    node = tx.rely_on(Node, registration.node_id, "session", "status")
    if node is None:
        id = registration.node_id
        removal = removal_of(tx.lookup(Revocation, id))
        # A node that stops its containers must know that it was removed: a restored store has no newer nodes either.
        unknown = f"Permission denied: node {id} is not part of the swarm"
        raise PermissionDenied(removal.refusal(id) if removal is not None else unknown)
    status = NodeStatus(state=NodeState.READY, addr=_reachable(node, registration.address))
    return tx.put(
        msgspec.structs.replace(
            node,
            description=_believed(tx, node, status.addr, registration.description),
            status=status,
            silent_since=None,
            silent_together=False,
            session=SessionOwner(manager_id=registration.manager_id, session_id=registration.session_id),
        )
    )


class SilentNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose grace period has passed without a heartbeat."""

    node_id: NodeId
    session_id: SessionId
    silent_s: float = 0.0
    """Own time in seconds since its last heartbeat."""
    with_others: bool = False
    """Whether other nodes miss heartbeats too."""


def mark_down(tx: Transaction, silent_node: SilentNode, now_ns: int) -> bool:
    """Write that the node is down.  Returns False if another session replaced this one meanwhile."""
    node = tx.rely_on(Node, silent_node.node_id, "session")
    if node is None or node.session is None or node.session.session_id != silent_node.session_id:
        return False
    if node.status.state is not NodeState.DOWN:
        status = NodeStatus(state=NodeState.DOWN, message=HEARTBEAT_FAILURE, addr=node.status.addr)
        since_ns = now_ns - round(silent_node.silent_s * SECOND_NS)
        if node.session.contact_at is not None:
            # Nothing was heard since the adoption, so the node may know neither newer labels nor newer tasks.
            since_ns = min(since_ns, unix_ns(node.session.contact_at))
        silence = {"silent_since": timestamp(since_ns), "silent_together": silent_node.with_others}
        tx.put(msgspec.structs.replace(node, status=status, **silence))
    return True


def revert_down(tx: Transaction, node_id: NodeId, session_id: SessionId) -> None:
    """Revert ``mark_down`` after a heartbeat that arrived while it was being written."""
    node = tx.rely_on(Node, node_id, "session", "status")
    if node is None or node.session is None or node.session.session_id != session_id:
        return
    if node.status.state is NodeState.DOWN:
        status = NodeStatus(state=NodeState.READY, addr=node.status.addr)
        tx.put(msgspec.structs.replace(node, status=status, silent_since=None, silent_together=False))


def require_session(tx: Transaction, node_id: NodeId, session_id: SessionId) -> Node:
    """Return the node, if ``session_id`` is still its session when the transaction commits.

    Raises:
        SessionInvalid: Another manager has the session, or the node has a later one.
    """
    node = tx.rely_on(Node, node_id, "session")
    if node is None or node.session is None or node.session.session_id != session_id:
        raise SessionInvalid
    return node


def describe_node(
    tx: Transaction, node_id: NodeId, session_id: SessionId, description: NodeDescription
) -> None:
    """Write a node's description.  Raises SessionInvalid."""
    node = require_session(tx, node_id, session_id)
    description = _believed(tx, node, node.status.addr, description)
    tx.put(msgspec.structs.replace(node, description=description))


def _believed(
    tx: Transaction, node: Node, connects_from: str, description: NodeDescription
) -> NodeDescription:
    """Return ``description`` within its size limit, without claims that a node may not make.

    Nodes cut it to the same size, except for nodes of earlier versions.
    """
    description = with_seen_volumes(tx, node, within_size(description))
    labels = dict(description.engine.labels)
    _refuse_others_address(tx, node.id, connects_from, labels)
    _refuse_others_key(tx, node.id, labels)
    _remember_nat(node, connects_from, labels)
    return replace(description, engine=replace(description.engine, labels=labels))


def _refuse_others_address(tx: Transaction, id: NodeId, connects_from: str, labels: dict[str, str]) -> None:
    """Rename the data-path label if another node already has that address.

    If two nodes announce an address at the same moment, ``planes.holder`` chooses one.
    """
    labels.pop(REFUSED_DATA_PATH_LABEL, None)
    announced = labels.get(DATA_PATH_LABEL)
    if announced is not None:
        others = [one.id for one in tx.find(Node, underlay=_normalized(announced)) if one.id != id]
        if others and _normalized(announced) != connects_from:
            labels[REFUSED_DATA_PATH_LABEL] = labels.pop(DATA_PATH_LABEL)


def _refuse_others_key(tx: Transaction, id: NodeId, labels: dict[str, str]) -> None:
    """Rename the label with the key of tunnels if another node has this key, also while that node is down.

    A key becomes known to others only after it was stored, so whoever is second has copied it.
    """
    labels.pop(REFUSED_TUNNEL_LABEL, None)
    key = tunnel_key_in(labels)
    if key is not None and any(one.id != id for one in tx.find(Node, tunnel_key=key.key.hex())):
        labels[REFUSED_TUNNEL_LABEL] = labels.pop(TUNNEL_LABEL)


def _remember_nat(node: Node, connects_from: str, labels: dict[str, str]) -> None:
    """Set the label with the NAT that managers see, or have seen while the node had its present key.

    It makes a key at each boot.
    """
    labels.pop(SEEN_NAT_LABEL, None)
    before = node.description.engine.labels
    has_same_key = TUNNEL_LABEL in labels and before.get(TUNNEL_LABEL) == labels[TUNNEL_LABEL]
    known = before.get(SEEN_NAT_LABEL, "") if has_same_key else ""
    if nat := seen_nat(labels, connects_from) or known:
        labels[SEEN_NAT_LABEL] = nat


def _normalized(text: str) -> str:
    try:
        return str(parsed(text))
    except ValueError:
        return text


def _reachable(node: Node, address: str) -> str:
    """Return the address at which others reach the node.  A manager's own agent connects over loopback."""
    is_loopback = address.startswith("127.") or address == "::1"
    if is_loopback and node.manager_status is not None:
        return host_of(node.manager_status.addr) or address
    return address


def with_seen_volumes(tx: Transaction, node: Node, description: NodeDescription) -> NodeDescription:
    """Return ``description`` without reports of slots that have had no task on ``node`` (decision 81).

    A slot's task returns to its data, and with ``skep.volume-affinity=required`` runs nowhere else: a node that could
    report any slot would receive its tasks with their secrets, or keep them from running.  For the same reason no use
    of a volume is later than the tasks that a manager knows.
    """
    label = description.engine.labels.get(SLOT_VOLUMES_LABEL, "")
    if not label or label == node.description.engine.labels.get(SLOT_VOLUMES_LABEL):
        return description
    known = {_key(one): one.at_ms for one in slot_volumes_of(node)}
    seen = _seen(tx, node.id)
    kept: dict[tuple[str, str, int], SlotVolume] = {}
    for one in slot_volumes_of(replace(node, description=description)):
        # A use by a task that was removed or never seen counts as one by the task before it.
        times = [at_ms for at_ms in seen.get((one.service, one.slot), ()) if at_ms <= one.at_ms]
        if _key(one) in known:
            times.append(known[_key(one)])
        if times:
            kept[_key(one)] = replace(one, at_ms=max(times))
    labels = dict(description.engine.labels)
    labels[SLOT_VOLUMES_LABEL] = slot_volumes_label(kept.values())
    return replace(description, engine=replace(description.engine, labels=labels))


def _key(one: SlotVolume) -> tuple[str, str, int]:
    return one.volume, one.service, one.slot


def _seen(tx: Transaction, node_id: NodeId) -> dict[tuple[str, int], list[int]]:
    """Return the times of the node's tasks by service and slot.  Tasks of global services have no slot."""
    found: dict[tuple[str, int], list[int]] = {}
    for task in tx.find(Task, node_id=node_id):
        service = tx.lookup(Service, task.service_id)
        if service is not None and task.slot:
            found.setdefault((service.spec.name, task.shown_slot), []).append(created_ms(task))
    return found
