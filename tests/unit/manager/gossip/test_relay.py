"""The targets to which a manager relays a docker node's gossip."""

from skep.manager.gossip.relay import peers_of
from skep.model.node import NodeState
from tests.support.builders import a_docker_node

D1, D2, D3 = a_docker_node("d1"), a_docker_node("d2"), a_docker_node("d3", state=NodeState.DOWN)


def test_a_docker_node_meets_another_live_one_never_itself() -> None:
    assert peers_of(D1.status.addr, [D1, D2, D3]) == [D2.status.addr]
    assert peers_of(D3.status.addr, [D1, D2, D3]) == [D1.status.addr, D2.status.addr]
    assert peers_of(D1.status.addr, [D1]) == []


def test_other_nodes_are_not_served() -> None:
    assert peers_of("192.168.100.77", [D1, D2]) == []
    assert peers_of("", [D1, D2]) == []
