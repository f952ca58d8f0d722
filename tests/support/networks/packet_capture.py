"""Captures frames on an interface of another network namespace, as tcpdump does."""

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_OUTGOING = 4
"""PACKET_OUTGOING: on loopback each frame is seen twice, outgoing and incoming."""
_FRAME_BYTES_MAX = 1 << 17


class Segment(NamedTuple):
    """A TCP segment with data.  ``sender``: connection and direction."""

    sender: bytes
    source_port: int
    target_port: int
    data: bytes


@contextmanager
def captured_on_loopback(netns: str) -> Iterator[list[Segment]]:
    """Capture TCP segments on ``lo`` of ``netns``.  The list grows while the block runs."""
    capture = _socket_inside(netns)
    capture.settimeout(0.1)
    segments: list[Segment] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            try:
                frame, (_, _, kind, _, _) = capture.recvfrom(_FRAME_BYTES_MAX)
            except TimeoutError:
                continue
            if kind != _OUTGOING and (segment := _segment(frame)) is not None:
                segments.append(segment)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield segments
    finally:
        is_over.set()
        reader.join(5)
        capture.close()


def _socket_inside(netns: str) -> socket.socket:
    """Return a raw socket on ``lo`` of ``netns``.  A separate thread enters the namespace to create it."""
    made: list[socket.socket] = []

    def make() -> None:
        handle = os.open(netns, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {netns}")
        finally:
            os.close(handle)
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        raw.bind(("lo", 0))
        made.append(raw)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def _segment(frame: bytes) -> Segment | None:
    if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
        return None
    packet = frame[14:]
    header = (packet[0] & 15) * 4
    segment = packet[header : int.from_bytes(packet[2:4], "big")]
    data = segment[(segment[12] >> 4) * 4 :]
    if not data:
        return None
    ports = int.from_bytes(segment[0:2], "big"), int.from_bytes(segment[2:4], "big")
    return Segment(packet[12:20] + segment[0:4], *ports, data)
