"""The agent: this node's connection to the managers.

It keeps a session with one of them, moves on to the next when it breaks, and keeps the node's certificate young.
What it receives goes to the ``AssignmentSink``, what it is told by the worker (``Reports``) goes to the manager.
Containers do not depend on it: without any manager they run on.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from enum import Enum
from itertools import count
from random import Random
from typing import Protocol

import msgspec
import structlog

from skep.agent.assignments import AssignmentSink, LogSource
from skep.agent.managers import ManagerList, patience
from skep.agent.path_stream import PathSource
from skep.agent.reports import Reports
from skep.agent.revisions import Revision, SeenRevision
from skep.agent.session import Session, unknown_load
from skep.agent.session_state import SessionState
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.first import wait_first
from skep.aio.guard import report
from skep.api.errors import rpc_words
from skep.dataplane.tables.stream import TableSink
from skep.errors import RetryLater, SkepError, Unavailable
from skep.model.ids import ContainerId, NodeId, TaskId
from skep.model.meta import TLSInfo
from skep.model.node import NodeDescription, NodeRole
from skep.model.sandbox import EndpointRequest
from skep.node.local import Peer
from skep.node.renewal import Managers
from skep.security.identity import Identity
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import Channel
from skep.wire.convert.node import role_from_pb

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 2.0
ATTACH_SECONDS_MAX = 15.0
"""A manager answers when it is written, which takes until its store has a leader again."""
DETACH_SECONDS_MAX = 3.0
"""A container's end does not wait for longer; the manager hears of it all the same."""
UNREACHED_S = 10.0
"""After so long without any manager the node says so (``docker info``)."""
POSTPONED_MAX = 10
"""A manager that told the node to come again so often is left for another one."""
STAY_AWAY_S_MAX = 30.0
"""No manager may have the node wait for longer in one go."""
LASTED_S = 10.0
"""A session that held for so long was a good one: the next attempt is made at once."""


def time_to_stay_away(told_s: float, chance: float) -> float:
    """Seconds to wait when a manager says ``told_s``: never less, and not the same for two that were told the same."""
    return min(max(told_s, FIRST_RETRY_S) * (1.0 + 0.1 * chance), STAY_AWAY_S_MAX)


class Attempt(Enum):
    """What came of asking a manager for a session."""

    SESSION = "session"
    """There was one, and it has ended."""
    NONE = "none"
    NEXT = "next"
    """Nobody was there, and others are left to ask."""


class Credentials(Protocol):
    """Who the node is, and what it proves that with (``node.renewal.KeyPairCredentials``)."""

    news: asyncio.Event
    """Set with every change; whoever tells the managers of it clears it."""

    @property
    def identity(self) -> Identity: ...

    @property
    def tls_info(self) -> TLSInfo:
        """Whom the node trusts, and who vouches for it."""

    def connected(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[Channel]:
        """A connection to the manager at ``address``.  Raises: Unavailable: not reachable, or not trusted."""

    def take_roots(self, root_pem: bytes) -> None:
        """A manager says whom to trust."""

    def take_role(self, role: NodeRole) -> None:
        """The cluster has this node in ``role``."""

    def want_renewal(self) -> None:
        """A manager asks for it."""

    async def run(self, choose: Managers) -> None:
        """Keep them valid until cancelled; ``choose``: the manager to ask."""


class Agent:
    """Speaks for one node.  ``registered`` is set while there is a session."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        managers: ManagerList,
        describe: Callable[[], NodeDescription],
        sink: AssignmentSink,
        reports: Reports,
        logs: LogSource,
        clock: Clock,
        random: Random,
        session_state: SessionState | None = None,
        seen: SeenRevision | None = None,
        address_of: Callable[[Peer], str] = lambda peer: peer.addr,
        load: Callable[[], float | None] = unknown_load,
        tables: TableSink | None = None,
        paths: PathSource | None = None,
        unreached: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            describe: what the node says of itself; asked at the start of each session (the trust is added here).
            contact: told about every session and heartbeat.
            seen: the newest revision, which the machine keeps; None: forgotten with this agent.
            address_of: where this node reaches a manager; others may know it under another address.
            load, tables, paths: see ``Session``.
            unreached: told in a sentence that no manager is reached; with an empty one, that one is.
        """
        self._unreached = unreached
        self._managers = managers
        self._address_of = address_of
        self._load = load
        self._paths = paths
        self._tables = tables
        self._describe = describe
        self._sink = sink
        self._reports = reports
        self._logs = logs
        self._clock = clock
        self._random = random
        self._credentials = credentials
        self._session_state = session_state or SessionState(clock)
        self._seen = seen or SeenRevision(None, credentials.identity.cluster_id)
        self._peer: Peer | None = None
        self._channel: Channel | None = None
        """Of the session, while there is one."""
        self._hurried = asyncio.Event()
        self.registered = asyncio.Event()

    @property
    def node_id(self) -> NodeId:
        return self._credentials.identity.node_id

    @property
    def role(self) -> NodeRole:
        """In the certificate."""
        return self._credentials.identity.role

    def renew_certificate(self) -> None:
        """Have the managers issue another one, as soon as one of them can."""
        self._credentials.want_renewal()

    def _manager_to_renew_with(self) -> Peer | None:
        """The one that holds the session, for it is known to answer; without a session the next to try."""
        has_session = self.registered.is_set() and self._peer is not None
        peer = self._peer if has_session else self._managers.choose(self.node_id, self._random)
        return Peer(peer.node_id, self._address_of(peer)) if peer is not None else None

    @property
    def managers(self) -> tuple[Peer, ...]:
        """The managers as the last session named them."""
        return self._managers.peers

    async def run(self) -> None:
        """Keep a session and a valid certificate until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_session(), name="keep a session")
            group.create_task(self._credentials.run(self._manager_to_renew_with), name="keep a certificate")
            group.create_task(self._seen.run(), name="keep the revision")

    def try_now(self) -> None:
        """A manager has just begun to serve: if there is no session, the next attempt is made at once."""
        self._hurried.set()

    # -- places of plain containers -------------------------------------------------------------------------------

    async def attach_network(self, container_id: ContainerId, wish: EndpointRequest) -> TaskId:
        """Ask for a place on a network of the cluster.

        Raises: SkepError in Docker's words; Unavailable: there is no session.
        """
        config = pb.NetworkAttachmentConfig(
            target=wish.network, aliases=wish.aliases, addresses=[wish.address] if wish.address else []
        )
        request = pb.AttachNetworkRequest(config=config, container_id=container_id)
        with rpc_words(f"Could not attach to network {wish.network}"):
            reply = await self._session_channel().call(
                methods.ATTACH_NETWORK, request, timeout_s=ATTACH_SECONDS_MAX
            )
        return TaskId(reply.attachment_id)

    async def detach_network(self, id: TaskId) -> None:
        """Give a place back.  Raises: SkepError."""
        request = pb.DetachNetworkRequest(attachment_id=id)
        await self._session_channel().call(methods.DETACH_NETWORK, request, timeout_s=DETACH_SECONDS_MAX)

    def _session_channel(self) -> Channel:
        if self._channel is None or not self.registered.is_set():
            raise Unavailable("no manager is reached at present")
        return self._channel

    # -- sessions -------------------------------------------------------------------------------------------------

    async def _keep_session(self) -> None:
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, chance=self._random.random)
        while True:
            started = self._clock.monotonic()
            self._hurried.clear()
            # A task of its own: a broken connection cancels whoever uses it, and that must not be this loop.
            async with asyncio.TaskGroup() as group:
                attempt = group.create_task(self._attempt(), name="session attempt")
            self.registered.clear()
            self._session_state.end()
            if self._session_state.silence_s() >= UNREACHED_S:
                self._unreached(self._managers.unreached())
            if attempt.result() is Attempt.SESSION and self._clock.monotonic() - started >= LASTED_S:
                backoff.reset()
            if attempt.result() is Attempt.NEXT:
                await self._clock.sleep(FIRST_RETRY_S * self._random.uniform(0.5, 1.0))
            else:
                await wait_first(backoff.sleep(self._clock), self._hurried.wait())

    async def _attempt(self) -> Attempt:
        """Hold one session until it breaks."""
        peer = self._managers.choose(self.node_id, self._random)
        if peer is None:
            log.error("no manager is known")
            return Attempt.NONE
        had_session = is_there = False
        try:
            timeout_s = self._managers.connect_patience(peer)
            address = self._address_of(peer)
            async with self._credentials.connected(address, timeout_s=timeout_s) as channel:
                is_there = True
                self._channel = channel
                await self._hold_session(channel, peer)
        except SkepError as error:
            had_session = self.registered.is_set()
            event = "session lost" if had_session else "no session"
            log.warning(event, manager=peer.addr, error=str(error))
        except Exception as error:
            had_session = self.registered.is_set()
            report(error, "session failed", manager=peer.addr)
        finally:
            self._channel = None
        self._managers.failed(peer, was_there=is_there)
        if had_session:
            return Attempt.SESSION
        return Attempt.NONE if is_there or self._managers.is_last_of_round(peer) else Attempt.NEXT

    async def _hold_session(self, channel: Channel, peer: Peer) -> None:
        """Hold a session until it breaks; on the same connection later, where the manager says so.

        Raises: SkepError: why.
        """
        for postponed in count(1):
            session = Session(
                channel,
                _Host(self, peer),
                self._sink,
                self._reports,
                self._logs,
                self._clock,
                self._description,
                self._credentials.news,
                self._load,
                self._tables,
                self._paths,
                self._random.random,
            )
            try:
                await session.run()
                return
            except RetryLater as error:
                if self.registered.is_set() or postponed == POSTPONED_MAX:
                    raise
                log.info("told to register later", manager=peer.addr, after_s=round(error.after_s, 1))
                await self._clock.sleep(time_to_stay_away(error.after_s, self._random.random()))

    def _description(self) -> NodeDescription:
        return msgspec.structs.replace(self._describe(), tls_info=self._credentials.tls_info)

    def take_message(self, message: pb.SessionMessage, peer: Peer) -> None:
        """Act on what a manager says of this node and its cluster."""
        if not self.registered.is_set():
            log.info("registered", manager=peer.addr, session=message.session_id)
            self._managers.worked(peer)
            self._peer = peer
            self._session_state.begin()
            self._unreached("")
            self.registered.set()
        peers = [Peer(NodeId(known.peer.node_id), known.peer.addr) for known in message.managers]
        self._managers.replace(peers, {known.peer.addr: known.weight for known in message.managers})
        self._credentials.take_roots(message.RootCA)
        if message.node.certificate.status.state == pb.IssuanceStatus.ROTATE:
            self._credentials.want_renewal()
        self._credentials.take_role(role_from_pb(message.node.role))

    def accept_revision(self, revision: Revision) -> None:
        """Raises: FailedPrecondition: the manager is behind what this node has seen."""
        self._seen.advance(revision)

    def heard(self, asked_at: float) -> None:
        """The manager answered a heartbeat sent at ``asked_at``."""
        self._session_state.record_response(asked_at)

    @property
    def session_state(self) -> SessionState:
        """With the managers."""
        return self._session_state

    def patience_s(self, period_s: float) -> float:
        """How long to wait for the answer to a heartbeat."""
        return patience(period_s, len(self._managers.peers))


class _Host(msgspec.Struct, frozen=True):
    """What a session with ``peer`` may tell the agent."""

    agent: Agent
    peer: Peer

    def session_message(self, message: pb.SessionMessage) -> None:
        self.agent.take_message(message, self.peer)

    def accept_revision(self, revision: Revision) -> None:
        self.agent.accept_revision(revision)

    def heard(self, asked_at: float) -> None:
        self.agent.heard(asked_at)

    @property
    def session_state(self) -> SessionState:
        return self.agent.session_state

    def patience_s(self, period_s: float) -> float:
        return self.agent.patience_s(period_s)
