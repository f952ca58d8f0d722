"""Allocates addresses and subnets on the node's own networks.  Does no I/O."""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import chain
from typing import Final, Generic, TypeAlias, TypeVar

from skep.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from skep.model.networks.addresses import Address

Network = TypeVar("Network", IPv4Network, IPv6Network)

Subnets: TypeAlias = tuple[IPv4Network | IPv6Network, int]
"""An address pool: a network, and the prefix length of the subnets that it is divided into."""

DEFAULT_POOLS: Final[Sequence[Subnets]] = (
    (IPv4Network("172.18.0.0/15"), 16),
    (IPv4Network("172.20.0.0/14"), 16),
    (IPv4Network("172.24.0.0/13"), 16),
    (IPv4Network("192.168.0.0/16"), 20),
    (IPv4Network("172.16.0.0/15"), 24),
    (IPv4Network("192.168.0.0/16"), 24),
)
"""Docker's pools for local networks, in Docker's order (30 subnets), and two further pools.

A node with builders, or with a network for each application, needs more than Docker's 30.  The last two pools have 512
small subnets below Docker's, and the rest of a /20 of which a route of the machine occupies a part.  No pool is in
10.0.0.0/8, because overlay networks are there.
"""


def pools_or_default(configured: Sequence[Subnets]) -> Sequence[Subnets]:
    """Return ``configured``.  If none of these pools is IPv4, the default pools are added."""
    return configured if any(pool.version == 4 for pool, _ in configured) else (*configured, *DEFAULT_POOLS)


def free_subnet(taken: Iterable[Network], pools: Iterable[Subnets], version: type[Network]) -> Network:
    """Return the first subnet of ``pools`` that does not overlap ``taken``.  Default routes in ``taken`` do not count.

    Raises: ResourceExhausted: no subnet is free, in Docker's words.
    """
    used = sorted((int(network[0]), int(network[-1])) for network in taken if network.prefixlen > 0)
    for pool, prefix_length in pools:
        if isinstance(pool, version):
            start = _first_free(int(pool[0]), 1 << (pool.max_prefixlen - prefix_length), used)
            if start <= int(pool[-1]):
                return version((start, prefix_length))
    raise ResourceExhausted(
        "all predefined address pools have been fully subnetted: name a subnet (--subnet), remove unused networks, or "
        "give this node more pools (default-address-pools)"
    )


def _first_free(start: int, size: int, used: Iterable[tuple[int, int]]) -> int:
    """Return the first multiple of ``size``, at ``start`` or later, whose addresses are outside the ``used`` ranges.

    ``used`` is sorted."""
    for first, last in used:
        if first >= start + size:
            break
        if last >= start:
            start = (last // size + 1) * size
    return start


UNIQUE_LOCAL_BITS = 40
"""Number of random bits in an RFC 4193 prefix."""


def unique_local(rng: int) -> IPv6Network:
    """Return the first /64 of the unique local network (RFC 4193) that has the 40 random bits ``rng`` after ``fd``."""
    return IPv6Network((0xFD << 120 | rng << 80, 64))


def derived_ipv6(address: Address, subnet: IPv6Network) -> IPv6Address:
    """Return the IPv6 address in ``subnet`` that contains ``address``.

    It is as unique as ``address``, so it needs no allocation.
    """
    return subnet[int(address)]


class Addresses(Generic[Network]):
    """Allocates the addresses of one subnet.  The gateway has the first one, unless the user chooses another.

    ``take`` continues after the address that it returned last.  A released address is therefore not reused at once,
    while neighbors may still remember its old owner.
    """

    def __init__(
        self,
        subnet: Network,
        *,
        gateway: Address | None = None,
        pool: Network | None = None,
        reserved: Iterable[Address] = (),
    ) -> None:
        """Create an allocator.

        ``take`` returns only addresses in ``pool``.  Addresses in ``reserved`` are never allocated.
        """
        self.subnet: Network = subnet
        self.gateway = gateway or subnet[1]
        self._reserved = frozenset({self.gateway, *reserved})
        pool = pool or subnet
        self._first = max(int(pool[0]), int(subnet[1]))
        self._last_of_pool = min(int(pool[-1]), int(subnet[-2]))
        self.used: dict[Address, str] = {}
        self._last = self._first - 1

    def take(self, owner: str) -> Address:
        """Allocate a free address to ``owner`` and return it.  Raises: ResourceExhausted: the pool is used up."""
        first, last = self._first, self._last_of_pool
        for number in chain(range(self._last + 1, last + 1), range(first, self._last + 1)):
            address = self.subnet[number - int(self.subnet[0])]
            if first <= number <= last and address not in self.used and address not in self._reserved:
                self.used[address] = owner
                self._last = number
                return address
        raise ResourceExhausted(f"no address is free in {self.subnet}")

    def take_requested(self, address: Address, owner: str) -> Address:
        """Allocate ``address``.

        Raises: InvalidArgument: it is outside this subnet; FailedPrecondition: it is in use.
        """
        is_inside = int(self.subnet[1]) <= int(address) <= int(self.subnet[-2])
        if not is_inside or address.version != self.subnet.version:
            raise InvalidArgument(
                f"Invalid address {address}: It does not belong to any of this network's subnets"
            )
        if address in self.used or address in self._reserved:
            raise FailedPrecondition("Address already in use")
        self.used[address] = owner
        return address

    def claim(self, address: Address, owner: str) -> None:
        """Record that ``owner`` already has ``address``."""
        self.used[address] = owner
        if self._first <= int(address) <= self._last_of_pool:
            self._last = max(self._last, int(address))

    def owners(self) -> tuple[str, ...]:
        """Return the owner of each allocated address."""
        return tuple(self.used.values())

    def release(self, address: Address, owner: str) -> None:
        """Release ``address``.  Does nothing if ``owner`` does not have it."""
        if self.used.get(address) == owner:
            del self.used[address]

    def release_all(self, owner: str) -> None:
        """Release every address of ``owner``."""
        for address in [address for address, one in self.used.items() if one == owner]:
            del self.used[address]


def mac_of(address: Address) -> str:
    """Return the MAC address that Docker derives from ``address``: 02:42, then the four bytes of IPv4, or the last four
    of IPv6.
    """
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *address.packed[-4:]))


def mac_for(addresses: Iterable[str]) -> str:
    """Return an endpoint's MAC address, or an empty string for an endpoint without addresses.

    It is derived from the first IPv4 address, or from the first address if all are IPv6.  ``addresses`` have no prefix
    length.
    """
    given = list(addresses)
    chosen = next((one for one in given if ":" not in one), given[0] if given else "")
    return mac_of(ip_address(chosen)) if chosen else ""
