"""The kernel's lists of routes, as they are read."""

from ipaddress import ip_network
from pathlib import Path

from skep.linux.network.routes import read_routes

ROUTE = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth1\t0000000A\t0101A8C0\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
*\t0000070A\t00000000\t0200\t0\t0\t0\t00FFFFFF\t0\t0\t0
down0\t0000080A\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0
broken line
"""
NONE = "00000000000000000000000000000000"
ROUTE_6 = f"""\
20010db8000000000000000000000000 40 {NONE} 00 {NONE} 00000100 00000001 00000000 00000001 eth0
20010db8000000000000000000000007 80 {NONE} 00 {NONE} 00000000 00000001 00000000 80200001 lo
fe800000000000000000000000000000 40 {NONE} 00 {NONE} 00000100 00000001 00000000 00000001 eth0
ff000000000000000000000000000000 08 {NONE} 00 {NONE} 00000100 00000001 00000000 00000001 eth0
{NONE} 00 {NONE} 00 {NONE} 00000100 00000001 00000000 00000003 eth0
"""


def test_reachable_networks_are_listed_with_their_interfaces(tmp_path: Path) -> None:
    (tmp_path / "route").write_text(ROUTE)
    (tmp_path / "ipv6_route").write_text(ROUTE_6)
    assert read_routes(tmp_path) == [
        (ip_network("192.168.0.0/16"), "eth0"),
        (ip_network("10.0.0.0/24"), "eth1"),
        (ip_network("2001:db8::/64"), "eth0"),
    ]


def test_of_a_million_routes_only_whole_lines_are_read(tmp_path: Path) -> None:
    head, *_ = ROUTE.splitlines()
    line = "eth0\t{:08X}\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0"
    lines = (line.format(int.from_bytes(bytes((10, n >> 8, n & 255, 0)), "little")) for n in range(20_000))
    (tmp_path / "route").write_text("\n".join([head, *lines, ""]))
    found = read_routes(tmp_path)
    assert 1000 < len(found) < 20_000
    assert {subnet.prefixlen for subnet, _ in found} == {24}


def test_a_kernel_without_a_version_of_ip_has_no_routes_of_it(tmp_path: Path) -> None:
    assert read_routes(tmp_path) == []
