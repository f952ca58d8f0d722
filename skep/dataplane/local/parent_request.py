"""Builds a node's network on one of the machine's own devices (macvlan, ipvlan) from a request.  Pure.

Source: moby 20.10, libnetwork/drivers/macvlan/macvlan_setup.go, macvlan_network.go, and the same of ipvlan (error
texts).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from skep.api.errors import Forbidden
from skep.api.formats.networks import NetworkBody, SubnetBody
from skep.dataplane.addresses import DEFAULT_POOLS, Subnets
from skep.dataplane.local.bridge_request import network_of, settings_of, settled_subnets
from skep.dataplane.local.objects import (
    DUMMIES,
    DUMMY,
    PARENT_MODES,
    PARENT_OPTION,
    VLAN,
    LocalNetwork,
    device_of,
    parent_of,
    subnets_of,
)
from skep.errors import InvalidArgument, Unimplemented
from skep.model.network import MTU_OPTION, MTUS
from skep.model.networks.routes import Subnet
from skep.model.values.times import Timestamp

_VLANS = range(1, 4095)
_DEVICE_CHARACTERS_MAX = 15
"""Longest device name in characters, the kernel's limit (IFNAMSIZ)."""


def parent_network_of(
    body: NetworkBody,
    *,
    id: str,
    created_at: Timestamp,
    others: Collection[LocalNetwork],
    devices: Collection[str],
    made: Mapping[str, str] = MappingProxyType({}),
    routes: Iterable[Subnet] = (),
    pools: Sequence[Subnets] = DEFAULT_POOLS,
    configuration: LocalNetwork | None = None,
) -> LocalNetwork:
    """Return the network that ``body`` requests.

    Args:
        others: The node's networks.
        devices: Names of the machine's network interfaces.
        made: Kind of each device that the node creates for its networks, by name.
        routes: Subnets that the machine routes.  A subnet that Skep chooses must not overlap them.
        pools: Address pools from which a subnet is chosen if the user names none.
        configuration: The ``--config-only`` network with the settings, or None to use the settings in ``body``.

    Raises: InvalidArgument, Forbidden, Unimplemented: the request cannot be fulfilled.
    """
    configs, options, has_ipv6 = settings_of(body, configuration)
    subnets = settled_subnets(configs, _taken(configs, others, routes), id if has_ipv6 else "", pools)
    network = network_of(
        body, body.driver, id=id, created_at=created_at, configs=configs, subnets=subnets, options=options
    )
    _check_options(network, others, devices)
    device = device_of(network)
    kind = VLAN if options.get(PARENT_OPTION) else DUMMY
    return replace(network, made=made.get(device, "" if device in devices else kind))


def _taken(
    configs: Collection[SubnetBody], others: Collection[LocalNetwork], routes: Iterable[Subnet]
) -> list[Subnet]:
    """Return the subnets that the new network's subnets must not overlap.

    A subnet that the user names may be the machine's own network, and usually is, but it must not belong to another
    network here.  As in Docker Engine, two networks may share a subnet if their ranges differ.
    """
    shared = {one.subnet for one in configs if one.ip_range}
    taken = [subnet for one in others for subnet in subnets_of(one) if str(subnet) not in shared]
    named = {":" in one.subnet for one in configs if one.subnet}
    return [*taken, *(one for one in routes if (one.version == 6) not in named)]


def _check_options(network: LocalNetwork, others: Collection[LocalNetwork], devices: Collection[str]) -> None:
    driver, known = network.driver, {PARENT_OPTION, MTU_OPTION, f"{network.driver}_mode"}
    for name, value in sorted(network.options.items()):
        if name not in known:
            raise Unimplemented(f"{driver} networks of this node do not have the option {name}={value}")
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
        return
    if parent == "lo":
        raise InvalidArgument(f"loopback interface is not a valid {driver} parent link")
    if parent not in devices:
        _check_vlan(parent[:40], devices)
    for other in others:
        if (held := parent_of(other)) is not None and (held.kind, held.device) == (driver, parent):
            raise Forbidden(
                f"network {DUMMIES[driver]}-{other.id[:12]} is already using parent interface {parent}"
            )


def _check_vlan(parent: str, devices: Collection[str]) -> None:
    """Check that ``parent`` names a VLAN of an existing device.  Raises: InvalidArgument, in Docker Engine's words."""
    device, dot, number = parent.partition(".")
    if not dot:
        raise InvalidArgument(f"invalid subinterface vlan name {parent}, example formatting is eth0.10")
    if not re.fullmatch("[0-9]{1,9}", number):
        raise InvalidArgument(f"unable to parse a valid vlan id from: {number} (ex. eth0.10 for vlan 10)")
    if device not in devices:
        raise InvalidArgument(f"-o parent interface does was not found on the host: {device}")
    if int(number) not in _VLANS:
        raise InvalidArgument(f"vlan id must be between 1-4094, received: {int(number)}")
    if len(parent) > _DEVICE_CHARACTERS_MAX:
        raise InvalidArgument(f"failed to create {parent} vlan link: the name has more than 15 characters")
