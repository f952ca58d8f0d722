"""What is written of a node's reports."""

from skep.manager.probes.records import WRITTEN_MAX
from skep.manager.probes.streams import ProbeResults
from skep.model.networks.paths import PathCheck, PathFinding, PathPeer, PathReport
from skep.model.node import FailingPath
from skep.model.values.ids import NodeId

PEERS = {NodeId(id): PathPeer(node_id=NodeId(id), hostname=id) for id in ("n2", "n3")}


def finding(check: PathCheck = PathCheck.OVERLAY, *, lost: int = 0) -> PathFinding:
    return PathFinding(check=check, port="4789/udp", sent=3, lost=lost)


def report(peer: str, *findings: PathFinding, rounds: int = 2) -> PathReport:
    return PathReport(peer=NodeId(peer), findings=findings, rounds=rounds)


def failing(peer: str, check: PathCheck = PathCheck.OVERLAY) -> FailingPath:
    return FailingPath(peer=NodeId(peer), hostname=peer, check=check.value, port="4789/udp")


def test_a_path_fails_from_the_second_round_on_and_is_well_after_the_second() -> None:
    verdicts = ProbeResults(())
    verdicts.record([report("n2", finding(lost=3), rounds=1)], PEERS)
    assert verdicts.failing() == ()
    verdicts.record([report("n2", finding(lost=3))], PEERS)
    assert verdicts.failing() == (failing("n2"),)
    verdicts.record([report("n2", finding(), rounds=1)], PEERS)
    assert verdicts.failing() == (failing("n2"),)
    verdicts.record([report("n2", finding())], PEERS)
    assert verdicts.failing() == ()


def test_what_was_written_counts_until_the_node_says_something_else() -> None:
    verdicts = ProbeResults([failing("n2"), failing("n2", PathCheck.CONTROL), failing("n3")])
    assert len(verdicts.failing()) == 3
    verdicts.record([report("n2", finding(lost=3))], PEERS)
    assert verdicts.failing() == (failing("n2"), failing("n3"))


def test_results_of_a_former_peer_are_dropped() -> None:
    verdicts = ProbeResults([failing("n2"), failing("n3")])
    verdicts.retain({NodeId("n3")})
    assert verdicts.failing() == (failing("n3"),)


def test_reports_on_nodes_that_are_no_targets_are_ignored() -> None:
    verdicts = ProbeResults(())
    verdicts.record([report("stranger", finding(lost=3))], PEERS)
    assert verdicts.failing() == ()


def test_what_is_written_is_bounded_and_what_carries_containers_packets_comes_first() -> None:
    ids = [NodeId(f"n{number:03}") for number in range(100)]
    peers = {id: PathPeer(node_id=id, hostname=id) for id in ids}
    verdicts = ProbeResults(())
    verdicts.record([report(id, finding(PathCheck.GOSSIP, lost=3), finding(lost=3)) for id in ids], peers)
    written = verdicts.failing()
    assert len(written) == WRITTEN_MAX
    assert {path.check for path in written} == {"overlay"}
