"""The nftables rules of virtual addresses in a container's namespace: text only.

One table per family, ``ip skep_virtual`` and ``ip6 skep_virtual``.  A packet for a virtual address takes three steps:

* ``guards`` (before NAT) refuses what cannot go anywhere: a new flow to a service without backends, and TCP in the
  middle of a connection that this namespace does not remember, which is reset (it would reach some backend that
  knows nothing of it).  It notes in ``datagrams`` which addresses UDP flows go to, since looking for the flows of a
  backend that went means going through all that the node's connection tracking knows (9 ms).
* ``services`` leads the first packet of a flow to ``spread_<n>``, the chain for all services that have just ``n``
  backends: it draws one of ``n`` numbers.  So the spread is exactly even, and a service costs as many elements as it
  has backends.
* ``backends`` has the address for the virtual address and the number drawn.  All later packets of the flow follow
  conntrack, whatever happens to the maps: connections stay where they are.

The sender keeps its own address, so a backend sees who calls, and may be the caller itself.  Every protocol is led:
TCP, UDP, SCTP, and ICMP, so that a ping is answered by a backend.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from skep.dataplane.vip.wanted import Backends, Leads, is_ipv6

NAME = "skep_virtual"
FAMILIES = ("ip", "ip6")
MAPS = ("backends", "services", "guards")
DATAGRAMS = "datagrams"
_DATAGRAMS_MAX = 1024
"""The kernel makes room for as many from the start: 16 KiB."""
_ADDRESS_TYPE = {"ip": "ipv4_addr", "ip6": "ipv6_addr"}


def of_family(leads: Leads, family: str) -> Leads:
    """Those of ``leads`` whose address is of ``ip`` or ``ip6``."""
    return {address: to for address, to in leads.items() if is_ipv6(address) is (family == "ip6")}


def whole(family: str, leads: Leads) -> str:
    """The table of ``family`` as it is to be, whatever it was, as one transaction.

    What removes a table waits for the kernel to have done so: 10 to 20 ms.
    """
    table = f"{family} {NAME}"
    return f"add table {table}\ndelete table {table}\n{fresh(family, leads)}"


def fresh(family: str, leads: Leads) -> str:
    """The table of ``family`` where there is none; refused where there is one."""
    table = f"{family} {NAME}"
    return "".join(
        (
            f"create table {table}\n",
            f"add map {table} backends {{ typeof {family} daddr . numgen random mod 65536 : {family} daddr; }}\n",
            f"add map {table} services {{ type {_ADDRESS_TYPE[family]} : verdict; }}\n",
            f"add map {table} guards {{ type {_ADDRESS_TYPE[family]} : verdict; }}\n",
            f"add set {table} {DATAGRAMS} {{ type {_ADDRESS_TYPE[family]}; flags dynamic; size {_DATAGRAMS_MAX}; }}\n",
            f"add chain {table} known\n",
            f"add rule {table} known meta l4proto udp ct state new add @datagrams {{ {family} daddr }}\n",
            f"add rule {table} known ct state new,invalid tcp flags & (syn | rst) == 0 reject with tcp reset\n",
            f"add chain {table} empty\n",
            f"add rule {table} empty ct state new meta l4proto tcp reject with tcp reset\n",
            f"add rule {table} empty ct state new reject\n",
            f"add rule {table} empty goto known\n",
            f"add chain {table} check {{ type filter hook output priority -150; }}\n",
            f"add rule {table} check {family} daddr vmap @guards\n",
            f"add chain {table} out {{ type nat hook output priority -100; }}\n",
            f"add rule {table} out {family} daddr vmap @services\n",
            changes(family, {}, leads, frozenset()),
        )
    )


def changes(family: str, old: Leads, new: Leads, counts: frozenset[int]) -> str:
    """What makes ``old`` into ``new``, as one transaction; empty: nothing.  ``counts``: the chains there are."""
    table = f"{family} {NAME}"
    lines = []
    for count in sorted(counts_of(new) - counts):
        draw = f"dnat to {family} daddr . numgen random mod {count} map @backends"
        lines += [f"add chain {table} spread_{count}\n", f"add rule {table} spread_{count} {draw}\n"]
    for change in elements(family, old, new):
        verb = "add" if change.is_added else "delete"
        listed = (f"{key} : {value}" if change.is_added else key for key, value in change.elements)
        lines.append(f"{verb} element {table} {change.map} {{ {', '.join(listed)} }}\n")
    return "".join(lines)


class Elements(NamedTuple):
    """Elements (key, value) that come to a map of the ``family``'s table, or go from it."""

    family: str
    map: str
    is_added: bool
    elements: tuple[tuple[str, str], ...]


def elements(family: str, old: Leads, new: Leads) -> tuple[Elements, ...]:
    """How the elements of ``new`` differ from those of ``old``, in the order in which they are to be changed."""
    gone: dict[str, list[tuple[str, str]]] = {name: [] for name in MAPS}
    come: dict[str, list[tuple[str, str]]] = {name: [] for name in MAPS}
    for address in sorted(old.keys() | new.keys()):
        if old.get(address) == new.get(address):
            continue
        before = set(_elements(address, old.get(address)))
        after = set(_elements(address, new.get(address)))
        for name, key, value in sorted(before - after):
            gone[name].append((key, value))
        for name, key, value in sorted(after - before):
            come[name].append((key, value))
    return tuple(
        Elements(family, name, is_added, tuple(changed[name]))
        for is_added, changed in ((False, gone), (True, come))
        for name in MAPS
        if changed[name]
    )


def removed(family: str) -> str:
    """Remove the table of ``family``, if there is one."""
    return f"add table {family} {NAME}\ndelete table {family} {NAME}\n"


def noted(addresses: Iterable[str]) -> str:
    """Note that UDP flows go to ``addresses``."""
    return "".join(
        f"add element {family} {NAME} {DATAGRAMS} {{ {one} }}\n"
        for one in sorted(addresses)
        for family in [FAMILIES[is_ipv6(one)]]
    )


def counts_of(leads: Leads) -> frozenset[int]:
    """The numbers of backends for which there have to be chains."""
    return frozenset(len(backends) for backends in leads.values() if backends)


def _elements(address: str, backends: Backends | None) -> Iterator[tuple[str, str, str]]:
    """(map, key, value) of each element for ``address``; None: it is not led anywhere."""
    if backends is None:
        return
    yield "guards", address, "goto known" if backends else "goto empty"
    if backends:
        yield "services", address, f"goto spread_{len(backends)}"
    for number, backend in enumerate(backends):
        yield "backends", f"{address} . {number}", backend
