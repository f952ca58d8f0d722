"""Ports in a node's description."""

from skep.node.host.description import port_labels


def test_a_port_of_the_routing_mesh_changes_no_nodes_description() -> None:
    """Every node listens on it; with thousands of nodes each service would be thousands of writes."""
    listening = frozenset({("tcp", 22), ("tcp", 80), ("udp", 53)})
    assert port_labels((), frozenset(), listening) == {"skep.ports": "tcp=22,80 udp=53"}
    assert port_labels((), frozenset({("tcp", 80), ("udp", 53)}), listening) == {"skep.ports": "tcp=22"}
