"""Which nodes are still believed alive."""

from hypothesis import given
from hypothesis import strategies as st

from skep.aio.event_loop.hang_detection import RunningTime
from skep.errors import Unavailable
from skep.manager.dispatcher.node_sessions.sessions import LiveSession, Sessions
from skep.manager.nodes.heartbeats import (
    grace_after_absence,
    grace_after_adoption,
    grace_after_loss,
    heartbeat_period,
)
from skep.model.values.ids import NodeId, SessionId

TICK_S, TICK_S_MAX = 0.2, 0.5


def test_after_a_loss_of_quorum_every_node_gets_time_to_come_back():
    assert grace_after_adoption(1.0, is_skep=True, recovers=False) == 3.0
    assert grace_after_adoption(1.0, is_skep=True, recovers=True) == grace_after_absence(1.0)


def test_a_node_that_lost_its_manager_gets_what_its_kind_needs_to_find_another():
    assert grace_after_loss(1.0, is_skep=True) == 3.0
    assert grace_after_loss(1.0, is_skep=False) == 12.0
    assert grace_after_loss(5.0, is_skep=False) == 15.0
    assert grace_after_loss(1.0, is_skep=True, configured_s=20.0) == 20.0


def test_after_its_own_absence_a_manager_gives_more_time():
    assert grace_after_absence(1.0) == 12.0
    assert grace_after_absence(5.0) == 30.0


def test_heartbeats_keep_their_period_for_hundreds_of_nodes():
    assert heartbeat_period(1.0, skep_nodes=1000, docker_nodes=0) == 1.0
    assert heartbeat_period(1.0, skep_nodes=0, docker_nodes=100) == 1.0


def test_heartbeats_are_stretched_to_a_twentieth_of_a_core():
    period_s = heartbeat_period(1.0, skep_nodes=0, docker_nodes=1000)
    assert 1000 / period_s * 195e-6 <= 0.0501


def test_own_time_passes_as_the_clock_does():
    time = RunningTime(seen_at=100.0)
    for number in range(1, 11):
        time = time.after(100.0 + number * TICK_S, TICK_S)
    assert abs(time.seconds - 10 * TICK_S) < 1e-9


def test_while_the_loop_stood_still_no_node_missed_anything():
    time = RunningTime(seen_at=0.0).after(60.0, TICK_S)
    assert time.seconds <= 2 * TICK_S


def test_a_late_tick_counts_only_a_part_of_its_delay():
    """A check may be rare without nodes of a starved manager being marked down sooner."""
    late, time = 60.0, RunningTime(seen_at=0.0)
    assert time.after(TICK_S_MAX + late, TICK_S_MAX, late_s=0.2).seconds == TICK_S_MAX + 0.2
    assert time.after(0.6, TICK_S_MAX, late_s=0.2).seconds == 0.6


def test_while_this_manager_was_cut_off_no_node_missed_anything():
    time = RunningTime(seen_at=0.0).after(TICK_S, TICK_S, is_current=False)
    assert time == RunningTime(seconds=0.0, seen_at=TICK_S)


@given(st.lists(st.floats(0, 100), max_size=20))
def test_own_time_is_never_faster_than_the_clock(gaps):
    now, time = 0.0, RunningTime(seen_at=0.0)
    for gap in gaps:
        now += gap
        before = time.seconds
        time = time.after(now, TICK_S)
        assert before <= time.seconds <= before + gap + 1e-9


def a_session(node: str = "n1", id: str = "a", deadline: float = 3.0) -> LiveSession:
    return LiveSession(NodeId(node), SessionId(id), lambda: None, deadline=deadline)


def test_a_node_is_silent_when_its_deadline_has_passed():
    sessions = Sessions()
    sessions.add(a_session("n1", deadline=3.0))
    sessions.add(a_session("n2", deadline=4.0))
    assert [silence.node_id for silence in sessions.silent(3.5)] == ["n1"]
    assert [silence.node_id for silence in sessions.silent(2.5)] == []


def test_a_node_that_is_expected_back_counts_as_silent_only_later():
    sessions = Sessions()
    sessions.expect(NodeId("n1"), SessionId("a"), last_seen=0.0, grace_s=12.0)
    sessions.expect(NodeId("n1"), SessionId("a"), last_seen=5.0, grace_s=12.0)  # no further time
    assert sessions.silent(11.0) == []
    assert [silence.session_id for silence in sessions.silent(12.0)] == ["a"]
    sessions.add(a_session("n1", "b", deadline=20.0))
    assert sessions.silent(13.0) == []


def test_sessions_given_up_are_expected_to_be_somewhere_else():
    sessions = Sessions()
    sessions.add(a_session("n1"))
    assert sessions.release_all(Unavailable("cut off"), now=0.0, grace_s=30.0) == 1
    assert list(sessions.all()) == []
    assert [silence.node_id for silence in sessions.silent(30.0)] == ["n1"]
    sessions.lose(NodeId("n1"), SessionId("taken-by-another"), Unavailable("gone"))
    assert sessions.silent(30.0) == []


def test_the_kinds_of_nodes_are_counted():
    sessions = Sessions()
    session = a_session("n1")
    session.is_skep = True
    sessions.add(session)
    sessions.add(a_session("n2"))
    assert sessions.count() == (1, 1)
