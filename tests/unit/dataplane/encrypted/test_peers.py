"""Whose an address is, where two nodes are said to be at it."""

import os

from skep.dataplane.encrypted.forwarder import Forwarder
from skep.dataplane.encrypted.plan import Plan, PlannedPeer
from skep.model.ids import NodeId


def test_of_two_nodes_at_one_address_the_one_that_was_there_stays() -> None:
    forwarder = Forwarder(os.urandom, lambda: 0.5, lambda: 0.0)
    victim = PlannedPeer(node_id=NodeId("n2"), address="192.0.2.2", keys=())
    thief = PlannedPeer(node_id=NodeId("n1"), address="192.0.2.2", keys=())
    forwarder._use_peers(Plan(peers=(victim,)))
    before = forwarder._peers[victim.node_id]
    forwarder._use_peers(Plan(peers=(thief, victim)))
    assert forwarder._peers == {victim.node_id: before}
    assert forwarder._routes_of(Plan(), {}).peers == {"192.0.2.2": before}
    forwarder._use_peers(Plan(peers=(thief,)))
    assert set(forwarder._peers) == {thief.node_id}
