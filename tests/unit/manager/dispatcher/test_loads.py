"""Which loads are written, and how often."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.dispatcher.loads import (
    AT_ONCE,
    INTERVAL_S,
    STEP,
    is_significant,
    load_from_heartbeat,
    record_load,
    reports,
)
from skep.manager.dispatcher.node_sessions.registration import SessionInvalid
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.model.node import Node, SessionOwner
from skep.model.values.ids import NodeId, SessionId
from skep.store.memory import MemoryCluster, MemoryStore
from tests.support.builders import a_node


def a_session(node: str, load: float | None) -> LiveSession:
    session = LiveSession(NodeId(node), SessionId(f"of-{node}"), lambda: None, deadline=0.0)
    session.load = load
    return session


async def a_store(*nodes: Node) -> MemoryStore:
    store = MemoryStore(SystemClock(), MemoryCluster())
    for node in nodes:
        session = SessionOwner(manager_id=NodeId("m1"), session_id=SessionId(f"of-{node.id}"))
        await store.update(lambda tx, node=node, session=session: tx.put(replace(node, session=session)))
    return store


def test_a_first_value_is_written_and_small_changes_are_not() -> None:
    assert is_significant(None, 0.0, written_s=None)
    assert not is_significant(0.0, STEP, written_s=None)
    assert is_significant(0.0, STEP + 0.01, written_s=None)
    assert not is_significant(0.0, 1.0, written_s=INTERVAL_S - 1)
    assert is_significant(0.0, 1.0, written_s=INTERVAL_S)


@given(st.lists(st.floats(0, 1), max_size=100), st.floats(0.1, 20))
def test_writes_are_apart_in_time_and_in_value(reported: list[float], period_s: float) -> None:
    stored: float | None = None
    last_s: float | None = None
    for number, load in enumerate(reported):
        now = number * period_s
        if is_significant(stored, load, written_s=None if last_s is None else now - last_s):
            assert last_s is None or now - last_s >= INTERVAL_S
            assert stored is None or abs(load - stored) > STEP
            stored, last_s = round(load, 1), now
        elif last_s is not None and now - last_s >= INTERVAL_S:
            assert stored is not None
            assert abs(stored - load) <= STEP


def test_a_heartbeat_cannot_say_more_than_everything() -> None:
    assert (load_from_heartbeat(0), load_from_heartbeat(250), load_from_heartbeat(2**32 - 1)) == (
        0.0,
        0.25,
        1.0,
    )


async def test_sessions_that_say_nothing_and_nodes_that_are_gone_are_passed_over() -> None:
    store = await a_store(a_node("n1"), a_node("n2"))
    sessions = [a_session("n1", 0.34), a_session("n2", None), a_session("gone", 0.9)]
    (report,) = reports(store.view(), sessions, now=0.0)
    assert (report.node_id, report.session_id, report.load) == ("n1", "of-n1", 0.3)


async def test_a_look_writes_so_many_and_those_that_wait_longest_first() -> None:
    nodes = [a_node(f"n{number:03}") for number in range(AT_ONCE + 10)]
    store = await a_store(*nodes)
    sessions = [a_session(node.id, 0.5) for node in nodes]
    for session in sessions[:AT_ONCE]:
        session.load_written = 1.0
    found = reports(store.view(), sessions, now=100.0)
    assert len(found) == AT_ONCE
    assert {one.node_id for one in found[:10]} == {node.id for node in nodes[AT_ONCE:]}


async def test_only_the_session_that_speaks_for_the_node_writes() -> None:
    store = await a_store(replace(a_node("n1"), load=0.1))
    (report,) = reports(store.view(), [a_session("n1", 0.8)], now=0.0)
    with pytest.raises(SessionInvalid):
        await store.update(record_load, replace(report, session_id=SessionId("an-earlier-one")))
    await store.update(record_load, report)
    assert store.view().get(Node, NodeId("n1")).load == 0.8
    assert reports(store.view(), [a_session("n1", 0.85)], now=0.0) == []
