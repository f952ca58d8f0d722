"""Nodes and their descriptions of themselves."""

from skep.model.node import (
    Availability,
    CSIInfo,
    EngineDescription,
    EnginePlugin,
    Node,
    NodeCertificate,
    NodeDescription,
    NodeRole,
    Topology,
)
from skep.model.values.meta import TLSInfo
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.network import attachment_to_pb
from skep.wire.convert.resources import (
    platform_from_pb,
    platform_to_pb,
    resources_from_pb,
    resources_to_pb,
)
from skep.wire.convert.values import EnumTable, meta_to_pb

ROLES = EnumTable("node role", {"worker": 0, "manager": 1})
AVAILABILITIES = EnumTable("availability", {"active": 0, "pause": 1, "drain": 2})
NODE_STATES = EnumTable("node state", {"unknown": 0, "down": 1, "ready": 2, "disconnected": 3})
REACHABILITIES = EnumTable("reachability", {"unknown": 0, "unreachable": 1, "reachable": 2})
CERTIFICATE_STATES = EnumTable(
    "certificate state", {"": 0, "renew": 1, "pending": 2, "issued": 3, "failed": 4, "rotate": 5}
)


def role_to_pb(role: NodeRole) -> pb.NodeRole.ValueType:
    return pb.NodeRole.ValueType(ROLES.number(role.value))


def role_from_pb(number: int) -> NodeRole:
    """Convert a role.  Raises InvalidArgument if it is unknown."""
    return NodeRole(ROLES.word(number))


def availability_to_pb(availability: Availability) -> pb.NodeSpec.Availability.ValueType:
    return pb.NodeSpec.Availability.ValueType(AVAILABILITIES.number(availability.value))


def availability_from_pb(number: int) -> Availability:
    return Availability(AVAILABILITIES.word(number))


def node_to_pb(node: Node, data_path_port: int = 0) -> pb.Node:
    """Convert a node without its session, which concerns the managers only.

    ``data_path_port`` is the cluster's UDP port for VXLAN, or 0 to omit it.
    """
    certificate = node.certificate or NodeCertificate(role=node.spec.role)
    message = pb.Node(
        id=node.id,
        meta=meta_to_pb(node.version, node.created_at, node.updated_at),
        spec=pb.NodeSpec(
            annotations=pb.Annotations(name=node.spec.name, labels=node.spec.labels),
            desired_role=role_to_pb(node.spec.role),
            membership=pb.NodeSpec.ACCEPTED,
            availability=availability_to_pb(node.spec.availability),
        ),
        description=description_to_pb(node.description),
        status=pb.NodeStatus(
            state=pb.NodeStatus.State.ValueType(NODE_STATES.number(node.status.state.value)),
            message=node.status.message,
            addr=node.status.addr,
        ),
        certificate=pb.Certificate(
            role=role_to_pb(certificate.role),
            cn=node.id,
            status=pb.IssuanceStatus(
                state=pb.IssuanceStatus.State.ValueType(CERTIFICATE_STATES.number(certificate.state))
            ),
        ),
        role=role_to_pb(certificate.role),
        attachments=[attachment_to_pb(attachment) for attachment in node.attachments],
        VXLANUDPPort=data_path_port,
    )
    if (status := node.manager_status) is not None:
        message.manager_status.CopyFrom(
            pb.ManagerStatus(
                addr=status.addr,
                leader=status.leader,
                reachability=pb.RaftMemberStatus.Reachability.ValueType(
                    REACHABILITIES.number(status.reachability.value)
                ),
            )
        )
    return message


def description_to_pb(description: NodeDescription) -> pb.NodeDescription:
    """Reverse ``description_from_pb``."""
    engine, tls = description.engine, description.tls_info
    return pb.NodeDescription(
        hostname=description.hostname,
        platform=platform_to_pb(description.platform),
        resources=resources_to_pb(description.resources),
        engine=pb.EngineDescription(
            engine_version=engine.engine_version,
            labels=engine.labels,
            plugins=[pb.PluginDescription(type=plugin.type, name=plugin.name) for plugin in engine.plugins],
        ),
        tls_info=pb.NodeTLSInfo(
            trust_root=tls.trust_root.encode(),
            cert_issuer_subject=tls.cert_issuer_subject,
            cert_issuer_public_key=tls.cert_issuer_public_key,
        ),
        csi_info=[_csi_to_pb(info) for info in description.csi_info],
    )


def description_from_pb(message: pb.NodeDescription) -> NodeDescription:
    """Convert a node's description of itself.  Architecture names are kept as the node spells them."""
    engine, tls = message.engine, message.tls_info
    return NodeDescription(
        hostname=message.hostname,
        platform=platform_from_pb(message.platform),
        resources=resources_from_pb(message.resources),
        engine=EngineDescription(
            engine_version=engine.engine_version,
            labels=dict(engine.labels),
            plugins=tuple(EnginePlugin(type=plugin.type, name=plugin.name) for plugin in engine.plugins),
        ),
        tls_info=TLSInfo(
            trust_root=tls.trust_root.decode(errors="replace"),
            cert_issuer_subject=tls.cert_issuer_subject,
            cert_issuer_public_key=tls.cert_issuer_public_key,
        ),
        csi_info=tuple(_csi_from_pb(info) for info in message.csi_info),
    )


def _csi_to_pb(info: CSIInfo) -> pb.NodeCSIInfo:
    message = pb.NodeCSIInfo(
        plugin_name=info.plugin_name,
        node_id=info.node_id,
        max_volumes_per_node=info.max_volumes_per_node,
    )
    if info.accessible_topology is not None:
        message.accessible_topology.CopyFrom(pb.Topology(segments=info.accessible_topology.segments))
    return message


def _csi_from_pb(message: pb.NodeCSIInfo) -> CSIInfo:
    topology = message.accessible_topology
    return CSIInfo(
        plugin_name=message.plugin_name,
        node_id=message.node_id,
        max_volumes_per_node=message.max_volumes_per_node,
        accessible_topology=(
            Topology(segments=dict(topology.segments)) if message.HasField("accessible_topology") else None
        ),
    )
