"""Whose turn it is to restart its etcd."""

import pytest

from skep.manager.ca.peer_files import SETTLED_S, RestartTurn, is_my_turn
from skep.model.node import ManagerStatus, Node, Reachability
from skep.model.values.ids import NodeId


def a_manager(id: str, *, has_new: bool = False, leads: bool = False, is_there: bool = True) -> Node:
    return Node(
        id=NodeId(id),
        peer_roots="new" if has_new else "old",
        manager_status=ManagerStatus(
            leader=leads,
            reachability=Reachability.REACHABLE if is_there else Reachability.UNREACHABLE,
            addr=f"{id}:2377",
        ),
    )


def turns(*nodes: Node) -> list[str]:
    """Those that may restart now, of those that have to."""
    return [node.id for node in nodes if node.peer_roots != "new" and is_my_turn(node.id, nodes, "new")]


def test_they_go_one_after_another_and_the_leader_last():
    m1, m2, m3 = a_manager("m1", leads=True), a_manager("m2"), a_manager("m3")
    assert turns(m1, m2, m3) == ["m2"]
    m2 = a_manager("m2", has_new=True)
    assert turns(m1, m2, m3) == ["m3"]
    m3 = a_manager("m3", has_new=True)
    assert turns(m1, m2, m3) == ["m1"]


def test_no_etcd_restarts_while_that_would_cost_the_quorum():
    assert turns(a_manager("m1", leads=True), a_manager("m2"), a_manager("m3", is_there=False)) == []


def test_with_five_managers_one_may_be_away():
    away = a_manager("m1", is_there=False)
    four = [a_manager("m2"), a_manager("m3"), a_manager("m4"), a_manager("m5", leads=True)]
    assert turns(away, *four) == ["m2"]


@pytest.mark.parametrize("count", [1, 2])
def test_where_a_moment_without_a_quorum_cannot_be_avoided_it_is_taken(count):
    managers = [a_manager("m1", leads=True), a_manager("m2")][:count]
    assert turns(*managers) == (["m1"] if count == 1 else ["m2"])


def test_a_manager_that_is_joining_does_not_count():
    """The others' etcds do not know the root of its certificate: it joins once they have restarted."""
    joining = Node(id=NodeId("m0"), manager_status=ManagerStatus(addr="m0:2377"))
    assert turns(joining, a_manager("m1", leads=True), a_manager("m2"), a_manager("m3")) == ["m2"]


def test_workers_do_not_count():
    assert turns(a_manager("m1", leads=True), Node(id=NodeId("a-worker"), peer_roots="new")) == ["m1"]


def test_the_one_before_has_to_be_back_for_a_while():
    m1, m2, done = a_manager("m1", leads=True), a_manager("m2"), a_manager("m2", has_new=True)
    turn = RestartTurn()
    assert not turn.has_come(m1.id, [m1, m2], "new", 0.0)
    assert not turn.has_come(m1.id, [m1, done], "new", 100.0)
    assert not turn.has_come(m1.id, [m1, done], "new", 100.0 + SETTLED_S / 2)
    assert turn.has_come(m1.id, [m1, done], "new", 100.0 + SETTLED_S)


def test_the_wait_begins_anew_when_another_one_goes_meanwhile():
    m1, m2, done = a_manager("m1", leads=True), a_manager("m2"), a_manager("m2", has_new=True)
    turn = RestartTurn()
    assert not turn.has_come(m1.id, [m1, done], "new", 0.0)
    assert not turn.has_come(m1.id, [m1, m2], "new", SETTLED_S)
    assert not turn.has_come(m1.id, [m1, done], "new", SETTLED_S + 0.1)


def test_a_single_manager_does_not_wait():
    assert RestartTurn().has_come(NodeId("m1"), [a_manager("m1", leads=True)], "new", 0.0)
