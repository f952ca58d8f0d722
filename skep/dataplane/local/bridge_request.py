"""Builds a user's bridge network from a request.  Pure.

Unimplemented options that would change which containers can reach each other are refused, so that users do not rely on
them.

Source: moby 20.10, libnetwork/network.go, libnetwork/ipam/allocator.go, drivers/bridge/bridge.go (error texts).
"""

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network

import msgspec

from skep.api.errors import Forbidden
from skep.api.formats.networks import IPAMBody, NetworkBody, SubnetBody
from skep.dataplane.addresses import (
    DEFAULT_POOLS,
    UNIQUE_LOCAL_BITS,
    Network,
    Subnets,
    free_subnet,
    unique_local,
)
from skep.dataplane.local.objects import LocalNetwork
from skep.errors import InvalidArgument, Unimplemented
from skep.model.network import MTU_OPTION, MTUS
from skep.model.networks.addresses import Address, parsed
from skep.model.networks.data_planes import why_reserved
from skep.model.networks.routes import Subnet, overlap
from skep.model.values.times import Timestamp

_BRIDGE = "com.docker.network.bridge."
_NEUTRAL: Mapping[str, frozenset[str]] = {
    f"{_BRIDGE}enable_icc": frozenset({"", "true"}),
    f"{_BRIDGE}enable_ip_masquerade": frozenset({"", "true"}),
    f"{_BRIDGE}host_binding_ipv4": frozenset({"", "0.0.0.0"}),
    f"{_BRIDGE}default_bridge": frozenset({"", "false"}),
}
"""Options that are accepted only with these values, because they describe what Skep does anyway."""


def bridge_of(
    body: NetworkBody,
    *,
    id: str,
    created_at: Timestamp,
    taken: Iterable[Subnet],
    pools: Sequence[Subnets] = DEFAULT_POOLS,
    configuration: LocalNetwork | None = None,
) -> LocalNetwork:
    """Return the network that ``body`` requests.

    Args:
        id: The network's id, from which the IPv6 subnet is derived if the user does not name one.
        taken: Subnets of the machine's routes and of its other networks.
        pools: Address pools from which a subnet is chosen if the user names none.
        configuration: The ``--config-only`` network with the settings, or None to use the settings in ``body``.

    Raises: InvalidArgument, Forbidden, Unimplemented: the request cannot be fulfilled.
    """
    _check_driver(body)
    configs, options, has_ipv6 = settings_of(body, configuration)
    _check_options(options)
    subnets = settled_subnets(configs, list(taken), id if has_ipv6 else "", pools)
    return network_of(
        body, "bridge", id=id, created_at=created_at, configs=configs, subnets=subnets, options=options
    )


def settings_of(
    body: NetworkBody, configuration: LocalNetwork | None
) -> tuple[Sequence[SubnetBody], Mapping[str, str], bool]:
    """Return subnets and options from the body or ``configuration``, and whether the network has IPv6.

    Raises: InvalidArgument: an unknown IPAM driver.
    """
    ipam = body.ipam or IPAMBody()
    if ipam.driver not in ("", "default"):
        raise InvalidArgument(f"could not resolve driver {ipam.driver} in registry")
    if configuration is not None:
        return configuration.configs, configuration.options, configuration.has_ipv6
    return ipam.config, body.options, body.enable_ipv6


def network_of(
    body: NetworkBody,
    driver: str,
    *,
    id: str,
    created_at: Timestamp,
    configs: Iterable[SubnetBody],
    subnets: tuple[SubnetBody, ...],
    options: Mapping[str, str],
) -> LocalNetwork:
    """Return the network of ``body`` with the ``subnets`` that were chosen for ``configs``."""
    ipam = body.ipam or IPAMBody()
    return LocalNetwork(
        id=id,
        name=body.name,
        driver=driver,
        created_at=created_at,
        configs=subnets,
        shown=shown_configs(configs),
        ipam_options=ipam.options,
        config_from=body.config_source,
        is_internal=body.internal,
        is_attachable=body.attachable,
        has_ipv6=len(subnets) > 1,
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
                f"this node supports only bridge networks for its containers, not driver {driver}: "
                "give skep a Docker Engine (--engine-socket) for these"
            )


def _check_options(options: Mapping[str, str]) -> None:
    for name, value in sorted(options.items()):
        if name == MTU_OPTION:
            if not (value.isascii() and value.isdigit() and int(value) in MTUS):
                raise InvalidArgument(f"invalid value for {name}: {value}")
        elif value not in _NEUTRAL.get(name, ()):
            raise Unimplemented(f"bridge networks of this node do not have the option {name}={value}")


def settled_subnets(
    configs: Iterable[SubnetBody], taken: Sequence[Subnet], id6: str, pools: Sequence[Subnets]
) -> tuple[SubnetBody, ...]:
    """Choose the network's IPv4 subnet, and its IPv6 subnet if it has IPv6, each with its gateway.

    Args:
        id6: The network's id if it has IPv6, otherwise empty.
        pools: An IPv6 subnet is taken from these only if one of them is IPv6.

    Raises: InvalidArgument, Forbidden, Unimplemented: the request cannot be fulfilled; ResourceExhausted.
    """
    named = [one for one in configs if one != SubnetBody()]
    four, six = ([one for one in named if (":" in one.subnet) is is_six] for is_six in (False, True))
    if len(four) > 1 or len(six) > 1:
        raise Unimplemented("a network of this node has one IPv4 subnet, and one IPv6 subnet (--ipv6)")
    if six and not id6:
        raise InvalidArgument(f"subnet {six[0].subnet} needs IPv6, which the network does not have (--ipv6)")
    config = four[0] if four else SubnetBody()
    subnet = _checked(config.subnet, taken) if config.subnet else _from_pools(taken, pools, IPv4Network)
    found = _settled(config, subnet)
    if not id6:
        return (found,)
    config = six[0] if six else SubnetBody()
    if config.subnet:
        subnet6 = _checked(config.subnet, taken)
    elif any(pool.version == 6 for pool, _ in pools):
        subnet6 = _from_pools(taken, pools, IPv6Network)
    else:
        subnet6 = _unique_local(id6)
    return found, _settled(config, subnet6)


def _from_pools(taken: Iterable[Subnet], pools: Sequence[Subnets], version: type[Network]) -> Network:
    """Return a free subnet of ``pools``.  Raises: ResourceExhausted."""
    return free_subnet([one for one in taken if isinstance(one, version)], pools, version)


def _unique_local(id: str) -> IPv6Network:
    """Return a subnet derived from the random digits of a network's id, so that it stays the same after a restart."""
    return unique_local(int(id[: UNIQUE_LOCAL_BITS // 4], 16))


def _checked(text: str, taken: Iterable[Subnet]) -> Subnet:
    subnet = ip_network(text, strict=False)
    if subnet.is_multicast or subnet.is_loopback or (subnet.version == 6 and subnet.is_link_local):
        raise InvalidArgument(
            f"invalid subnet {subnet}: multicast, loopback and link-local addresses cannot be used"
        )
    if reason := why_reserved(subnet):
        raise InvalidArgument(f"subnet {subnet} {reason}")
    if subnet.num_addresses < 4:
        raise InvalidArgument(f"subnet {subnet} is too small for a gateway and a container")
    if any(overlap(subnet, other) for other in taken if other.prefixlen):
        raise Forbidden("Pool overlaps with other one on this address space")
    return subnet


def _settled(config: SubnetBody, subnet: Subnet) -> SubnetBody:
    pool = _range(config.ip_range, subnet) if config.ip_range else subnet
    # Docker Engine uses the first address of the range for an unnamed gateway.
    first = pool[0] if int(pool[0]) > int(subnet[1]) else subnet[1]
    gateway = _inside(config.gateway, subnet, "gateway") if config.gateway else first
    for address in config.auxiliary_addresses.values():
        _inside(address, subnet, "auxiliary address")
    return msgspec.structs.replace(config, subnet=str(subnet), gateway=str(gateway))


def shown_configs(configs: Iterable[SubnetBody]) -> tuple[SubnetBody, ...]:
    """Return the subnets that ``inspect`` shows: the user's request, or none to show the chosen ones.

    Source: moby 20.10, daemon/network.go, buildIPAMResources.
    """
    return tuple(one for one in configs if one.subnet)


def _range(text: str, subnet: Subnet) -> Subnet:
    try:
        parsed(text.partition("/")[0])
        pool = ip_network(text, strict=False)
        if not overlap(pool, subnet) or pool.prefixlen < subnet.prefixlen:
            raise ValueError
    except ValueError:
        raise InvalidArgument(f"no matching subnet for range {text}") from None
    return pool


def _inside(text: str, subnet: Subnet, what: str) -> Address:
    try:
        address = parsed(text)
    except ValueError:
        raise InvalidArgument(f"invalid {what} {text}") from None
    if address not in subnet or address in (subnet[0], subnet[-1]):
        raise InvalidArgument(f"no matching subnet for {what} {text}")
    return address
