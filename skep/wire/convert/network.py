"""Networks, attachments and ports."""

from skep.model.network import ConfigReference, IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.networks.gossip import GossipKey
from skep.model.service import NetworkAttachmentConfig, PortConfig, PublishMode
from skep.model.task import NetworkAttachment
from skep.model.values.ids import NetworkId
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.values import (
    EnumTable,
    driver_from_pb,
    driver_to_pb,
    meta_to_pb,
    stamp_of,
    version_from_pb,
)

PROTOCOLS = EnumTable("protocol", {"tcp": 0, "": 0, "udp": 1, "sctp": 2})
PUBLISH_MODES = EnumTable("publish mode", {"ingress": 0, "host": 1})


def port_to_pb(port: PortConfig) -> pb.PortConfig:
    """Convert a port.  Raises InvalidArgument for an unknown protocol."""
    return pb.PortConfig(
        name=port.name,
        protocol=pb.PortConfig.Protocol.ValueType(PROTOCOLS.number(port.protocol)),
        target_port=port.target_port,
        published_port=port.published_port,
        publish_mode=pb.PortConfig.PublishMode.ValueType(PUBLISH_MODES.number(port.publish_mode.value)),
    )


def port_from_pb(message: pb.PortConfig) -> PortConfig:
    """Convert a port.  Raises InvalidArgument for an unknown protocol or mode."""
    return PortConfig(
        name=message.name,
        protocol=PROTOCOLS.word(message.protocol),
        target_port=message.target_port,
        published_port=message.published_port,
        publish_mode=PublishMode(PUBLISH_MODES.word(message.publish_mode)),
    )


def attachment_config_to_pb(config: NetworkAttachmentConfig) -> pb.NetworkAttachmentConfig:
    return pb.NetworkAttachmentConfig(
        target=config.target, aliases=config.aliases, driver_attachment_opts=config.driver_opts
    )


def attachment_config_from_pb(message: pb.NetworkAttachmentConfig) -> NetworkAttachmentConfig:
    return NetworkAttachmentConfig(
        target=message.target,
        aliases=tuple(message.aliases),
        driver_opts=dict(message.driver_attachment_opts),
    )


def attachment_to_pb(attachment: NetworkAttachment) -> pb.NetworkAttachment:
    message = pb.NetworkAttachment(addresses=attachment.addresses, aliases=attachment.aliases)
    if attachment.network is not None:
        message.network.CopyFrom(network_to_pb(attachment.network))
    return message


def attachment_from_pb(message: pb.NetworkAttachment) -> NetworkAttachment:
    """Convert an attachment with addresses as ``ip/prefix length``.  ``network`` is None if the message has none."""
    return NetworkAttachment(
        network=network_from_pb(message.network) if message.HasField("network") else None,
        addresses=tuple(message.addresses),
        aliases=tuple(message.aliases),
    )


def gossip_key_to_pb(key: GossipKey) -> pb.EncryptionKey:
    return pb.EncryptionKey(subsystem=key.subsystem, key=key.key, lamport_time=key.lamport_time)


def network_to_pb(network: Network) -> pb.Network:
    """Convert a network without ``spec.scope``: nodes receive only networks of the cluster."""
    spec = network.spec
    message = pb.Network(
        id=network.id,
        meta=meta_to_pb(network.version, network.created_at, network.updated_at),
        spec=pb.NetworkSpec(
            annotations=pb.Annotations(name=spec.name, labels=spec.labels),
            ipv6_enabled=spec.ipv6_enabled,
            internal=spec.internal,
            attachable=spec.attachable,
            ingress=spec.ingress,
        ),
        driver_state=driver_to_pb(network.driver_state),
    )
    if spec.driver_configuration is not None:
        message.spec.driver_config.CopyFrom(driver_to_pb(spec.driver_configuration))
    if spec.config_from is not None and spec.config_from.network:
        message.spec.network = spec.config_from.network
    if spec.ipam_options is not None:
        message.spec.ipam.CopyFrom(_ipam_to_pb(spec.ipam_options))
    if network.ipam_options is not None:
        message.ipam.CopyFrom(_ipam_to_pb(network.ipam_options))
    return message


def network_from_pb(message: pb.Network) -> Network:
    """Reverse ``network_to_pb``.  ``spec.scope`` is empty."""
    spec = message.spec
    return Network(
        id=NetworkId(message.id),
        version=version_from_pb(message.meta.version),
        created_at=stamp_of(message.meta, "created_at"),
        updated_at=stamp_of(message.meta, "updated_at"),
        spec=NetworkSpec(
            name=spec.annotations.name,
            labels=dict(spec.annotations.labels),
            driver_configuration=(
                driver_from_pb(spec.driver_config) if spec.HasField("driver_config") else None
            ),
            ipv6_enabled=spec.ipv6_enabled,
            internal=spec.internal,
            attachable=spec.attachable,
            ingress=spec.ingress,
            ipam_options=_ipam_from_pb(spec.ipam) if spec.HasField("ipam") else None,
            config_from=ConfigReference(network=spec.network) if spec.network else None,
        ),
        driver_state=driver_from_pb(message.driver_state),
        ipam_options=_ipam_from_pb(message.ipam) if message.HasField("ipam") else None,
    )


def _ipam_to_pb(options: IPAMOptions) -> pb.IPAMOptions:
    return pb.IPAMOptions(
        driver=driver_to_pb(options.driver),
        configs=[
            pb.IPAMConfig(
                family=pb.IPAMConfig.IPV6 if ":" in config.subnet else pb.IPAMConfig.IPV4,
                subnet=config.subnet,
                range=config.range,
                gateway=config.gateway,
                reserved=config.auxiliary_addresses,
            )
            for config in options.configs
        ],
    )


def _ipam_from_pb(message: pb.IPAMOptions) -> IPAMOptions:
    return IPAMOptions(
        driver=driver_from_pb(message.driver),
        configs=tuple(
            IPAMConfig(
                subnet=config.subnet,
                range=config.range,
                gateway=config.gateway,
                auxiliary_addresses=dict(config.reserved),
            )
            for config in message.configs
        ),
    )
