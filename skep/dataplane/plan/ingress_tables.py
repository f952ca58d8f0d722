"""The node's nftables rules for the routing mesh: text only.

One table per address family, ``ip skep_ingress`` and ``ip6 skep_ingress``.  A packet to a local address of the node
finds its port in ``ports`` (or ``bound``, by address and port, where a port answers on one address only), which sends
it to ``pick_<n>`` for a port with n backends, or to ``sticky``; these read the backend from ``backends``.  So a change
of backends changes elements of maps and no rule: a tenth of the time, and nothing that is under way notices.  Only
the first packet of a connection comes here; the others follow it by connection tracking, whatever changes.

Address and port of a backend are in two maps, ``backends`` and ``targets``: nft 1.0.6 reads a map whose data are
both back from the kernel wrongly, and adds a test for TCP to rules that use it.

A port without a backend is refused by ``input``, which the packets reach because nobody leads them elsewhere.
"""

from collections.abc import Mapping

import msgspec

from skep.dataplane.plan.ingress import STICKY_SLOTS, Backend, MeshPort, Plan, sticky_slots

TABLE = "skep_ingress"
BRIDGE = "skep-ingress"
_STICKY = "sticky"
_STICKY_SEED = "0x736b6570"
"""The same on all nodes, so that a client meets its task through each of them."""


class Family(msgspec.Struct, frozen=True):
    """An address family in nft's words."""

    name: str
    address_type: str

    @property
    def table(self) -> str:
        return f"{self.name} {TABLE}"


IPV4 = Family("ip", "ipv4_addr")
IPV6 = Family("ip6", "ipv6_addr")
FAMILIES = (IPV4, IPV6)

Elements = Mapping[str, str]
"""Keys and values as nft writes them; the value is empty in a set."""


class MeshRules(msgspec.Struct, frozen=True):
    """What differs from one moment to the next in the table of one family.

    ``counts``: for each there is a chain ``pick_<n>``; ``elements``: of each map and set, by its name.
    """

    counts: frozenset[int]
    elements: Mapping[str, Elements]


_SETS = ("ports", "bound", "backends", "targets", "refused", "bound_refused")


def mesh_rules(plan: Plan, family: Family) -> MeshRules:
    """What the table of ``family`` has to hold for ``plan``.

    A port that user space serves (the PROXY protocol; IPv6 while the tasks have none) is led nowhere, but is refused
    as any other while nobody serves it.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in _SETS}
    counts = set()
    for port in plan.ports:
        if not (port.answers_ipv4 if family is IPV4 else port.answers_ipv6):
            continue
        key = f"{port.protocol} . {port.published}"
        bound = f"{port.only_address} . {key}"
        backends = port.ipv4 if family is IPV4 else port.ipv6
        if not port.ipv4 and not port.ipv6:
            found["bound_refused" if port.only_address else "refused"][
                bound if port.only_address else key
            ] = ""
        elif backends and not port.options.proxy_protocol:
            verdict = f"goto {_STICKY}" if port.options.is_sticky else f"goto pick_{len(backends)}"
            found["bound" if port.only_address else "ports"][bound if port.only_address else key] = verdict
            found["backends"].update(_backends(port, key, backends))
            found["targets"][key] = str(backends[0].port)
            if not port.options.is_sticky:
                counts.add(len(backends))
    return MeshRules(frozenset(counts), found)


def whole(rules: MeshRules, family: Family) -> str:
    """The whole table, whatever it was before, as one transaction."""
    table = family.table
    localhost = f'add rule {table} raw iifname != "lo" ip daddr 127.0.0.0/8 drop\n' if family is IPV4 else ""
    sticky = f"jhash {family.name} saddr mod {STICKY_SLOTS} seed {_STICKY_SEED}"
    key, bound_key = "meta l4proto . th dport", f"{family.name} daddr . meta l4proto . th dport"
    text = f"""\
add table {table}
delete table {table}
add table {table}
add map {table} backends {{ typeof {key} . numgen random mod 65536 : {family.name} daddr; }}
add map {table} targets {{ type inet_proto . inet_service : inet_service; }}
add map {table} ports {{ type inet_proto . inet_service : verdict; }}
add map {table} bound {{ type {family.address_type} . inet_proto . inet_service : verdict; }}
add set {table} refused {{ type inet_proto . inet_service; }}
add set {table} bound_refused {{ type {family.address_type} . inet_proto . inet_service; }}
add chain {table} {_STICKY}
add chain {table} refuse
add chain {table} raw {{ type filter hook prerouting priority -300; }}
add chain {table} pre {{ type nat hook prerouting priority -100; }}
add chain {table} out {{ type nat hook output priority -100; }}
add chain {table} post {{ type nat hook postrouting priority 100; }}
add chain {table} input {{ type filter hook input priority 0; }}
add chain {table} forward {{ type filter hook forward priority 0; }}
add rule {table} {_STICKY} {_dnat(family, sticky)}
add rule {table} refuse meta l4proto tcp reject with tcp reset
add rule {table} refuse reject
{localhost}"""
    if family is IPV6:  # the kernel lets no packet of ::1 leave the node: user space serves it
        text += f"add rule {table} out ip6 daddr ::1 accept\n"
    for chain in ("pre", "out"):
        text += f"add rule {table} {chain} fib daddr type local {bound_key} vmap @bound\n"
        text += f"add rule {table} {chain} fib daddr type local {key} vmap @ports\n"
    # A client on the node itself has no address that a task could answer to by way of the network.
    text += f'add rule {table} post oifname "{BRIDGE}" fib saddr type local masquerade\n'
    text += f"add rule {table} input ct state new {bound_key} @bound_refused goto refuse\n"
    text += f"add rule {table} input ct state new {key} @refused goto refuse\n"
    # What was led to a task passes, and the answers; tasks have no other way through here, nor has anybody to them.
    for direction in ("oifname", "iifname"):
        text += f'add rule {table} forward {direction} "{BRIDGE}" ct state established,related accept\n'
    text += f'add rule {table} forward oifname "{BRIDGE}" ct status dnat accept\n'
    for direction in ("oifname", "iifname"):
        text += f'add rule {table} forward {direction} "{BRIDGE}" drop\n'
    return text + difference(MeshRules(frozenset(), {}), rules, family)


def difference(old: MeshRules, new: MeshRules, family: Family) -> str:
    """What makes the table of ``old`` into that of ``new`` as one transaction; empty: nothing.

    Chains that nobody goes to any more stay: there are few, and removing one would take the kernel 8 ms.
    """
    table = family.table
    text = ""
    for count in sorted(new.counts - old.counts):
        text += f"add chain {table} pick_{count}\n"
        text += f"add rule {table} pick_{count} {_dnat(family, f'numgen random mod {count}')}\n"
    for name in _SETS:
        before, after = old.elements.get(name, {}), new.elements.get(name, {})
        gone = [key for key in before if after.get(key) != before[key]]
        come = [
            f"{key} : {value}" if value else key for key, value in after.items() if before.get(key) != value
        ]
        if gone:
            text += f"delete element {table} {name} {{ {', '.join(gone)} }}\n"
        if come:
            text += f"add element {table} {name} {{ {', '.join(come)} }}\n"
    return text


def absent(family: Family) -> str:
    """No table at all."""
    return f"add table {family.table}\ndelete table {family.table}\n"


def _backends(port: MeshPort, key: str, backends: tuple[Backend, ...]) -> Elements:
    chosen = sticky_slots(backends) if port.options.is_sticky else backends
    return {f"{key} . {number}": one.address for number, one in enumerate(chosen)}


def _dnat(family: Family, number: str) -> str:
    """Lead to the backend of this number."""
    key = "meta l4proto . th dport"
    return f"dnat {family.name} to {key} . {number} map @backends : {key} map @targets"
