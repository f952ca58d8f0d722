"""Decides which nodes may attach plain containers to a network, and how many.  Pure.

Every node may attach to every attachable network, as in Docker, unless a label of the network restricts it.
"""

from collections.abc import Iterable
from ipaddress import IPv4Network

from skep.errors import InvalidArgument, PermissionDenied, ResourceExhausted
from skep.model.network import Network, subnet_of
from skep.model.networks.addresses import parsed
from skep.model.node import Node
from skep.model.options import constraints
from skep.model.options.affinity import NODE_LABEL

ATTACH_LABEL = "skep.attach"
"""Label of a network with comma-separated constraints that a node has to meet to attach plain containers.  They may use
attributes that the cluster sets, but not attributes that a node reports itself."""

_TRUSTED = ("node.id", "node.role", NODE_LABEL)

SHARE = 2
"""In a cluster of several nodes, the plain containers of one node get at most 1/SHARE of a network's addresses."""


def attach_constraints(label: str) -> tuple[constraints.Constraint, ...]:
    """Return the constraints of the label.  Raises: InvalidArgument."""
    found = constraints.parsed(tuple(part.strip() for part in label.split(",")))
    for constraint in found:
        if not constraint.key.lower().startswith(_TRUSTED):
            raise InvalidArgument(
                f"{ATTACH_LABEL}: {constraint.key} is reported by the node: use node.labels, node.role or node.id"
            )
    return found


def require_attachable(network: Network, node: Node) -> None:
    """Check that plain containers of this node may join this network.  Raises: PermissionDenied."""
    if not network.spec.attachable:
        raise PermissionDenied(f"network {network.spec.name} not manually attachable")
    if (label := network.spec.labels.get(ATTACH_LABEL)) is None:
        return
    try:
        is_met = constraints.meets(attach_constraints(label), node)
    except InvalidArgument:
        is_met = False  # written by a newer version
    if not is_met:
        raise PermissionDenied(
            f"network {network.spec.name} accepts only containers of nodes with {label}, which this node does not meet"
        )


def require_subnets(network: Network, addresses: Iterable[str]) -> None:
    """Check that the network has the requested addresses, if its subnets are known.  Raises: InvalidArgument."""
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    for text in addresses:
        try:
            address = parsed(text.partition("/")[0])
        except ValueError:
            raise InvalidArgument(f"invalid IP address: {text[:64]}") from None
        if configs and not any(address in subnet_of(config) for config in configs):
            raise InvalidArgument(
                f"Invalid address {address}: It does not belong to any of this network's subnets"
            )


def require_share(network: Network, taken: int, nodes: int) -> None:
    """Check a node's ``taken`` addresses against its share.  Raises: ResourceExhausted."""
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    subnets = [subnet for config in configs if isinstance(subnet := subnet_of(config), IPv4Network)]
    addresses = sum(subnet.num_addresses for subnet in subnets)
    if nodes > 1 and addresses and taken >= addresses // SHARE:
        raise ResourceExhausted(
            f"containers of this node have half of the {addresses} addresses of network {network.spec.name}: "
            f"skep network update --subnet-add SUBNET {network.spec.name} adds addresses"
        )
