"""The agent: this node's connection to the managers.

The agent keeps a session with one manager, switches to another manager when the session breaks, and renews the node's
certificate.  It passes assignments to the worker, and the worker's status reports to the manager.  Containers do not
depend on the agent: without a manager they keep running.
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

from skep.agent.renewal import ChooseManager
from skep.agent.session.managers import KnownManager, ManagerList, response_timeout
from skep.agent.session.session import ManagerSession, NodeServices
from skep.agent.session.session_state import SessionState
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import log_error
from skep.aio.race import wait_first
from skep.errors import PermissionDenied, RetryLater, SkepError
from skep.model.node import NodeDescription, NodeRole
from skep.model.node_reports.node_removal import removal_in
from skep.model.node_reports.revisions import Revision
from skep.model.values.ids import NodeId
from skep.model.values.meta import TLSInfo
from skep.rpc.errors import NOT_TRUSTED
from skep.security.identity import NodeIdentity
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel
from skep.wire.convert.node import role_from_pb

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
"""Seconds before the first attempt after a lost session.

Short, because most sessions are lost to a manager that restarts.
"""
LONGEST_RETRY_S = 2.0
"""Upper limit in seconds for the growing delay between two attempts."""
UNREACHED_S = 10.0
"""Seconds without any manager after which ``docker info`` shows an error."""
POSTPONED_MAX = 10
"""Number of postponements by one manager after which the node tries another manager."""
POSTPONEMENT_S_MAX = 30.0
"""Upper limit in seconds for one postponement, whatever the manager requests."""
REMOVED_RETRY_S = 10.0
"""Seconds between two attempts of a removed node.  A cluster restored from an earlier backup accepts it again."""
LASTED_S = 10.0
"""Seconds after which a session counts as good, so that the next attempt starts at once."""


def postponement_s(requested_s: float, random: float) -> float:
    """Return the seconds to wait when a manager requests ``requested_s``.

    ``random`` (0 to 1) adds up to a tenth, so that nodes do not return together.  At most ``POSTPONEMENT_S_MAX``.
    """
    return min(max(requested_s, FIRST_RETRY_S) * (1.0 + 0.1 * random), POSTPONEMENT_S_MAX)


class Attempt(Enum):
    """Result of one attempt at a session."""

    SESSION = "session"
    """A session was held and has ended."""
    NONE = "none"
    NEXT = "next"
    """No connection was made, and there are other managers to try."""


class NodeCredentials(Protocol):
    """The node's identity and key pair (``agent.renewal.KeyPairCredentials``)."""

    changed: asyncio.Event
    """Set with every change.  The session sends the change to the manager and clears the event."""

    @property
    def identity(self) -> NodeIdentity:
        """Node, cluster and role of the certificate."""

    @property
    def tls_info(self) -> TLSInfo:
        """Trusted roots, and the issuer of the certificate."""

    def connect(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to the manager at ``address``.  Raises: Unavailable: it is not reachable, or not trusted."""

    def take_roots(self, root_pem: bytes) -> None:
        """Trust the root certificates that a manager has sent."""

    def take_role(self, role: NodeRole) -> None:
        """Set the node's role in the cluster.  A role that differs from the certificate's role requires a renewal."""

    def want_renewal(self) -> None:
        """Renew the certificate as soon as possible."""

    async def run(self, choose: ChooseManager) -> None:
        """Keep the credentials valid until cancelled.  ``choose`` returns the manager to renew with."""


class Agent:
    """The agent of one node.  ``registered`` is set while there is a session."""

    def __init__(
        self,
        *,
        credentials: NodeCredentials,
        managers: ManagerList,
        describe: Callable[[], NodeDescription],
        services: NodeServices,
        clock: Clock,
        random: Random,
        session_state: SessionState,
    ) -> None:
        """
        Args:
            describe: Returns the node's description at the start of each session.  The agent adds the trusted roots.
            session_state: Records every session and heartbeat.
        """
        self._managers = managers
        self._describe = describe
        self._services = services
        self._clock = clock
        self._random = random
        self.credentials = credentials
        self._session_state = session_state
        self._peer: KnownManager | None = None
        """The peer of the last attempt at a session, or of the session while ``registered`` is set."""
        self._channel: ManagerChannel | None = None
        """The connection of the last attempt or session."""
        self._distrust = ""
        """Reason why this node does not trust the manager of the last attempt, or an empty string."""
        self._try_now = asyncio.Event()
        self.registered = asyncio.Event()

    @property
    def node_id(self) -> NodeId:
        """The node id in the certificate."""
        return self.credentials.identity.node_id

    @property
    def role(self) -> NodeRole:
        """The role in the certificate."""
        return self.credentials.identity.role

    def renew_certificate(self) -> None:
        """Request another certificate from the managers as soon as one is reached."""
        self.credentials.want_renewal()

    def _manager_to_renew_with(self) -> KnownManager | None:
        """Return the session's manager, which is known to respond, or without a session the next manager to try."""
        has_session = self.registered.is_set() and self._peer is not None
        peer = self._peer if has_session else self._managers.choose(self.node_id, self._random)
        return KnownManager(peer.node_id, self._managers.address_of(peer)) if peer is not None else None

    @property
    def managers(self) -> tuple[KnownManager, ...]:
        """The managers as the last session listed them."""
        return self._managers.peers

    @property
    def removal(self) -> str:
        """A sentence about the removal of this node from its cluster, or an empty string if it was not removed."""
        found = self._session_state.removal
        return found.summary if found is not None else ""

    async def run(self) -> None:
        """Keep a session and a valid certificate until cancelled."""
        self._session_state.join(self.node_id)
        async with asyncio.TaskGroup() as group:
            if self._services.serve_images is not None:
                # The server starts first, so that the first session reports the port.
                group.create_task(self._services.serve_images(), name="serve images")
            if self._services.tunnels is not None:
                group.create_task(self._services.tunnels.run(), name="tunnels")
            group.create_task(self._keep_session(), name="keep a session")
            group.create_task(self.credentials.run(self._manager_to_renew_with), name="keep a certificate")
            group.create_task(self._services.seen.run(), name="keep the revision")

    def try_now(self) -> None:
        """Without a session, make the next attempt at once, because a manager has just started to serve."""
        self._try_now.set()

    # -- sessions -------------------------------------------------------------------------------------------------

    async def _keep_session(self) -> None:
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            started = self._clock.monotonic()
            self._try_now.clear()
            try:
                # A separate task: a broken connection cancels the task that uses it, which must not be this loop.
                async with asyncio.TaskGroup() as group:
                    attempt = group.create_task(self._attempt(), name="session attempt")
            finally:  # the node may leave its cluster, and its tasks outlive the agent if the manager recovers
                self.registered.clear()
                self._session_state.end()
            if self._session_state.removal is not None:
                self._managers.clear_unreached()
            elif self._session_state.silence_s() >= UNREACHED_S:
                self._managers.note_unreached(self._distrust)
            if attempt.result() is Attempt.SESSION and self._clock.monotonic() - started >= LASTED_S:
                backoff.reset()
            if attempt.result() is Attempt.NEXT:
                await self._clock.sleep(FIRST_RETRY_S * self._random.uniform(0.5, 1.0))
            elif self._session_state.removal is not None:
                await wait_first(self._clock.sleep(REMOVED_RETRY_S), self._try_now.wait())
            else:
                await wait_first(backoff.sleep(self._clock), self._try_now.wait())

    async def _attempt(self) -> Attempt:
        """Hold one session until it breaks."""
        peer = self._managers.choose(self.node_id, self._random)
        if peer is None:
            log.error("no manager is known")
            return Attempt.NONE
        had_session, is_connected, reason = False, False, ""
        self._peer = peer
        try:
            timeout_s = self._managers.connect_timeout(peer)
            address = self._managers.address_of(peer)
            async with self.credentials.connect(address, timeout_s=timeout_s) as channel:
                is_connected = True
                self._managers.require_manager(peer, channel.peer)
                self._channel = channel
                await self._hold_session(channel, peer)
        except SkepError as error:
            had_session = self.registered.is_set()
            event = "session lost" if had_session else "no session"
            reason = str(error)
            log.warning(event, manager=peer.addr, error=reason)
            self._distrust = reason if NOT_TRUSTED in reason else ""
            if isinstance(error, PermissionDenied) and is_connected:
                self._note_removal(str(error))
        except Exception as error:
            had_session = self.registered.is_set()
            log_error(error, "session failed", manager=peer.addr)
        self._managers.failed(peer, was_connected=is_connected, reason=reason)
        if had_session:
            return Attempt.SESSION
        return Attempt.NONE if is_connected or self._managers.is_last_of_round(peer) else Attempt.NEXT

    def _note_removal(self, refusal: str) -> None:
        """Record that this node was removed, if a manager has refused it for that reason.

        The refusal can be trusted: the connection has authenticated a manager of the cluster.  No other refusal has
        this text.
        """
        removal = removal_in(refusal, self.node_id)
        if removal is not None and removal != self._session_state.removal:
            log.error("this node was removed from its cluster", at=removal.at, reason=removal.summary)
            self._session_state.removal = removal

    async def _hold_session(self, channel: ManagerChannel, peer: KnownManager) -> None:
        """Hold a session until it breaks.  If the manager postpones it, try again later on the same connection.

        Raises:
            SkepError: The reason why the session ended.
        """
        for postponed in count(1):
            session = ManagerSession(
                channel,
                self,
                self._services,
                self._clock,
                self._description,
                self.credentials.changed,
                self._random.random,
            )
            try:
                await session.run()
                return
            except RetryLater as error:
                if self.registered.is_set() or postponed == POSTPONED_MAX:
                    raise
                log.info("registration postponed", manager=peer.addr, after_s=round(error.after_s, 1))
                await self._clock.sleep(postponement_s(error.after_s, self._random.random()))

    def _description(self) -> NodeDescription:
        return msgspec.structs.replace(self._describe(), tls_info=self.credentials.tls_info)

    # -- called by the session (``SessionHost``) -----------------------------------------------------------------

    def session_message(self, message: pb.SessionMessage) -> None:
        """Apply a message about this node and its cluster."""
        assert self._peer is not None, "a session has a peer"
        if not self.registered.is_set():
            log.info("registered", manager=self._peer.addr, session=message.session_id)
            self._managers.worked(self._peer)
            assert self._channel is not None, "a session has a channel"
            self._session_state.begin(self._channel)
            self.registered.set()
        peers = [KnownManager(NodeId(known.peer.node_id), known.peer.addr) for known in message.managers]
        self._managers.replace(peers, {known.peer.addr: known.weight for known in message.managers})
        self._session_state.data_path_port = message.node.VXLANUDPPort
        self.credentials.take_roots(message.RootCA)
        if message.node.certificate.status.state == pb.IssuanceStatus.ROTATE:
            self.credentials.want_renewal()
        self.credentials.take_role(role_from_pb(message.node.role))

    def connect(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[ManagerChannel]:
        """Open one more connection to a manager with this node's certificate.  Raises: Unavailable."""
        return self.credentials.connect(address, timeout_s=timeout_s)

    def accept_revision(self, revision: Revision) -> None:
        """Accept a manager's revision.  Raises: FailedPrecondition: the manager lags behind this node."""
        self._services.seen.advance(revision)

    def record_response(self, requested_at: float) -> None:
        """Record that the manager has responded to a heartbeat sent at ``requested_at``."""
        self._session_state.record_response(requested_at)

    @property
    def session_state(self) -> SessionState:
        """State of this node's session with its managers."""
        return self._session_state

    def response_timeout_s(self, period_s: float) -> float:
        """Return how long to wait for the response to a heartbeat."""
        return response_timeout(period_s, len(self._managers.peers))
