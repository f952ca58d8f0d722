"""Managers announce a changed address to the others, even without a quorum that could write it.

Usually managers learn an address from the node object, which they all watch.  But if several managers return with new
addresses, there is no quorum before they have found each other.  So each manager announces its node id and address to
every address that it knows, at the manager's port, over mTLS.  A manager can only announce itself.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable, Sequence

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import PermissionDenied, SkepError
from skep.manager.membership.peer_addresses import PeerAddresses, full_address
from skep.model.networks.addresses import host_of, joined, parted
from skep.model.values.ids import NodeId
from skep.security.identity import NodeIdentity
from skep.security.tls import MANAGER_NAME
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.access import Caller
from skep.wire.client import open_channel
from skep.wire.methods import MethodAccess
from skep.wire.service import Handler, unary

log = structlog.get_logger(__name__)

ANNOUNCE_S = 2.0
"""Timeout in seconds of one announcement."""
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 4.0
"""Limits of the delay between announcements."""


class PeerSearch:
    """This manager's announcements, and the announcements it receives.

    Args:
        addr: ``ip:port`` of this manager.
        look_at: More addresses where managers may be, from this node's configuration.
        tls: Returns the current TLS context for calls to managers.
    """

    def __init__(
        self,
        own: NodeId,
        addr: str,
        peer_addresses: PeerAddresses,
        look_at: Iterable[str],
        tls: Callable[[], ssl.SSLContext],
        clock: Clock,
    ) -> None:
        self._own = own
        self._addr = addr
        self._peer_addresses = peer_addresses
        self._look_at = tuple(look_at)
        self._tls = tls
        self._clock = clock

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (unary(methods.ANNOUNCE, self._on_announce),)

    async def search(self) -> None:
        """Announce this manager's address to all known addresses, repeatedly until cancelled."""
        backoff = Backoff(FIRST_DELAY_S, LONGEST_DELAY_S)
        while True:
            async with asyncio.TaskGroup() as group:
                for addr in self._candidates():
                    group.create_task(self._announce(addr), name=f"announce to {addr}")
            await backoff.sleep(self._clock)

    def require_known(self, identity: NodeIdentity, _access: MethodAccess) -> None:
        """Accept calls of known managers while this manager's store is not available to check them.

        A manager that has joined since then is not needed here, because it has a quorum with others and finds this
        manager through them.

        Raises:
            PermissionDenied: The caller is not a known manager.
        """
        if identity.node_id not in {peer.name for peer in self._peer_addresses.peers}:
            raise PermissionDenied(
                f"Permission denied: node {identity.node_id} is not known here as a manager of the swarm"
            )

    def _candidates(self) -> list[str]:
        _, port = parted(self._addr)
        known = [
            joined(peer.ip, peer.manager_port or port)
            for peer in self._peer_addresses.peers
            if peer.name != self._own and peer.ip
        ]
        return sorted({*known, *self._look_at} - {self._addr})

    async def _announce(self, addr: str) -> None:
        try:
            async with open_channel(addr, self._tls(), MANAGER_NAME) as channel:
                reply = await channel.call(
                    methods.ANNOUNCE, pb.AnnounceRequest(addr=self._addr), timeout_s=ANNOUNCE_S
                )
        except SkepError as error:
            log.debug("announcement failed, will retry", manager=addr, reason=str(error))
            return
        self._peer_addresses.record_move(reply.node_id, host_of(addr))
        for other in reply.moved:
            if other.name != self._own:
                self._peer_addresses.record_move(other.name, other.ip)

    async def _on_announce(self, request: pb.AnnounceRequest, caller: Caller) -> pb.AnnounceResponse:
        self._peer_addresses.record_move(caller.node_id, host_of(full_address(request.addr, caller.address)))
        return pb.AnnounceResponse(
            node_id=self._own,
            addr=self._addr,
            moved=[pb.Member(name=peer.name, ip=peer.ip) for peer in self._peer_addresses.moved],
        )
