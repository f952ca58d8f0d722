"""Even on one node every assignment travels over TLS: a capture on loopback shows nothing else."""

import signal
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.integration.cluster import TestNode, create, wait_running, wait_until

CLUSTER_PORT = 2377
TLS_RECORD_TYPES = {20, 21, 22, 23}
MARK = "a-word-of-the-spec-that-must-not-be-readable"


def test_a_capture_on_loopback_shows_tls_for_every_assignment(m1: TestNode, tmp_path: Path) -> None:
    capture = tmp_path / "loopback.pcap"
    netns = m1.description["netns"]
    words = ["nsenter", f"--net={netns}", "tcpdump", "-i", "lo", "-U", "-w", str(capture)]
    tcpdump = subprocess.Popen([*words, "tcp", "port", str(CLUSTER_PORT)], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: capture.exists() and capture.stat().st_size >= 24, "tcpdump captures")
        create(m1, "secretive", 2, "--env", f"MARK={MARK}")
        wait_running(m1, "secretive", 2)
        wait_until(lambda: len(list(payloads(capture))) > 4, "the assignments were captured")
    finally:
        tcpdump.send_signal(signal.SIGINT)
        tcpdump.wait(10)

    assert MARK.encode() not in capture.read_bytes()
    captured = list(payloads(capture))
    assert captured, "nothing was captured on the cluster's port"
    assert sum(len(data) for _, data in captured) > 1000
    # A capture that starts in the middle of a connection may see the rest of a record first; all that a sender
    # pushes afterwards begins with a record's head.
    by_sender: dict[bytes, list[bytes]] = defaultdict(list)
    for sender, data in captured:
        by_sender[sender].append(data)
    for sent in by_sender.values():
        assert all(data[0] in TLS_RECORD_TYPES and data[1] == 3 for data in sent), sent[0][:16]


def payloads(capture: Path) -> Iterator[tuple[bytes, bytes]]:
    """(connection and direction, bytes) of each TCP segment with data in a pcap file of Ethernet frames (IPv4)."""
    data = capture.read_bytes()
    offset = 24
    while offset + 16 <= len(data):
        (length,) = struct.unpack_from("<I", data, offset + 8)
        frame = data[offset + 16 : offset + 16 + length]
        offset += 16 + length
        if len(frame) < length or frame[12:14] != b"\x08\x00":
            continue
        ip = frame[14:]
        header = (ip[0] & 15) * 4
        total = int.from_bytes(ip[2:4], "big")
        tcp = ip[header:total]
        payload = tcp[(tcp[12] >> 4) * 4 :]
        if payload:
            yield ip[12:20] + tcp[0:4], payload
