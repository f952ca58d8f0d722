"""A simulated node's connection to the managers: the real session over the simulated network.

It stands for ``node/agent.py`` without its certificates.
"""

from collections.abc import AsyncIterator
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.model.ids import NodeId
from skep.model.logs import LogLine, LogQuery
from skep.model.node import NodeDescription
from skep.node.agent import FIRST_RETRY_S, LONGEST_RETRY_S
from skep.node.assignments import AssignmentSink
from skep.node.contact import Contact
from skep.node.local import Peer
from skep.node.managers import ManagerList, patience
from skep.node.reports import Reports
from skep.node.revisions import Revision, advanced
from skep.node.session import Session
from skep.security.identity import Identity
from skep.sim.network import Network
from skep.wire import swarm_pb2 as pb

log = structlog.get_logger()


class SimulatedAgent:
    """Keeps a session with one of the managers.  Implements ``node.session.SessionHost``."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        managers: ManagerList,
        description: NodeDescription,
        *,
        sink: AssignmentSink,
        reports: Reports,
        contact: Contact,
        clock: Clock,
        random: Random,
    ) -> None:
        self._identity = identity
        self._network = network
        self._managers = managers
        self._description = description
        self._sink = sink
        self._reports = reports
        self._contact = contact
        self._clock = clock
        self._random = random
        self._seen = Revision()
        self._backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, chance=random.random)

    async def run(self) -> None:
        """Hold one session after the other until cancelled."""
        while True:
            peer = self._managers.choose(self._identity.node_id, self._random)
            if peer is None or await self._attempt(peer) or self._managers.is_last_of_round(peer):
                await self._backoff.sleep(self._clock)
            else:
                await self._clock.sleep(FIRST_RETRY_S * self._random.uniform(0.5, 1.0))

    async def _attempt(self, peer: Peer) -> bool:
        """Hold one session until it breaks; gives whether the manager was there."""
        is_there = False
        try:
            async with self._network.connected(peer.addr, self._identity) as channel:
                is_there = True
                session = Session(
                    channel,  # type: ignore[arg-type]  # it has the calls of a real one
                    self,
                    self._sink,
                    self._reports,
                    NoLogs(),
                    self._clock,
                    lambda: self._description,
                )
                await session.run()
        except SkepError as error:
            log.debug("session ended", node=self._identity.node_id, manager=peer.addr, reason=str(error))
        self._contact.lost()
        self._managers.failed(peer)
        return is_there

    def session_message(self, message: pb.SessionMessage) -> None:
        """The managers are those that the message names; this one works."""
        self._backoff.reset()
        if not self._contact.has_manager:
            self._contact.gained()
        self._managers.replace(
            [Peer(NodeId(known.peer.node_id), known.peer.addr) for known in message.managers]
        )

    def accept_revision(self, revision: Revision) -> None:
        """Raises: FailedPrecondition: the manager is behind what this node has seen."""
        self._seen = advanced(self._seen, revision)

    def heard(self, asked_at: float) -> None:
        """The manager answered a heartbeat sent at ``asked_at``."""
        self._contact.heard(asked_at)

    @property
    def contact(self) -> Contact:
        """With the managers."""
        return self._contact

    def patience_s(self, period_s: float) -> float:
        """How long to wait for the answer to a heartbeat."""
        return patience(period_s, len(self._managers.peers))


class NoLogs:
    """Simulated tasks say nothing.  Implements ``node.assignments.LogSource``."""

    async def read(self, query: LogQuery) -> AsyncIterator[LogLine]:
        nothing: tuple[LogLine, ...] = ()
        for line in nothing:
            yield line
