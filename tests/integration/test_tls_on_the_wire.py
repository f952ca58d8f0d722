"""Even on one node every assignment travels over TLS: a capture on loopback shows nothing else."""

from collections import defaultdict

from tests.support.machines.playground_rig import TestNode, create, wait_running, wait_until
from tests.support.networks.packet_capture import captured_on_loopback

CLUSTER_PORT = 2377
TLS_RECORD_TYPES = {20, 21, 22, 23}
MARK = "a-word-of-the-spec-that-must-not-be-readable"


def test_a_capture_on_loopback_shows_tls_for_every_assignment(m1: TestNode) -> None:
    with captured_on_loopback(m1.description["netns"]) as segments:
        create(m1, "secretive", 2, "--env", f"MARK={MARK}")
        wait_running(m1, "secretive", 2)
        wait_until(lambda: len(segments) > 4, "the assignments were captured")

    assert not any(MARK.encode() in segment.data for segment in segments)
    ours = [segment for segment in segments if CLUSTER_PORT in (segment.source_port, segment.target_port)]
    assert sum(len(segment.data) for segment in ours) > 1000
    # All that a sender pushes begins with a TLS record's head (records are small: one segment each).
    by_sender: dict[bytes, list[bytes]] = defaultdict(list)
    for segment in ours:
        by_sender[segment.sender].append(segment.data)
    for sent in by_sender.values():
        assert all(data[0] in TLS_RECORD_TYPES and data[1] == 3 for data in sent), sent[0][:16]
