"""Route netlink in bulk: whole tables read and many entries written, without an object for every attribute.

A network of 500 services has thousands of entries; a general library takes 0.1 ms for each, this takes 10 us.  The
functions block and work in the network namespace of the calling thread.

Source: linux, include/uapi/linux/{netlink,rtnetlink,neighbour,if_link}.h.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence

BYTE_ORDER = sys.byteorder

NEWLINK, GETLINK = 16, 18
NEWADDR, GETADDR = 20, 22
NEWROUTE, GETROUTE = 24, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
AF_BRIDGE = 7

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
REPLACE, CREATE = 0x100, 0x400

_ERROR, _DONE = 2, 3
_INTERRUPTED = 0x10
_DUMP_TRIES = 8
_ANSWER_BYTES = 1 << 17
_RECEIVE_BYTES = 4 << 20
_BATCH = 64
"""Messages sent before their answers are read: those must fit into the socket."""
_DEADLINE_S = 10
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF

Message = tuple[int, memoryview]
"""Type, and what follows the netlink header."""


def dumped(kind: int, body: bytes) -> list[Message]:
    """All answers to a dump request.  ``body``: what follows the header.  Raises: OSError."""
    with _opened() as connection:
        for _ in range(_DUMP_TRIES):
            found = _dump(connection, kind, body)
            if found is not None:
                return found
    raise OSError(errno.EAGAIN, "the kernel's tables change faster than they can be read")


def carried_out(requests: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Send changes (type, flags, body); gives for each 0 or the kernel's error number.  Raises: OSError."""
    results: list[int] = []
    with _opened() as connection:
        for start in range(0, len(requests), _BATCH):
            part = requests[start : start + _BATCH]
            connection.send(
                b"".join(
                    _HEADER.pack(_HEADER.size + len(body), kind, flags | REQUEST | ACK, number, 0) + body
                    for number, (kind, flags, body) in enumerate(part)
                )
            )
            results += _acknowledged(connection, len(part))
    return results


def attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and value of each attribute; flags of the type (nested, byte order) are left out."""
    position = 0
    while position + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < 4:
            return
        yield kind & _TYPE_MASK, data[position + 4 : position + length]
        position += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def messages(data: memoryview) -> Iterator[Message]:
    """The messages of one datagram; an acknowledgement or an end is one of type 2 or 3."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size:
            return
        yield kind, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def listening(family: int, groups: Iterable[int]) -> socket.socket:
    """A socket that gets what the kernel tells of the ``groups`` (numbers, not masks); does not block."""
    opened = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, family
    )
    try:
        opened.bind((0, 0))
        for group in groups:
            opened.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except BaseException:
        opened.close()
        raise
    return opened


_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1


def _opened() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    opened.bind((0, 0))
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    opened.settimeout(_DEADLINE_S)
    return opened


def _dump(connection: socket.socket, kind: int, body: bytes) -> list[Message] | None:
    """None: the table changed under the dump, which may have missed something."""
    connection.send(_HEADER.pack(_HEADER.size + len(body), kind, REQUEST | DUMP, 1, 0) + body)
    found: list[Message] = []
    is_whole = True
    while True:
        data = memoryview(connection.recv(_ANSWER_BYTES))
        position = 0
        while position + _HEADER.size <= len(data):
            length, answer, flags, _, _ = _HEADER.unpack_from(data, position)
            content = data[position + _HEADER.size : position + length]
            position += (length + 3) & ~3
            is_whole = is_whole and not flags & _INTERRUPTED
            if answer == _DONE:
                return found if is_whole else None
            if answer == _ERROR:
                number = -int.from_bytes(content[:4], BYTE_ORDER, signed=True)
                raise OSError(number, os.strerror(number))
            found.append((answer, content))


def _acknowledged(connection: socket.socket, count: int) -> list[int]:
    results = [0] * count
    missing = count
    while missing:
        data = memoryview(connection.recv(_ANSWER_BYTES))
        position = 0
        while position + _HEADER.size <= len(data):
            length, answer, _, number, _ = _HEADER.unpack_from(data, position)
            if answer == _ERROR and number < count:
                start = position + _HEADER.size
                results[number] = -struct.unpack_from("=i", data, start)[0]
                missing -= 1
            position += (length + 3) & ~3
    return results
