"""What a node's network on one of the machine's own devices (macvlan, ipvlan) is to be: pure.

Source: moby 20.10, libnetwork/drivers/macvlan/macvlan_setup.go, macvlan_network.go, and ipvlan's (the words).
"""

from collections.abc import Collection

from skep.api.errors import Forbidden
from skep.api.networks import IPAMBody, NetworkBody, SubnetBody
from skep.dataplane.local.bridge_request import settled_subnet
from skep.dataplane.local.objects import PARENT_MODES, PARENT_OPTION, LocalNetwork, parent_of
from skep.errors import InvalidArgument, Unimplemented
from skep.model.network import MTU_OPTION, MTUS
from skep.model.times import Timestamp

_NAME_LENGTH_MAX = 15


def parent_network_of(
    body: NetworkBody,
    *,
    id: str,
    created_at: Timestamp,
    others: Collection[LocalNetwork],
    devices: Collection[str],
    configuration: LocalNetwork | None = None,
) -> LocalNetwork:
    """The network that ``body`` asks for.

    Args:
        others: the node's networks.
        devices: names of the machine's network interfaces.
        configuration: where its settings are from; None: the body itself.

    Raises: InvalidArgument, Forbidden, Unimplemented: it cannot be so.
    """
    ipam = body.ipam or IPAMBody()
    configs = configuration.configs if configuration is not None else ipam.config
    options = configuration.options if configuration is not None else body.options
    if body.enable_ipv6 or (configuration is not None and configuration.has_ipv6):
        raise Unimplemented(f"{body.driver} networks of this node have IPv4 only (--ipv6)")
    if ipam.driver not in ("", "default"):
        raise InvalidArgument(f"could not resolve driver {ipam.driver} in registry")
    network = LocalNetwork(
        id=id,
        name=body.name,
        driver=body.driver,
        created_at=created_at,
        configs=(_subnet(configs, body.driver),),
        ipam_options=ipam.options,
        config_from=body.config_source,
        is_internal=body.internal,
        is_attachable=body.attachable,
        options=options,
        labels=body.labels,
    )
    _check_options(network, others, devices)
    return network


def _subnet(configs: Collection[SubnetBody], driver: str) -> SubnetBody:
    named = [one for one in configs if one != SubnetBody()]
    if not any(one.subnet for one in named):
        raise InvalidArgument(
            f"a {driver} network of this node needs the subnet of its parent's network (--subnet)"
        )
    return settled_subnet(named, [])


def _check_options(network: LocalNetwork, others: Collection[LocalNetwork], devices: Collection[str]) -> None:
    driver, known = network.driver, {PARENT_OPTION, MTU_OPTION, f"{network.driver}_mode"}
    for name, value in sorted(network.options.items()):
        if name not in known:
            raise Unimplemented(f"{driver} networks of this node do not know the option {name}={value}")
    mode = network.options.get(f"{driver}_mode", "")
    if mode and mode not in PARENT_MODES[driver]:
        default = PARENT_MODES[driver][0]
        raise InvalidArgument(
            f"requested {driver} mode '{mode}' is not valid, '{default}' mode is the {driver} driver default"
        )
    mtu = network.options.get(MTU_OPTION, "")
    if mtu and not (mtu.isascii() and mtu.isdigit() and int(mtu) in MTUS):
        raise InvalidArgument(f"invalid value for {MTU_OPTION}: {mtu}")
    parent = network.options.get(PARENT_OPTION, "")
    if not parent:
        raise Unimplemented(f"a {driver} network of this node needs a parent interface (-o parent=eth0)")
    if parent == "lo":
        raise InvalidArgument(f"loopback interface is not a valid {driver} parent link")
    if len(parent) > _NAME_LENGTH_MAX or parent not in devices:
        raise InvalidArgument(
            f"invalid subinterface vlan name {parent[:40]}, or the parent interface is not there: make it first "
            f"(ip link add link eth0 name eth0.10 type vlan id 10)"
        )
    for other in others:
        if (held := parent_of(other)) is not None and held.device == parent:
            raise Forbidden(f"network {other.id[:12]} is already using parent interface {parent}")
