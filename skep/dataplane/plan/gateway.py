"""The node's nftables rules for containers.  Pure.

In the table ``ip skep``, the map ``host_ports`` leads from a published port of the node to a container.  The map
``bound_ports`` does the same for ports that are published on one address only.  The other rules are fixed.  ``ip6
skep`` has the rules for egress, and ports of containers that listen for IPv6.  ``bridge skep_gateway`` decides which
containers reach each other through the gateway bridge.  Containers without another network reach each other, as on
Docker's ``bridge``.  All others use it only for egress, because otherwise it would connect their networks with each
other.
"""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

import msgspec

from skep.dataplane.netns.nft_table import NftTable

TABLE, TABLE_IPV6 = "ip skep", "ip6 skep"
BETWEEN = "bridge skep_gateway"
_BOUND = "ip daddr . meta l4proto . th dport"


class HostPort(msgspec.Struct, frozen=True, order=True):
    """A port of the node that leads to a port of a container."""

    protocol: str
    published_port: int
    address: str
    target_port: int
    host_ip: str = ""
    """The only address of the node that the port is published on, or empty for all addresses."""


def gateway_table(bridge: str, subnet: IPv4Network, host_ports: Iterable[HostPort]) -> NftTable:
    """Return the complete IPv4 table with all ``host_ports``.

    Packets to a published port are sent to the container, from outside (``pre``) and from the node itself (``out``).
    Packets from containers leave under the node's address.  If the client is the node itself, or a container that used
    the node's address, the server sees the bridge's address as its client, so that the response returns the same way.
    Nothing else is forwarded to containers, from outside or from one to another.
    """
    return NftTable(
        name=TABLE,
        sets=(
            ("host_ports", "type inet_proto . inet_service : ipv4_addr . inet_service"),
            ("bound_ports", "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service"),
        ),
        chains=(
            ("raw", "{ type filter hook prerouting priority -300; }"),
            ("pre", "{ type nat hook prerouting priority -100; }"),
            ("out", "{ type nat hook output priority -100; }"),
            ("post", "{ type nat hook postrouting priority 100; }"),
            ("forward", "{ type filter hook forward priority 0; }"),
        ),
        rules=(
            ("raw", 'iifname != "lo" ip daddr 127.0.0.0/8 drop'),
            ("pre", f"fib daddr type local dnat ip to {_BOUND} map @bound_ports"),
            ("pre", "fib daddr type local dnat ip to meta l4proto . th dport map @host_ports"),
            ("out", f"fib daddr type local dnat ip to {_BOUND} map @bound_ports"),
            ("out", "fib daddr type local dnat ip to meta l4proto . th dport map @host_ports"),
            ("post", f'ip saddr {subnet} oifname != "{bridge}" masquerade'),
            ("post", f'oifname "{bridge}" fib saddr type local masquerade'),
            ("post", f'oifname "{bridge}" ip saddr {subnet} ct status dnat masquerade'),
            *_forward(bridge, "ct state established,related accept", "ct status dnat accept"),
        ),
        elements=frozenset(_element(port) for port in host_ports),
    )


def gateway_table_ipv6(bridge: str, subnet: IPv6Network, host_ports: Iterable[HostPort] = ()) -> NftTable:
    """Return the IPv6 table for egress under the node's address, and with ``host_ports`` of containers that listen for
    IPv6.

    Connections of the node itself are not led to them, because ``::1`` cannot be the source of a packet to a container.
    The net process relays those.
    """
    return NftTable(
        name=TABLE_IPV6,
        sets=(("host_ports", "type inet_proto . inet_service : ipv6_addr . inet_service"),),
        chains=(
            ("pre", "{ type nat hook prerouting priority -100; }"),
            ("post", "{ type nat hook postrouting priority 100; }"),
            ("forward", "{ type filter hook forward priority 0; }"),
        ),
        rules=(
            ("pre", "fib daddr type local dnat ip6 to meta l4proto . th dport map @host_ports"),
            ("post", f'ip6 saddr {subnet} oifname != "{bridge}" masquerade'),
            ("post", f'oifname "{bridge}" ip6 saddr {subnet} ct status dnat masquerade'),
            *_forward(bridge, "ct state established,related accept", "ct status dnat accept"),
        ),
        elements=frozenset(_element(port) for port in host_ports),
    )


def _forward(bridge: str, *welcome: str) -> tuple[tuple[str, str], ...]:
    """Return forward rules that accept packets to the bridge that match ``welcome``, and drop all others."""
    rules = (f'oifname != "{bridge}" accept', *welcome, "drop")
    return tuple(("forward", rule) for rule in rules)


def between_table(ports: Iterable[tuple[str, bool]]) -> NftTable:
    """Return the rules between containers.

    ``ports`` has each port of the gateway bridge, and whether its container may reach other such containers.
    """
    elements = set()
    for port, is_open in ports:
        elements.add(("ports", f'"{port}"'))
        if is_open:
            elements.add(("open", f'"{port}"'))
    return NftTable(
        name=BETWEEN,
        sets=(("ports", "type ifname"), ("open", "type ifname")),
        chains=(("between", "{ type filter hook forward priority 0; }"),),
        rules=(
            ("between", "iifname @open oifname @open accept"),
            ("between", "iifname @ports oifname @ports drop"),
        ),
        elements=frozenset(elements),
    )


def _element(port: HostPort) -> tuple[str, str]:
    """Return the map and the element for a port."""
    led = f"{port.protocol} . {port.published_port} : {port.address} . {port.target_port}"
    if port.host_ip in ("", "0.0.0.0"):
        return "host_ports", led
    return "bound_ports", f"{port.host_ip} . {led}"
