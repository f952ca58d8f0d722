"""Connection tracking of a namespace: its times, and flows that have to find another backend.

UDP has no end, so a flow that goes on keeps its entry, and with it a backend that is gone: such entries are deleted,
and the flow's next packet draws another backend.  TCP connections stay where they are.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator

from skep.node.network import netlink
from skep.node.network.namespaces import set_sysctl
from skep.node.virtual.wanted import Leads, is_ipv6

_SUBSYSTEM_CONNTRACK = 1
_GET, _DELETE = _SUBSYSTEM_CONNTRACK << 8 | 1, _SUBSYSTEM_CONNTRACK << 8 | 2
_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE = 1, 2, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER = 1
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
    for family in sorted({socket.AF_INET6 if is_ipv6(address) else socket.AF_INET for address in leads}):
        with netlink.opened(netlink.NETFILTER, _TIMEOUT_S) as connection:
            astray = []
            for entry in entries(connection, family):
                protocol, address, backend = _flow(entry, family)
                if address not in leads:
                    continue
                is_datagrams = protocol == socket.IPPROTO_UDP
                if is_datagrams:
                    seen.add(address)
                if backend == address or (is_datagrams and backend not in leads[address]):
                    astray.append(entry)
            for number, entry in enumerate(astray, start=1):
                _delete(connection, family, number, entry)
    return frozenset(seen)


def _flow(entry: dict[int, bytes], family: int) -> tuple[int, str, str]:
    """(protocol, to which address, to which backend); empty: it says nothing of that."""
    original, back = _parts(entry.get(_TUPLE_ORIG, b"")), _parts(entry.get(_TUPLE_REPLY, b""))
    protocol = _parts(original.get(_TUPLE_PROTO, b"")).get(_PROTO_NUMBER, b"\0")[0]
    source, destination = (3, 4) if family == socket.AF_INET6 else (1, 2)
    address = _parts(original.get(_TUPLE_IP, b"")).get(destination)
    backend = _parts(back.get(_TUPLE_IP, b"")).get(source)
    if address is None or backend is None:
        return protocol, "", ""
    return protocol, socket.inet_ntop(family, address), socket.inet_ntop(family, backend)


def entries(connection: socket.socket, family: int) -> Iterator[dict[int, bytes]]:
    """All entries of ``family``, as their attributes."""
    connection.send(netlink.request(_GET, netlink.DUMP, _head(family)))
    while True:
        for type_, body in netlink.messages(connection.recv(1 << 18)):
            if type_ == netlink.DONE:
                return
            if type_ == netlink.ERROR:
                raise OSError(netlink.error_number(body), "conntrack entries cannot be listed")
            yield _parts(body[4:])


def _delete(connection: socket.socket, family: int, number: int, entry: dict[int, bytes]) -> None:
    # With its id, so that it is not the entry that came after it.
    named = b"".join(
        netlink.attribute(type_ | (netlink.NESTED if type_ == _TUPLE_ORIG else 0), entry[type_])
        for type_ in (_TUPLE_ORIG, _ZONE, _ID)
        if type_ in entry
    )
    connection.send(netlink.request(_DELETE, netlink.ACK, _head(family) + named, number=number))
    for type_, body in netlink.messages(connection.recv(1 << 16)):
        code = netlink.error_number(body) if type_ == netlink.ERROR else 0
        if code not in (0, errno.ENOENT):
            raise OSError(code, f"conntrack entry cannot be deleted: {os.strerror(code)}")


def _parts(data: bytes) -> dict[int, bytes]:
    return dict(netlink.attributes(data))


def _head(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)
