"""The machine's interfaces, as the kernel tells them."""

from ipaddress import ip_address

from skep.api.formats.swarm_requests import Interface
from skep.node.host.machine import KernelLink, interfaces_of, read_interfaces

UP, LOOPBACK = 0x1, 0x8


def test_interfaces_have_what_decides_about_them() -> None:
    links = [
        KernelLink(1, "lo", UP | LOOPBACK),
        KernelLink(7, "eth0", UP, "veth"),
        KernelLink(9, "skep-gw", kind="bridge"),
    ]
    addresses = [(1, "127.0.0.1"), (7, "192.0.2.7"), (1, "::1"), (7, "fe80::1")]
    assert interfaces_of(links, addresses) == {
        "lo": Interface(addresses=(ip_address("127.0.0.1"), ip_address("::1")), is_loopback=True),
        "eth0": Interface(addresses=(ip_address("192.0.2.7"), ip_address("fe80::1"))),
        "skep-gw": Interface(is_up=False, is_ours=True),
    }


async def test_this_machine_has_a_loopback_with_its_address() -> None:
    found = await read_interfaces()
    assert found["lo"].is_loopback
    assert ip_address("127.0.0.1") in found["lo"].addresses
