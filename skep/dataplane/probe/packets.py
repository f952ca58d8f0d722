"""Encodes probe requests and responses inside the probes' VXLAN as UDP datagrams.  Pure.

A request has the packet size that is tested.  A response is never longer than the shortest request, so that forged
sender addresses cannot be used to flood a node.  A response carries the measurements of its sender: the MTU of its
device, and the peers that only smaller packets reach.

Layout, big-endian::

  request:  "skpp" | version 1 | kind 1 | 0 0 | nonce 8 | zeros
  response: "skpp" | version 1 | kind 1 | number of pairs 2 | nonce 8 | mtu 2 | (probe address 4, mtu 2) ...
"""

import struct
from collections.abc import Mapping

import msgspec

# Kinds of datagrams.
REQUEST, RESPONSE = 1, 2
REQUEST_BYTES_MIN = 256
"""Size in bytes of the smallest request.  It equals the size of the longest response."""
PAIRS_MAX = 32
"""Limit for the path MTUs in one response."""

_MAGIC, _VERSION = b"skpp", 1
_HEADER = struct.Struct("!4sBBHQ")
_MTU = struct.Struct("!H")
_PAIR = struct.Struct("!IH")
_MTU_MAX = (1 << 16) - 1
"""Largest MTU that fits into the field of 16 bits."""


class PeerMeasurements(msgspec.Struct, frozen=True):
    """A node's report of its own measurements.

    ``mtu`` is the MTU of its device on the underlay.  ``lower`` has each path MTU that is smaller, by the peer's probe
    address as a number.
    """

    mtu: int = 0
    lower: Mapping[int, int] = {}


def encode_request(nonce: int, size: int) -> bytes:
    """Return a request of ``size`` bytes, at least ``REQUEST_BYTES_MIN``."""
    return _HEADER.pack(_MAGIC, _VERSION, REQUEST, 0, nonce).ljust(max(size, REQUEST_BYTES_MIN), b"\0")


def decode_request(datagram: bytes) -> int | None:
    """Return the nonce of a request, or None if ``datagram`` is not one."""
    if len(datagram) < REQUEST_BYTES_MIN:
        return None
    magic, version, kind, rest, nonce = _HEADER.unpack_from(datagram)
    is_request = (magic, version, kind, rest) == (_MAGIC, _VERSION, REQUEST, 0)
    return int(nonce) if is_request else None


def encode_response(nonce: int, measurements: PeerMeasurements) -> bytes:
    """Return the response to the request ``nonce``.

    If there are more than ``PAIRS_MAX`` smaller path MTUs, the smallest of the remaining ones is sent as the device's
    MTU.  This is safe, because packets of that size arrive at all of these peers.
    """
    pairs = sorted(measurements.lower.items(), key=lambda pair: (pair[1], pair[0]))
    kept, left_out = pairs[:PAIRS_MAX], pairs[PAIRS_MAX:]
    mtu = min([measurements.mtu, *(one for _, one in left_out)])
    head = _HEADER.pack(_MAGIC, _VERSION, RESPONSE, len(kept), nonce) + _MTU.pack(min(mtu, _MTU_MAX))
    return head + b"".join(_PAIR.pack(address, min(one, _MTU_MAX)) for address, one in kept)


def decode_response(datagram: bytes) -> tuple[int, PeerMeasurements] | None:
    """Return the nonce and the content of a response, or None if ``datagram`` is not one."""
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
    """The outcome of a series of probes.

    Args:
        round_trip_s: The shortest round trip, or None without a response.
        error: The kernel's error for a probe that could not be sent.
        peer: The content of the last response.
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
