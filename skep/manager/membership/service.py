"""``skep.v1.Managers``: adds managers.  Served by every manager.  A caller can only act for itself."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable
from skep.manager.control.nodes import check_demotion
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.peer_addresses import PeerAddresses, full_address
from skep.manager.membership.peer_ports import connect_error
from skep.model.node import ManagerStatus, Node, NodeRole, Reachability
from skep.model.values.ids import ClusterId, NodeId
from skep.store.etcd.errors import NoMember, StillLearning
from skep.store.etcd.membership import RaftMember
from skep.store.etcd.peers import peer_url
from skep.store.interface import Store, Transaction
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.access import Caller
from skep.wire.service import Handler, unary

log = structlog.get_logger(__name__)

RESIGN_S = 5.0
"""Timeout in seconds of a demotion that its own manager requests."""

CATCH_UP_S = 2.0
"""Seconds that a request for a vote waits for the manager to catch up before the manager has to repeat it.

With ``peer_ports.CONNECT_S`` it is shorter than the request's deadline.
"""

CHECK_S = 0.02
"""Seconds between attempts during ``CATCH_UP_S``."""


class MembersService:
    """Adds managers at their request.

    Args:
        wrapping_key: Returns the current wrapping keys of the data keys.
        keep_key: Stores another wrapping key.  Returns when it is on disk.
    """

    def __init__(
        self,
        store: Store,
        consensus: Consensus,
        peer_addresses: PeerAddresses,
        wrapping_key: Callable[[], bytes],
        keep_key: Callable[[bytes], Awaitable[None]],
        cluster_id: ClusterId,
        clock: Clock,
    ) -> None:
        self._store = store
        self._consensus = consensus
        self._peer_addresses = peer_addresses
        self._wrapping_key = wrapping_key
        self._keep_key = keep_key
        self._cluster_id = cluster_id
        self._clock = clock

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            unary(methods.ADD_MEMBER, self._add),
            unary(methods.PROMOTE_MEMBER, self.promote),
            unary(methods.RESIGN, self._resign),
            unary(methods.KEEP_WRAPPING_KEY, self._keep),
        )

    async def _add(self, request: pb.AddMemberRequest, caller: Caller) -> pb.AddMemberResponse:
        if not 0 < request.peer_port < 65536:
            raise InvalidArgument(f"{request.peer_port} is not a valid port for etcd's peers")
        addr = full_address(request.addr, caller.address)
        await self._store.update(announce_manager, caller.node_id, addr)
        # The other managers learn the new address from the node object before the new etcd connects to them.
        self._update_addresses(await self._consensus.all())
        members = await self._consensus.add(caller.node_id, peer_url(caller.node_id, request.peer_port))
        self._update_addresses(members)
        log.info("manager joins", node=caller.node_id, addr=addr)
        return pb.AddMemberResponse(
            members=self._members_of(members),
            wrapping_key=self._wrapping_key(),
            cluster_token=self._cluster_id,
            incarnation=self._store.incarnation,
            addr=addr,
        )

    def _update_addresses(self, members: Sequence[RaftMember]) -> None:
        self._peer_addresses.note(self._store.view().find(Node), members)

    def _members_of(self, members: Sequence[RaftMember]) -> list[pb.Member]:
        known = {peer.name: (peer.ip, peer.manager_port) for peer in self._peer_addresses.peers}
        return [
            pb.Member(name=member.name, peer_url=member.url, ip=ip, manager_port=port)
            for member in members
            for ip, port in (known.get(member.name, ("", 0)),)
        ]

    async def promote(self, _request: pb.PromoteMemberRequest, caller: Caller) -> pb.PromoteMemberResponse:
        """Make the caller a voter.  Waits a while for it to catch up."""
        until = self._clock.monotonic() + CATCH_UP_S
        while True:
            try:
                await self._consensus.promote(caller.node_id)
            except NoMember as error:
                raise FailedPrecondition("this manager was removed while it was joining") from error
            except StillLearning:
                if self._clock.monotonic() >= until:
                    await self._require_reached(caller.node_id)
                    raise
                await self._clock.sleep(CHECK_S)
            else:
                return pb.PromoteMemberResponse()

    async def _require_reached(self, name: str) -> None:
        """Raise Unavailable, with the next step, if this manager cannot connect to the joining one's etcd."""
        addr = next((peer.peer_addr for peer in self._peer_addresses.peers if peer.name == name), "")
        if addr and (error := await connect_error(addr)):
            log.warning("cannot connect to the etcd of a joining manager", node=name, addr=addr, reason=error)
            raise Unavailable(
                f"the managers cannot reach {addr} (etcd's peers): {error}: open the port, or choose another port with "
                "--peer-addr"
            )

    async def _resign(self, _request: pb.ResignRequest, caller: Caller) -> pb.ResignResponse:
        """Demote the caller.  Returns when it has no vote."""
        await self._store.update(resign, caller.node_id)
        async with asyncio.timeout(RESIGN_S):
            while caller.node_id in {member.name for member in await self._consensus.all()}:
                await self._clock.sleep(0.05)
        log.info("manager resigned", node=caller.node_id)
        return pb.ResignResponse()

    async def _keep(self, request: pb.KeepWrappingKeyRequest, caller: Caller) -> pb.KeepWrappingKeyResponse:
        await self._keep_key(request.key)
        log.info("wrapping key stored", manager=caller.node_id)
        return pb.KeepWrappingKeyResponse()


def announce_manager(tx: Transaction, node_id: NodeId, addr: str) -> None:
    """Write the address of a joining manager.

    Raises:
        PermissionDenied: The node was removed.
        FailedPrecondition: The node's role is not manager.
        Unavailable: Another manager has the address.
    """
    node = tx.lookup(Node, node_id)
    if node is None:
        raise PermissionDenied(f"Permission denied: node {node_id} is not part of this swarm")
    if node.spec.role is not NodeRole.MANAGER:
        raise FailedPrecondition(f"node {node_id} is not a manager: promote it first")
    for other in tx.find(Node):
        if other.id != node_id and _uses_address(other, addr):
            raise Unavailable(
                f"address {addr} is in use by manager {other.id}: choose another --advertise-addr"
            )
    status = node.manager_status or ManagerStatus()
    if status.addr != addr:
        tx.put(msgspec.structs.replace(node, manager_status=msgspec.structs.replace(status, addr=addr)))


def resign(tx: Transaction, node_id: NodeId) -> None:
    """Set the node's role to worker.

    Raises:
        FailedPrecondition: The others would have no quorum.
        Unavailable: The node's spec is unreadable here, and would be lost.
    """
    if node_id in tx.unreadable(Node):
        raise Unavailable(
            f"the record of node {node_id} is unreadable on this manager: run the command on another manager"
        )
    node = tx.lookup(Node, node_id)
    if node is not None and node.spec.role is NodeRole.MANAGER:
        check_demotion(tx, node)
        tx.put(msgspec.structs.replace(node, spec=msgspec.structs.replace(node.spec, role=NodeRole.WORKER)))


def _uses_address(node: Node, addr: str) -> bool:
    status = node.manager_status
    return status is not None and status.addr == addr and status.reachability is not Reachability.UNREACHABLE
