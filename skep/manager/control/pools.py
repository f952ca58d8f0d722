"""Address pools of an existing cluster.  Docker only sets them with ``docker swarm init --default-addr-pool``.

Networks get their subnets from a pool.  A change affects networks without a subnet.  Existing networks keep theirs.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network

from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound
from skep.manager.cluster import cluster_of
from skep.manager.failover.records import addresses_in
from skep.model.network import Network, subnet_of
from skep.model.networks.addresses import parsed
from skep.model.networks.data_planes import why_reserved
from skep.model.networks.routes import Subnet, overlap, routes_of, routes_of_all
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.encoding import ApiObject
from skep.store.interface import Transaction, View

POOLS_MAX = 64
"""Largest number of address pools of a cluster."""
SUBNET_SIZE_MAX = 29
"""Longest prefix of a network's subnet, as in Docker."""
NAMED_MAX = 5
"""Largest number of names in one error."""


class PoolChange(ApiObject):
    """Body of ``POST /skep/cluster/pools``.

    ``subnet_size`` is the prefix length of new networks' subnets, or 0 to keep the current one.
    """

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    subnet_size: int = 0


def change_pools(tx: Transaction, change: PoolChange) -> Swarm:
    """Add and remove address pools, and set the size of subnets.

    Raises:
        InvalidArgument: A pool is not an IPv4 subnet, is too small, overlaps another pool, or lies within a node's
            network.
        NotFound: A pool to remove does not exist.
        FailedPrecondition: Networks have subnets of a pool to remove, or no pool would remain.
    """
    # limited because each pool is compared with the routes of every node
    if len(change.add) + len(change.remove) > 2 * POOLS_MAX:
        raise InvalidArgument(f"a cluster has at most {POOLS_MAX} address pools")
    swarm = tx.get(Swarm, cluster_of(tx).id)
    present = [_pool(text) for text in swarm.default_addr_pool]
    removed = [_pool(text) for text in change.remove]
    if removed:
        tx.rely_on_all(Network)  # the leader may allocate a subnet of the pool at the same time
    for pool in removed:
        if pool not in present:
            raise NotFound(
                f"{pool} is not an address pool of the cluster: it has {_listed(map(str, present))}"
            )
        if users := _users(tx, pool):
            raise FailedPrecondition(f"address pool {pool} is in use by networks: {_listed(users)}")
    kept = [pool for pool in present if pool not in removed]
    for pool in dict.fromkeys(map(_pool, change.add)):
        if pool not in kept:
            _check_new(tx, pool, kept)
            kept.append(pool)
    size = change.subnet_size or swarm.subnet_size
    _check_sizes(kept, size)
    return tx.put(replace(swarm, default_addr_pool=tuple(map(str, kept)), subnet_size=size))


def _pool(text: str) -> IPv4Network:
    try:
        if "/" not in text:
            raise ValueError
        return IPv4Network(text.strip(), strict=False)
    except ValueError:
        raise InvalidArgument(
            f"invalid address pool {text[:100]!r}: expected an IPv4 subnet like 10.10.0.0/16"
        ) from None


def _check_new(view: View, pool: IPv4Network, others: Sequence[IPv4Network]) -> None:
    """Refuse a pool that overlaps another pool, that has a failover address which networks would not avoid, or that has
    no usable subnet because a node has a route to all of it.
    """
    if clash := next((other for other in others if pool.overlaps(other)), None):
        raise InvalidArgument(f"address pool {pool} overlaps address pool {clash}")
    if reason := why_reserved(pool):
        raise InvalidArgument(f"address pool {pool} {reason}")
    routes = routes_of_all(view.find(Node))
    for one in addresses_in(view).addresses:
        ip = parsed(one.address)
        # Networks get no subnet of a pool to which a node has a route.
        if ip in pool and not any(ip in route for route in routes):
            raise InvalidArgument(
                f"address pool {pool} has the failover address {ip}, which is in no subnet of a node"
            )
    for node in view.find(Node):
        for route in routes_of(node):
            if isinstance(route.subnet, IPv4Network) and pool.subnet_of(route.subnet):
                name = node.shown_name
                raise InvalidArgument(
                    f"address pool {pool} is within {route.subnet}, which node {name} reaches by {route.interface}"
                )


def _check_sizes(pools: Sequence[IPv4Network], size: int) -> None:
    if not pools:
        raise FailedPrecondition("the cluster needs an address pool: add another one first")
    if len(pools) > POOLS_MAX:
        raise InvalidArgument(f"a cluster has at most {POOLS_MAX} address pools")
    if not 1 <= size <= SUBNET_SIZE_MAX:
        raise InvalidArgument(f"subnet size is out of range: {size}")
    if small := next((pool for pool in pools if pool.prefixlen > size), None):
        raise InvalidArgument(f'invalid CIDR: "{small}". Subnet size is too small for pool: {size}')


def _users(view: View, pool: IPv4Network) -> list[str]:
    """Return the names of the networks with a subnet of the pool, without subnets that the user specified."""
    return sorted(
        network.spec.name
        for network in view.find(Network)
        if any(overlap(subnet, pool) for subnet in _automatic(network))
    )


def _automatic(network: Network) -> list[Subnet]:
    options = network.spec.ipam_options
    named = {
        subnet_of(config) for config in (options.configs if options is not None else ()) if config.subnet
    }
    given = network.ipam_options.configs if network.ipam_options is not None else ()
    return [subnet for config in given if (subnet := subnet_of(config)) not in named]


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - NAMED_MAX
    return ", ".join(found[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
