"""The machine's interfaces, as ``ip`` prints them."""

from ipaddress import ip_address

from skep.api.swarm_requests import Interface
from skep.node.interfaces import parse_interfaces

OUTPUT = b"""[
 {"ifname": "lo", "flags": ["LOOPBACK", "UP"], "addr_info": [{"local": "127.0.0.1"}, {"local": "::1"}]},
 {"ifname": "eth0", "flags": ["BROADCAST", "UP"], "linkinfo": {"info_kind": "veth"},
  "addr_info": [{"local": "192.0.2.7"}, {"local": "fe80::1"}]},
 {"ifname": "skep-gw", "flags": ["BROADCAST"], "linkinfo": {"info_kind": "bridge"}, "addr_info": []},
 {}
]"""


def test_interfaces_are_read_with_what_decides_about_them() -> None:
    assert parse_interfaces(OUTPUT) == {
        "lo": Interface(addresses=(ip_address("127.0.0.1"), ip_address("::1")), is_loopback=True),
        "eth0": Interface(addresses=(ip_address("192.0.2.7"), ip_address("fe80::1"))),
        "skep-gw": Interface(is_up=False, is_ours=True),
    }


def test_a_machine_without_interfaces_has_none() -> None:
    assert parse_interfaces(b"") == {}
