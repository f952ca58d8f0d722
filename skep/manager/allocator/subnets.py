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

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_interface
from itertools import islice

from msgspec.structs import replace

from skep.errors import SkepError
from skep.model.network import IPAMConfig, IPAMOptions, Network, network_of, subnet_of
from skep.model.networks.data_planes import DOCKER, PLANE_OPTION, SKEP, driver_of, is_overlay, plane_of
from skep.model.networks.overlays import VXLAN_ID_MAX, VXLAN_OPTION, vxlan_ids
from skep.model.networks.routes import Subnet
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver

FIRST_VXLAN_ID = 4096
"""Lowest VXLAN id, as in Docker (ovmanager)."""


class NotAllocated(SkepError):
    """The network's spec cannot be satisfied."""


class AddressSpans:
    """Address ranges of one IP version, merged where they overlap or touch, in order.

    A cluster may have thousands of networks, so that a search among all subnets for each new one would take minutes.
    """

    def __init__(self, subnets: Iterable[Subnet] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted(map(_span, subnets)):  # so that each is added at the end
            self._add(first, last)

    def add(self, subnet: Subnet) -> None:
        """Add the addresses of a subnet."""
        self._add(*_span(subnet))

    def _add(self, first: int, last: int) -> None:
        begin, end = bisect_left(self._lasts, first - 1), bisect_right(self._firsts, last + 1)
        if begin < end:  # these ranges overlap with the subnet or touch it
            first, last = min(first, self._firsts[begin]), max(last, self._lasts[end - 1])
        self._firsts[begin:end] = [first]
        self._lasts[begin:end] = [last]

    def last_within(self, first: int, last: int) -> int | None:
        """Return the last address of the highest range that overlaps with ``first`` to ``last``, or None."""
        index = bisect_right(self._firsts, last) - 1
        return self._lasts[index] if index >= 0 and self._lasts[index] >= first else None


def _span(subnet: Subnet) -> tuple[int, int]:
    return int(subnet.network_address), int(subnet.broadcast_address)


class NetworkAllocations:
    """VXLAN ids and subnets, with their networks."""

    def __init__(self) -> None:
        self._vxlan_ids: dict[NetworkId, frozenset[int]] = {}
        self._uses: Counter[int] = Counter()
        """Number of networks with each VXLAN id."""
        self._full_below = FIRST_VXLAN_ID + 1
        """Lowest id above ``FIRST_VXLAN_ID`` that may be free."""
        self._subnets: dict[NetworkId, tuple[Subnet, ...]] = {}
        self._spans: dict[int, AddressSpans] = {}
        """Addresses of all subnets by IP version.  Empty after a removal, until they are needed again."""

    def enter(self, network: Network) -> None:
        """Add or update a network.  A network without an allocation has no ids and subnets."""
        before, now = self._subnets.get(network.id, ()), tuple(map(subnet_of, _given(network)))
        self._subnets[network.id] = now
        if not set(before) <= set(now):
            self._spans.clear()
        for subnet in now if self._spans else ():
            self._spans[subnet.version].add(subnet)
        self._enter_ids(network.id, frozenset(vxlan_ids(network.driver_state.options)))

    def enter_copy(self, network: Network) -> None:
        """Add a removed network by the copy in a task, unless another copy has more subnets, which are only added."""
        if len(_given(network)) > len(self._subnets.get(network.id, ())):
            self.enter(network)

    def leave(self, network_id: NetworkId) -> None:
        """Release the ids and subnets of the network."""
        self._enter_ids(network_id, frozenset())
        self._vxlan_ids.pop(network_id, None)
        if self._subnets.pop(network_id, ()):
            self._spans.clear()

    def _enter_ids(self, network_id: NetworkId, ids: frozenset[int]) -> None:
        before = self._vxlan_ids.get(network_id, frozenset())
        self._vxlan_ids[network_id] = ids
        self._uses.update(ids)
        self._uses.subtract(before)
        for id in before - ids:
            if not self._uses[id]:
                del self._uses[id]
                if id > FIRST_VXLAN_ID:
                    self._full_below = min(self._full_below, id)

    def has(self, network_id: NetworkId) -> bool:
        """Return whether the network is known, allocated or not."""
        return network_id in self._subnets

    def has_vxlan_id(self, number: int, *, but: NetworkId) -> bool:
        """Return whether a network other than ``but`` has a VXLAN id."""
        return self._uses[number] > (number in self._vxlan_ids.get(but, ()))

    def free_vxlan_ids(self, first: int, *, but: NetworkId) -> Iterator[int]:
        """Yield the ids from ``first`` that no network other than ``but`` has, in order."""
        while self._full_below <= VXLAN_ID_MAX and self._uses[self._full_below]:
            self._full_below += 1
        own = self._vxlan_ids.get(but, frozenset())
        below = sorted(id for id in {FIRST_VXLAN_ID, *own} if id < self._full_below)
        for number in below:
            if number >= first and not self.has_vxlan_id(number, but=but):
                yield number
        for number in range(max(first, self._full_below), VXLAN_ID_MAX + 1):
            if not self.has_vxlan_id(number, but=but):
                yield number

    def spans_except(self, network: Network) -> dict[int, AddressSpans]:
        """Return the addresses of all other networks, and of the network's present subnets, by IP version.

        The caller may not change them.
        """
        present, known = set(map(subnet_of, _given(network))), self._subnets.get(network.id, ())
        if present != set(known):
            others = [one for id, some in self._subnets.items() if id != network.id for one in some]
            return _spans_of([*others, *present])
        if not self._spans:
            self._spans = _spans_of(one for some in self._subnets.values() for one in some)
        return self._spans


def _spans_of(subnets: Iterable[Subnet]) -> dict[int, AddressSpans]:
    by_version: dict[int, list[Subnet]] = {4: [], 6: []}
    for subnet in subnets:
        by_version[subnet.version].append(subnet)
    return {version: AddressSpans(some) for version, some in by_version.items()}


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
    given, taken, added = list(_given(network)), allocations.spans_except(network), _spans_of(())
    for config in _missing(network):
        if config.subnet:
            version = subnet_of(config).version
            config = _checked(config, (taken[version], added[version]))
        elif config is _LOCAL_6:
            config = IPAMConfig(subnet=str(_unique_local(cluster, (taken[6], added[6]))))
        else:
            subnet = free_subnet(pools, prefix_length, (taken[4], added[4]), _only_4(routes))
            config = replace(config, subnet=str(subnet))
        given.append(_with_gateway(config))
        added[subnet_of(config).version].add(subnet_of(config))
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
    taken: Sequence[AddressSpans],
    routes: Iterable[IPv4Network] = (),
) -> IPv4Network:
    """Return the lowest subnet of the pools that overlaps neither with ``taken`` nor with a route.

    If every pool is full or lies within a route, routes that contain a whole pool are ignored.

    Raises:
        NotAllocated: No subnet is free.
    """
    reached = list(routes)
    for passes_over_wide in (False, True):
        for text in pools:
            pool = IPv4Network(text, strict=False)
            avoided = [one for one in reached if not (passes_over_wide and pool.subnet_of(one))]
            if (found := _free_in(pool, prefix_length, (*taken, AddressSpans(avoided)))) is not None:
                return IPv4Network((found, prefix_length))
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


def _free_in(pool: Subnet, prefix_length: int, taken: Sequence[AddressSpans]) -> int | None:
    """Return the first address of the lowest subnet of this length in ``pool`` outside of ``taken``, or None."""
    size = 1 << (pool.max_prefixlen - prefix_length)
    start, end = _span(pool)
    while start + size - 1 <= end:
        lasts = [last for spans in taken if (last := spans.last_within(start, start + size - 1)) is not None]
        if not lasts:
            return start
        start = (max(lasts) // size + 1) * size
    return None


def _unique_local(cluster: str, taken: Sequence[AddressSpans]) -> IPv6Network:
    """Return the lowest free /64 of the cluster's /48: ``fd`` and 40 bits derived from the cluster's id (RFC 4193)."""
    prefix = 0xFD << 120 | int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:5]) << 80
    if (first := _free_in(IPv6Network((prefix, 48)), 64, taken)) is None:
        raise NotAllocated("could not find an available, non-overlapping IPv6 address pool for the network")
    return IPv6Network((first, 64))


def _only_4(subnets: Iterable[Subnet]) -> list[IPv4Network]:
    return [subnet for subnet in subnets if isinstance(subnet, IPv4Network)]


def _checked(config: IPAMConfig, taken: Sequence[AddressSpans]) -> IPAMConfig:
    subnet = subnet_of(config)
    if any(spans.last_within(*_span(subnet)) is not None for spans in taken):
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
    requested = network.spec.driver_configuration
    options = requested.options if requested is not None else {}
    ids = vxlan_ids(network.driver_state.options)
    if options.get(VXLAN_OPTION) and not ids:
        ids = vxlan_ids(options)
        if len(ids) != count or any(allocations.has_vxlan_id(id, but=network.id) for id in ids):
            raise NotAllocated(
                f"the network needs free VXLAN ids, one per IPv4 subnet ({count}), not {options[VXLAN_OPTION]}"
            )
    # 4096 is reserved for the ingress network, as in Docker, even if the cluster has none.
    first = FIRST_VXLAN_ID if network.spec.ingress else FIRST_VXLAN_ID + 1
    free = (number for number in allocations.free_vxlan_ids(first, but=network.id) if number not in ids)
    ids += islice(free, max(count - len(ids), 0))
    if len(ids) < count:
        raise NotAllocated("no free VXLAN id")
    return ids


def _ipam_options(network: Network) -> dict[str, str]:
    requested = network.spec.ipam_options
    return dict(requested.driver.options) if requested is not None else {}
