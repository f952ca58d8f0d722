"""What a manager says of itself: ``ManagerStatus`` of its own node object, which it alone writes."""

from msgspec.structs import replace

from skep.model.ids import NodeId
from skep.model.node import ManagerStatus, Node, Reachability
from skep.store.interface import Transaction


def show_presence(tx: Transaction, node_id: NodeId, addr: str, *, leads: bool) -> None:
    """Show the manager ``node_id`` as reachable at ``addr``, and whether it leads.

    A node that was removed stays removed.
    """
    node = tx.lookup(Node, node_id)
    if node is None:
        return
    status = ManagerStatus(leader=leads, reachability=Reachability.REACHABLE, addr=addr)
    if node.manager_status != status:
        tx.put(replace(node, manager_status=status))
