"""IPAM of overlay networks: tracks allocated addresses, and finds the next free one.

Allocations are derived from the store, so a new leader derives the same ones.  They are the virtual IPs of services,
the attachments of tasks that have not ended, and one address of every docker node on each of its networks.  The search
for the next address starts after the last address that this leader allocated, or else after the highest allocated one.
So an address is not reused right after its release.

Source: moby, libnetwork/ipams/default (RequestAddress, serial allocation); swarmkit, manager/allocator/cnmallocator.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from itertools import filterfalse
from socket import AF_INET, inet_pton
from typing import Final, TypeAlias

import msgspec

from skep.errors import SkepError
from skep.model.network import IPAMConfig, IPAMOptions, Network, network_of, subnet_of
from skep.model.networks.addresses import parsed
from skep.model.values.ids import NetworkId

_Key: TypeAlias = tuple[NetworkId, int]
"""A network and an IP version.

Addresses are kept as numbers: a new leader loads the addresses of all tasks, and ``ipaddress`` objects take ten times
as long."""

_NONE: Final[frozenset[NetworkId]] = frozenset()
NEARLY_FULL = 0.8
"""Share of used addresses from which on users are warned."""


class NoAddress(SkepError):
    """The network has no free address, or the requested address is not free."""


class AddressUsage(msgspec.Struct, frozen=True):
    """Number of a network's used IPv4 addresses, and their total."""

    used: int
    size: int

    @property
    def is_nearly_full(self) -> bool:
        """Whether the share of used addresses is at least ``NEARLY_FULL``."""
        return self.used >= NEARLY_FULL * self.size

    def __str__(self) -> str:
        return f"{self.used} of {self.size} addresses are in use"


class AddressAllocations:
    """Allocated addresses per network, with their owners."""

    def __init__(self) -> None:
        self._taken: dict[_Key, dict[int, int]] = {}
        """Number of owners of each address."""
        self._held: dict[str, tuple[tuple[_Key, int], ...]] = {}
        self._last: dict[_Key, int] = {}
        self._full: dict[_Key, IPAMOptions | None] = {}
        """Networks without a free address, with the pools that were searched.  A network is removed from it when an
        address is released.
        """

    def hold(self, owner: str, addresses: Iterable[tuple[NetworkId, str]]) -> frozenset[NetworkId]:
        """Replace the addresses (``ip/length``) of ``owner``.

        Returns the networks of the addresses that ``owner`` no longer has.
        """
        return self._hold(owner, tuple([_parsed(network_id, text) for network_id, text in addresses]))

    def _hold(self, owner: str, held: tuple[tuple[_Key, int], ...]) -> frozenset[NetworkId]:
        before = self._held.get(owner, ())
        if before == held:
            return _NONE
        if before:
            self.release(owner)
        for key, number in held:
            self._take(key, number)
        if held:
            self._held[owner] = held
        if not before:  # as for each task of a snapshot
            return _NONE
        return frozenset(one[0][0] for one in before if one not in held)

    def _take(self, key: _Key, number: int) -> None:
        taken = self._taken.get(key)
        if taken is None:
            taken = self._taken[key] = {}
        taken[number] = taken.get(number, 0) + 1

    def release(self, owner: str) -> frozenset[NetworkId]:
        """Release all addresses of ``owner``.  Returns their networks."""
        held = self._held.pop(owner, None)
        if held is None:
            return frozenset()
        for key, number in held:
            taken = self._taken[key]
            taken[number] -= 1
            if not taken[number]:
                del taken[number]
                self._full.pop(key, None)
            if not taken:
                del self._taken[key]
        return frozenset(network_id for (network_id, _), _ in held)

    def is_used(self, network_id: NetworkId) -> bool:
        """Return whether any address of the network is allocated."""
        return (network_id, 4) in self._taken or (network_id, 6) in self._taken

    def is_full(self, network: Network) -> bool:
        """Return whether a search has failed, for any IP version, since the last release of an address."""
        return any(self._is_full((network.id, version), network) for version in (4, 6))

    def _is_full(self, key: _Key, network: Network) -> bool:
        return key in self._full and self._full[key] == network.ipam_options

    def usage(self, network: Network) -> AddressUsage:
        """Return how full an allocated network is.  Cheap, because it is called for every task."""
        return usage_of(network, len(self._taken.get((network.id, 4), ())))

    def skip_to_last_quarter(self, network: Network) -> None:
        """Continue the search in the last quarter of the network.  Unknown addresses in use are mostly below it."""
        for pool in _pools(network):
            key = network.id, pool.version
            start = pool.last - (pool.last - pool.first) // 4
            self._last[key] = max(self._last.get(key, 0), max(self._taken.get(key, ()), default=0), start)

    def allocate(self, owner: str, network: Network, requested: str = "") -> str:
        """Allocate an IPv4 address of an allocated network, as ``ip/length``.

        Args:
            requested: The address to allocate (``--ip``).  Empty for any.

        Raises:
            NoAddress: The network or the requested address is not free.
        """
        return self._allocate(owner, network, requested, 4)

    def allocate_all(self, owner: str, network: Network, requested: Sequence[str] = ()) -> tuple[str, ...]:
        """Allocate an address of each IP version, IPv4 first.  Raises NoAddress, and then allocates nothing."""
        before = self._held.get(owner, ())
        wanted = {6 if ":" in one else 4: one for one in requested}
        try:
            given: tuple[str, ...] = (self._allocate(owner, network, wanted.get(4, ""), 4),)
            if has_ipv6(network) or 6 in wanted:
                given = (*given, self._allocate(owner, network, wanted.get(6, ""), 6))
        except NoAddress:
            self._hold(owner, before)
            raise
        return given

    def allocate_6(self, owner: str, network: Network) -> str:
        """Allocate an IPv6 address of a network that has IPv6.  Raises NoAddress."""
        return self._allocate(owner, network, "", 6)

    def _allocate(self, owner: str, network: Network, requested: str, version: int) -> str:
        version = 6 if ":" in requested else version
        key = network.id, version
        taken = self._taken.get(key, {})
        if requested:
            number, length = _requested(network, requested, taken)
        else:
            number, length = self._next(network, taken, version)
        self._take(key, number)
        self._held[owner] = (*self._held.get(owner, ()), (key, number))
        return f"{(IPv6Address if version == 6 else IPv4Address)(number)}/{length}"

    def _next(self, network: Network, taken: Mapping[int, int], version: int) -> tuple[int, int]:
        """Return the next free address after the last allocated one.  At the end of the pools, continue from their
        start.
        """
        key = (network.id, version)
        if self._is_full(key, network):
            raise _no_address(network, version)
        if key not in self._last and taken:
            self._last[key] = max(taken)  # a new leader does not know which address was allocated last
        last = self._last.get(key)
        pools = [pool for pool in _pools(network) if pool.version == version]
        current = [pool for pool in pools if last is not None and pool.first <= last <= pool.last]
        for pool, after in (*((pool, last) for pool in current), *((pool, None) for pool in pools)):
            number = pool.first_free(taken, after)
            if number is not None:
                self._last[key] = number
                return number, pool.length
        self._full[key] = network.ipam_options
        raise _no_address(network, version)


def _no_address(network: Network, version: int) -> NoAddress:
    return NoAddress(
        f"no available IPv{version} addresses on this network's address pools: "
        f"{network.spec.name} ({network.id})"
    )


def _parsed(network_id: NetworkId, text: str) -> tuple[_Key, int]:
    """Return the key and number of ``ip/length``."""
    try:
        return (network_id, 4), int.from_bytes(inet_pton(AF_INET, text.partition("/")[0]), "big")
    except OSError:
        address = ip_interface(text).ip
        return (network_id, address.version), int(address)


def has_ipv6(network: Network) -> bool:
    """Return whether the network also has IPv6 addresses."""
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    return any(":" in config.subnet for config in configs)


def usage_of(network: Network, used: int) -> AddressUsage:
    """Return how full an allocated network is if ``used`` of its IPv4 addresses are allocated."""
    size = sum(pool.size for pool in _pools(network) if pool.version == 4)
    return AddressUsage(min(used, size), size)


class _Pool:
    """The allocatable addresses of a subnet.  They exclude the gateway, auxiliary addresses, and the first and last
    addresses.
    """

    def __init__(self, config: IPAMConfig) -> None:
        subnet = subnet_of(config)
        self.version = subnet.version
        hosts = network_of(config.range) if config.range else subnet
        self.length = subnet.prefixlen
        self.first, self.last = int(hosts.network_address), int(hosts.broadcast_address)
        self._reserved = {int(subnet.network_address)}
        if subnet.version == 4:
            self._reserved.add(int(subnet.broadcast_address))
        self._reserved |= {int(ip_address(text)) for text in config.auxiliary_addresses.values()}
        if config.gateway:
            self._reserved.add(int(ip_address(config.gateway)))

    @property
    def size(self) -> int:
        reserved = sum(self.first <= number <= self.last for number in self._reserved)
        return self.last - self.first + 1 - reserved

    def can_allocate(self, number: int, taken: Mapping[int, int]) -> bool:
        return number not in self._reserved and number not in taken

    def first_free(self, taken: Mapping[int, int], after: int | None) -> int | None:
        numbers = range(after + 1 if after is not None else self.first, self.last + 1)
        # This runs in C, so even the last of 65,000 addresses is found within two milliseconds.
        free = filterfalse(taken.__contains__, numbers)
        return next((number for number in free if number not in self._reserved), None)


def _pools(network: Network) -> Iterator[_Pool]:
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    return (_Pool(config) for config in configs)


def _requested(network: Network, requested: str, taken: Mapping[int, int]) -> tuple[int, int]:
    try:
        address = parsed(requested.partition("/")[0])
    except ValueError:
        raise NoAddress(f"{requested} is not an IP address") from None
    for config in network.ipam_options.configs if network.ipam_options is not None else ():
        if address not in subnet_of(config):
            continue
        pool = _Pool(config)
        if pool.can_allocate(int(address), taken):
            return int(address), pool.length
        raise NoAddress(f"address {address} of network {network.spec.name} is already in use")
    raise NoAddress(f"address {address} is not in a subnet of network {network.spec.name}")
