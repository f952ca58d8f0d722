"""Loads virtual addresses that a container uses without having resolved their names.

A program may get such an address from the API (like a proxy that is configured through it), from a cache, or from
another container.  So the kernel logs the first packet to each address of the container's networks to this process
(nfnetlink_log), at most once in half a minute.  If the address is virtual, its service is loaded and the packet's
connection tracking entry is deleted, so that the next attempt (with TCP, after a second) reaches a backend.
"""

import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

import structlog

from skep.dataplane.netns.kernel import netlink, nft
from skep.dataplane.netns.nft_table import NftTable

log = structlog.get_logger()

NAME = "skep_asked"
FAMILIES = ("ip", "ip6")
_GROUP = 11
"""Netlink group of logged packets.  Each namespace has its own groups, so the number cannot collide."""
_BYTES = 40
"""Number of bytes that the kernel copies of a packet: up to the end of its destination address."""
_LOG = f"log group {_GROUP} snaplen {_BYTES}"
_LOGGED_MAX = 512
"""Size of the set of logged addresses.  The kernel allocates its 8 KiB at once."""
# Source: linux/netfilter/nfnetlink_log.h.
_SUBSYSTEM_LOG = 4
_PACKET, _CONFIGURE = _SUBSYSTEM_LOG << 8, _SUBSYSTEM_LOG << 8 | 1
_COMMAND, _MODE, _AT_ONCE = 1, 2, 5
_BIND, _COPY_PACKET = 1, 2
_PAYLOAD = 9
_TIMEOUT_S = 2.0
"""Time limit in seconds for the kernel's response."""
_READS_MAX = 64
"""Number of reads in a row before other work of the event loop, which a flood of first packets must not hold up."""


def on_demand_tables(subnets: Iterable[IPv4Network | IPv6Network]) -> tuple[NftTable, ...]:
    """Return the tables for the address families of ``subnets``."""
    found = []
    for family, version in zip(FAMILIES, (4, 6), strict=True):
        if own := sorted({str(one) for one in subnets if one.version == version}):
            kind = f"ip{'v4' if version == 4 else 'v6'}_addr"
            new = f"{family} daddr != @told add @told {{ {family} daddr }}"
            rule = f"{family} daddr {{ {', '.join(own)} }} ct state new {new} {_LOG}"
            declared = f"type {kind}; flags dynamic,timeout; timeout 30s; size {_LOGGED_MAX}"
            found.append(
                NftTable(
                    name=f"{family} {NAME}",
                    sets=(("told", declared),),
                    chains=(("out", "{ type filter hook output priority -149; }"),),
                    rules=(("out", rule),),
                )
            )
    return tuple(found)


def open_on_demand(subnets: tuple[IPv4Network | IPv6Network, ...]) -> socket.socket | None:
    """Open a socket that receives logged packets to ``subnets``, in the calling thread's namespace.

    Returns None if this kernel cannot log packets.
    """
    try:
        packets = open_packets()
    except OSError as error:
        log.info("virtual addresses are loaded only by name", reason=str(error))
        return None
    try:
        nft.create(on_demand_tables(subnets), stale=[f"{family} {NAME}" for family in FAMILIES])
    except nft.NftFailed as error:
        packets.close()
        log.info("virtual addresses are loaded only by name", reason=str(error))
        return None
    return packets


def open_packets() -> socket.socket:
    """Open a socket for the logged packets of the calling thread's namespace.  Raises: OSError."""
    opened = netlink.open_socket(netlink.NETFILTER, _TIMEOUT_S)
    try:
        _configure(opened, _COMMAND, struct.pack("=B", _BIND))
        _configure(opened, _MODE, struct.pack("!IBB", _BYTES, _COPY_PACKET, 0))
        _configure(opened, _AT_ONCE, struct.pack("!I", 1))
        opened.setblocking(False)
    except BaseException:
        opened.close()
        raise
    return opened


def read(opened: socket.socket) -> frozenset[str]:
    """Return the destination addresses of logged packets."""
    found: set[str] = set()
    for _ in range(_READS_MAX):
        try:
            data = opened.recv(1 << 16)
        except OSError:  # nothing more to read, or packets were lost, and the next one is logged again
            break
        found |= destinations(data)
    return frozenset(found)


def destinations(data: bytes) -> frozenset[str]:
    """Return the destinations of the packets in ``data``, messages of nfnetlink_log."""
    found = set()
    for type_, body in netlink.messages(data):
        packet = dict(netlink.attributes(body[4:])).get(_PAYLOAD, b"") if type_ == _PACKET else b""
        if len(packet) >= 20 and packet[0] >> 4 == 4:
            found.add(socket.inet_ntop(socket.AF_INET, packet[16:20]))
        elif len(packet) >= 40 and packet[0] >> 4 == 6:
            found.add(socket.inet_ntop(socket.AF_INET6, packet[24:40]))
    return frozenset(found)


def _configure(opened: socket.socket, type_: int, value: bytes) -> None:
    head = struct.pack("=BBH", socket.AF_UNSPEC, 0, socket.htons(_GROUP))
    opened.send(netlink.request(_CONFIGURE, netlink.ACK, head + netlink.attribute(type_, value)))
    for kind, reply in netlink.messages(opened.recv(1 << 12)):
        code = netlink.error_number(reply) if kind == netlink.ERROR else 0
        if code:
            raise OSError(code, "nfnetlink_log is not available")
