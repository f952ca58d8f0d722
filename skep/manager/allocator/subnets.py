"""What an overlay network gets: a VXLAN id, a subnet and a gateway, in the form Docker Engines expect.

Source: moby, libnetwork/drivers/overlay/ovmanager (VXLAN ids from 4096), swarmkit, manager/allocator/cnmallocator
(allocatePools, allocateDriverState); moby, daemon/cluster/swarm.go (default address pools).
"""

import bisect
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Interface, IPv4Network

from msgspec.structs import replace

from skep.errors import SkepError
from skep.model.ids import NetworkId
from skep.model.meta import Driver
from skep.model.network import IPAMConfig, IPAMOptions, Network
from skep.model.planes import driver_of, is_overlay

VXLAN_OPTION = "com.docker.network.driver.overlay.vxlanid_list"
FIRST_VXLAN_ID = 4096
LAST_VXLAN_ID = 2**24 - 1


class NotAllocated(SkepError):
    """The network cannot have what it asks for."""


class NetworkBook:
    """Which network holds which VXLAN ids and subnets."""

    def __init__(self) -> None:
        self._vxlan_ids: dict[NetworkId, frozenset[int]] = {}
        self._subnets: dict[NetworkId, tuple[IPv4Network, ...]] = {}

    def enter(self, network: Network) -> None:
        """A network as it is now; one without an allocation holds nothing."""
        self._vxlan_ids[network.id] = frozenset(_vxlan_ids(network))
        configs = network.ipam_options.configs if network.ipam_options is not None else ()
        self._subnets[network.id] = tuple(_subnet(config) for config in configs if ":" not in config.subnet)

    def leave(self, network_id: NetworkId) -> None:
        """The network holds nothing any more."""
        self._vxlan_ids.pop(network_id, None)
        self._subnets.pop(network_id, None)

    def knows(self, network_id: NetworkId) -> bool:
        return network_id in self._subnets

    def vxlan_ids_but(self, network_id: NetworkId) -> frozenset[int]:
        """Ids that other networks hold."""
        return frozenset().union(*(ids for id, ids in self._vxlan_ids.items() if id != network_id))

    def subnets_but(self, network_id: NetworkId) -> list[IPv4Network]:
        """Subnets that other networks hold."""
        return [one for id, subnets in self._subnets.items() if id != network_id for one in subnets]


def is_allocated(network: Network) -> bool:
    """Whether the network has all it needs."""
    if not network.driver_state.name:
        return False
    return not is_overlay(network) or network.ipam_options is not None


def allocated(network: Network, book: NetworkBook, pools: Sequence[str], prefix_length: int) -> Network:
    """``network`` with its driver's state and its addresses.

    ``pools``, ``prefix_length``: where a subnet comes from for which the user named none (``--default-addr-pool``).

    Raises: NotAllocated: no subnet or id is free, or the one that the user named is not.
    """
    wished = network.spec.driver_configuration or Driver()
    if not is_overlay(network):
        return replace(network, driver_state=Driver(name=driver_of(network), options=wished.options))
    configs = network.spec.ipam_options.configs if network.spec.ipam_options is not None else ()
    # Engines do addresses of the sixth version on overlays for themselves.
    named = [config for config in configs if config.subnet and ":" not in config.subnet]
    taken = book.subnets_but(network.id)
    if named:
        given = [_checked(config, taken) for config in named]
    else:
        given = [IPAMConfig(subnet=str(free_subnet(pools, prefix_length, taken)))]
    options = {**wished.options, VXLAN_OPTION: ",".join(map(str, _ids_for(network, book, len(given))))}
    return replace(
        network,
        driver_state=Driver(name=driver_of(network), options=options),
        ipam_options=IPAMOptions(
            driver=Driver(name="default", options=_ipam_options(network)),
            configs=tuple(_with_gateway(config) for config in given),
        ),
    )


def free_subnet(pools: Iterable[str], prefix_length: int, taken: Iterable[IPv4Network]) -> IPv4Network:
    """The lowest subnet of the pools that overlaps with none of ``taken``.  Raises: NotAllocated."""
    spans = sorted((int(subnet.network_address), int(subnet.broadcast_address)) for subnet in taken)
    starts = [first for first, _ in spans]
    size = 2 ** (32 - prefix_length)
    for text in pools:
        pool = IPv4Network(text, strict=False)
        start, end = int(pool.network_address), int(pool.broadcast_address)
        while start + size - 1 <= end:
            # Spans do not overlap each other, so only the last one that begins in or before the candidate counts.
            index = bisect.bisect_right(starts, start + size - 1) - 1
            if index < 0 or spans[index][1] < start:
                return IPv4Network((start, prefix_length))
            start = (spans[index][1] // size + 1) * size
    raise NotAllocated(
        "could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the network"
    )


def _checked(config: IPAMConfig, taken: Iterable[IPv4Network]) -> IPAMConfig:
    subnet = _subnet(config)
    if any(subnet.overlaps(other) for other in taken):
        raise NotAllocated(f"Pool overlaps with other one on this address space: {config.subnet}")
    return replace(config, subnet=str(subnet))


def _with_gateway(config: IPAMConfig) -> IPAMConfig:
    if config.gateway:
        return config
    within = IPv4Interface(config.range or config.subnet).network
    first = within.network_address
    if first == _subnet(config).network_address:
        first += 1
    return replace(config, gateway=str(first))


def _ids_for(network: Network, book: NetworkBook, count: int) -> list[int]:
    """One VXLAN id per subnet: those the user named, else the lowest free ones."""
    taken = book.vxlan_ids_but(network.id)
    wished = network.spec.driver_configuration
    named = wished.options.get(VXLAN_OPTION, "") if wished is not None else ""
    if named:
        ids = [int(word) for word in named.split(",") if word.strip().isdigit()]
        if len(ids) != count or not taken.isdisjoint(ids):
            raise NotAllocated(f"VXLAN ids {named} are not {count} free numbers")
        return ids
    # 4096 is the ingress network's, as in Docker, also while it is not there.
    first = FIRST_VXLAN_ID if network.spec.ingress else FIRST_VXLAN_ID + 1
    ids = []
    number = first
    while len(ids) < count and number <= LAST_VXLAN_ID:
        if number not in taken:
            ids.append(number)
        number += 1
    if len(ids) < count:
        raise NotAllocated("no VXLAN id is free")
    return ids


def _vxlan_ids(network: Network) -> Iterable[int]:
    words = network.driver_state.options.get(VXLAN_OPTION, "").split(",")
    return (int(word) for word in words if word.strip().isdigit())


def _subnet(config: IPAMConfig) -> IPv4Network:
    return IPv4Interface(config.subnet).network


def _ipam_options(network: Network) -> dict[str, str]:
    wished = network.spec.ipam_options
    return dict(wished.driver.options) if wished is not None else {}
