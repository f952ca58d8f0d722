"""Routes a task's replies back through the node that their client connected to: routes, rules and tables.  Pure.

Packets of the routing mesh reach a container with the client's own address, so its default route would send the replies
another way.  The source MAC address tells which node forwarded them.  It determines the mark of the connection and of
its replies.  By the mark, a rule selects a routing table with that node as its only gateway.  Mark and table are the
node's IPv4 address on the ingress network, so that no numbers have to be assigned or stored.

* A client, such as a load balancer before all nodes, may use one source port towards several nodes.  Both connections
  then have the same addresses and ports at a task that both lead to.  Each node's connections are therefore tracked in
  a zone of their own in the original direction, and in one common zone in the reply direction.  If the replies of two
  connections would look the same, one of them gets another client port on arrival, as in any address translation.  The
  client's address stays.
* If a UDP server replies from an unbound socket, the default route determines the source address, so the reply would
  match no connection.  UDP is therefore sent to the address of the default route's interface, and conntrack restores
  the right source.
* Most containers have no IPv6 default route, and without any route no reply can start.  TCP selects the route of its
  replies by the mark of the first packet (``SYSCTLS``), UDP by a rule that sends only UDP to the node's own ingress
  address.  New UDP flows on that route are refused, and new TCP connections find no route.  Both fail at once.
  Containers with an IPv6 default route are handled as for IPv4.

Source: the approach is direct server return by policy routing, with marks by MAC address as users of keepalived do.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, ip_network
from socket import IPPROTO_UDP

import msgspec

from skep.dataplane.addresses import mac_of
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.netns.state import NamespaceState, Route, RoutingRule
from skep.dataplane.plan.ingress import IngressNode, IngressPlan

_TABLE = "skep_return"
_PRIORITY = 1042
"""Priority of the routing rules that select by mark.  Skep also recognizes its rules by this priority."""
_UDP_PRIORITY = 32999
"""Priority of the rule for IPv6 replies over UDP, after all other routes."""
_UDP_TABLE = 1042
"""Routing table of that rule.  Tables of nodes have much larger numbers, because these are IPv4 addresses."""
_ZONE = "@ll,80,16"
"""The last two bytes of a packet's source MAC address.  They are the last two bytes of the node's IPv4 address."""
SYSCTLS = {"net/ipv4/tcp_fwmark_accept": "1"}
"""Sysctls of the container's namespace, for both versions of IP."""


class IngressEndpoint(msgspec.Struct, frozen=True):
    """A container's ``interface`` on the ingress network.

    ``egress`` and ``egress6`` are its addresses on the interfaces of its IPv4 and IPv6 default routes, or empty without
    such a route.
    """

    interface: str
    egress: str = ""
    egress6: str = ""


def reply_routing(
    plan: IngressPlan, endpoint: IngressEndpoint
) -> tuple[NamespaceState, tuple[NftTable, NftTable]]:
    """Return the desired state and tables of a container's namespace."""
    nodes = [node for node in plan.nodes if node.ipv4]
    rules, routes = set[RoutingRule](), set[Route]()
    for node in nodes:
        mark = mark_of(node)
        for version, gateway, everywhere in ((4, node.ipv4, "0.0.0.0/0"), (6, node.ipv6, "::/0")):
            if gateway:
                rules.add(RoutingRule(version, _PRIORITY, mark, mark))
                routes.add(Route(endpoint.interface, everywhere, gateway, table=mark))
    if plan.own.ipv6 and not endpoint.egress6:
        rules.add(RoutingRule(6, _UDP_PRIORITY, _UDP_TABLE, protocol=IPPROTO_UDP))
        routes.add(Route(endpoint.interface, "::/0", plan.own.ipv6, table=_UDP_TABLE))
    state = NamespaceState(rules=frozenset(rules), routes=frozenset(routes), sysctls=SYSCTLS)
    return state, (_table("ip", plan, endpoint, nodes), _table("ip6", plan, endpoint, nodes))


def mark_of(node: IngressNode) -> int:
    """Return the mark of connections that came through ``node``."""
    return int(IPv4Address(node.ipv4))


def _table(
    family: str, plan: IngressPlan, endpoint: IngressEndpoint, nodes: Iterable[IngressNode]
) -> NftTable:
    version = 4 if family == "ip" else 6
    egress = endpoint.egress if version == 4 else endpoint.egress6
    subnets = ", ".join(sorted(one for one in plan.subnets if ip_network(one).version == version))
    from_clients = f'iifname "{endpoint.interface}" {family} saddr != {{ {subnets} }}'
    chains, rules = list[tuple[str, str]](), list[tuple[str, str]]()
    if subnets:
        chains = [
            ("zones", "{ type filter hook prerouting priority -300; }"),
            ("apart", "{ type nat hook input priority 100; }"),
            ("arrival", "{ type filter hook prerouting priority -150; }"),
            ("departure", "{ type route hook output priority -150; }"),
        ]
        rules = [
            ("zones", f"{from_clients} ct original zone set {_ZONE}"),
            ("arrival", f"{from_clients} ct state new ct mark set ether saddr map @gates"),
            ("arrival", f'iifname "{endpoint.interface}" ct mark != 0 meta mark set ct mark'),
            ("departure", "ct direction reply ct mark != 0 meta mark set ct mark"),
        ]
    if subnets and egress:
        chains.append(("answers", "{ type nat hook prerouting priority -100; }"))
        rules.append(("answers", f"{from_clients} meta l4proto udp dnat to {egress}"))
    elif subnets and version == 6:
        outside = f"ip6 daddr != {{ {subnets}, fe80::/10, ff00::/8 }}"
        chains.append(("refused", "{ type filter hook output priority 0; }"))
        reject = f'oifname "{endpoint.interface}" ct state new {outside} reject with icmpv6 no-route'
        rules.append(("refused", reject))
    return NftTable(
        name=f"{family} {_TABLE}",
        sets=(("gates", "type ether_addr : mark"),),
        chains=tuple(chains),
        rules=tuple(rules),
        elements=frozenset(
            ("gates", f"{mac_of(IPv4Address(node.ipv4))} : {mark_of(node)}") for node in nodes
        ),
    )
