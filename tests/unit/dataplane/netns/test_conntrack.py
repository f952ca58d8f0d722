"""Flows of connection tracking, from the kernel's messages; a pair of sockets stands for the kernel."""

import errno
import socket
from collections.abc import Iterator

import pytest

from skep.dataplane.netns.kernel import conntrack, netlink
from skep.dataplane.netns.kernel.conntrack import ConntrackRefused
from skep.dataplane.netns.state import Tuple

ENTRY = 0x0100


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours, and the kernel's."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernel:
        yield ours, kernel


def one_way(source: str, destination: str, protocol: int, ports: tuple[int, int] | None) -> bytes:
    addresses = netlink.attribute(1, socket.inet_aton(source)) + netlink.attribute(
        2, socket.inet_aton(destination)
    )
    numbers = netlink.attribute(1, bytes([protocol]))
    for kind, port in zip((2, 3), ports or (), strict=False):
        numbers += netlink.attribute(kind, port.to_bytes(2, "big"))
    return netlink.attribute(1, addresses) + netlink.attribute(2, numbers)


def entry(port: int, *, protocol: int = socket.IPPROTO_UDP, id: int = 7) -> bytes:
    """A flow from 192.0.2.9 to 10.0.0.1, led to 10.0.0.2."""
    ports = (4000, port) if port else None
    back = (port, 4000) if port else None
    original = netlink.attribute(1, one_way("192.0.2.9", "10.0.0.1", protocol, ports))
    reply = netlink.attribute(2, one_way("10.0.0.2", "192.0.2.9", protocol, back))
    return b"\x02\0\0\0" + original + reply + netlink.attribute(12, id.to_bytes(4, "big"))


def refusal(number: int) -> bytes:
    return netlink.request(netlink.ERROR, 0, (-number).to_bytes(4, netlink.BYTE_ORDER, signed=True))


def test_flows_are_listed_with_both_directions(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, kernel = ends
    kernel.send(
        netlink.request(ENTRY, 0, entry(53))
        + netlink.request(ENTRY, 0, entry(0, protocol=socket.IPPROTO_ICMP))
    )
    kernel.send(netlink.request(ENTRY, 0, b"\x02\0\0\0") + netlink.request(netlink.DONE, 0, b"\0\0\0\0"))
    datagrams, ping = conntrack.flows(ours, socket.AF_INET)
    assert datagrams.original == Tuple(socket.IPPROTO_UDP, "192.0.2.9", 4000, "10.0.0.1", 53)
    assert datagrams.reply == Tuple(socket.IPPROTO_UDP, "10.0.0.2", 53, "192.0.2.9", 4000)
    assert ping.original == Tuple(socket.IPPROTO_ICMP, "192.0.2.9", 0, "10.0.0.1", 0)


def test_a_flow_is_answered_once_the_other_end_has_sent_a_packet(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, kernel = ends
    for status in (b"\0\0\0\x20", b"\0\0\0\x22"):
        kernel.send(netlink.request(ENTRY, 0, entry(80, protocol=6) + netlink.attribute(3, status)))
    kernel.send(netlink.request(netlink.DONE, 0, b"\0\0\0\0"))
    assert [one.is_answered for one in conntrack.flows(ours, socket.AF_INET)] == [False, True]


def test_a_kernel_without_conntrack_listing_is_distinguished_from_an_empty_table(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, kernel = ends
    kernel.send(refusal(errno.EOPNOTSUPP))
    with pytest.raises(ConntrackRefused, match="cannot be listed"):
        list(conntrack.flows(ours, socket.AF_INET))


def test_a_flow_that_cannot_be_deleted_is_reported_after_all_were_tried(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, kernel = ends
    kernel.send(b"".join(netlink.request(ENTRY, 0, entry(53, id=number)) for number in (1, 2, 3)))
    kernel.send(netlink.request(netlink.DONE, 0, b"\0\0\0\0"))
    found = list(conntrack.flows(ours, socket.AF_INET))
    kernel.recv(1 << 16)
    for number in (errno.EBUSY, errno.ENOENT, 0):
        kernel.send(refusal(number))
    with pytest.raises(ConntrackRefused, match="cannot be deleted") as raised:
        conntrack.delete(ours, socket.AF_INET, found)
    assert raised.value.errno == errno.EBUSY
    asked = [kernel.recv(1 << 16) for _ in found]
    assert [(12).to_bytes(2, netlink.BYTE_ORDER) in one for one in asked] == [True] * 3, "by its id"
    kernel.send(refusal(errno.ENOENT))
    conntrack.delete(ours, socket.AF_INET, found[:1])  # ended by itself meanwhile
