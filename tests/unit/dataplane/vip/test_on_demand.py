"""Packets to addresses whose names were not resolved, as the kernel logs them."""

import socket
import struct
from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.vip.on_demand import destinations, on_demand_tables

IPV4 = b"\x45" + bytes(15) + socket.inet_aton("10.0.1.2")
IPV6 = b"\x60" + bytes(23) + socket.inet_pton(socket.AF_INET6, "fd00::2")


def reported(packet: bytes, type: int = 4 << 8) -> bytes:
    body = bytes(4) + struct.pack("=HH", 4 + len(packet), 9) + packet + b"\0" * (-len(packet) % 4)
    return struct.pack("=IHHII", 16 + len(body), type, 0, 0, 0) + body


def test_both_families_are_read_and_other_messages_passed_over() -> None:
    assert destinations(reported(IPV4) + reported(b"", 3) + reported(IPV6)) == {"10.0.1.2", "fd00::2"}
    assert destinations(reported(IPV4[:-1]) + reported(IPV6[:-1]) + reported(b"\x10" * 40)) == frozenset()


@given(st.binary(max_size=100) | st.binary(max_size=60).map(reported))
def test_no_bytes_make_it_fail(data: bytes) -> None:
    destinations(data)


def test_only_networks_of_the_container_are_watched() -> None:
    subnets = [ip_network("10.0.1.0/24"), ip_network("10.0.2.0/24"), ip_network("fd00::/64")]
    four, six = on_demand_tables(subnets)
    assert four.rules[0][1].startswith("ip daddr { 10.0.1.0/24, 10.0.2.0/24 } ct state new")
    assert six.rules[0][1].startswith("ip6 daddr { fd00::/64 } ct state new")
    assert on_demand_tables([]) == ()
