"""Registers nodes: each gets a session with this manager, which is written to the store."""

import structlog

from skep.aio.clock import Clock
from skep.manager.dispatcher.node_sessions.admission import RegistrationQueue
from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import HeartbeatDeadlines
from skep.manager.dispatcher.node_sessions.quorum_contact import QuorumContact
from skep.manager.dispatcher.node_sessions.registration import (
    Registration,
    RegistrationRate,
    SessionInvalid,
    take_session,
)
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.model.node import Node
from skep.model.values.ids import IdSource, NodeId, SessionId
from skep.store.interface import Store
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.node import description_from_pb

log = structlog.get_logger(__name__)


class Registrar:
    """Gives nodes their sessions, many at a time but not too many."""

    def __init__(
        self,
        store: Store,
        manager_id: NodeId,
        deadlines: HeartbeatDeadlines,
        contact: QuorumContact,
        queue: RegistrationQueue,
        clock: Clock,
        new_id: IdSource,
    ) -> None:
        self._store = store
        self._manager_id = manager_id
        self._deadlines = deadlines
        self._contact = contact
        self.queue = queue
        self._clock = clock
        self._new_id = new_id
        self._rate = RegistrationRate()

    async def register(self, request: pb.SessionRequest, caller: Caller) -> LiveSession:
        """Write the session once a slot is free, and return when this replica shows it.

        Raises:
            RetryLater: Too many nodes are registering.
            Unavailable: The node registers too often, or this manager has lost contact with the others.
        """
        self._rate.note(caller.node_id, self._clock.monotonic())
        self._contact.require()
        with self._deadlines.registering(caller.node_id):
            async with self.queue.slot():
                return await self._take_session(request, caller)

    async def _take_session(self, request: pb.SessionRequest, caller: Caller) -> LiveSession:
        node_id, session_id = caller.node_id, SessionId(self._new_id())
        if self._store.view().lookup(Node, node_id) is None:
            # Its certificate may have been issued by another manager a moment ago.
            await self._store.barrier()
        await self._store.update(
            take_session,
            Registration(
                node_id=node_id,
                manager_id=self._manager_id,
                session_id=session_id,
                description=description_from_pb(request.description),
                address=caller.address,
            ),
        )
        node = self._store.view().lookup(Node, node_id)
        if node is None or node.session is None or node.session.session_id != session_id:
            raise SessionInvalid  # it registered again meanwhile
        self._contact.require()  # the quorum may have been lost meanwhile, and all sessions ended
        session = self._deadlines.begin(node_id, session_id, caller.disconnect)
        log.info("node registered", node=node_id, session=session_id, peer=caller.address)
        return session
