"""How a task's answers go back through the node that their client came by: text and routes.  Pure.

Packets of the routing mesh reach a container with the client's own address, so its default route would send the
answers another way.  The MAC address they came from says which node forwarded them: it becomes the mark of the
connection, the mark of the answers, and by a rule the number of a routing table with that node as its only way.  Mark
and table are the node's IPv4 address on the ingress network, so that nothing has to be counted or remembered.

* A client (a load balancer before all nodes) may use one port of its own towards several nodes: the same addresses and
  ports for a task that both lead to.  Each node's connections are tracked in a zone of their own in the direction of
  the question and in one zone of all in that of the answer: a connection whose answers could not be told from
  another's gets another client port as it arrives, as by any address translation; its address stays.
* A UDP server that answers from an unbound socket has its source address chosen by the default route, so its answer
  would belong to no connection.  UDP is therefore led to the address of the default route's interface, and conntrack
  puts the right source back.
* Most containers have no IPv6 default route, and without any route no answer begins.  TCP begins its answers by the
  mark of the first packet (``SYSCTLS``), UDP by a rule that leads UDP alone to the node's own ingress address.  New
  UDP flows by that way are refused, new TCP connections find no route: both at once.  Those that have the route are
  treated as with IPv4.

Source: the approach is direct server return by policy routing; marks by MAC address as keepalived's users do it.
"""

from ipaddress import IPv4Address, ip_network

import msgspec

from skep.dataplane.addresses import mac_of
from skep.dataplane.plan.ingress import Gate, Plan

TABLE = "skep_return"
RULE_PRIORITY = 1042
"""Of our rules; they are recognised by it."""
UDP_RULE_PRIORITY = 32999
"""Of the rule for IPv6 answers over UDP: after the routes of everybody else."""
UDP_TABLE = 1042
_ZONE = "@ll,80,16"
"""The last two bytes of the MAC address that a packet came from: those of its node's address."""
SYSCTLS = {"net/ipv4/tcp_fwmark_accept": "1"}
"""Of the container's namespace, for both versions of IP."""


class ReturnPath(msgspec.Struct, frozen=True, kw_only=True):
    """What one container's namespace has to hold.

    Args:
        interface: of the ingress network in the container.
        subnets: of the ingress network; who is in them is answered directly.
        gates: nodes that clients may come by.
        own: the container's own node.
        way_out, way_out6: addresses of the container on the interface of its IPv4 and of its IPv6 default route;
            empty: it has none.
    """

    interface: str
    subnets: tuple[str, ...]
    gates: tuple[Gate, ...]
    own: Gate
    way_out: str = ""
    way_out6: str = ""


class ReturnRoute(msgspec.Struct, frozen=True, order=True):
    """The default route of routing table ``mark``, and the rule that leads packets with this mark there."""

    mark: int
    gateway: str


def return_path(plan: Plan, interface: str, way_out: str, way_out6: str = "") -> ReturnPath:
    """The return path of a container of this node."""
    return ReturnPath(
        interface=interface,
        subnets=plan.subnets,
        gates=tuple(sorted(gate for gate in plan.gates if gate.ipv4)),
        own=plan.own,
        way_out=way_out,
        way_out6=way_out6,
    )


def mark_of(gate: Gate) -> int:
    """The mark of connections through ``gate``."""
    return int(IPv4Address(gate.ipv4))


def uses_udp_route(path: ReturnPath) -> bool:
    """Whether IPv6 answers over UDP need a route that is there for nothing else."""
    return bool(path.own.ipv6) and not path.way_out6


def routes(path: ReturnPath, version: int) -> tuple[ReturnRoute, ...]:
    """The routes of one IP version."""
    gateways = ((mark_of(gate), gate.ipv4 if version == 4 else gate.ipv6) for gate in path.gates)
    return tuple(ReturnRoute(mark, gateway) for mark, gateway in gateways if gateway)


def whole(path: ReturnPath, *, is_new: bool = False) -> str:
    """The rules of both families, whatever they were before, as one transaction.

    ``is_new``: there was nothing, which the kernel need not wait to be rid of (5 ms).
    """
    text = "".join(_opened(family, path, is_new=is_new) for family in ("ip", "ip6"))
    ipv4, ipv6 = _subnets(path, 4), _subnets(path, 6)
    if ipv4:
        text += _tagging("ip", path.interface, ipv4)
        if path.way_out:
            text += _led_out("ip", path.interface, ipv4, path.way_out)
    if ipv6:
        text += _tagging("ip6", path.interface, ipv6)
    if ipv6 and path.way_out6:
        text += _led_out("ip6", path.interface, ipv6, path.way_out6)
    elif ipv6:
        text += f"add chain ip6 {TABLE} refused {{ type filter hook output priority 0; }}\n"
        text += (
            f'add rule ip6 {TABLE} refused oifname "{path.interface}" ct state new '
            f"ip6 daddr != {{ {ipv6}, fe80::/10, ff00::/8 }} reject with icmpv6 no-route\n"
        )
    return text


def difference(old: ReturnPath, new: ReturnPath) -> str:
    """What makes the rules of ``old`` into those of ``new``; empty: nothing."""
    if msgspec.structs.replace(new, gates=old.gates) != old:
        return whole(new)
    gone = ", ".join(_mac(gate) for gate in old.gates if gate not in new.gates)
    come = ", ".join(_element(gate) for gate in new.gates if gate not in old.gates)
    text = ""
    for family in ("ip", "ip6"):
        if gone:
            text += f"delete element {family} {TABLE} gates {{ {gone} }}\n"
        if come:
            text += f"add element {family} {TABLE} gates {{ {come} }}\n"
    return text


def absent() -> str:
    """No tables at all."""
    return "".join(f"add table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family in ("ip", "ip6"))


def _opened(family: str, path: ReturnPath, *, is_new: bool) -> str:
    elements = ", ".join(map(_element, path.gates))
    text = "" if is_new else f"add table {family} {TABLE}\ndelete table {family} {TABLE}\n"
    text += f"add table {family} {TABLE}\n"
    text += f"add map {family} {TABLE} gates {{ type ether_addr : mark; }}\n"
    return text + (f"add element {family} {TABLE} gates {{ {elements} }}\n" if elements else "")


def _tagging(family: str, interface: str, subnets: str) -> str:
    return f"""\
add chain {family} {TABLE} zones {{ type filter hook prerouting priority -300; }}
add rule {family} {TABLE} zones iifname "{interface}" {family} saddr != {{ {subnets} }} \
ct original zone set {_ZONE}
add chain {family} {TABLE} apart {{ type nat hook input priority 100; }}
add chain {family} {TABLE} arrival {{ type filter hook prerouting priority -150; }}
add chain {family} {TABLE} departure {{ type route hook output priority -150; }}
add rule {family} {TABLE} arrival iifname "{interface}" ct state new {family} saddr != {{ {subnets} }} \
ct mark set ether saddr map @gates
add rule {family} {TABLE} arrival iifname "{interface}" ct mark != 0 meta mark set ct mark
add rule {family} {TABLE} departure ct direction reply ct mark != 0 meta mark set ct mark
"""


def _led_out(family: str, interface: str, subnets: str, way_out: str) -> str:
    return f"""\
add chain {family} {TABLE} answers {{ type nat hook prerouting priority -100; }}
add rule {family} {TABLE} answers iifname "{interface}" {family} saddr != {{ {subnets} }} \
meta l4proto udp dnat to {way_out}
"""


def _subnets(path: ReturnPath, version: int) -> str:
    return ", ".join(sorted(subnet for subnet in path.subnets if ip_network(subnet).version == version))


def _element(gate: Gate) -> str:
    return f"{_mac(gate)} : {mark_of(gate)}"


def _mac(gate: Gate) -> str:
    return mac_of(IPv4Address(gate.ipv4))
