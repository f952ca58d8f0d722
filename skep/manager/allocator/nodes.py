"""A node's own places on overlay networks.

An engine needs an address of its own on every network that one of its tasks uses, from which it balances load
there, and on the ingress network always; it has to know it before the first task comes.  A skep node needs one on the
ingress network alone, from the first published port on; it keeps it then, so that nothing is written for thousands of
nodes whenever the last port goes and another comes.

Source: swarmkit, manager/allocator/network.go (allocateNode); moby, daemon/cluster/executor/container/executor.go.
"""

from collections.abc import Callable, Iterable

from skep.model.ids import NetworkId
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.planes import is_docker_node, is_overlay
from skep.model.task import NetworkAttachment, Task, TaskState


def networks_of_node(
    node: Node,
    tasks: Iterable[Task],
    ingress: Network | None,
    to_come: Iterable[Network],
    *,
    is_published: bool = False,
) -> dict[NetworkId, Network]:
    """The overlay networks on which the node needs an address, by id.

    Args:
        tasks: all of the node.  ``to_come``: networks of those that have no attachments yet.
        is_published: whether any port is to be answered on every node.
    """
    if not is_docker_node(node):
        if ingress is None or not (_is_on(node, ingress) or (is_published and is_ready(node))):
            return {}
        return {ingress.id: ingress}
    wanted = {ingress.id: ingress} if ingress is not None else {}
    wanted.update((network.id, network) for network in to_come)
    for task in tasks:
        if occupies_networks(task):
            used = (attachment.network for attachment in task.networks_attachments)
            wanted.update((network.id, network) for network in used if network and is_overlay(network))
    return wanted


def node_attachments(
    node: Node, wanted: dict[NetworkId, Network], give: Callable[[Network], str]
) -> tuple[NetworkAttachment, ...]:
    """The attachments that ``node`` should have, in order of network id: those it has stay.

    Raises: NoAddress.
    """
    present = {one.network.id: one for one in node.attachments if one.network is not None}
    return tuple(
        present.get(id) or NetworkAttachment(network=wanted[id], addresses=(give(wanted[id]),))
        for id in sorted(wanted)
    )


def is_ready(node: Node) -> bool:
    """Whether it has a session and is up."""
    return node.status.state is NodeState.READY


def _is_on(node: Node, network: Network) -> bool:
    return any(one.network is not None and one.network.id == network.id for one in node.attachments)


def occupies_networks(task: Task) -> bool:
    """Whether the task still needs the addresses it has: until it is seen to have ended."""
    return task.status.state <= TaskState.RUNNING
