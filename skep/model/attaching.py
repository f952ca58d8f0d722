"""Which node may take places on a network for its plain containers, and how many.  Pure.

In Docker every node may, on every attachable network, and so it is here unless the network's label says else.
"""

from ipaddress import IPv4Network

from skep.errors import InvalidArgument, PermissionDenied, ResourceExhausted
from skep.model import constraints
from skep.model.network import Network, subnet_of
from skep.model.node import Node

ATTACH_LABEL = "skep.attach"
"""On a network: constraints that a node has to meet for its plain containers to join, separated by commas.  Only
what the cluster says of nodes counts, never what they say of themselves."""

_TRUSTED = ("node.id", "node.role", constraints.NODE_LABEL)

SHARE = 2
"""One node's plain containers have at most every second address of a network, where there are other nodes."""


def attach_constraints(label: str) -> tuple[constraints.Constraint, ...]:
    """What the label's value says.  Raises: InvalidArgument."""
    parsed = constraints.parsed(tuple(part.strip() for part in label.split(",")))
    for constraint in parsed:
        if not constraint.key.lower().startswith(_TRUSTED):
            raise InvalidArgument(
                f"{ATTACH_LABEL}: {constraint.key} is said by the node itself: use node.labels, node.role or node.id"
            )
    return parsed


def require_attachable(network: Network, node: Node) -> None:
    """Raises: PermissionDenied: plain containers of this node may not join this network."""
    if not network.spec.attachable:
        raise PermissionDenied(f"network {network.spec.name} not manually attachable")
    if (label := network.spec.labels.get(ATTACH_LABEL)) is None:
        return
    try:
        is_met = constraints.meets(attach_constraints(label), node)
    except InvalidArgument:
        is_met = False  # written by a version that knew more
    if not is_met:
        raise PermissionDenied(
            f"network {network.spec.name} takes containers of nodes with {label} only, and this node is none"
        )


def require_share(network: Network, taken: int, nodes: int) -> None:
    """Raises: ResourceExhausted: ``taken`` places of one node are enough, where there are other nodes."""
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    subnets = [subnet for config in configs if isinstance(subnet := subnet_of(config), IPv4Network)]
    addresses = sum(subnet.num_addresses for subnet in subnets)
    if nodes > 1 and addresses and taken >= addresses // SHARE:
        raise ResourceExhausted(
            f"containers of this node have half of the {addresses} addresses of network {network.spec.name}: "
            f"skep network update --subnet-add SUBNET {network.spec.name} gives it more"
        )
