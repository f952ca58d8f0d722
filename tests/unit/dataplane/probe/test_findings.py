"""Findings from the outcomes of probes."""

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.probe.findings import (
    checksum_finding,
    is_changed,
    large_finding,
    next_report,
    overlay_finding,
    port_finding,
)
from skep.dataplane.probe.packets import Outcome
from skep.model.networks.paths import DETAIL_CHARACTERS_MAX, PathCheck, PathPeer, PathReport
from skep.model.values.ids import NodeId

PEER = PathPeer(node_id=NodeId("p"), hostname="worker2", data_path="192.0.2.2")
LOST, WELL = Outcome(sent=3, answered=0), Outcome(sent=3, answered=3, round_trip_s=0.0012)


def failed(check: PathCheck = PathCheck.OVERLAY) -> PathReport:
    return next_report(PEER, [port_finding(check, PEER, "192.0.2.2", 1, LOST, protocol="tcp")], 0, None)


def test_a_closed_port_is_named_with_its_node_and_what_is_known_of_the_direction() -> None:
    found = overlay_finding(PEER, LOST, is_received=False)
    assert found.is_failing
    assert found.detail == "no response through VXLAN (UDP port 4789) from worker2 (192.0.2.2)"
    one_way = overlay_finding(PEER, LOST, is_received=True)
    assert one_way.detail.endswith(
        "; its own probes arrived here until lately: the path to it is blocked, or it has just failed"
    )


def test_a_path_without_faults_has_no_detail() -> None:
    found = overlay_finding(PEER, WELL, is_received=True)
    assert (found.is_failing, found.detail, found.round_trip_ms) == (False, "", 1.2)
    assert large_finding(PEER, 1500, 1500, 2).detail == ""
    assert checksum_finding(PEER, WELL, is_off=False).detail == ""


def test_loss_is_reported_and_fails_from_one_half_on() -> None:
    some = overlay_finding(PEER, Outcome(sent=10, answered=6), is_received=True)
    assert (some.is_failing, some.detail) == (
        False,
        "4 of 10 packets to worker2 (192.0.2.2) through VXLAN were lost",
    )
    assert overlay_finding(PEER, Outcome(sent=10, answered=4), is_received=True).is_failing


def test_faults_with_a_workaround_are_reported_and_do_not_fail() -> None:
    small = large_finding(PEER, 1400, 1500, 20)
    assert not small.is_failing
    assert "up to 1400 bytes arrive at worker2" in small.detail
    card = checksum_finding(PEER, WELL, is_off=True)
    assert not card.is_failing
    assert "wrong checksums" in card.detail


def test_paths_that_lose_all_large_packets_or_all_checksummed_ones_fail() -> None:
    assert large_finding(PEER, 0, 1500, 2).is_failing
    assert checksum_finding(PEER, LOST, is_off=True).is_failing


@given(st.text(min_size=1, max_size=500), st.text(max_size=500))
def test_a_sentence_is_bounded(hostname: str, error: str) -> None:
    peer = PathPeer(node_id=NodeId("p"), hostname=hostname, data_path="192.0.2.2")
    outcome = Outcome(sent=1, answered=0, error=error)
    assert 0 < len(overlay_finding(peer, outcome, is_received=False).detail) <= DETAIL_CHARACTERS_MAX
    found = port_finding(PathCheck.CONTROL, peer, "192.0.2.2", 2377, outcome, protocol="tcp")
    assert len(found.detail) <= DETAIL_CHARACTERS_MAX


def test_rounds_count_equal_failures_and_changes_and_settled_results_are_reported() -> None:
    first = failed()
    second = next_report(PEER, first.findings, 0, first)
    third = next_report(PEER, first.findings, 0, second)
    assert [one.rounds for one in (first, second, third)] == [1, 2, 3]
    assert [is_changed(None, first), is_changed(first, second), is_changed(second, third)] == [
        True,
        True,
        False,
    ]
    well = next_report(PEER, [overlay_finding(PEER, WELL, is_received=True)], 1500, third)
    assert (well.rounds, is_changed(third, well)) == (1, True)
    assert is_changed(well, next_report(PEER, well.findings, 1400, well)), "another MTU"
