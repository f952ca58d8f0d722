"""Probe requests and responses inside the probes' VXLAN, as bytes of UDP datagrams.  Pure.

A request is as long as the packet size under test.  A response is never longer than the shortest request, so that a
forged sender address cannot be used to flood a node.  A response carries what its sender has measured itself: the
MTU of its device, and the nodes that only smaller packets reach.

Layout, big-endian::

    request:  "skpp" | version 1 | kind 1 | 0 0 | nonce 8 | zeros
    response: "skpp" | version 1 | kind 1 | number of pairs 2 | nonce 8 | mtu 2 | (probe address 4, mtu 2) ...
"""

import struct
from collections.abc import Mapping

import msgspec

REQUEST, RESPONSE = 1, 2
REQUEST_BYTES_MIN = 256
"""Of the smallest request: as long as the longest response."""
PAIRS_MAX = 32

_MAGIC, _VERSION = b"skpp", 1
_HEADER = struct.Struct("!4sBBHQ")
_MTU = struct.Struct("!H")
_PAIR = struct.Struct("!IH")
_MTU_MAX = (1 << 16) - 1


class PeerMeasurements(msgspec.Struct, frozen=True):
    """What a node reports of its own measurements.

    ``mtu``: of its device on the underlay; ``lower``: the path MTU where it is smaller, by the peer's probe address as
    a number.
    """

    mtu: int = 0
    lower: Mapping[int, int] = {}


def encode_request(nonce: int, size: int) -> bytes:
    """A request of ``size`` bytes, at least ``REQUEST_BYTES_MIN``."""
    return _HEADER.pack(_MAGIC, _VERSION, REQUEST, 0, nonce).ljust(max(size, REQUEST_BYTES_MIN), b"\0")


def decode_request(datagram: bytes) -> int | None:
    """The nonce of a request; None: ``datagram`` is not one."""
    if len(datagram) < REQUEST_BYTES_MIN:
        return None
    magic, version, kind, rest, nonce = _HEADER.unpack_from(datagram)
    is_request = (magic, version, kind, rest) == (_MAGIC, _VERSION, REQUEST, 0)
    return int(nonce) if is_request else None


def encode_response(nonce: int, measurements: PeerMeasurements) -> bytes:
    """The response to the request ``nonce``.

    With more than ``PAIRS_MAX`` smaller path MTUs, the smallest of those left out is given as the device's: smaller
    packets arrive as well.
    """
    pairs = sorted(measurements.lower.items(), key=lambda pair: (pair[1], pair[0]))
    kept, left_out = pairs[:PAIRS_MAX], pairs[PAIRS_MAX:]
    mtu = min([measurements.mtu, *(one for _, one in left_out)])
    head = _HEADER.pack(_MAGIC, _VERSION, RESPONSE, len(kept), nonce) + _MTU.pack(min(mtu, _MTU_MAX))
    return head + b"".join(_PAIR.pack(address, min(one, _MTU_MAX)) for address, one in kept)


def decode_response(datagram: bytes) -> tuple[int, PeerMeasurements] | None:
    """The nonce of a response and its content; None: ``datagram`` is not one."""
    if len(datagram) < _HEADER.size + _MTU.size:
        return None
    magic, version, kind, count, nonce = _HEADER.unpack_from(datagram)
    if (magic, version, kind) != (_MAGIC, _VERSION, RESPONSE) or count > PAIRS_MAX:
        return None
    if len(datagram) != _HEADER.size + _MTU.size + count * _PAIR.size:
        return None
    (mtu,) = _MTU.unpack_from(datagram, _HEADER.size)
    return nonce, PeerMeasurements(mtu, dict(_PAIR.iter_unpack(datagram[_HEADER.size + _MTU.size :])))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Of a series of probes.

    ``round_trip_s``: the shortest; ``error``: the kernel's, of a probe that could not be sent; ``peer``: the content of
    the last response.
    """

    sent: int
    answered: int
    round_trip_s: float | None = None
    error: str = ""
    peer: PeerMeasurements | None = None

    @property
    def arrived(self) -> bool:
        """Whether there was at least one response."""
        return self.answered > 0
