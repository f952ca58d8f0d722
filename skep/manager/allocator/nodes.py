"""A node's own attachments to overlay networks.

An engine needs an address of its own, for load balancing, on every network that one of its tasks uses, and always on
the ingress network.  It must have the address before the first task is assigned.  A skep node needs an address on the
ingress network only, from the first published port on.  It keeps that address.  Otherwise, thousands of nodes would
have to be written whenever the last port is removed and another is published.

Source: swarmkit, manager/allocator/network.go (allocateNode); moby, daemon/cluster/executor/container/executor.go.
"""

from collections.abc import Callable, Collection, Iterable

from skep.model.network import Network
from skep.model.networks.data_planes import is_docker_node, is_overlay
from skep.model.node import Node, NodeState
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId


def networks_of_node(
    node: Node,
    tasks: Iterable[Task],
    ingress: Network | None,
    upcoming: Iterable[Network],
    *,
    is_published: bool = False,
) -> dict[NetworkId, Network]:
    """Return the overlay networks on which the node needs an address, by id.

    Args:
        tasks: All tasks of the node.
        upcoming: Networks of the tasks that have no attachments yet.
        is_published: Whether any port is published on every node.
    """
    if not is_docker_node(node):
        if ingress is None or not (_is_on(node, ingress) or (is_published and is_ready(node))):
            return {}
        return {ingress.id: ingress}
    wanted = {ingress.id: ingress} if ingress is not None else {}
    wanted.update((network.id, network) for network in upcoming)
    for task in tasks:
        if occupies_networks(task):
            used = (attachment.network for attachment in task.networks_attachments)
            wanted.update((network.id, network) for network in used if network and is_overlay(network))
    return wanted


def node_attachments(
    node: Node,
    wanted: dict[NetworkId, Network],
    allocate: Callable[[Network], tuple[str, ...]],
    unreadable: Collection[NetworkId] = (),
) -> tuple[NetworkAttachment, ...]:
    """Return the attachments that ``node`` should have, in order of network id.  Existing attachments are kept.

    ``unreadable``: networks that cannot be read, which the node may still need.

    Raises NoAddress.
    """
    present = {one.network.id: one for one in node.attachments if one.network is not None}
    return tuple(
        present.get(id) or NetworkAttachment(network=wanted[id], addresses=allocate(wanted[id]))
        for id in sorted(wanted.keys() | (present.keys() & set(unreadable)))
    )


def is_ready(node: Node) -> bool:
    """Return whether the node has a session and is up."""
    return node.status.state is NodeState.READY


def _is_on(node: Node, network: Network) -> bool:
    return any(one.network is not None and one.network.id == network.id for one in node.attachments)


def occupies_networks(task: Task) -> bool:
    """Return whether the task still needs its addresses.  It needs them until its end is reported."""
    return task.status.state <= TaskState.RUNNING
