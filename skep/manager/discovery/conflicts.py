"""Nodes whose overlay networks reach no other node, because of their data path address.  Pure."""

from collections.abc import Iterable

from skep.model.node import Node, NodeState
from skep.model.planes import (
    DATA_PATH_LABEL,
    REFUSED_DATA_PATH_LABEL,
    claimed_underlay,
    holder,
    is_docker_node,
    usable_address,
)


def data_path_warnings(nodes: Iterable[Node]) -> list[str]:
    """A sentence for each node whose address belongs to another node, or cannot be the address of a machine."""
    up = [node for node in nodes if node.status.state is not NodeState.DOWN and not is_docker_node(node)]
    claiming: dict[str, list[Node]] = {}
    for node in up:
        if (claimed := claimed_underlay(node)) is not None:
            claiming.setdefault(claimed, []).append(node)
    owners = {address: holder(here) for address, here in claiming.items()}
    names = {node.id: node.description.hostname or node.id for node in up}
    found = []
    for node in up:
        labels, claimed = node.description.engine.labels, claimed_underlay(node)
        announced = labels.get(DATA_PATH_LABEL, "")
        if REFUSED_DATA_PATH_LABEL in labels:
            found.append(
                f"node {names[node.id]}: its data path address {labels[REFUSED_DATA_PATH_LABEL]!r} belongs to "
                "another node and is not used"
            )
        elif claimed is not None and (owner := owners[claimed]) is not None and owner != node.id:
            found.append(
                f"node {names[node.id]}: its data path address {claimed} is that of node "
                f"{names[owner]}, so its overlay networks reach no other node"
            )
        elif announced and not usable_address(announced):
            found.append(
                f"node {names[node.id]}: its data path address {announced!r} is no address of a machine and is not used"
            )
    return found
