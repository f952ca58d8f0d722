"""Connection tracking of a namespace: its times, and flows that have to find another backend.

UDP has no end, so a flow that goes on keeps its entry, and with it a backend that is gone: such entries are deleted,
and the flow's next packet draws another backend.  TCP connections stay where they are.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

from skep.node.network.namespaces import set_sysctl
from skep.node.virtual.wanted import Leads, is_ipv6

NETLINK_NETFILTER = 12
_SUBSYSTEM_CONNTRACK = 1
_GET, _DELETE = _SUBSYSTEM_CONNTRACK << 8 | 1, _SUBSYSTEM_CONNTRACK << 8 | 2
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE = 1, 2, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER = 1
_ATTRIBUTE_TYPE = 0x3FFF
_TIMEOUT_S = 2.0

SYSCTLS = {
    # An idle connection is forgotten by nobody before its ends forget it.
    "net/netfilter/nf_conntrack_tcp_timeout_established": "432000",
    # One end has closed, the other still works on its answer.  The kernel's own are 120 s and 60 s.
    "net/netfilter/nf_conntrack_tcp_timeout_fin_wait": "7200",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait": "7200",
    # A segment that looks out of its window belongs to the connection all the same: let the ends judge.
    "net/netfilter/nf_conntrack_tcp_be_liberal": "1",
}


def set_times() -> None:
    """Set ``SYSCTLS`` in the namespace of the calling thread.

    A namespace has its own, with the kernel's values at first, whatever the node's are; a container sees them
    read-only.
    """
    for name, value in SYSCTLS.items():
        set_sysctl(name, value)


def forget_flows(leads: Leads) -> frozenset[str]:
    """Delete the UDP entries to addresses in ``leads`` that lead to none of their backends; to which there were any.

    And those of all protocols that are not led anywhere: they began before the address was.

    In the namespace of the calling thread.  Blocks for as long as the kernel takes to go through its entries, of all
    namespaces (9 ms of processor time).  Raises: OSError.
    """
    seen: set[str] = set()
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    for family in sorted({socket.AF_INET6 if is_ipv6(address) else socket.AF_INET for address in leads}):
        with closing(socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)) as netlink:
            netlink.settimeout(_TIMEOUT_S)
            netlink.bind((0, 0))
            astray = []
            for entry in entries(netlink, family):
                protocol, address, backend = _flow(entry, family)
                if address not in leads:
                    continue
                is_datagrams = protocol == socket.IPPROTO_UDP
                if is_datagrams:
                    seen.add(address)
                if backend == address or (is_datagrams and backend not in leads[address]):
                    astray.append(entry)
            for number, entry in enumerate(astray, start=1):
                _delete(netlink, family, number, entry)
    return frozenset(seen)


def _flow(entry: dict[int, bytes], family: int) -> tuple[int, str, str]:
    """(protocol, to which address, to which backend); empty: it says nothing of that."""
    original, back = attributes(entry.get(_TUPLE_ORIG, b"")), attributes(entry.get(_TUPLE_REPLY, b""))
    protocol = attributes(original.get(_TUPLE_PROTO, b"")).get(_PROTO_NUMBER, b"\0")[0]
    source, destination = (3, 4) if family == socket.AF_INET6 else (1, 2)
    address = attributes(original.get(_TUPLE_IP, b"")).get(destination)
    backend = attributes(back.get(_TUPLE_IP, b"")).get(source)
    if address is None or backend is None:
        return protocol, "", ""
    return protocol, socket.inet_ntop(family, address), socket.inet_ntop(family, backend)


def entries(netlink: socket.socket, family: int) -> Iterator[dict[int, bytes]]:
    """All entries of ``family``, as their attributes."""
    netlink.send(_message(_GET, _REQUEST | _DUMP, 0, family, b""))
    while True:
        data = netlink.recv(1 << 18)
        for type_, body in messages(data):
            if type_ == _DONE:
                return
            if type_ == _ERROR:
                raise OSError(-struct.unpack_from("=i", body)[0], "conntrack entries cannot be listed")
            yield attributes(body[4:])


def _delete(netlink: socket.socket, family: int, number: int, entry: dict[int, bytes]) -> None:
    # With its id, so that it is not the entry that came after it.
    named = b"".join(
        _attribute(type_, entry[type_], nested=type_ == _TUPLE_ORIG)
        for type_ in (_TUPLE_ORIG, _ZONE, _ID)
        if type_ in entry
    )
    netlink.send(_message(_DELETE, _REQUEST | _ACK, number, family, named))
    for type_, body in messages(netlink.recv(1 << 16)):
        code = -struct.unpack_from("=i", body)[0] if type_ == _ERROR else 0
        if code not in (0, errno.ENOENT):
            raise OSError(code, f"conntrack entry cannot be deleted: {os.strerror(code)}")


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, body) of each netlink message in ``data``."""
    at = 0
    while at + 16 <= len(data):
        length, type_ = struct.unpack_from("=IH", data, at)
        if length < 16:
            return
        yield type_, data[at + 16 : at + length]
        at += length + 3 & ~3


def attributes(data: bytes) -> dict[int, bytes]:
    """Netlink attributes by type."""
    found = {}
    at = 0
    while at + 4 <= len(data):
        length, type_ = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[type_ & _ATTRIBUTE_TYPE] = data[at + 4 : at + length]
        at += length + 3 & ~3
    return found


def _attribute(type_: int, data: bytes, *, nested: bool) -> bytes:
    return (
        struct.pack("=HH", len(data) + 4, type_ | (0x8000 if nested else 0)) + data + b"\0" * (-len(data) % 4)
    )


def _message(type_: int, flags: int, number: int, family: int, body: bytes) -> bytes:
    return struct.pack("=IHHIIBBH", 20 + len(body), type_, flags, number, 0, family, 0, 0) + body
