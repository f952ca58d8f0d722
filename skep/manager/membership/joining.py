"""Coming in as a further manager: asked at each start of a manager whose store is still empty.

It is let in as a member that learns, starts its etcd among the others, and asks for its vote until it gets it.  What
an interrupted attempt left among the others is removed by the next one, or by the leader after a minute.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
import structlog
from google.protobuf.message import Message

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, PermissionDenied, SkepError, Unavailable, Unimplemented
from skep.manager.membership.ways import closed_ways
from skep.model.ids import NodeId
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, client_context
from skep.store.etcd.peers import Peer
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.client import connected
from skep.wire.methods import Unary

log = structlog.get_logger(__name__)

ADD_S = 15.0
"""For being let in."""

VOTE_S = 5.0

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


class NotLetIn(SkepError):
    """The managers do not take this node in: it is not to be one.  The message says why."""


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """What a new manager is told.  ``addr``: ``ip:port`` under which the others know it."""

    peers: tuple[Peer, ...]
    wrapping_key: bytes
    cluster_token: str
    incarnation: int
    addr: str


class Applicant:
    """A manager to be, with the addresses of managers that it may ask."""

    def __init__(
        self, managers: Sequence[str], pair: KeyPair, clock: Clock, rng: Callable[[], float]
    ) -> None:
        self._managers = managers
        self._pair = pair
        self._clock = clock
        self._rng = rng

    async def admission(self, addr: str, peer_port: int) -> Admission:
        """Ask to be let in until one of the managers does it.

        Args:
            addr: ``ip:port`` of this manager; ``:port``: the manager asked sees the rest.

        Raises: NotLetIn: this node is not to be a manager.
        """
        request = pb.AddMemberRequest(addr=addr, peer_port=peer_port)
        reply = await self._ask(methods.ADD_MEMBER, request, ADD_S, Backoff(0.1, 2.0, rng=self._rng))
        return admission_of(reply, self._pair.identity.node_id)

    async def vote(self, peers: Sequence[Peer], hindered: Callable[[str], None]) -> None:
        """Ask for this manager's vote until it has one: that takes as long as it has to catch up.

        Args:
            peers: all members, as it was told when it was let in.
            hindered: is told, each time anew, why it has none yet: which way to or from another's etcd is closed.

        Raises: NotLetIn: it was removed meanwhile.
        """
        # Somebody waits for the join.  The manager that is asked looks by itself, for as long as it usually takes.
        backoff = Backoff(0.03, 0.15, rng=self._rng)
        own = self._pair.identity.node_id

        async def hinders(reason: str) -> None:
            hindered(
                await closed_ways(peers, own) or reason
            )  # what is closed to it keeps its own etcd from serving

        await self._ask(methods.PROMOTE_MEMBER, pb.PromoteMemberRequest(), VOTE_S, backoff, hinders)

    async def _ask(
        self,
        method: Unary[Q, A],
        request: Q,
        timeout_s: float,
        backoff: Backoff,
        hindered: Callable[[str], Awaitable[None]] | None = None,
    ) -> A:
        """The first answer that any of the managers gives."""
        while True:
            for manager in self._managers:
                try:
                    async with connected(manager, client_context(self._pair), MANAGER_NAME) as channel:
                        return await channel.call(method, request, timeout_s=timeout_s)
                except Unavailable as error:
                    log.debug("not yet", asked=method.path, manager=manager, reason=str(error))
                    if hindered is not None:
                        await hindered(str(error))
                except Unimplemented as error:
                    raise NotLetIn(
                        f"{manager} is no manager of Skep: join its cluster with the worker token instead"
                    ) from error
                except (PermissionDenied, FailedPrecondition) as error:
                    raise NotLetIn(str(error)) from error
            await backoff.sleep(self._clock)


def admission_of(reply: pb.AddMemberResponse, node_id: NodeId) -> Admission:
    """What ``reply`` says.  Raises: NotLetIn: it is of no use."""
    peers = tuple(Peer(name=member.name, url=member.peer_url, ip=member.ip) for member in reply.members)
    if node_id not in {peer.name for peer in peers} or not all(peer.url for peer in peers):
        raise NotLetIn("the manager's answer names no place for this one: are they of one version?")
    return Admission(
        peers=peers,
        wrapping_key=reply.wrapping_key,
        cluster_token=reply.cluster_token,
        incarnation=reply.incarnation,
        addr=reply.addr,
    )
