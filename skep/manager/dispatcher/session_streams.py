"""Session streams: each sends a node its own object, the managers and the trusted roots, again after every change."""

from collections.abc import AsyncIterator, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

from skep.manager.dispatcher.node_sessions.balancing import Balancing
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer, session_message
from skep.manager.dispatcher.node_sessions.registrar import Registrar
from skep.manager.dispatcher.node_sessions.registration import NotRegistered
from skep.manager.dispatcher.state import DispatcherState
from skep.model.networks.data_planes import is_docker_node
from skep.model.networks.gossip import GossipKey, decoded_keys
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.store.interface import Store, View
from skep.store.kinds import GOSSIP_KEYS_ID, Payload
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.service import Handler, server_stream


class SessionContents(NamedTuple):
    """Data of a session message, in the order of ``session_message``."""

    node: Node
    swarm: Swarm
    managers: Sequence[ManagerPeer]
    keys: tuple[GossipKey, ...]
    weights: Mapping[NodeId, int]


def contents_for(
    node_id: NodeId, view: View, managers: Sequence[ManagerPeer], weights: Mapping[NodeId, int]
) -> SessionContents | None:
    """Return the data for a node, or None while the leader is about to create keys or a root that the node needs.

    An engine without keys gossips in clear, and an engine without a root trusts no manager.

    Raises:
        NotRegistered: The node or the cluster was removed.
    """
    node, swarm = view.lookup(Node, node_id), _swarm_of(view)
    if node is None or swarm is None:
        raise NotRegistered
    keys: tuple[GossipKey, ...] = ()
    if is_docker_node(node):
        stored = view.lookup(Payload, GOSSIP_KEYS_ID)
        if stored is None or swarm.id in view.unreadable(Swarm) or not swarm.tls_info.trust_root:
            return None
        keys = decoded_keys(stored.data).keys
    return SessionContents(node, swarm, managers, keys, weights)


class SessionStreams:
    """The session stream of each node that registers here.  The stream's first step is the registration."""

    def __init__(
        self, store: Store, registrar: Registrar, state: DispatcherState, balancing: Balancing
    ) -> None:
        self._store = store
        self._registrar = registrar
        self._state = state
        self._balancing = balancing

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (server_stream(methods.SESSION, self._session),)

    async def _session(self, request: pb.SessionRequest, caller: Caller) -> AsyncIterator[pb.SessionMessage]:
        session = await self._registrar.register(request, caller)
        del request  # thousands of these streams wait for hours, so they release unneeded memory
        sent, seen = b"", None
        while True:
            session.require_open()
            found = contents_for(
                session.node_id, self._store.view(), self._state.managers, self._balancing.weights
            )
            # A node that has just registered is woken by its own registration.
            if found is not None and found != seen:
                seen = found
                message = session_message(session.id, *found)
                digest = sha256(message.SerializeToString(deterministic=True)).digest()
                if digest != sent:
                    sent = digest
                    yield message
                del message
            await session.messages.wait()


def _swarm_of(view: View) -> Swarm | None:
    """Return the cluster object, or an empty one if it is unreadable: a node then keeps its last message."""
    found = view.find(Swarm)
    unreadable = view.unreadable(Swarm)
    return found[0] if found else Swarm(id=ClusterId(min(unreadable))) if unreadable else None
