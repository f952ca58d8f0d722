"""What the dispatcher writes of a node: who holds its session, what it said of itself, whether it is up.

Registering is a write by compare-and-swap: a manager without a quorum cannot take a session, and what the new
owner sends is at least as new as what any manager sent before.
"""

import msgspec

from skep.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from skep.model.addresses import host_of, parsed
from skep.model.encoding import to_json
from skep.model.ids import NodeId, SessionId
from skep.model.node import Node, NodeDescription, NodeSession, NodeState, NodeStatus
from skep.model.planes import DATA_PATH_LABEL, REFUSED_DATA_PATH_LABEL
from skep.model.times import SECOND_NS, timestamp
from skep.store.interface import Transaction

DESCRIPTION_BYTES_MAX = 64 * 1024

RATE_PERIOD_S = 8.0
RATE_MAX = 5
"""Registrations of one node within the period."""
RATE_NODES_MAX = 10_000
"""Nodes remembered before those that were quiet for a period are forgotten."""

HEARTBEAT_FAILURE = "heartbeat failure"
"""Message of a node that is down; SwarmKit's word."""


class SessionInvalid(InvalidArgument):
    """The node has registered again since; an engine registers anew when it hears this."""

    def __init__(self) -> None:
        super().__init__("session invalid")


class NotRegistered(NotFound):
    """This manager knows no session of the node; an engine registers anew when it hears this."""

    def __init__(self) -> None:
        super().__init__("node not registered")


class RegistrationRate:
    """How often each node registers or describes itself, so that one that does nothing else cannot fill the store.

    Source: swarmkit, manager/dispatcher/nodes.go (rateLimitPeriod, rateLimitCount).
    """

    def __init__(self) -> None:
        self._times: dict[NodeId, list[float]] = {}

    def note(self, node_id: NodeId, now: float) -> None:
        """A node registers at ``now`` (monotonic seconds).  Raises: Unavailable: it did so too often."""
        recent = [at for at in self._times.get(node_id, ()) if at > now - RATE_PERIOD_S]
        if len(recent) >= RATE_MAX:
            raise Unavailable(f"node {node_id} registers too often")
        self._times[node_id] = [*recent, now]
        if len(self._times) > RATE_NODES_MAX:
            self._times = {id: times for id, times in self._times.items() if times[-1] > now - RATE_PERIOD_S}


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """A node that wants a session with this manager."""

    node_id: NodeId
    manager_id: NodeId
    session_id: SessionId
    description: NodeDescription
    address: str
    """IP address the node connects from."""


def take_session(tx: Transaction, registration: Registration) -> Node:
    """Make this manager the owner of the node's session; the node counts as ready from now on.

    Raises: PermissionDenied: the node was removed; InvalidArgument: an absurd description.
    """
    _check_description(registration.description)
    # The status counts too: a replica that does not show yet that the node is down would write nothing there.
    node = tx.rely_on(Node, registration.node_id, "session", "status")
    if node is None:
        raise PermissionDenied(f"Permission denied: node {registration.node_id} was removed from the swarm")
    status = NodeStatus(state=NodeState.READY, addr=_reachable(node, registration.address))
    return tx.put(
        msgspec.structs.replace(
            node,
            description=_without_others_address(tx, node.id, status.addr, registration.description),
            status=status,
            silent_since=None,
            silent_together=False,
            session=NodeSession(manager_id=registration.manager_id, session_id=registration.session_id),
        )
    )


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose grace has passed without a heartbeat."""

    node_id: NodeId
    session_id: SessionId
    silent_s: float = 0.0
    """Own time since it was last heard."""
    is_together: bool = False
    """Whether heartbeats of others are missed as well."""


def mark_down(tx: Transaction, silence: Silence, now_ns: int) -> bool:
    """Write that the node is down; gives False when another session speaks for it meanwhile."""
    node = tx.rely_on(Node, silence.node_id, "session")
    if node is None or node.session is None or node.session.session_id != silence.session_id:
        return False
    if node.status.state is not NodeState.DOWN:
        status = NodeStatus(state=NodeState.DOWN, message=HEARTBEAT_FAILURE, addr=node.status.addr)
        since = timestamp(now_ns - round(silence.silent_s * SECOND_NS))
        told = {"silent_since": since, "silent_together": silence.is_together}
        tx.put(msgspec.structs.replace(node, status=status, **told))
    return True


def mark_heard(tx: Transaction, node_id: NodeId, session_id: SessionId) -> None:
    """Take back that the node is down: its heartbeat came while that was being written."""
    node = tx.rely_on(Node, node_id, "session", "status")
    if node is None or node.session is None or node.session.session_id != session_id:
        return
    if node.status.state is NodeState.DOWN:
        status = NodeStatus(state=NodeState.READY, addr=node.status.addr)
        tx.put(msgspec.structs.replace(node, status=status, silent_since=None, silent_together=False))


def require_session(tx: Transaction, node_id: NodeId, session_id: SessionId) -> Node:
    """The node, if ``session_id`` still speaks for it when the transaction commits.

    Raises: SessionInvalid: another manager, or a later session, speaks for the node now.
    """
    node = tx.rely_on(Node, node_id, "session")
    if node is None or node.session is None or node.session.session_id != session_id:
        raise SessionInvalid
    return node


def describe_node(
    tx: Transaction, node_id: NodeId, session_id: SessionId, description: NodeDescription
) -> None:
    """Write what the node says of itself in its session.  Raises: SessionInvalid; InvalidArgument: it is absurd."""
    _check_description(description)
    node = require_session(tx, node_id, session_id)
    description = _without_others_address(tx, node.id, node.status.addr, description)
    tx.put(msgspec.structs.replace(node, description=description))


def _without_others_address(
    tx: Transaction, id: NodeId, connects_from: str, description: NodeDescription
) -> NodeDescription:
    """``description`` whose data-path label is one that is refused, if another node has that address already.

    Two nodes that say so at the same moment are told apart by ``planes.holder``.
    """
    labels = dict(description.engine.labels)
    labels.pop(REFUSED_DATA_PATH_LABEL, None)
    said = labels.get(DATA_PATH_LABEL)
    if said is not None:
        others = [one.id for one in tx.find(Node, underlay=_as_usual(said)) if one.id != id]
        if others and _as_usual(said) != connects_from:
            labels[REFUSED_DATA_PATH_LABEL] = labels.pop(DATA_PATH_LABEL)
    engine = msgspec.structs.replace(description.engine, labels=labels)
    return msgspec.structs.replace(description, engine=engine)


def _as_usual(text: str) -> str:
    try:
        return str(parsed(text))
    except ValueError:
        return text


def _check_description(description: NodeDescription) -> None:
    if len(to_json(description)) > DESCRIPTION_BYTES_MAX:
        raise InvalidArgument("the node's description is too large")


def _reachable(node: Node, address: str) -> str:
    """The address others know the node by; a manager's own agent comes over loopback."""
    is_loopback = address.startswith("127.") or address == "::1"
    if is_loopback and node.manager_status is not None:
        return host_of(node.manager_status.addr) or address
    return address
