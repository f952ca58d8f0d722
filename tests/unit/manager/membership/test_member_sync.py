"""Which managers answer, and who leads, as node objects say it."""

from skep.manager.manager_status import write_manager_status
from skep.manager.membership.manager_changes import (
    WITHOUT_CONTACT_S,
    LostContact,
    ReachabilityChange,
    reachability_changes,
)
from skep.model.node import ManagerStatus, Node, NodeRole, NodeSpec, Reachability
from skep.model.values.ids import NodeId
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def a_manager(id: NodeId, reachability: Reachability, *, leads: bool = False) -> Node:
    status = ManagerStatus(leader=leads, reachability=reachability, addr=f"{id}:2377")
    return Node(id=id, spec=NodeSpec(role=NodeRole.MANAGER), manager_status=status)


def shown(*nodes: Node, by: NodeId, leads: bool) -> dict[NodeId, ManagerStatus | None]:
    """Statuses after the manager ``by`` has shown itself."""
    tx = LocalTransaction(State(), 0)
    for node in nodes:
        tx.put(node)
    write_manager_status(tx, by, f"{by}:2377", leads=leads)
    return {node.id: node.manager_status for node in tx.find(Node)}


def test_silence_and_its_end_are_marked_once() -> None:
    nodes = [
        a_manager(A, Reachability.REACHABLE, leads=True),
        a_manager(B, Reachability.REACHABLE),
        a_manager(C, Reachability.UNREACHABLE),
    ]
    assert reachability_changes(nodes, {B}, {C}, A) == [
        ReachabilityChange(B, Reachability.UNREACHABLE),
        ReachabilityChange(C, Reachability.REACHABLE),
    ]
    assert reachability_changes(nodes[:2], set(), {B}, A) == []
    assert reachability_changes([nodes[0], nodes[2]], {C}, set(), A) == []


def test_a_new_leader_marks_no_manager_reachable_without_contact() -> None:
    nodes = [a_manager(A, Reachability.REACHABLE, leads=True), a_manager(B, Reachability.UNREACHABLE)]
    assert reachability_changes(nodes, set(), set(), A) == []


def test_a_manager_that_pings_without_contact_to_a_quorum_is_unreachable_after_a_while() -> None:
    nodes = [a_manager(A, Reachability.REACHABLE, leads=True), a_manager(B, Reachability.REACHABLE)]
    contact = LostContact()
    assert contact.changes(nodes, set(), set(), A, 100.0) == [], "a new leader's first seconds"
    assert contact.changes(nodes, set(), {B}, A, 101.0) == []
    assert contact.changes(nodes, set(), set(), A, 102.0) == []
    assert contact.changes(nodes, set(), set(), A, 101.9 + WITHOUT_CONTACT_S) == []
    lost = [ReachabilityChange(B, Reachability.UNREACHABLE)]
    assert contact.changes(nodes, set(), set(), A, 102.0 + WITHOUT_CONTACT_S) == lost
    assert contact.changes(nodes, {B}, set(), A, 120.0) == lost
    back = [a_manager(A, Reachability.REACHABLE, leads=True), a_manager(B, Reachability.UNREACHABLE)]
    assert contact.changes(back, set(), {B}, A, 121.0) == [ReachabilityChange(B, Reachability.REACHABLE)]


def test_a_manager_that_is_coming_in_says_itself_when_it_is_there() -> None:
    nodes = [a_manager(A, Reachability.REACHABLE), a_manager(B, Reachability.UNKNOWN)]
    assert reachability_changes(nodes, {B}, set(), A) == []
    assert reachability_changes(nodes, set(), {B}, A) == []
    status = shown(*nodes, by=B, leads=False)[B]
    assert status is not None
    assert status.reachability is Reachability.REACHABLE


def test_a_manager_that_has_just_joined_has_time_for_its_first_ping() -> None:
    """While it starts, it answers no ping.  This says nothing about the time after it has joined."""
    leader = a_manager(A, Reachability.REACHABLE, leads=True)
    starting, joined = a_manager(B, Reachability.UNKNOWN), a_manager(B, Reachability.REACHABLE)
    lost = [ReachabilityChange(B, Reachability.UNREACHABLE)]
    contact = LostContact()
    assert contact.changes([leader, starting], {B}, set(), A, 100.0) == []
    assert contact.changes([leader, starting], {B}, set(), A, 100.0 + WITHOUT_CONTACT_S) == []
    for silent in (set[NodeId](), {B}):
        assert contact.changes([leader, joined], silent, set(), A, 106.0) == [], silent
    assert contact.changes([leader, joined], {B}, set(), A, 106.0 + WITHOUT_CONTACT_S) == lost
    assert contact.changes([leader, joined], set(), {B}, A, 112.0) == []
    assert contact.changes([leader, joined], {B}, set(), A, 115.0) == lost, (
        "it was reached, and has failed since"
    )


def test_a_new_leader_clears_the_mark_of_the_previous_one() -> None:
    statuses = shown(
        a_manager(A, Reachability.REACHABLE, leads=True),
        a_manager(B, Reachability.REACHABLE),
        by=B,
        leads=True,
    )
    assert [status.leader for status in statuses.values() if status is not None] == [False, True]


def test_a_manager_does_not_mark_itself_reachable() -> None:
    status = shown(a_manager(A, Reachability.UNREACHABLE), by=A, leads=False)[A]
    assert status is not None
    assert status.reachability is Reachability.UNREACHABLE


def test_a_demoted_manager_that_still_runs_is_not_shown_again() -> None:
    assert shown(Node(id=A, spec=NodeSpec(role=NodeRole.WORKER)), by=A, leads=False)[A] is None
