"""What managers report to each other counts for a moment, and the last report of each."""

from skep.manager.peer_reports import REPORT_VALID_S, PeerReport, PeerReports
from skep.model.values.ids import NodeId

M2, M3 = NodeId("m2"), NodeId("m3")


def test_overload_of_any_manager_counts_until_its_report_is_old_or_another_one_came() -> None:
    reports = PeerReports()
    reports.record(M2, PeerReport(is_overloaded=True), 10.0)
    assert reports.is_overloaded_anywhere(10.0 + REPORT_VALID_S / 2)
    assert not reports.is_overloaded_anywhere(10.0 + REPORT_VALID_S)
    reports.record(M2, PeerReport(is_overloaded=True), 20.0)
    reports.record(M2, PeerReport(), 20.1)
    assert not reports.is_overloaded_anywhere(20.1)
    reports.own = PeerReport(is_overloaded=True)
    assert reports.is_overloaded_anywhere(20.1)


def test_nodes_of_other_managers_that_missed_heartbeats_are_counted_together() -> None:
    reports = PeerReports()
    reports.own = PeerReport(missed=5)
    assert reports.missed_elsewhere(1.0) == 0
    reports.record(M2, PeerReport(missed=1), 1.0)
    reports.record(M3, PeerReport(missed=2), 1.5)
    assert reports.missed_elsewhere(1.5) == 3
    reports.record(M3, PeerReport(missed=0), 2.0)
    assert reports.missed_elsewhere(2.0) == 1
    assert reports.missed_elsewhere(1.0 + REPORT_VALID_S) == 0


def test_nodes_that_register_with_other_managers_are_known_while_the_report_is_valid() -> None:
    reports = PeerReports()
    reports.own = PeerReport(registering=(NodeId("n1"),))
    reports.record(M2, PeerReport(registering=(NodeId("n2"),)), 1.0)
    reports.record(M3, PeerReport(registering=(NodeId("n3"),)), 2.0)
    assert reports.registering_elsewhere(2.0) == {"n2", "n3"}
    assert reports.registering_elsewhere(1.0 + REPORT_VALID_S) == {"n3"}


def test_a_manager_is_without_a_quorum_until_it_reports_that_it_has_one() -> None:
    reports = PeerReports()
    reports.record(M2, PeerReport(is_without_quorum=True), 1.0)
    reports.record(M3, PeerReport(), 1.0)
    assert reports.without_quorum() == {M2}
    reports.record(M2, PeerReport(), 2.0)
    assert reports.without_quorum() == set()
