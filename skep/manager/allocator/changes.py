"""The allocator's changes.  Each is plain data, which ``apply`` writes in one small transaction."""

from typing import TypeAlias, assert_never

import msgspec
from msgspec.structs import replace

from skep.errors import Unavailable
from skep.manager.allocator.subnets import is_allocated
from skep.manager.control_loops.failures import ERROR_CHARACTERS_MAX
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import Endpoint, Service
from skep.model.swarm import Swarm
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction
from skep.store.keys import HEAD

PENDING = "pending task scheduling"
"""Message of a task that waits for the scheduler after its allocation, in SwarmKit's words."""


class AllocateSubnets(msgspec.Struct, frozen=True):
    """Set a network's driver state and subnets.  ``network`` is the result.

    ``pools`` are the cluster's address pools at the time of the decision.  If they have changed, the network is decided
    again.
    """

    network: Network
    pools: tuple[str, ...]


class WriteClaims(msgspec.Struct, frozen=True):
    """Write the claim keys of a network that a leader of an earlier version allocated without such keys."""

    network: Network


class AllocateEndpoint(msgspec.Struct, frozen=True):
    """Set a service's ports and virtual addresses."""

    service: Service
    endpoint: Endpoint


class AttachNode(msgspec.Struct, frozen=True):
    """Set a node's own attachments to networks."""

    node_id: NodeId
    attachments: tuple[NetworkAttachment, ...]


class ReleaseTask(msgspec.Struct, frozen=True):
    """Set the attachments of a task and release it to the scheduler."""

    task: Task
    attachments: tuple[NetworkAttachment, ...] = ()


class Explain(msgspec.Struct, frozen=True):
    """Write the reason for waiting to a task."""

    task: Task
    reason: str


Change: TypeAlias = AllocateSubnets | WriteClaims | AllocateEndpoint | AttachNode | ReleaseTask | Explain


def apply(tx: Transaction, change: Change, now: Timestamp) -> None:
    """Write ``change``, unless its preconditions no longer hold."""
    match change:
        case AllocateSubnets(wanted_network, pools):
            network = tx.lookup(Network, wanted_network.id)
            if network is not None and not is_allocated(network):
                swarms = [tx.rely_on(Swarm, one.id, HEAD) for one in tx.find(Swarm)]
                if any(one is None or one.default_addr_pool != pools for one in swarms):
                    raise Unavailable("the cluster's address pools have changed meanwhile")
                state, addresses = wanted_network.driver_state, wanted_network.ipam_options
                tx.put(replace(network, driver_state=state, ipam_options=addresses))
        case WriteClaims(wanted_network):
            network = tx.lookup(Network, wanted_network.id)
            if network is not None:
                tx.put(network)
        case AllocateEndpoint(wanted, endpoint):
            service = tx.lookup(Service, wanted.id)
            if service is not None and service.spec_version == wanted.spec_version:
                tx.put(replace(service, endpoint=endpoint))
        case AttachNode(node_id, attachments):
            node = tx.lookup(Node, node_id)
            if node is not None:
                tx.put(replace(node, attachments=attachments))
        case ReleaseTask(wanted_task, attachments):
            task = tx.lookup(Task, wanted_task.id)
            if task is not None and task.status.state is TaskState.NEW:
                status = TaskStatus(timestamp=now, state=TaskState.PENDING, message=PENDING)
                tx.put(replace(task, status=status, networks_attachments=attachments))
        case Explain(wanted_task, reason):
            task, reason = tx.lookup(Task, wanted_task.id), reason[:ERROR_CHARACTERS_MAX]
            if "status" in tx.damaged(Task).get(wanted_task.id, ()):
                return  # the task is shown as NEW but may already be PENDING, and a state never moves back
            if task is not None and task.status.state is TaskState.NEW and task.status.err != reason:
                tx.put(replace(task, status=replace(task.status, timestamp=now, err=reason)))
        case _:
            assert_never(change)


NETWORK = "network/"
NODE = "node/"


def network_key(id: str) -> str:
    """Return the work queue's key of a network.  The keys of services are their bare ids."""
    return f"{NETWORK}{id}"


def node_key(id: str) -> str:
    """Return the work queue's key of a node."""
    return f"{NODE}{id}"
