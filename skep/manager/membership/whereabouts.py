"""Managers that have moved tell the others where they are, though there may be no quorum to write it down.

Usually an address is in the node object, and everybody follows that.  When several managers come back under new
addresses, none of their stores has a quorum before they have found each other: so each one says to every other that
it can think of who it is and where, at the manager's port, over mTLS.  A manager speaks for its own name only.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable, Sequence

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import PermissionDenied, SkepError
from skep.manager.membership.addresses import AddressBook, full_address
from skep.model.addresses import host_of, joined, parted
from skep.model.ids import NodeId
from skep.security.identity import Identity
from skep.security.tls import MANAGER_NAME
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.access import Caller
from skep.wire.client import connected
from skep.wire.methods import Access
from skep.wire.service import Handler, unary

log = structlog.get_logger(__name__)

ANNOUNCE_S = 2.0
FIRST_AGAIN_S, LONGEST_AGAIN_S = 1.0, 4.0


class Whereabouts:
    """This manager's part in it.

    Args:
        addr: ``ip:port`` of this manager.
        look_at: further addresses where managers may be, as the configuration of this node says.
        tls: of calls to managers, as they are at this moment.
    """

    def __init__(
        self,
        own: NodeId,
        addr: str,
        book: AddressBook,
        look_at: Iterable[str],
        tls: Callable[[], ssl.SSLContext],
        clock: Clock,
    ) -> None:
        self._own = own
        self._addr = addr
        self._book = book
        self._look_at = tuple(look_at)
        self._tls = tls
        self._clock = clock

    def services(self) -> Sequence[Handler]:
        """What to hand to ``wire.server.serve``."""
        return (unary(methods.ANNOUNCE, self._hear),)

    async def search(self) -> None:
        """Say to everybody where this manager is, again and again until cancelled."""
        backoff = Backoff(FIRST_AGAIN_S, LONGEST_AGAIN_S)
        while True:
            async with asyncio.TaskGroup() as group:
                for addr in self._candidates():
                    group.create_task(self._tell(addr), name=f"announce to {addr}")
            await backoff.sleep(self._clock)

    def require_known(self, identity: Identity, _access: Access) -> None:
        """Who is heard while there is no store to ask: managers that were some when there was one.

        Those that came in since have a quorum with others, and are found by them.  Raises: PermissionDenied.
        """
        if identity.node_id not in {peer.name for peer in self._book.peers}:
            raise PermissionDenied(
                f"Permission denied: node {identity.node_id} is not known here as a manager of the swarm"
            )

    def _candidates(self) -> list[str]:
        _, port = parted(self._addr)
        known = [joined(peer.ip, port) for peer in self._book.peers if peer.name != self._own and peer.ip]
        return sorted({*known, *self._look_at} - {self._addr})

    async def _tell(self, addr: str) -> None:
        try:
            async with connected(addr, self._tls(), MANAGER_NAME) as channel:
                reply = await channel.call(
                    methods.ANNOUNCE, pb.AnnounceRequest(addr=self._addr), timeout_s=ANNOUNCE_S
                )
        except SkepError as error:
            log.debug("not announced", manager=addr, reason=str(error))
            return
        self._book.learn(reply.node_id, host_of(addr))
        for other in reply.moved:
            if other.name != self._own:
                self._book.learn(other.name, other.ip)

    async def _hear(self, request: pb.AnnounceRequest, caller: Caller) -> pb.AnnounceResponse:
        self._book.learn(caller.node_id, host_of(full_address(request.addr, caller.address)))
        return pb.AnnounceResponse(
            node_id=self._own,
            addr=self._addr,
            moved=[pb.Member(name=peer.name, ip=peer.ip) for peer in self._book.moved],
        )
