"""Allocation of an overlay network: VXLAN ids, subnets and gateways, in the form that Docker Engines expect.

A network has at least one IPv4 subnet, each with a VXLAN id.  With ``--ipv6`` it also has IPv6 subnets, which share the
first VXLAN.  They are the subnets of the spec, or a subnet of the cluster's own unique local addresses (RFC 4193).
Such a network belongs to skep nodes unless the user requests otherwise, because each engine allocates IPv6 addresses
for itself.

Subnets that the user does not name avoid the routes of the machines.  If a route covers a whole pool, nobody knows
which part of the pool is free, so such a pool is used only if no other has space.

Source: moby, libnetwork/drivers/overlay/ovmanager (VXLAN ids from 4096), swarmkit, manager/allocator/cnmallocator
(allocatePools, allocateDriverState); moby, daemon/cluster/swarm.go (default address pools).
"""

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_interface

from msgspec.structs import replace

from skep.errors import SkepError
from skep.model.network import IPAMConfig, IPAMOptions, Network, network_of, subnet_of
from skep.model.networks.data_planes import DOCKER, PLANE_OPTION, SKEP, driver_of, is_overlay, plane_of
from skep.model.networks.overlays import VXLAN_ID_MAX, VXLAN_OPTION, vxlan_ids
from skep.model.networks.routes import Subnet, overlap
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver

FIRST_VXLAN_ID = 4096
"""Lowest VXLAN id, as in Docker (ovmanager)."""


class NotAllocated(SkepError):
    """The network's spec cannot be satisfied."""


class NetworkAllocations:
    """VXLAN ids and subnets, with their networks."""

    def __init__(self) -> None:
        self._vxlan_ids: dict[NetworkId, frozenset[int]] = {}
        self._subnets: dict[NetworkId, tuple[Subnet, ...]] = {}

    def enter(self, network: Network) -> None:
        """Add or update a network.  A network without an allocation has no ids and subnets."""
        self._vxlan_ids[network.id] = frozenset(vxlan_ids(network.driver_state.options))
        self._subnets[network.id] = tuple(subnet_of(config) for config in _given(network))

    def leave(self, network_id: NetworkId) -> None:
        """Release the ids and subnets of the network."""
        self._vxlan_ids.pop(network_id, None)
        self._subnets.pop(network_id, None)

    def has(self, network_id: NetworkId) -> bool:
        """Return whether the network is known, allocated or not."""
        return network_id in self._subnets

    def vxlan_ids_except(self, network_id: NetworkId) -> frozenset[int]:
        """Return the VXLAN ids of all other networks."""
        return frozenset().union(*(ids for id, ids in self._vxlan_ids.items() if id != network_id))

    def subnets_except(self, network_id: NetworkId) -> list[Subnet]:
        """Return the subnets of all other networks."""
        return [one for id, subnets in self._subnets.items() if id != network_id for one in subnets]


def is_allocated(network: Network) -> bool:
    """Return whether the network is completely allocated."""
    if not network.driver_state.name:
        return False
    return not is_overlay(network) or (network.ipam_options is not None and not _missing(network))


def has_addresses(network: Network) -> bool:
    """Return whether the network has a subnet to allocate from.  More subnets may be missing."""
    return bool(network.driver_state.name) and (not is_overlay(network) or bool(_given(network)))


def allocated(
    network: Network,
    allocations: NetworkAllocations,
    pools: Sequence[str],
    prefix_length: int,
    *,
    routes: Iterable[Subnet] = (),
    cluster: str = "",
) -> Network:
    """Return ``network`` with its driver state and subnets.  Existing subnets are kept.

    Args:
        pools, prefix_length: Source of subnets that the user does not name (``--default-addr-pool``).
        routes: Routes of the nodes, which subnets that the user does not name avoid.
        cluster: The cluster's id, from which its IPv6 addresses are derived.

    Raises:
        NotAllocated: There is no free subnet or id, or a subnet or id that the user named is in use.
    """
    requested = network.spec.driver_configuration or Driver()
    if not is_overlay(network):
        return replace(network, driver_state=Driver(name=driver_of(network), options=requested.options))
    taken = allocations.subnets_except(network.id) + [subnet_of(config) for config in _given(network)]
    given = list(_given(network))
    for config in _missing(network):
        if config.subnet:
            config = _checked(config, taken)
        elif config is _LOCAL_6:
            config = IPAMConfig(subnet=str(_unique_local(cluster, taken)))
        else:
            subnet = free_subnet(pools, prefix_length, _only_4(taken), _only_4(routes))
            config = replace(config, subnet=str(subnet))
        given.append(_with_gateway(config))
        taken.append(subnet_of(config))
    # IPv4 comes first, because engines use the first subnet for IPv4
    given.sort(key=lambda config: ":" in config.subnet)
    count = sum(":" not in config.subnet for config in given)
    ids = _ids_for(network, allocations, count)
    options = {**requested.options, **network.driver_state.options, VXLAN_OPTION: ",".join(map(str, ids))}
    if _has_ipv6(network) and not plane_of(network) and not network.spec.ingress:
        options[PLANE_OPTION] = SKEP
    return replace(
        network,
        driver_state=Driver(name=driver_of(network), options=options),
        ipam_options=IPAMOptions(
            driver=Driver(name="default", options=_ipam_options(network)), configs=tuple(given)
        ),
    )


def free_subnet(
    pools: Iterable[str],
    prefix_length: int,
    taken: Iterable[IPv4Network],
    routes: Iterable[IPv4Network] = (),
) -> IPv4Network:
    """Return the lowest subnet of the pools that overlaps neither with ``taken`` nor with a route.

    If every pool is full or lies within a route, routes that contain a whole pool are ignored.

    Raises:
        NotAllocated: No subnet is free.
    """
    held, reached = list(taken), list(routes)
    for passes_over_wide in (False, True):
        for text in pools:
            pool = IPv4Network(text, strict=False)
            avoided = [one for one in reached if not (passes_over_wide and pool.subnet_of(one))]
            if (found := _free_in(pool, prefix_length, [*held, *avoided])) is not None:
                return found
    raise NotAllocated(
        "could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the network"
    )


_LOCAL_6 = IPAMConfig()
"""Placeholder for an IPv6 subnet that the user does not name.  Compared by identity."""


def _missing(network: Network) -> list[IPAMConfig]:
    """Return the subnets that the network lacks: named ones, and placeholders for automatic ones."""
    requested = network.spec.ipam_options.configs if network.spec.ipam_options is not None else ()
    present = {subnet_of(config) for config in _given(network)}
    named = [config for config in requested if config.subnet]
    named_4 = [config for config in named if ":" not in config.subnet]
    named_6 = [config for config in named if ":" in config.subnet] if _has_ipv6(network) else []
    missing = [config for config in named_4 + named_6 if subnet_of(config) not in present]
    automatic = present - {subnet_of(config) for config in named}
    blanks = [config for config in requested if not config.subnet]
    if not blanks and not named_4:
        blanks = [IPAMConfig()]
    missing += blanks[sum(subnet.version == 4 for subnet in automatic) :]
    if _has_ipv6(network) and not named_6 and not any(subnet.version == 6 for subnet in automatic):
        missing.append(_LOCAL_6)
    return missing


def _has_ipv6(network: Network) -> bool:
    return network.spec.ipv6_enabled and plane_of(network) != DOCKER


def _given(network: Network) -> tuple[IPAMConfig, ...]:
    return network.ipam_options.configs if network.ipam_options is not None else ()


def _free_in(pool: IPv4Network, prefix_length: int, taken: Iterable[IPv4Network]) -> IPv4Network | None:
    spans = [
        (int(one.network_address), int(one.broadcast_address)) for one in sorted(collapse_addresses(taken))
    ]
    starts = [first for first, _ in spans]
    size = 2 ** (32 - prefix_length)
    start, end = int(pool.network_address), int(pool.broadcast_address)
    while start + size - 1 <= end:
        # Spans do not overlap, so only the last span that begins within or before the candidate can overlap it.
        index = bisect.bisect_right(starts, start + size - 1) - 1
        if index < 0 or spans[index][1] < start:
            return IPv4Network((start, prefix_length))
        start = (spans[index][1] // size + 1) * size
    return None


def _unique_local(cluster: str, taken: Iterable[Subnet]) -> IPv6Network:
    """Return the lowest free /64 of the cluster's /48: ``fd`` and 40 bits derived from the cluster's id (RFC 4193)."""
    prefix = 0xFD << 120 | int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:5]) << 80
    held = [one for one in taken if one.version == 6]
    for number in range(2**16):
        subnet = IPv6Network((prefix | number << 64, 64))
        if not any(overlap(subnet, other) for other in held):
            return subnet
    raise NotAllocated("could not find an available, non-overlapping IPv6 address pool for the network")


def _only_4(subnets: Iterable[Subnet]) -> list[IPv4Network]:
    return [subnet for subnet in subnets if isinstance(subnet, IPv4Network)]


def _checked(config: IPAMConfig, taken: Iterable[Subnet]) -> IPAMConfig:
    subnet = subnet_of(config)
    if any(overlap(subnet, other) for other in taken):
        raise NotAllocated(f"Pool overlaps with other one on this address space: {config.subnet}")
    return replace(config, subnet=str(subnet))


def _with_gateway(config: IPAMConfig) -> IPAMConfig:
    if config.gateway:
        return config
    within = network_of(config.range or config.subnet)
    candidate = within.network_address
    auxiliary = {ip_interface(text).ip for text in config.auxiliary_addresses.values()}
    while candidate == subnet_of(config).network_address or candidate in auxiliary:
        candidate += 1
    return replace(config, gateway=str(candidate))


def _ids_for(network: Network, allocations: NetworkAllocations, count: int) -> list[int]:
    """Return one VXLAN id per IPv4 subnet: an existing id, an id that the user named, or the lowest free one."""
    taken = allocations.vxlan_ids_except(network.id)
    requested = network.spec.driver_configuration
    options = requested.options if requested is not None else {}
    ids = vxlan_ids(network.driver_state.options)
    if options.get(VXLAN_OPTION) and not ids:
        ids = vxlan_ids(options)
        if len(ids) != count or not taken.isdisjoint(ids):
            raise NotAllocated(
                f"the network needs free VXLAN ids, one per IPv4 subnet ({count}), not {options[VXLAN_OPTION]}"
            )
    # 4096 is reserved for the ingress network, as in Docker, even if the cluster has none.
    number = FIRST_VXLAN_ID if network.spec.ingress else FIRST_VXLAN_ID + 1
    while len(ids) < count and number <= VXLAN_ID_MAX:
        if number not in taken and number not in ids:
            ids.append(number)
        number += 1
    if len(ids) < count:
        raise NotAllocated("no free VXLAN id")
    return ids


def _ipam_options(network: Network) -> dict[str, str]:
    requested = network.spec.ipam_options
    return dict(requested.driver.options) if requested is not None else {}
