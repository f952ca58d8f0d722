"""Addresses of overlay networks: who holds which, and which comes next.

What is held is derived from the store: virtual IPs of services, attachments of tasks that have not ended, one
address per network of every docker node.  So a new leader arrives at the same book.  The next address is looked
for behind the last one given: an address that was just given back is not given again at once.

Source: moby, libnetwork/ipams/default (RequestAddress, serial allocation); swarmkit, manager/allocator/cnmallocator.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from skep.errors import SkepError
from skep.model.ids import NetworkId
from skep.model.network import IPAMConfig, Network


class NoAddress(SkepError):
    """The network has no address left, or not the one that was wished for."""


class AddressBook:
    """Which address of which network belongs to whom."""

    def __init__(self) -> None:
        self._taken: dict[NetworkId, Counter[IPv4Address]] = {}
        self._held: dict[str, tuple[tuple[NetworkId, IPv4Address], ...]] = {}
        self._last: dict[NetworkId, IPv4Address] = {}

    def hold(self, owner: str, addresses: Iterable[tuple[NetworkId, str]]) -> None:
        """``owner`` holds exactly ``addresses`` (``ip/length``) from now on."""
        self.release(owner)
        held = tuple((network_id, IPv4Interface(text).ip) for network_id, text in addresses)
        for network_id, address in held:
            self._taken.setdefault(network_id, Counter())[address] += 1
        if held:
            self._held[owner] = held

    def release(self, owner: str) -> frozenset[NetworkId]:
        """``owner`` holds nothing any more; gives the networks on which it did."""
        held = self._held.pop(owner, ())
        for network_id, address in held:
            taken = self._taken[network_id]
            taken[address] -= 1
            if not taken[address]:
                del taken[address]
            if not taken:
                del self._taken[network_id]
        return frozenset(network_id for network_id, _ in held)

    def is_used(self, network_id: NetworkId) -> bool:
        """Whether anybody holds an address of the network."""
        return network_id in self._taken

    def give(self, owner: str, network: Network, wished: str = "") -> str:
        """An address of an allocated network for ``owner``, as ``ip/length``.  ``wished``: that one (``--ip``).

        Raises: NoAddress.
        """
        taken = self._taken.get(network.id, Counter())
        address, length = _wished(network, wished, taken) if wished else self._next(network, taken)
        self._taken.setdefault(network.id, Counter())[address] += 1
        self._held[owner] = (*self._held.get(owner, ()), (network.id, address))
        return f"{address}/{length}"

    def _next(self, network: Network, taken: Counter[IPv4Address]) -> tuple[IPv4Address, int]:
        """Behind the last one given, and from the start again when the end is reached."""
        last = self._last.get(network.id)
        pools = list(_pools(network))
        current = [pool for pool in pools if last is not None and last in pool.hosts]
        for pool, after in (*((pool, last) for pool in current), *((pool, None) for pool in pools)):
            address = pool.first_free(taken, after)
            if address is not None:
                self._last[network.id] = address
                return address, pool.length
        raise NoAddress(
            f"no available IPv4 addresses on this network's address pools: {network.spec.name} ({network.id})"
        )


class _Pool:
    """What can be given out of one subnet: its range, without network, broadcast and gateway."""

    def __init__(self, config: IPAMConfig) -> None:
        subnet = IPv4Interface(config.subnet).network
        self.hosts = IPv4Interface(config.range).network if config.range else subnet
        self.length = subnet.prefixlen
        self._reserved = {subnet.network_address, subnet.broadcast_address}
        if config.gateway:
            self._reserved.add(IPv4Address(config.gateway))

    def may_give(self, address: IPv4Address, taken: Counter[IPv4Address]) -> bool:
        return address not in self._reserved and address not in taken

    def first_free(self, taken: Counter[IPv4Address], after: IPv4Address | None) -> IPv4Address | None:
        first, last = int(self.hosts.network_address), int(self.hosts.broadcast_address)
        start = int(after) + 1 if after is not None else first
        candidates = (IPv4Address(number) for number in range(start, last + 1))
        return next((address for address in candidates if self.may_give(address, taken)), None)


def _pools(network: Network) -> Iterator[_Pool]:
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    return (_Pool(config) for config in configs if ":" not in config.subnet)


def _wished(network: Network, wished: str, taken: Counter[IPv4Address]) -> tuple[IPv4Address, int]:
    try:
        address = IPv4Interface(wished).ip
    except ValueError:
        raise NoAddress(f"{wished} is not an IPv4 address") from None
    for config in network.ipam_options.configs if network.ipam_options is not None else ():
        if ":" in config.subnet or address not in IPv4Network(config.subnet, strict=False):
            continue
        pool = _Pool(config)
        if pool.may_give(address, taken):
            return address, pool.length
        raise NoAddress(f"address {address} of network {network.spec.name} is already in use")
    raise NoAddress(f"address {address} is not in a subnet of network {network.spec.name}")
