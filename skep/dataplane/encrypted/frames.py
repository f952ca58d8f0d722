"""How frames travel between two nodes: the bytes of a datagram.

Ethernet frames (each with the 10 bytes of its virtio header, as the TAP gave it) to one node and network form a
*unit*: sealed at once, then cut into *pieces* that fit the underlay.  A unit is either one large frame (up to 64 KiB,
which TCP's own segmentation has left whole) or as many small ones as fit one piece, so that losing a piece never costs
more than its own unit, and waiting for company never delays anybody: only what already waits in the TAP travels
together.

Layout of a piece, big-endian::

    version 1 | kind 1 | position 1 | pieces 1 | network 4 | epoch 4 | session 4 | counter 8 | part of the sealed unit

The associated data of a unit is the header of its first piece; a piece elsewhere in the row has another position and
nothing else.  Content of a unit: per frame its length (4 bytes), then the frame.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

VERSION = 1
PIECE = 0
GREETING = 1
ECHO, ECHOED = 2, 3
"""A question whether this forwarder can be reached, and its answer: 16 bytes, not secret."""

HEADER = struct.Struct("!BBBBIIIQ")
LENGTH = struct.Struct("!I")
_ECHO = struct.Struct("!BB6xQ")
NONCE = struct.Struct("!IQ")
TAG_BYTES = 16
VNET_BYTES = 10
ETHERNET_BYTES = 14
FRAME_BYTES_MAX = VNET_BYTES + ETHERNET_BYTES + 4 + 65535
"""What a TAP gives at most: virtio header, Ethernet header with a VLAN tag, one IP packet."""
GSO_BYTES_MAX = 61440
"""For ``gso_max_size`` of containers' interfaces on encrypted networks: a TCP frame's pieces then go out and come in
with one call each, which takes a fifth less processor time.  Larger frames work as well.
"""
PIECES_MAX = 255
PIECE_BYTES_MIN = 512

_POSITION_AT = 2
_POSITIONS = bytes(range(256))
_UDP_IPV4_BYTES = 28
_UDP_IPV6_BYTES = 48


class Header(NamedTuple):
    """What every piece says of itself, in clear and authenticated."""

    version: int
    kind: int
    position: int
    pieces: int
    network: int
    epoch: int
    session: int
    counter: int


def piece_bytes(underlay_mtu: int, *, is_ipv6: bool = False) -> int:
    """Bytes of a datagram's payload that fill ``underlay_mtu``."""
    return underlay_mtu - (_UDP_IPV6_BYTES if is_ipv6 else _UDP_IPV4_BYTES)


def inner_mtu(underlay_mtu: int, *, is_ipv6: bool = False) -> int:
    """The MTU of an encrypted network: a full packet fits one piece.  Underlay's less 96 bytes (IPv6: 116)."""
    overhead = HEADER.size + TAG_BYTES + LENGTH.size + VNET_BYTES + ETHERNET_BYTES
    return piece_bytes(underlay_mtu, is_ipv6=is_ipv6) - overhead


def room(piece: int) -> int:
    """Bytes of a unit's content that fit one piece of ``piece`` bytes."""
    return piece - HEADER.size - TAG_BYTES


def pack(frames: Sequence[bytes]) -> bytes:
    """The content of a unit of ``frames``."""
    return b"".join(part for frame in frames for part in (LENGTH.pack(len(frame)), frame))


def unpack(content: memoryview) -> Iterator[memoryview]:
    """The frames of a unit; what is not well-formed at its end is left out."""
    offset = 0
    while offset + LENGTH.size <= len(content):
        (length,) = LENGTH.unpack_from(content, offset)
        offset += LENGTH.size
        if length > len(content) - offset:
            return
        yield content[offset : offset + length]
        offset += length


def associated(header: Header) -> bytes:
    """What the seal of a unit covers beside its content."""
    return HEADER.pack(*header._replace(position=0))


def cut(first: bytes, sealed: bytes, piece: int) -> list[bytes]:
    """The pieces of a unit, all of ``piece`` bytes but the last; ``first``: the header of the first."""
    body = piece - HEADER.size
    if len(sealed) <= body:
        return [first + sealed]
    before, after = first[:2], first[3:]
    view = memoryview(sealed)
    return [
        b"".join((before, bytes((index,)), after, view[start : start + body]))
        for index, start in enumerate(range(0, len(sealed), body))
    ]


def count_of(content_bytes: int, piece: int) -> int:
    """Pieces that a unit of ``content_bytes`` is cut into."""
    return -(-(content_bytes + TAG_BYTES) // (piece - HEADER.size))


def run_length(data: bytes, start: int, segment: int, header: Header) -> int:
    """How many datagrams from ``start`` on are consecutive pieces of the unit that ``header`` begins.

    They lie ``segment`` bytes apart, as the kernel has joined them.  Looks at the position and the end of the counter
    only: whatever else differs, the seal does not fit.
    """
    most = min(header.pieces - header.position, -(-(len(data) - start) // segment))
    end = start + most * segment
    positions = data[start + _POSITION_AT : end : segment]
    if positions != _POSITIONS[header.position : header.position + most]:
        return 1
    for offset in (HEADER.size - 2, HEADER.size - 1):
        one = data[start + offset : end : segment]
        if one.count(one[0]) != most:
            return 1
    return most


def echo_question(number: int) -> bytes:
    """Asks whether a forwarder can be reached.  ``number``: 64 random bits, which its answer repeats."""
    return _ECHO.pack(VERSION, ECHO, number)


def echo_answer(number: int) -> bytes:
    """Answers ``echo_question(number)``, and is as long."""
    return _ECHO.pack(VERSION, ECHOED, number)


def echo_asked(datagram: bytes | memoryview) -> int | None:
    """The number of such a question; None: it is none."""
    if len(datagram) != _ECHO.size:
        return None
    version, kind, number = _ECHO.unpack(datagram)
    return int(number) if (version, kind) == (VERSION, ECHO) else None


def parse(datagram: memoryview) -> Header | None:
    """The header of a piece; None: it is none of this version."""
    if len(datagram) <= HEADER.size:
        return None
    header = Header._make(HEADER.unpack_from(datagram))
    is_known = header.version == VERSION and header.kind == PIECE
    return header if is_known and header.position < header.pieces else None
