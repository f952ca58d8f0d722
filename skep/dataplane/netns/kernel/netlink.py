"""Encodes and decodes netlink messages and attributes, and runs route netlink requests in bulk.

A network of 500 services has thousands of entries.  A general library needs 0.1 ms for each, because it creates an
object for every attribute.  This module needs 10 us.  Blocking calls work in the calling thread's network namespace.

Source: linux, include/uapi/linux/{netlink,rtnetlink,neighbor,if_link}.h, linux/netfilter/nfnetlink.h.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from skep.linux.descriptors import set_aside

BYTE_ORDER = sys.byteorder

NETFILTER = 12
"""The netlink protocol of nftables, connection tracking and logged packets."""
# Source: linux/rtnetlink.h and linux/netfilter/nfnetlink.h: groups of notifications.
GROUP_NFTABLES = 7
GROUP_LINK, GROUP_NEIGHBOR = 1, 3
GROUP_ROUTE4, GROUP_RULE4, GROUP_ROUTE6, GROUP_RULE6 = 7, 8, 11, 19
GROUP_ADDRESS4, GROUP_ADDRESS6 = 5, 9

# Source: linux/rtnetlink.h: RTM_*.
NEWLINK, GETLINK = 16, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, GETROUTE = 24, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
GETRULE = 34
AF_BRIDGE = 7

# Source: linux/netlink.h: NLM_F_*.
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
REPLACE, EXCL, CREATE = 0x100, 0x200, 0x400
NESTED = 0x8000
"""Flag in an attribute's type: the value consists of further attributes."""

ERROR, DONE = 2, 3
"""Message types: an error number (0 is an acknowledgement), and the end of a dump."""
# Source: linux/netlink.h: NLM_F_DUMP_INTR.
_INTERRUPTED = 0x10
_DUMP_TRIES = 8
"""Attempts to read a listing.

If it changes while it is read, the kernel marks it as inconsistent, and it is read again.
"""
_REPLY_BYTES = 1 << 17
"""Buffer size in bytes for one read.  The kernel's pieces have at most 32 KiB."""
_RECEIVE_BYTES = 4 << 20
"""Bytes of reports that the kernel keeps while this process is busy.  It drops further ones, and reports that."""
_BATCH = 64
"""Number of messages sent before their responses are read.  The responses must fit into the socket's buffer."""
_DEADLINE_S = 10
"""Time limit in seconds for a response.  Long, because the removal of many devices holds a lock of the kernel."""
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
# Source: linux/netlink.h: NLA_TYPE_MASK.
_TYPE_MASK = 0x3FFF

Data = TypeVar("Data", bytes, memoryview)

Message = tuple[int, memoryview]
"""The type, and the bytes after the netlink header."""


def dump(kind: int, body: bytes, protocol: int = socket.NETLINK_ROUTE) -> list[Message]:
    """Return all responses to a dump request.  ``body`` follows the header.  Raises: OSError."""
    with _open_for_bulk(protocol) as connection:
        for _ in range(_DUMP_TRIES):
            found = _dump(connection, kind, body)
            if found is not None:
                return found
    raise OSError(errno.EAGAIN, "the kernel's tables change faster than they can be read")


def send_changes(
    requests: Sequence[tuple[int, int, bytes]], protocol: int = socket.NETLINK_ROUTE
) -> list[int]:
    """Send changes (type, flags, body).  Return 0 or the kernel's error number for each.  Raises: OSError."""
    results: list[int] = []
    with _open_for_bulk(protocol) as connection:
        for start in range(0, len(requests), _BATCH):
            part = requests[start : start + _BATCH]
            connection.send(
                b"".join(
                    request(kind, flags | ACK, body, number=number)
                    for number, (kind, flags, body) in enumerate(part)
                )
            )
            results += _acknowledged(connection, len(part))
    return results


def attributes(data: Data) -> Iterator[tuple[int, Data]]:
    """Yield type and value of each attribute.  Flags of the type (nested, byte order) are removed."""
    position = 0
    while position + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < 4:
            return
        yield kind & _TYPE_MASK, data[position + 4 : position + length]
        position += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def messages(data: Data) -> Iterator[tuple[int, Data]]:
    """Yield type and body of each message of a datagram, including ``ERROR`` and ``DONE``."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size:
            return
        yield kind, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def request(kind: int, flags: int, body: bytes, *, number: int = 1) -> bytes:
    """Return one request.  ``REQUEST`` is added to ``flags``."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | REQUEST, number, 0) + body


def error_number(body: bytes | memoryview) -> int:
    """Return the error number of an ``ERROR`` message, which is 0 for an acknowledgement."""
    return -int.from_bytes(body[:4], BYTE_ORDER, signed=True)


def open_socket(protocol: int, timeout_s: float) -> socket.socket:
    """Open a socket for requests and their responses.  The caller closes it.  Raises: OSError."""
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        connection.bind((0, 0))
        connection.settimeout(timeout_s)
    except BaseException:
        connection.close()
        raise
    return connection


def open_listener(family: int, groups: Iterable[int]) -> socket.socket:
    """Open a non-blocking socket that receives the kernel's notifications of ``groups`` (numbers, not masks)."""
    heard = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, family
    )
    try:
        heard.bind((0, 0))
        for group in groups:
            heard.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except BaseException:
        heard.close()
        raise
    return set_aside(heard)


# Source: linux/socket.h and linux/netlink.h.
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1


def _open_for_bulk(protocol: int) -> socket.socket:
    connection = open_socket(protocol, _DEADLINE_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    return connection


def _dump(connection: socket.socket, kind: int, body: bytes) -> list[Message] | None:
    """Return the responses, or None if the table changed during the dump, so that the dump may be incomplete."""
    connection.send(request(kind, DUMP, body))
    found: list[Message] = []
    is_whole = True
    while True:
        data = memoryview(connection.recv(_REPLY_BYTES))
        position = 0
        while position + _HEADER.size <= len(data):
            length, reply, flags, _, _ = _HEADER.unpack_from(data, position)
            content = data[position + _HEADER.size : position + length]
            position += (length + 3) & ~3
            is_whole = is_whole and not flags & _INTERRUPTED
            if reply == DONE:
                return found if is_whole else None
            if reply == ERROR:
                number = error_number(content)
                raise OSError(number, os.strerror(number))
            found.append((reply, content))


def _acknowledged(connection: socket.socket, count: int) -> list[int]:
    results = [0] * count
    missing = count
    while missing:
        data = memoryview(connection.recv(_REPLY_BYTES))
        position = 0
        while position + _HEADER.size <= len(data):
            length, reply, _, number, _ = _HEADER.unpack_from(data, position)
            if reply == ERROR and number < count:
                results[number] = error_number(data[position + _HEADER.size :])
                missing -= 1
            position += (length + 3) & ~3
    return results
