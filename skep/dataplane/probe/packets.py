"""What nodes ask each other inside the probes' VXLAN, as bytes of UDP datagrams.  Pure.

A question is as long as the packet whose way it tries; its answer is never longer than the shortest question, so
no node is flooded with answers that a third one asked for.  An answer has what its sender has measured itself: the
MTU of its device, and the nodes at which less than that arrives.

Layout, big-endian::

    question: "skpp" | version 1 | kind 1 | 0 0 | nonce 8 | zeros
    answer:   "skpp" | version 1 | kind 1 | number of pairs 2 | nonce 8 | mtu 2 | (probe address 4, mtu 2) ...
"""

import struct
from collections.abc import Mapping

import msgspec

QUESTION, ANSWER = 1, 2
QUESTION_BYTES_MIN = 256
"""Padding of the smallest question: room for the longest answer."""
PAIRS_MAX = 32

_MAGIC, _VERSION = b"skpp", 1
_HEADER = struct.Struct("!4sBBHQ")
_MTU = struct.Struct("!H")
_PAIR = struct.Struct("!IH")
_MTU_MAX = (1 << 16) - 1


class Said(msgspec.Struct, frozen=True):
    """What a node says of its own measurements.

    ``mtu``: of its device on the underlay; ``lower``: what arrives of its packets where that is less, by the peer's
    probe address as a number.
    """

    mtu: int = 0
    lower: Mapping[int, int] = {}


def question(nonce: int, size: int) -> bytes:
    """A question of ``size`` bytes, at least ``QUESTION_BYTES_MIN``."""
    return _HEADER.pack(_MAGIC, _VERSION, QUESTION, 0, nonce).ljust(max(size, QUESTION_BYTES_MIN), b"\0")


def asked(datagram: bytes) -> int | None:
    """The nonce of a question; None: it is none."""
    if len(datagram) < QUESTION_BYTES_MIN:
        return None
    magic, version, kind, rest, nonce = _HEADER.unpack_from(datagram)
    is_question = (magic, version, kind, rest) == (_MAGIC, _VERSION, QUESTION, 0)
    return int(nonce) if is_question else None


def answer(nonce: int, said: Said) -> bytes:
    """The answer to ``nonce``.

    Where more peers than ``PAIRS_MAX`` are behind smaller MTUs, the device's is said to be the smallest of those left
    out: too small a packet arrives as well.
    """
    pairs = sorted(said.lower.items(), key=lambda pair: (pair[1], pair[0]))
    kept, left_out = pairs[:PAIRS_MAX], pairs[PAIRS_MAX:]
    mtu = min([said.mtu, *(one for _, one in left_out)])
    head = _HEADER.pack(_MAGIC, _VERSION, ANSWER, len(kept), nonce) + _MTU.pack(min(mtu, _MTU_MAX))
    return head + b"".join(_PAIR.pack(address, min(one, _MTU_MAX)) for address, one in kept)


def answered(datagram: bytes) -> tuple[int, Said] | None:
    """The nonce of an answer, and what it says; None: it is none."""
    if len(datagram) < _HEADER.size + _MTU.size:
        return None
    magic, version, kind, count, nonce = _HEADER.unpack_from(datagram)
    if (magic, version, kind) != (_MAGIC, _VERSION, ANSWER) or count > PAIRS_MAX:
        return None
    if len(datagram) != _HEADER.size + _MTU.size + count * _PAIR.size:
        return None
    (mtu,) = _MTU.unpack_from(datagram, _HEADER.size)
    return nonce, Said(mtu, dict(_PAIR.iter_unpack(datagram[_HEADER.size + _MTU.size :])))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """``round_trip_s``: the shortest; ``error``: what the kernel said of what failed; ``said``: the last answer."""

    sent: int
    answered: int
    round_trip_s: float | None = None
    error: str = ""
    said: Said | None = None

    @property
    def arrived(self) -> bool:
        """Whether anything did."""
        return self.answered > 0
