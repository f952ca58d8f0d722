"""Operations on the cluster as a whole.

Founding it is one transaction; the requests that lead there are checked in ``api.swarm_requests``.

Source: swarmkit, manager/controlapi/cluster.go; moby 20.10, daemon/cluster/swarm.go.
"""

import msgspec
from msgspec.structs import replace

from skep.api.swarm_requests import (
    DEFAULT_DATA_PATH_PORT,
    DEFAULT_POOL,
    DEFAULT_SUBNET_SIZE,
    check_swarm_name,
    merged_spec,
)
from skep.errors import FailedPrecondition, InvalidArgument, OutOfSequence, Unimplemented
from skep.manager.control.networks import first_networks
from skep.model.ids import ClusterId, IdSource
from skep.model.meta import TLSInfo, Version
from skep.model.node import Node
from skep.model.swarm import JoinTokens, Swarm, SwarmSpec
from skep.model.times import SECOND_NS, Timestamp
from skep.security.tokens import join_token
from skep.store.interface import Transaction, View

CERT_EXPIRY_MIN_NS = 3600 * SECOND_NS


class Rotations(msgspec.Struct, frozen=True, kw_only=True):
    """Which secrets an update of the cluster replaces."""

    worker_token: bool = False
    manager_token: bool = False
    unlock_key: bool = False


def found_swarm(
    tx: Transaction,
    id: ClusterId,
    spec: SwarmSpec,
    first_node: Node,
    *,
    tls_info: TLSInfo,
    join_tokens: JoinTokens,
    new_id: IdSource,
    now: Timestamp,
    default_addr_pool: tuple[str, ...] = DEFAULT_POOL,
    subnet_size: int = DEFAULT_SUBNET_SIZE,
    data_path_port: int = DEFAULT_DATA_PATH_PORT,
) -> Swarm:
    """Write everything a new cluster begins with: itself, its first node, ingress and the predefined networks.

    Raises:
        FailedPrecondition: there is a cluster already.
        InvalidArgument, Unimplemented: ``spec`` can never work.
    """
    if tx.find(Swarm):
        raise FailedPrecondition("the store holds a cluster already")
    check_swarm_spec(spec)
    swarm = Swarm(
        id=id,
        created_at=now,
        spec=spec,
        tls_info=tls_info,
        join_tokens=join_tokens,
        default_addr_pool=default_addr_pool,
        subnet_size=subnet_size,
        data_path_port=data_path_port,
    )
    tx.put(replace(first_node, created_at=now))
    for network in first_networks(new_id=new_id, now=now):
        tx.put(network)
    return tx.put(swarm)


def the_swarm(view: View) -> Swarm:
    """The cluster that ``view`` is of."""
    (swarm,) = view.find(Swarm)
    return swarm


def update_swarm(
    tx: Transaction, spec: SwarmSpec, version: int, rotations: Rotations, *, new_id: IdSource
) -> Swarm:
    """Replace the cluster's settings, if it is still at ``version``, and the tokens that ``rotations`` names.

    Raises:
        InvalidArgument: the spec can never work; Unimplemented: it asks for what this version cannot do.
        OutOfSequence: the cluster is at another version.
    """
    swarm = tx.get(Swarm, the_swarm(tx).id)
    check_swarm_name(spec)
    if spec.ca_config.signing_ca_cert or spec.ca_config.signing_ca_key:
        raise Unimplemented("a root CA of your own is not supported yet")
    spec = merged_spec(spec)
    check_swarm_spec(spec)
    if spec.ca_config.force_rotate != swarm.spec.ca_config.force_rotate:
        raise Unimplemented("rotating the root CA is not supported yet")
    if swarm.version != Version(index=version):
        raise OutOfSequence
    return tx.put(replace(swarm, spec=spec, join_tokens=_rotated(swarm, rotations, new_id)))


def check_swarm_spec(spec: SwarmSpec) -> None:
    """Refuse settings that can never work.  Raises: InvalidArgument, Unimplemented."""
    if spec.ca_config.node_cert_expiry < CERT_EXPIRY_MIN_NS:
        raise InvalidArgument("minimum certificate expiry time is: 1h0m0s")
    if spec.dispatcher.heartbeat_period < 0:
        raise InvalidArgument("heartbeat time period cannot be a negative duration")
    if spec.encryption_config.auto_lock_managers:
        # Better refused than a lock that does not lock.
        raise Unimplemented("locking managers is not supported yet")
    if spec.ca_config.external_cas:
        raise Unimplemented("external certificate authorities are not supported")


def _rotated(swarm: Swarm, rotations: Rotations, new_id: IdSource) -> JoinTokens:
    root = swarm.tls_info.trust_root.encode()
    tokens = swarm.join_tokens
    return JoinTokens(
        worker=join_token(root, new_id()) if rotations.worker_token else tokens.worker,
        manager=join_token(root, new_id()) if rotations.manager_token else tokens.manager,
    )
