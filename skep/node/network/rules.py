"""The node's nftables rules for containers: text only.

One table, ``ip skep``.  ``host_ports`` leads from a published port of the node to a container; everything
else is fixed.
"""

from collections.abc import Iterable
from ipaddress import IPv4Network

import msgspec

TABLE = "ip skep"


class HostPort(msgspec.Struct, frozen=True, order=True):
    """A port of the node that leads to a port of a container."""

    protocol: str
    published_port: int
    address: str
    target_port: int
    host_ip: str = ""
    """The only address of the node that it answers on; empty: all."""


def setup(bridge: str, subnet: IPv4Network, host_ports: Iterable[HostPort]) -> str:
    """The whole table, whatever it was before, as one transaction: ``host_ports`` are all that remain.

    Packets to a published port are led to the container, from outside (``pre``) and from the node itself
    (``out``).  What containers send elsewhere leaves under the node's address.  A container answers to the
    bridge's address where its client is the node itself or a container that went round by the node's
    address, because the answer must come back the same way.  From outside nothing else is forwarded to
    containers.
    """
    elements = "".join(
        f"add element {TABLE} host_ports {{ {_element(port)} }}\n" for port in sorted(host_ports)
    )
    return f"""\
add table {TABLE}
add map {TABLE} host_ports {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
add chain {TABLE} raw {{ type filter hook prerouting priority -300; }}
add chain {TABLE} pre {{ type nat hook prerouting priority -100; }}
add chain {TABLE} out {{ type nat hook output priority -100; }}
add chain {TABLE} post {{ type nat hook postrouting priority 100; }}
add chain {TABLE} forward {{ type filter hook forward priority 0; }}
flush map {TABLE} host_ports
flush chain {TABLE} raw
flush chain {TABLE} pre
flush chain {TABLE} out
flush chain {TABLE} post
flush chain {TABLE} forward
add rule {TABLE} raw iif != "lo" ip daddr 127.0.0.0/8 drop
add rule {TABLE} pre fib daddr type local dnat ip to meta l4proto . th dport map @host_ports
add rule {TABLE} out fib daddr type local dnat ip to meta l4proto . th dport map @host_ports
add rule {TABLE} post ip saddr {subnet} oifname != "{bridge}" masquerade
add rule {TABLE} post oifname "{bridge}" fib saddr type local masquerade
add rule {TABLE} post oifname "{bridge}" ip saddr {subnet} ct status dnat masquerade
add rule {TABLE} forward oifname != "{bridge}" accept
add rule {TABLE} forward iifname "{bridge}" accept
add rule {TABLE} forward ct state established,related accept
add rule {TABLE} forward ct status dnat accept
add rule {TABLE} forward drop
{elements}"""


def published(host_ports: Iterable[HostPort]) -> str:
    """Add host ports."""
    return "".join(f"add element {TABLE} host_ports {{ {_element(port)} }}\n" for port in host_ports)


def withdrawn(host_ports: Iterable[HostPort]) -> str:
    """Remove host ports."""
    return "".join(
        f"delete element {TABLE} host_ports {{ {port.protocol} . {port.published_port} }}\n"
        for port in host_ports
    )


def _element(port: HostPort) -> str:
    return f"{port.protocol} . {port.published_port} : {port.address} . {port.target_port}"
