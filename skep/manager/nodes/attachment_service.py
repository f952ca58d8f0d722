"""Attaches plain containers to networks of the cluster (``docker run --network``) at the request of their nodes.

An attachment is a task without a service, on the node that requested it.  Allocator, scheduler and dispatcher treat it
like any other task, and the node gets the address with its assignments.  While the attachment exists, the network
cannot be removed.

A skep node sends the container's name as the first alias of the attachment.  An engine sends names to other engines
itself.

Source: swarmkit, manager/resourceapi/allocator.go; moby, daemon/cluster/networks.go (AttachNetwork).
"""

from collections.abc import Sequence

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from skep.model.network import Network
from skep.model.networks.attaching import require_attachable, require_share, require_subnets
from skep.model.networks.data_planes import plane_of, plane_of_node
from skep.model.node import Node
from skep.model.service import NetworkAttachmentConfig, NetworkAttachmentSpec, TaskSpec
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.values.ids import IdSource, NodeId, TaskId
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import Store, Transaction
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.service import Handler, unary

log = structlog.get_logger(__name__)

ATTACHMENTS_MAX = 1000
"""Maximum number of one node's plain containers on cluster networks."""
CONTAINER_ID_CHARACTERS_MAX = 128
"""Twice the length of Docker's ids."""
ALIASES_MAX = 32
"""Largest number of names of one container on a network."""
ALIAS_CHARACTERS_MAX = 253
"""The maximum length of a DNS name."""
_VERSIONS = 2
"""IP versions.  A container has at most one address of each version on a network."""


class AttachmentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A node's request for one of its containers."""

    task_id: TaskId
    node_id: NodeId
    container_id: str
    network: str
    """Id or name of the network."""
    addresses: tuple[str, ...] = ()
    """Addresses from ``--ip`` and ``--ip6``.  Without an address of a version, the allocator chooses one."""
    aliases: tuple[str, ...] = ()
    """The container's name, then its aliases."""


class AttachmentService:
    """Serves ``ResourceAllocator`` on every manager."""

    def __init__(self, store: Store, clock: Clock, new_id: IdSource) -> None:
        self._store = store
        self._clock = clock
        self._new_id = new_id

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (unary(methods.ATTACH_NETWORK, self._attach), unary(methods.DETACH_NETWORK, self._detach))

    async def _attach(self, request: pb.AttachNetworkRequest, caller: Caller) -> pb.AttachNetworkResponse:
        await self._store.barrier()  # another manager may have created the network a moment ago
        attachment = AttachmentRequest(
            task_id=TaskId(self._new_id()),
            node_id=caller.node_id,
            container_id=request.container_id,
            network=request.config.target,
            addresses=tuple(request.config.addresses[:_VERSIONS]),
            aliases=tuple(request.config.aliases),
        )
        await self._store.update(attach, attachment, timestamp(self._clock.now_ns()))
        log.info(
            "container attached", node=attachment.node_id, network=attachment.network, task=attachment.task_id
        )
        return pb.AttachNetworkResponse(attachment_id=attachment.task_id)

    async def _detach(self, request: pb.DetachNetworkRequest, caller: Caller) -> pb.DetachNetworkResponse:
        await self._store.update(detach, caller.node_id, TaskId(request.attachment_id))
        return pb.DetachNetworkResponse()


def attach(tx: Transaction, attachment: AttachmentRequest, now: Timestamp) -> Task:
    """Create the task that represents the attachment.  The allocator then assigns its address.

    Raises:
        NotFound: The network does not exist.
        PermissionDenied: The network is not attachable, or the node was removed.
        FailedPrecondition: The network's data plane differs from the node's.
        InvalidArgument: An id, an alias or an address is invalid.
        ResourceExhausted: The node or the network has too many attachments.
    """
    if not 0 < len(attachment.container_id) <= CONTAINER_ID_CHARACTERS_MAX:
        raise InvalidArgument("the container id is missing or too long")
    if len(attachment.aliases) > ALIASES_MAX or any(
        len(one) > ALIAS_CHARACTERS_MAX for one in attachment.aliases
    ):
        raise InvalidArgument(
            f"a container can have at most {ALIASES_MAX} names of {ALIAS_CHARACTERS_MAX} characters on a network"
        )
    node = tx.rely_on(Node, attachment.node_id, "session")
    if node is None:
        raise PermissionDenied(f"Permission denied: node {attachment.node_id} was removed from the swarm")
    try:
        network = tx.resolve(Network, attachment.network)
    except NotFound:
        raise NotFound(f"network {attachment.network} not found") from None
    require_attachable(network, node)
    owner, plane = plane_of(network), plane_of_node(node)
    if owner not in ("", plane):
        raise FailedPrecondition(
            f"network {network.spec.name} belongs to {owner} nodes: containers of a {plane} node cannot join it"
        )
    present = [one for one in tx.find(Task, node_id=node.id) if _is_attachment(one)]
    if len(present) >= ATTACHMENTS_MAX:
        raise ResourceExhausted(f"the node already has {ATTACHMENTS_MAX} containers on cluster networks")
    here = sum(network.id in {config.target for config in one.spec.networks} for one in present)
    require_share(network, here, len(tx.find(Node)))
    require_subnets(network, attachment.addresses)
    requested = NetworkAttachment(network=network, addresses=attachment.addresses)
    return tx.put(
        Task(
            id=attachment.task_id,
            created_at=now,
            spec=TaskSpec(
                network_attachment_spec=NetworkAttachmentSpec(container_id=attachment.container_id),
                networks=(NetworkAttachmentConfig(target=network.id, aliases=attachment.aliases),),
            ),
            node_id=node.id,
            networks_attachments=(requested,) if attachment.addresses else (),
            status=TaskStatus(timestamp=now, state=TaskState.NEW, message="created"),
            desired_state=TaskState.RUNNING,
        )
    )


def detach(tx: Transaction, node_id: NodeId, task_id: TaskId) -> None:
    """Remove the attachment of a container that was removed.

    Raises:
        InvalidArgument: The id is empty.
        NotFound: The attachment does not exist.
        PermissionDenied: The attachment belongs to another node.
    """
    if not task_id:
        raise InvalidArgument("invalid argument")
    task = tx.lookup(Task, task_id)
    if task is None or not _is_attachment(task):
        raise NotFound(f"attachment {task_id} not found")
    if task.node_id != node_id:
        raise PermissionDenied(f"attachment {task_id} doesn't belong to this node")
    tx.delete(Task, task_id)


def _is_attachment(task: Task) -> bool:
    return task.spec.network_attachment_spec is not None
