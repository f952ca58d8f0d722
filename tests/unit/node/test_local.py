"""What a node remembers of its swarm."""

import pytest

from skep.agent.session.managers import KnownManager
from skep.model.values.ids import ClusterId, NodeId
from skep.node.cluster.local import LocalNode


@pytest.mark.parametrize(
    ("listen_addr", "own"),
    [
        ("0.0.0.0:2377", "127.0.0.1:2377"),
        ("[::]:2377", "[::1]:2377"),
        ("10.0.0.1:4000", "10.0.0.1:4000"),
        ("", "203.0.113.1:2377"),
    ],
)
def test_a_nodes_own_manager_is_reached_where_it_listens(listen_addr: str, own: str) -> None:
    """Behind address translation a machine need not reach itself where others do."""
    node = LocalNode(node_id=NodeId("a"), cluster_id=ClusterId("c"), is_manager=True, listen_addr=listen_addr)
    assert node.reach(KnownManager(NodeId("a"), "203.0.113.1:2377")) == own
    assert node.reach(KnownManager(NodeId("b"), "203.0.113.2:2377")) == "203.0.113.2:2377"
