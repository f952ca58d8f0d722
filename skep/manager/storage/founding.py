"""The first transaction of a cluster: its initial objects, all or nothing."""

from cryptography import x509

from skep.bootstrap import ManagerConfig
from skep.errors import FailedPrecondition
from skep.linux.network.routes import read_routes
from skep.manager.ca.admission import issued_certificate
from skep.manager.control.swarm import found_swarm
from skep.model.networks.addresses import host_of
from skep.model.networks.data_planes import SKEP
from skep.model.networks.routes import ROUTES_LABEL, MachineRoute, routes_label
from skep.model.node import (
    EngineDescription,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    Reachability,
)
from skep.model.swarm import Swarm
from skep.model.values.ids import IdSource
from skep.model.values.times import Timestamp
from skep.security.authority import Authority
from skep.security.tokens import new_join_tokens
from skep.security.trust import issuer_digest, tls_info
from skep.store.interface import Transaction
from skep.store.kinds import ROOT_KEY_ID, Payload


def found_cluster(
    tx: Transaction,
    config: ManagerConfig,
    authority: Authority,
    certificate: x509.Certificate,
    *,
    new_id: IdSource,
    now: Timestamp,
) -> Swarm:
    """Write the cluster object, the first node, its networks and the root key.

    Args:
        certificate: Certificate of the first node.

    Raises:
        FailedPrecondition: The manager has no settings for a new cluster.
    """
    bootstrap = config.bootstrap
    if bootstrap is None:
        raise FailedPrecondition(
            "this manager has no cluster and no settings for a new one: run docker swarm init or join again"
        )
    tls = tls_info(authority.root_pem)
    first = Node(
        id=config.node_id,
        spec=NodeSpec(role=NodeRole.MANAGER, availability=bootstrap.availability),
        description=NodeDescription(
            hostname=config.hostname,
            # The routes are needed now, because the first networks are allocated next and must avoid them.
            engine=EngineDescription(
                labels={ROUTES_LABEL: routes_label(MachineRoute(*one) for one in read_routes())}
            ),
        ),
        manager_status=ManagerStatus(reachability=Reachability.REACHABLE, addr=config.advertise_addr),
        certificate=issued_certificate(
            NodeRole.MANAGER,
            certificate,
            certificate.not_valid_before_utc,
            issuer=issuer_digest(tls),
            plane=SKEP,
        ),
    )
    tx.put(Payload(id=ROOT_KEY_ID, data=authority.key_pem))
    swarm = Swarm(
        id=config.cluster_id,
        created_at=now,
        spec=bootstrap.spec,
        tls_info=tls,
        join_tokens=new_join_tokens(authority.root_pem),
        default_addr_pool=bootstrap.default_addr_pool,
        subnet_size=bootstrap.subnet_size,
        data_path_port=bootstrap.data_path_port,
    )
    return found_swarm(tx, swarm, first, new_id, has_ipv6=":" in host_of(config.advertise_addr))
