"""Paths between nodes on the wire."""

from hypothesis import given
from hypothesis import strategies as st

from skep.model.networks.paths import (
    DETAIL_CHARACTERS_MAX,
    DiagnosticsRequest,
    NetworkNames,
    PathCheck,
    PathFinding,
    PathPeer,
    PathReport,
    ProbeTargets,
)
from skep.model.values.ids import NetworkId, NodeId
from skep.wire import skep_pb2 as pb
from skep.wire.convert import paths as convert

WORDS = st.text("abcdefghij0123456789", max_size=12)
SMALL = st.integers(0, 2**32 - 1)
PEERS = st.builds(
    PathPeer,
    node_id=WORDS.map(NodeId),
    hostname=WORDS,
    data_path=WORDS,
    vxlan_port=st.integers(1, 65535),
    control=WORDS,
    gossip=WORDS,
    etcd=WORDS,
    encrypted=st.booleans(),
)
LISTS = st.lists(PEERS, max_size=3).map(tuple)
FINDINGS = st.builds(
    PathFinding,
    check=st.sampled_from(PathCheck),
    port=WORDS,
    sent=SMALL,
    lost=SMALL,
    round_trip_ms=st.none() | st.floats(0, 1000),
    detail=WORDS,
)
REPORTS = st.builds(
    PathReport,
    peer=WORDS.map(NodeId),
    findings=st.lists(FINDINGS, max_size=7).map(tuple),
    mtu=SMALL,
    throughput=st.integers(0, 2**40),
    rounds=SMALL,
)
NAMES = st.builds(
    NetworkNames,
    network_id=WORDS.map(NetworkId),
    network=WORDS,
    names=st.dictionaries(WORDS, st.lists(WORDS, max_size=2).map(tuple), max_size=3),
)


@given(st.builds(ProbeTargets, node=PEERS, peers=LISTS))
def test_probe_targets_survive_the_round_trip(targets: ProbeTargets) -> None:
    sent = convert.targets_to_pb(targets).SerializeToString()
    assert convert.targets_from_pb(pb.ProbeTargets.FromString(sent)) == targets


@given(
    st.builds(
        DiagnosticsRequest,
        peers=LISTS,
        throughput=st.booleans(),
        names=st.lists(NAMES, max_size=2).map(tuple),
    ),
    SMALL,
)
def test_requests_for_diagnostics_survive(diagnostics: DiagnosticsRequest, number: int) -> None:
    sent = pb.DiagnosticsRequest.FromString(
        convert.diagnostics_to_pb(number, diagnostics).SerializeToString()
    )
    assert sent.number == number
    assert convert.diagnostics_from_pb(sent) == diagnostics


@given(st.lists(REPORTS, max_size=3).map(tuple))
def test_reports_survive(reports: tuple[PathReport, ...]) -> None:
    sent = pb.ProbeUpdate(reports=convert.reports_to_pb(reports)).SerializeToString()
    assert convert.reports_from_pb(pb.ProbeUpdate.FromString(sent).reports) == reports


def test_what_a_later_version_checks_is_left_out_and_what_is_too_long_is_cut() -> None:
    (report,) = convert.reports_from_pb(
        [
            pb.PathReport(
                findings=[
                    pb.PathFinding(check="telepathy"),
                    pb.PathFinding(check="overlay", port="4789/udp" * 100, detail="x" * 10_000),
                ]
            )
        ]
    )
    (finding,) = report.findings
    assert finding.check is PathCheck.OVERLAY
    assert len(finding.detail) == DETAIL_CHARACTERS_MAX
    assert len(finding.port) == convert.PORT_CHARACTERS_MAX
