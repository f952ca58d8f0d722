"""Ports in a node's description."""

import pytest

from skep.node import description
from skep.node.description import port_labels


def test_a_port_of_the_routing_mesh_changes_no_nodes_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node listens on it; with thousands of nodes each service would be thousands of writes."""
    listening = frozenset({("tcp", 22), ("tcp", 80), ("udp", 53)})
    monkeypatch.setattr(description, "read_listening_ports", lambda: listening)
    assert port_labels((), frozenset()) == {"skep.ports": "tcp=22,80 udp=53"}
    assert port_labels((), frozenset({("tcp", 80), ("udp", 53)})) == {"skep.ports": "tcp=22"}
