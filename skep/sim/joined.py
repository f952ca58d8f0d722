"""What an init and the joins leave in the store of a simulated cluster."""

from collections.abc import Iterable

from skep.model.ids import ClusterId, NodeId
from skep.model.node import (
    Availability,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.store.interface import Transaction

CLUSTER = ClusterId("sim")


def joined(tx: Transaction, managers: Iterable[NodeId], workers: Iterable[NodeId]) -> None:
    """A cluster of these; managers are drained."""
    tx.put(Swarm(id=CLUSTER, spec=DEFAULT_SWARM_SPEC))
    for id in managers:
        tx.put(
            Node(
                id=id,
                spec=NodeSpec(role=NodeRole.MANAGER, availability=Availability.DRAIN),
                description=NodeDescription(hostname=id),
                status=NodeStatus(state=NodeState.READY),
                manager_status=ManagerStatus(reachability=Reachability.REACHABLE, addr=address_of(id)),
            )
        )
    for id in workers:
        tx.put(Node(id=id))


def address_of(id: NodeId) -> str:
    """Where a manager listens."""
    return f"{id}:2377"
