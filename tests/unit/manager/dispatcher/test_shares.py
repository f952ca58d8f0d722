"""How sessions spread over the managers."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.manager.dispatcher.node_sessions.sessions import LiveSession, Sessions
from skep.manager.dispatcher.node_sessions.shares import (
    WEIGHT,
    WEIGHT_HEAVY,
    WEIGHT_LIGHT,
    held,
    to_redirect,
    weights,
)
from skep.model.node import ManagerStatus, Node, NodeState, NodeStatus, Reachability, SessionOwner
from skep.model.values.ids import NodeId, SessionId
from tests.support.builders import a_node

M1, M2, M3 = NodeId("m1"), NodeId("m2"), NodeId("m3")


def a_manager(id: NodeId, session: NodeId, reachability: Reachability = Reachability.REACHABLE) -> Node:
    status = ManagerStatus(addr=f"{id}:2377", reachability=reachability)
    return msgspec.structs.replace(a_worker(id, session), manager_status=status)


def a_worker(id: str, session: NodeId, state: NodeState = NodeState.READY) -> Node:
    return msgspec.structs.replace(
        a_node(id),
        status=NodeStatus(state=state),
        session=SessionOwner(manager_id=session, session_id=SessionId(f"of-{id}")),
    )


def test_only_managers_that_can_take_sessions_count_and_only_nodes_that_are_there():
    nodes = [
        a_manager(M1, M2),
        a_manager(M2, M1),
        a_manager(M3, M1, Reachability.UNREACHABLE),
        a_worker("w1", M1),
        a_worker("w2", M3),
        a_worker("w3", M1, NodeState.DOWN),
    ]
    assert held(nodes, M1) == {M1: 3, M2: 1}
    assert held([], M1) == {M1: 0}


def test_weights_favor_managers_with_fewer_nodes():
    assert weights({M1: 4, M2: 1, M3: 0}) == {M1: WEIGHT_HEAVY, M2: WEIGHT, M3: WEIGHT_LIGHT}
    assert weights({M1: 2, M2: 2, M3: 1}) == {M1: WEIGHT, M2: WEIGHT, M3: WEIGHT}
    assert weights({M1: 7}) == {M1: WEIGHT}


@pytest.mark.parametrize(
    "counts", [{M1: 2, M2: 2, M3: 1}, {M1: 5}, {M1: 1, M2: 4}, {M1: 410, M2: 300, M3: 300}]
)
def test_a_manager_with_its_share_sends_no_node_on(counts: Mapping[NodeId, int]):
    assert to_redirect(counts, M1, [NodeId(f"w{number}") for number in range(counts[M1])]) == ()


def test_a_manager_with_too_many_sends_a_few_nodes_on_at_a_time():
    nodes = [NodeId(f"w{number:03}") for number in range(900)]
    assert len(to_redirect({M1: 4, M2: 1, M3: 0}, M1, nodes[:4])) == 1
    assert len(to_redirect({M1: 900, M2: 0, M3: 0}, M1, nodes)) == 60


def test_no_node_is_sent_to_the_manager_of_its_own_machine():
    assert to_redirect({M1: 2, M2: 1, M3: 0}, M1, [M3]) == ()
    assert to_redirect({M1: 2, M2: 1, M3: 0}, M1, [M2, M3]) == (M2,)


def test_what_cannot_move_quickly_stays():
    assert to_redirect({M1: 9, M2: 0}, M1, []) == ()


def test_a_node_that_may_be_gone_gets_no_time_to_find_another_manager():
    """Or it would be down so much later; and up again, if that was being written when it was redirected."""
    sessions = Sessions()
    for id, seen, is_skep in (("w1", 9.0, True), ("w2", 8.0, True), ("w3", 9.0, False)):
        session = LiveSession(NodeId(id), SessionId(id), lambda: None, deadline=seen + 3.0, last_seen=seen)
        session.is_skep = is_skep
        sessions.add(session)
    assert sessions.movable(9.4, period_s=1.0) == ["w1", "w2"]
    assert sessions.movable(9.6, period_s=1.0) == ["w1"]


@given(st.lists(st.integers(0, 200), min_size=2, max_size=7))
def test_sending_on_comes_to_an_end(counts):
    present = {NodeId(f"m{number}"): count for number, count in enumerate(counts)}
    for _ in range(2000):
        moves = [
            (manager, len(to_redirect(present, manager, [NodeId(f"w{n:03}") for n in range(count)])))
            for manager, count in present.items()
        ]
        if not any(count for _, count in moves):
            return
        for manager, count in moves:
            for _ in range(count):
                present[manager] -= 1
                present[min(present, key=present.__getitem__)] += 1
    raise AssertionError(f"never at rest: {counts}")
