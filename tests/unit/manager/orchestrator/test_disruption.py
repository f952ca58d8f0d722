"""When so many nodes go down at once that nothing is replaced for a while."""

from collections import deque
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.orchestrator.replacement.disruption import (
    READY_BEFORE_S,
    Disruption,
    NodeDown,
    NodeHistory,
    disruption_in,
    held_until,
    is_over,
)
from skep.manager.orchestrator.state import OrchestratorState
from skep.model.node import Node, NodeState, NodeStatus, SessionOwner
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId, SessionId
from skep.store.interface import Commit, Deleted, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task

GRACE_S = 3.0


def nodes(count: int) -> list[NodeId]:
    return [NodeId(f"n{number}") for number in range(count)]


def falls(ids: list[NodeId], at: float = 100.0) -> list[NodeDown]:
    return [NodeDown(id, at) for id in ids]


def trip(fallen: list[NodeDown], ready: list[NodeId], now: float = 100.0) -> Disruption | None:
    return disruption_in(fallen, frozenset(ready), now=now, grace_s=GRACE_S)


def test_more_than_half_and_three_at_once_are_a_storm() -> None:
    five = nodes(5)
    assert trip(falls(five[:3]), five) == Disruption(tuple(five[:3]), 5)


@pytest.mark.parametrize(("down", "of"), [(1, 3), (2, 3), (2, 2), (2, 5), (3, 6), (3, 7), (4, 9)])
def test_a_minority_and_the_smallest_clusters_are_replaced_normally(down: int, of: int) -> None:
    """Every row of the quorum table that keeps its quorum is among them."""
    assert trip(falls(nodes(of)[:down]), nodes(of)) is None


def test_nodes_that_went_down_before_the_grace_period_do_not_count() -> None:
    five = nodes(5)
    assert trip(falls(five[:2], at=96.0) + falls(five[2:3]), five) is None


def test_nodes_that_were_not_ready_a_minute_ago_do_not_count() -> None:
    eight = nodes(8)
    assert trip(falls(eight[5:]), eight[:5]) is None


def test_it_is_over_when_half_of_them_are_back() -> None:
    fallen, known = nodes(4), frozenset(nodes(9))
    assert not is_over(fallen, frozenset(fallen[:1]), known)
    assert is_over(fallen, frozenset(fallen[:2]), known)
    assert is_over(fallen, frozenset(fallen[:1]), known - set(fallen[2:]))  # removed ones count neither way


@given(st.integers(1, 40), st.integers(0, 40))
def test_the_rule_is_exactly_the_rule(total: int, down: int) -> None:
    ready = nodes(total)
    fallen = ready[:down]
    expected = len(fallen) >= 3 and 2 * len(fallen) > total
    assert (trip(falls(fallen), ready) is not None) == expected


def test_a_single_fall_is_held_back_by_nothing() -> None:
    assert held_until([NodeDown(NodeId("n1"), 100.0)], now=100.0, period_s=1.0) == -inf
    assert (
        held_until([NodeDown(NodeId("n1"), 98.9), NodeDown(NodeId("n2"), 100.0)], now=100.0, period_s=1.0)
        == -inf
    )


@given(st.floats(0.1, 10), st.floats(0, 0.99))
def test_a_fall_that_is_not_the_only_one_is_held_for_longer_than_a_period(
    period_s: float, before: float
) -> None:
    together = NodeDown(NodeId("n1"), 100.0, with_others=True)
    two = [NodeDown(NodeId("n1"), 100.0 - before * period_s), NodeDown(NodeId("n2"), 100.0)]
    for fallen in ([together], two):
        assert held_until(fallen, now=100.0, period_s=period_s) >= 100.0 + period_s


def fallen(node: Node) -> Node:
    return replace(node, status=NodeStatus(state=NodeState.DOWN))


def down(node: Node) -> Updated:
    return Updated(node, fallen(node))


def ready_nodes(count: int) -> list[Node]:
    session = SessionOwner(manager_id=NodeId("m1"), session_id=SessionId("s"))
    return [replace(a_node(id), session=session) for id in nodes(count)]


def came(history: NodeHistory, some: list[Node], at: float) -> None:
    for node in some:
        unknown = replace(node, status=NodeStatus(state=NodeState.UNKNOWN), session=None)
        history.note(Commit(revision=1, events=(Updated(unknown, node),)), at)


def went(history: NodeHistory, some: list[Node], at: float) -> Disruption | None:
    assert history.note(Commit(revision=2, events=tuple(map(down, some))), at)
    return history.detect(at, GRACE_S)


@pytest.mark.parametrize("age_s", [1.0, 30.0, 70.0])
def test_most_nodes_of_a_new_cluster_that_go_down_are_a_disruption(age_s: float) -> None:
    history = NodeHistory([])
    came(history, ready_nodes(6), 1000.0)
    assert went(history, ready_nodes(5), 1000.0 + age_s) == Disruption(tuple(nodes(5)), 6)


def test_most_nodes_of_a_cluster_are_a_disruption_however_many_have_just_come() -> None:
    history = NodeHistory(ready_nodes(6))
    came(history, ready_nodes(20)[6:], 1000.0)
    assert went(history, ready_nodes(5), 1030.0) == Disruption(tuple(nodes(5)), 6)


def test_half_of_the_nodes_of_a_new_cluster_are_none() -> None:
    history = NodeHistory([])
    came(history, ready_nodes(6), 1000.0)
    assert went(history, ready_nodes(3), 1030.0) is None


def test_nodes_that_were_removed_do_not_count() -> None:
    history = NodeHistory([])
    came(history, ready_nodes(6), 1000.0)
    for node in ready_nodes(6)[4:]:
        history.note(Commit(revision=2, events=(Deleted(node),)), 1010.0)
    assert went(history, ready_nodes(3), 1020.0) == Disruption(tuple(nodes(3)), 4)


def test_a_new_leader_counts_the_nodes_whose_tasks_nobody_has_replaced() -> None:
    before = [fallen(node) for node in ready_nodes(6)[:3]]
    history = NodeHistory([*before, *ready_nodes(6)[3:]], before, counted_from=1000.0 + GRACE_S)
    assert history.detect(1000.0, GRACE_S) is None
    assert went(history, ready_nodes(6)[3:5], 1000.0 + 3 * GRACE_S) is None
    history = NodeHistory([*before, *ready_nodes(6)[3:]], before, counted_from=1000.0 + GRACE_S)
    assert went(history, ready_nodes(6)[3:5], 1000.0 + 1.9 * GRACE_S) == Disruption(tuple(nodes(5)), 6)


def test_nodes_missing_after_a_restore_count_for_disruption_mode() -> None:
    unknown = [replace(node, status=NodeStatus(state=NodeState.UNKNOWN)) for node in ready_nodes(5)]
    history = NodeHistory(unknown)
    history.note(Commit(revision=2, events=tuple(map(down, unknown[:3]))), 20.0)
    assert history.detect(20.0, GRACE_S) is not None


def test_a_node_that_is_back_did_not_fall() -> None:
    history = NodeHistory(ready_nodes(5))
    for node in ready_nodes(3):
        history.note(Commit(revision=1, events=(down(node),)), 10.0)
    assert history.detect(10.5, GRACE_S) is not None
    node = ready_nodes(1)[0]
    history.note(Commit(revision=2, events=(Updated(fallen(node), node),)), 11.0)
    assert history.detect(11.0, GRACE_S) is None


def test_no_task_moves_between_the_disruption_and_the_write_of_its_freeze() -> None:
    """The decisions that its last commit causes know it, and changes that were decided before it are held."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    some, service = ready_nodes(5), a_service(replicas=5)
    tasks = [a_task(slot=number, node=node.id, service=service) for number, node in enumerate(some, 1)]
    loop.run_until_complete(
        store.update(lambda tx: [tx.put(one) for one in (Swarm(id="c"), service, *some, *tasks)])
    )
    orchestrator = OrchestratorState(store, clock, Random(1))
    deque(orchestrator.start(store.view()))
    loop.run_until_complete(clock.sleep(2 * READY_BEFORE_S))
    writes = []
    for number, node in enumerate(some[:3], 1):
        loop.run_until_complete(store.update(lambda tx, node=node: tx.put(fallen(node))))
        orchestrator.on_commit(Commit(number, (down(node),)))
        deque(orchestrator.decide(service.id))
        if number == 1:  # decided, and written after the disruption
            continue
        writes += orchestrator.next_writes(10)
    assert orchestrator.disruption.is_frozen
    assert all(swarm.freeze is None for swarm in store.view().find(Swarm)), "not written"
    assert writes == []
    loop.close()
