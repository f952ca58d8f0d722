"""Joining as another manager, at each start of a manager whose store is still empty.

The manager is added as a learner, starts its etcd, and requests its vote until it is a voter.  If an attempt is
interrupted, the next attempt removes its member, or the leader does so after a minute.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
import structlog
from google.protobuf.message import Message

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, PermissionDenied, SkepError, Unavailable, Unimplemented
from skep.manager.membership.peer_ports import unreachable_peers
from skep.model.values.ids import NodeId
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, client_context
from skep.store.etcd.peers import EtcdPeer
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.client import open_channel
from skep.wire.methods import UnaryMethod

log = structlog.get_logger(__name__)

ADD_S = 15.0
"""Timeout in seconds of the call that adds the member."""

VOTE_S = 5.0
"""Timeout in seconds of a call that requests the vote."""

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


class JoinRefused(SkepError):
    """The managers refuse this node as a manager.  The message has the reason."""


class AdmittedManager(msgspec.Struct, frozen=True, kw_only=True):
    """The response to a new manager.  ``addr`` is the ``ip:port`` at which the others reach it."""

    peers: tuple[EtcdPeer, ...]
    wrapping_key: bytes
    cluster_token: str
    incarnation: int
    addr: str


class JoiningManager:
    """A joining manager, with the addresses of managers to call."""

    def __init__(
        self, managers: Sequence[str], pair: KeyPair, clock: Clock, rng: Callable[[], float]
    ) -> None:
        self._managers = managers
        self._pair = pair
        self._clock = clock
        self._rng = rng

    async def admission(self, addr: str, peer_port: int) -> AdmittedManager:
        """Request admission until a manager grants it.

        Args:
            addr: ``ip:port`` of this manager.  With ``:port`` the called manager takes the IP address from the
            connection.

        Raises:
            JoinRefused: This node must not become a manager.
        """
        request = pb.AddMemberRequest(addr=addr, peer_port=peer_port)
        reply = await self._call(methods.ADD_MEMBER, request, ADD_S, Backoff(0.1, 2.0, rng=self._rng))
        return admission_of(reply, self._pair.identity.node_id)

    async def vote(self, peers: Sequence[EtcdPeer], on_delay: Callable[[str], None]) -> None:
        """Request this manager's vote until it is a voter, which takes as long as it needs to catch up.

        Args:
            peers: All members, from the admission.
            on_delay: Called after each failure with the reason: a failed connection to or from another etcd.

        Raises:
            JoinRefused: It was removed meanwhile.
        """
        # The pauses are short, because a user waits for the join, and because the called manager itself waits while
        # this one catches up.
        backoff = Backoff(0.03, 0.15, rng=self._rng)
        own = self._pair.identity.node_id

        async def report_delay(reason: str) -> None:
            on_delay(
                await unreachable_peers(peers, own) or reason
            )  # a peer that cannot be reached keeps this manager's etcd from serving

        await self._call(methods.PROMOTE_MEMBER, pb.PromoteMemberRequest(), VOTE_S, backoff, report_delay)

    async def _call(
        self,
        method: UnaryMethod[Q, A],
        request: Q,
        timeout_s: float,
        backoff: Backoff,
        on_delay: Callable[[str], Awaitable[None]] | None = None,
    ) -> A:
        """Call the managers in turn until one responds, and return its response."""
        while True:
            for manager in self._managers:
                try:
                    async with open_channel(manager, client_context(self._pair), MANAGER_NAME) as channel:
                        return await channel.call(method, request, timeout_s=timeout_s)
                except Unavailable as error:
                    log.debug(
                        "call failed, will retry", method=method.path, manager=manager, reason=str(error)
                    )
                    if on_delay is not None:
                        await on_delay(str(error))
                except Unimplemented as error:
                    raise JoinRefused(
                        f"{manager} is not a Skep manager: join its cluster with the worker token instead"
                    ) from error
                except (PermissionDenied, FailedPrecondition) as error:
                    raise JoinRefused(str(error)) from error
            await backoff.sleep(self._clock)


def admission_of(reply: pb.AddMemberResponse, node_id: NodeId) -> AdmittedManager:
    """Return the admission in ``reply``.  Raises JoinRefused if it is incomplete."""
    peers = tuple(
        EtcdPeer(name=member.name, url=member.peer_url, ip=member.ip, manager_port=member.manager_port)
        for member in reply.members
    )
    if node_id not in {peer.name for peer in peers} or not all(peer.url for peer in peers):
        raise JoinRefused(
            "the response does not list this manager as a member. Check that all managers run the same version."
        )
    return AdmittedManager(
        peers=peers,
        wrapping_key=reply.wrapping_key,
        cluster_token=reply.cluster_token,
        incarnation=reply.incarnation,
        addr=reply.addr,
    )
