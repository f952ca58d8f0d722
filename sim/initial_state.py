"""The initial state of a simulated cluster, as an init and the joins leave it in the store."""

from collections.abc import Iterable
from hashlib import sha256
from itertools import count

from msgspec.structs import replace

from sim.world.certificates import found
from skep.manager.control.networks import first_networks
from skep.model.networks.data_planes import LOCAL_ADDRESSES_LABEL, PATHS_LABEL, SKEP, TUNNEL_LABEL
from skep.model.networks.reserved_ports import tunnel_port
from skep.model.networks.wireguard import PublicKey, public_keys_label
from skep.model.node import (
    Availability,
    ManagerStatus,
    Node,
    NodeCertificate,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.permissions.rights import ALLOW_LABEL, Right
from skep.model.swarm import DEFAULT_DATA_PATH_PORT, DEFAULT_SWARM_SPEC, Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import ZERO_TIME
from skep.store.interface import Transaction
from skep.store.level import LEVEL

CLUSTER = ClusterId("sim")


def joined(
    tx: Transaction,
    managers: Iterable[NodeId],
    workers: Iterable[NodeId],
    history_limit: int | None = None,
    *,
    has_root: bool = False,
) -> None:
    """Write a cluster of these nodes, with the networks that every new cluster has.  Managers are drained.

    Args:
        history_limit: number of ended tasks that are kept for each slot, or None for Docker's default.
        has_root: whether nodes check certificates (``certificates``).
    """
    spec, numbers = replace(DEFAULT_SWARM_SPEC, labels={ALLOW_LABEL: Right.PROCESSES.value}), count(1)
    if history_limit is not None:
        kept = replace(spec.orchestration, task_history_retention_limit=history_limit)
        spec = replace(spec, orchestration=kept)
    tx.put(Swarm(id=CLUSTER, spec=spec))
    tx.raise_level(LEVEL)
    for network in first_networks(new_id=lambda: f"net{next(numbers)}", now=ZERO_TIME):
        tx.put(network)
    for id in managers:
        tx.put(
            replace(
                a_manager(id),
                status=NodeStatus(state=NodeState.READY),
                manager_status=ManagerStatus(reachability=Reachability.REACHABLE, addr=address_of(id)),
            )
        )
    for id in workers:
        tx.put(a_worker(id))
    if has_root:
        found(tx)


def a_worker(id: NodeId) -> Node:
    """Return a worker node in the state after its join."""
    certificate = NodeCertificate(role=NodeRole.WORKER, state="issued", plane=SKEP)
    return Node(id=id, certificate=certificate)


def a_manager(id: NodeId) -> Node:
    """Return a drained manager node in the state after its join."""
    spec = NodeSpec(role=NodeRole.MANAGER, availability=Availability.DRAIN)
    certificate = NodeCertificate(role=NodeRole.MANAGER, state="issued", plane=SKEP)
    return Node(id=id, spec=spec, description=NodeDescription(hostname=id), certificate=certificate)


def address_of(id: NodeId) -> str:
    """Return the address on which a manager listens."""
    return f"{id}:2377"


def labels_behind_nat(id: NodeId) -> dict[str, str]:
    """Return the engine labels of a node behind NAT that can have tunnels."""
    key = PublicKey(sha256(id.encode()).digest(), tunnel_port(DEFAULT_DATA_PATH_PORT))
    return {PATHS_LABEL: "1", LOCAL_ADDRESSES_LABEL: "10.0.0.5/24", TUNNEL_LABEL: public_keys_label([key])}
