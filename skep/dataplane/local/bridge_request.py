"""What a user's bridge network is to be: pure.

Options that would change reachability and that are not implemented are refused, so that no user relies on them.

Source: moby 20.10, libnetwork/network.go, libnetwork/ipam/allocator.go, drivers/bridge/bridge.go (the words).
"""

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

import msgspec

from skep.api.errors import Forbidden
from skep.api.networks import IPAMBody, NetworkBody, SubnetBody
from skep.dataplane.addresses import free_subnet
from skep.dataplane.local.objects import LocalNetwork
from skep.errors import InvalidArgument, Unimplemented
from skep.model.network import MTU_OPTION, MTUS
from skep.model.times import Timestamp

_BRIDGE = "com.docker.network.bridge."
_NEUTRAL: Mapping[str, frozenset[str]] = {
    f"{_BRIDGE}enable_icc": frozenset({"", "true"}),
    f"{_BRIDGE}enable_ip_masquerade": frozenset({"", "true"}),
    f"{_BRIDGE}host_binding_ipv4": frozenset({"", "0.0.0.0"}),
    f"{_BRIDGE}default_bridge": frozenset({"", "false"}),
}
"""Options whose value says what is done anyway."""


def bridge_of(
    body: NetworkBody,
    *,
    id: str,
    created_at: Timestamp,
    taken: Iterable[IPv4Network],
    configuration: LocalNetwork | None = None,
) -> LocalNetwork:
    """The network that ``body`` asks for.

    Args:
        taken: subnets of the machine's routes and of its other networks.
        configuration: where its settings are from; None: the body itself.

    Raises: InvalidArgument, Forbidden, Unimplemented: it cannot be so.
    """
    _check_driver(body)
    configs, options = settings_of(body, "bridge", configuration)
    _check_options(options)
    subnet = settled_subnet([one for one in configs if one != SubnetBody()], list(taken))
    return network_of(
        body, "bridge", id=id, created_at=created_at, configs=configs, subnet=subnet, options=options
    )


def settings_of(
    body: NetworkBody, driver: str, configuration: LocalNetwork | None
) -> tuple[Sequence[SubnetBody], Mapping[str, str]]:
    """Subnets and options of a network of this node, the body's or those of its ``configuration``.

    Raises: InvalidArgument, Unimplemented: no driver of this node has them.
    """
    ipam = body.ipam or IPAMBody()
    if body.enable_ipv6 or (configuration is not None and configuration.has_ipv6):
        raise Unimplemented(f"{driver} networks of this node have IPv4 only (--ipv6)")
    if ipam.driver not in ("", "default"):
        raise InvalidArgument(f"could not resolve driver {ipam.driver} in registry")
    if configuration is not None:
        return configuration.configs, configuration.options
    return ipam.config, body.options


def network_of(
    body: NetworkBody,
    driver: str,
    *,
    id: str,
    created_at: Timestamp,
    configs: Iterable[SubnetBody],
    subnet: SubnetBody,
    options: Mapping[str, str],
) -> LocalNetwork:
    """The network of ``body`` with the ``subnet`` that was settled of ``configs``."""
    ipam = body.ipam or IPAMBody()
    return LocalNetwork(
        id=id,
        name=body.name,
        driver=driver,
        created_at=created_at,
        configs=(subnet,),
        shown=shown_configs(configs),
        ipam_options=ipam.options,
        config_from=body.config_source,
        is_internal=body.internal,
        is_attachable=body.attachable,
        options=options,
        labels=body.labels,
    )


def _check_driver(body: NetworkBody) -> None:
    match body.driver:
        case "" | "bridge":
            return
        case "host" | "null":
            raise Forbidden(f'only one instance of "{body.driver}" network is allowed')
        case driver:
            raise Unimplemented(
                f"this node makes bridge networks for its containers, none of driver {driver}: "
                "give skep a Docker Engine (--engine-socket) for these"
            )


def _check_options(options: Mapping[str, str]) -> None:
    for name, value in sorted(options.items()):
        if name == MTU_OPTION:
            if not (value.isascii() and value.isdigit() and int(value) in MTUS):
                raise InvalidArgument(f"invalid value for {name}: {value}")
        elif value not in _NEUTRAL.get(name, ()):
            raise Unimplemented(f"bridge networks of this node do not have the option {name}={value}")


def settled_subnet(configs: list[SubnetBody], taken: list[IPv4Network]) -> SubnetBody:
    """The network's one subnet, with its gateway."""
    if len(configs) > 1 or any(":" in config.subnet for config in configs):
        raise Unimplemented("a bridge network of this node has one IPv4 subnet")
    config = configs[0] if configs else SubnetBody()
    if config.subnet:
        subnet = IPv4Network(config.subnet, strict=False)
        if subnet.num_addresses < 4:
            raise InvalidArgument(f"subnet {subnet} has no room for a gateway and a container")
        if any(subnet.overlaps(other) for other in taken if other.prefixlen):
            raise Forbidden("Pool overlaps with other one on this address space")
    else:
        subnet = free_subnet(taken)
    pool = _range(config.ip_range, subnet) if config.ip_range else subnet
    # As an engine's, the gateway that is not named is the first address of the range.
    first = max(pool[0], subnet[1])
    gateway = _inside(config.gateway, subnet, "gateway") if config.gateway else first
    for address in config.auxiliary_addresses.values():
        _inside(address, subnet, "auxiliary address")
    return msgspec.structs.replace(config, subnet=str(subnet), gateway=str(gateway))


def shown_configs(configs: Iterable[SubnetBody]) -> tuple[SubnetBody, ...]:
    """What a user sees of the subnets: what was asked for; empty: what was settled.

    Source: moby 20.10, daemon/network.go, buildIPAMResources.
    """
    return tuple(one for one in configs if one.subnet)


def _range(text: str, subnet: IPv4Network) -> IPv4Network:
    try:
        pool = IPv4Network(text, strict=False)
        if not pool.subnet_of(subnet):
            raise ValueError
    except ValueError:
        raise InvalidArgument(f"no matching subnet for range {text}") from None
    return pool


def _inside(text: str, subnet: IPv4Network, what: str) -> IPv4Address:
    try:
        address = IPv4Address(text)
    except ValueError:
        raise InvalidArgument(f"invalid {what} {text}") from None
    if not int(subnet[0]) < int(address) < int(subnet[-1]):
        raise InvalidArgument(f"no matching subnet for {what} {text}")
    return address
