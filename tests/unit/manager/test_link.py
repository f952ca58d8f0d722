"""Which managers are silent."""

from hypothesis import given
from hypothesis import strategies as st

from skep.manager.link.pings import SILENT_S, ManagersLastSeen, report_in
from skep.manager.peer_reports import REGISTERING_MAX, PeerReport
from skep.model.values.ids import NodeId
from skep.wire import skep_pb2 as skep

A, B = NodeId("a"), NodeId("b")


def test_a_manager_is_silent_two_seconds_after_its_last_message() -> None:
    reachable = ManagersLastSeen()
    reachable.expect([A, B], 10.0)
    reachable.note(A, 11.0)
    assert reachable.silent(11.9) == {}
    assert reachable.silent(12.5) == {B: 2.5}
    reachable.note(B, 12.6)
    assert reachable.silent(13.0) == {A: 2.0}


def test_a_manager_without_any_message_is_neither_silent_nor_reachable() -> None:
    reachable = ManagersLastSeen()
    reachable.expect([A, B], 10.0)
    reachable.note_answer(A, 10.5, 110.4)
    assert reachable.reachable(111.0) == {A}
    assert reachable.silent(11.0) == {}
    assert reachable.reachable(112.4) == set()
    reachable.note_answer(B, 13.0, 113.0)
    reachable.expect([A], 13.0)
    reachable.expect([A, B], 13.0)
    assert reachable.reachable(113.0) == set()


def test_a_ping_that_was_long_on_its_way_makes_a_manager_no_longer_reachable() -> None:
    reachable = ManagersLastSeen()
    reachable.expect([A], 0.0)
    reachable.note_answer(A, 1.0, 1.0)
    reachable.note(A, 9.0)
    assert reachable.silent(9.5) == {}
    assert reachable.reachable(9.5) == set()


def test_time_in_which_this_manager_stood_still_makes_an_answer_older() -> None:
    reachable = ManagersLastSeen()
    reachable.expect([A], 0.0)
    reachable.note_answer(A, 1.0, 1.0)
    assert reachable.silent(1.4) == {}, "it was not silent for longer than this loop could observe"
    assert reachable.reachable(61.0) == set()


def test_only_known_managers_count() -> None:
    reachable = ManagersLastSeen()
    reachable.expect([A], 0.0)
    reachable.note(B, 0.0)
    reachable.expect([], 0.0)
    assert reachable.silent(100.0) == {}


def test_being_named_again_is_no_sign_of_life() -> None:
    reachable = ManagersLastSeen()
    reachable.expect([A], 0.0)
    reachable.expect([A, B], 1.9)
    assert reachable.silent(2.0) == {A: 2.0}


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.floats(0, 1)), max_size=30))
def test_a_manager_with_a_recent_message_is_never_silent(words: list[tuple[NodeId, float]]) -> None:
    now, reachable = 0.0, ManagersLastSeen()
    last = {A: 0.0, B: 0.0}
    reachable.expect([A, B], now)
    for id, gap_s in words:
        now += gap_s
        last[id] = now
        reachable.note(id, now)
        assert set(reachable.silent(now)) == {id for id, at in last.items() if now - at >= SILENT_S}


def test_a_report_of_any_length_is_cut_to_its_bound() -> None:
    ping = skep.Ping(crowded=True, missed=3, without_quorum=True, registering=["n"] * (REGISTERING_MAX + 1))
    report = report_in(ping)
    assert report == PeerReport(
        is_overloaded=True, missed=3, registering=(NodeId("n"),) * REGISTERING_MAX, is_without_quorum=True
    )
