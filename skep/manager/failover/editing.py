"""Adds, removes and shows failover addresses."""

from collections.abc import Iterator
from ipaddress import IPv4Interface, ip_interface

from msgspec.structs import replace

from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from skep.manager.cluster import known_cluster, node_name
from skep.manager.failover.decision import DoorNodes, door_services, holders_in, why_unheld
from skep.manager.failover.records import ADDRESSES_ID, FailoverAddress, addresses_in, renewals_in
from skep.model.network import Network, subnet_of
from skep.model.networks.addresses import Address, host_of, is_address, is_of_a_machine, is_subnet, parsed
from skep.model.networks.data_planes import claimed_underlay, why_reserved
from skep.model.networks.failover import ADDRESSES_MAX, AddressRequest, AddressShown
from skep.model.networks.routes import routes_of_all
from skep.model.node import Node, NodeState
from skep.model.service import Service
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, write_record
from skep.store.level import ADDRESSES

_INTERFACE_BYTES_MAX = 15
"""Longest name of an interface.  Source: linux/if.h (IFNAMSIZ, without the byte that ends it)."""


def add_address(tx: Transaction, wanted: AddressRequest) -> None:
    """Add an address.

    Raises:
        InvalidArgument: It is not the address of a machine, or it belongs to a node or to a network.
        AlreadyExists: It exists.
        FailedPrecondition: It is being removed, or a manager is too old.
        ResourceExhausted: There are too many.
    """
    if tx.level < ADDRESSES:
        raise FailedPrecondition("failover addresses need managers of this version: upgrade the others first")
    added = parsed_request(wanted)
    tx.rely_on(Payload, ADDRESSES_ID)
    record = addresses_in(tx)
    if (present := record.get(added.address)) is not None:
        if present.is_removed:
            raise FailedPrecondition(f"{added.address} is being removed: repeat the command in a few seconds")
        raise AlreadyExists(f"failover address {added.address} already exists")
    if len(record.addresses) >= ADDRESSES_MAX:
        raise ResourceExhausted(f"a cluster has at most {ADDRESSES_MAX} failover addresses: remove one first")
    for user in _users_of(tx, parsed(added.address)):
        raise InvalidArgument(f"{added.address} {user}. Choose an address that nothing else has.")
    write_record(tx, ADDRESSES_ID, record.put(added))


def remove_address(tx: Transaction, text: str) -> None:
    """Remove an address.  It disappears once no node can hold it.  Raises: NotFound."""
    address = text.partition("/")[0]
    tx.rely_on(Payload, ADDRESSES_ID)
    record = addresses_in(tx)
    found = record.get(str(parsed(address)) if is_address(address) else address)
    if found is None or found.is_removed:
        raise NotFound(f"no failover address {text[:100]}: see skep cluster address")
    gone = replace(found, is_removed=True)
    write_record(tx, ADDRESSES_ID, record.put(gone) if found.node_id else record.without(found.address))


def parsed_request(wanted: AddressRequest) -> FailoverAddress:
    """Return the address of a request, without a holder.  Raises: InvalidArgument."""
    text = wanted.address.strip()
    host, slash, _ = text.partition("/")
    if not (is_subnet(text) if slash else is_address(host)):
        raise InvalidArgument(f"invalid address {text[:100]!r}: expected an address like 10.0.0.100/24")
    found = ip_interface(text)
    network, ip = found.network, found.ip
    is_end = isinstance(found, IPv4Interface) and ip in (network.network_address, network.broadcast_address)
    if not is_of_a_machine(ip) or (is_end and network.num_addresses > 2):
        raise InvalidArgument(f"{ip} cannot be the address of a machine: choose another one")
    if reason := why_reserved(network):
        raise InvalidArgument(f"{found} {reason}")
    name = wanted.interface
    is_name = name.isascii() and name.isprintable() and not set(name) & set("/ :") and name not in (".", "..")
    if len(name) > _INTERFACE_BYTES_MAX or not is_name:
        raise InvalidArgument(f"invalid name of an interface: {name[:100]!r}. See ip link on the nodes.")
    return FailoverAddress(address=str(ip), prefix=network.prefixlen, interface=name)


def _users_of(view: View, ip: Address) -> Iterator[str]:
    """Yield the nodes and networks that have an address, as parts of a sentence."""
    for node in view.find(Node):
        status = node.manager_status
        texts = [node.status.addr, claimed_underlay(node) or ""]
        texts += [host_of(text) for text in ((status.addr, status.peer_addr) if status is not None else ())]
        if any(is_address(text) and parsed(text) == ip for text in texts):
            yield f"is an address of node {node.shown_name}"
    for network in view.find(Network):
        options = network.ipam_options or network.spec.ipam_options
        for config in options.configs if options is not None else ():
            if is_subnet(config.subnet) and ip in subnet_of(config):
                yield f"is in the subnet {config.subnet} of network {network.spec.name}"
    swarm = known_cluster(view)
    for pool in swarm.default_addr_pool if swarm is not None else ():
        # Networks get no subnet of a pool to which a node has a route.
        if ip in ip_interface(pool).network and not any(ip in one for one in routes_of_all(view.find(Node))):
            yield f"is in the address pool {pool} of the cluster's networks, and in no subnet of a node"


def shown_addresses(view: View) -> list[AddressShown]:
    """Return all addresses as the API shows them."""
    record = addresses_in(view)
    if not record.addresses:
        return []
    holders = holders_in(view, door_services(view.find(Service)))
    return [_shown(view, one, holders) for one in record.addresses]


def _shown(view: View, one: FailoverAddress, holders: DoorNodes) -> AddressShown:
    names = {id: node_name(view, id) for id in (*one.refusals, one.node_id) if id}
    state, reason = "unheld", why_unheld(one, holders, names)
    if one.node_id:
        name, node = names[one.node_id], view.lookup(Node, one.node_id)
        is_held = renewals_in(view, one.node_id).epochs.get(one.address) == one.epoch
        if node is None or node.status.state is not NodeState.READY:
            reason = (
                f"{name} is down, and no other node can take it: activate another node with the front door"
            )
        elif one.is_leaving:
            state, reason = "moving", f"{name} releases it"
        elif is_held:
            state, reason = "held", ""
        else:
            state, reason = "moving", f"{name} takes it"
    return AddressShown(
        address=one.shown,
        interface=one.interface,
        state=state,
        node_id=one.node_id,
        hostname=names.get(one.node_id, ""),
        since=timestamp(one.since_ns) if one.node_id else Timestamp(""),
        reason=reason,
    )


def address_warnings(view: View) -> Iterator[str]:
    """Yield a warning if addresses are not held.  It names no addresses, because every user reads it."""
    unheld = [one for one in shown_addresses(view) if one.state == "unheld"]
    if unheld:
        noun = "failover address is" if len(unheld) == 1 else "failover addresses are"
        yield f"WARNING: {len(unheld)} {noun} held by no node (skep cluster address)"
