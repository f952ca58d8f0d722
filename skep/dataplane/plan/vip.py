"""Virtual addresses in a container's namespace: their backends, and the nftables tables for them.  Pure.

There is one table per family, ``ip skep_virtual`` and ``ip6 skep_virtual``.  A packet for a virtual address passes
three steps:

* ``guards`` (before NAT) refuses packets without a destination.  These are new flows to a service without backends, and
  TCP packets in the middle of a connection that this namespace does not know.  Such a connection is reset, because
  otherwise its packets would reach some backend that does not know it either.  ``guards`` also notes in ``datagrams``
  which addresses UDP flows use, because finding the flows of a removed backend means reading all of the node's
  connection tracking (9 ms).
* ``services`` sends the first packet of a flow to ``spread_<n>``, the chain for all services that have exactly ``n``
  backends.  The chain draws one of ``n`` numbers, so the spread is exactly even, and a service needs one element for
  each backend.
* ``backends`` maps the virtual address and the drawn number to the backend's address.  All later packets of the flow
  follow connection tracking, so established connections are not affected by changes of the maps.

The sender's address is not translated, so a backend sees the address of its client.  The client may itself be a
backend.  Every protocol is handled: TCP, UDP, SCTP, and ICMP, so that a ping is answered by a backend.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import msgspec

from skep.dataplane.netns import nft_table
from skep.dataplane.netns.nft_table import NftTable
from skep.model.networks.tables import NetworkTable
from skep.model.values.ids import ServiceId

NAME = "skep_virtual"
FAMILIES = ("ip", "ip6")
DATAGRAMS = "datagrams"
_MAPS = ("backends", "services", "guards")
_DATAGRAMS_MAX = 1024
"""Size of the set ``datagrams``.  The kernel allocates all of it (16 KiB) when the set is created."""
_ADDRESS_TYPE = {"ip": "ipv4_addr", "ip6": "ipv6_addr"}

Backends: TypeAlias = tuple[str, ...]
VipBackends: TypeAlias = Mapping[str, Backends]
"""The backends' addresses by virtual address, of the same family.  Without backends, connections are refused."""


def vip_backends(table: NetworkTable) -> Mapping[ServiceId, VipBackends]:
    """Return the backends of each service's virtual addresses, in the order of their tasks' ids.

    The ingress network has no virtual addresses, because its ports are published by nodes.
    """
    if table.head.is_ingress:
        return {}
    serving: dict[ServiceId, list[tuple[str, ...]]] = defaultdict(list)
    for _, endpoint in sorted(table.endpoints.items()):
        if endpoint.is_serving:
            serving[endpoint.service_id].append(endpoint.addresses)
    return {
        id: {
            address: tuple(filter(None, (first_of_family(one, is_ipv6(address)) for one in serving[id])))
            for address in service.virtual_ips
        }
        for id, service in table.services.items()
        if service.virtual_ips
    }


class WrittenTable(msgspec.Struct, frozen=True):
    """One family's table as it was written: its backends, and the numbers n for which a chain ``spread_<n>`` exists."""

    backends: VipBackends
    counts: frozenset[int]


class VipPlan(msgspec.Struct, frozen=True):
    """Changes to the tables.

    Args:
        text: The changes as one transaction.
        elements: The same changes if only elements of maps change, else None.  Most changes of backends are of this
            kind and need not be parsed by nft.
        after: The tables by family after the changes.
        stale: Addresses whose UDP flows may lead to a removed backend, with their present backends.
        is_anew: Whether the earlier state was unknown, so that any address may have flows.
    """

    text: str
    elements: tuple["Elements", ...] | None
    after: Mapping[str, WrittenTable]
    stale: VipBackends
    is_anew: bool


def plan(written: Mapping[str, WrittenTable] | None, backends: VipBackends) -> VipPlan:
    """Return the changes that lead from ``written`` (None if unknown) to ``backends`` in a namespace.

    A namespace without virtual addresses of a family needs no table for it.
    """
    texts = []
    changed: list[Elements] = []
    has_more = False
    after: dict[str, WrittenTable] = {}
    stale: dict[str, Backends] = {}
    for family in FAMILIES:
        new = _of_family(backends, family)
        old = None if written is None else written.get(family)
        if old is not None:
            new = {address: in_place(old.backends.get(address, ()), found) for address, found in new.items()}
            texts.append(_changes(family, old, new))
            changed += elements(family, old.backends, new)
            has_more |= not _counts(new) <= old.counts
            after[family] = WrittenTable(new, old.counts | _counts(new))
            for address, found in old.backends.items():
                if set(found) - set(new.get(address, ())):
                    stale[address] = new.get(address, ())
        elif new:
            has_more = True
            table = vip_table(family, new)
            texts.append(nft_table.whole(table) if written is None else nft_table.fresh(table))
            after[family] = WrittenTable(new, _counts(new))
            if written is None:
                stale.update(new)
        elif written is None:
            has_more = True
            texts.append(nft_table.absent(f"{family} {NAME}"))
    return VipPlan("".join(texts), None if has_more else tuple(changed), after, stale, written is None)


def vip_table(family: str, backends: VipBackends) -> NftTable:
    """Return the complete table of one family."""
    kind = _ADDRESS_TYPE[family]
    counts = sorted(_counts(backends))
    return NftTable(
        name=f"{family} {NAME}",
        sets=(
            ("backends", f"typeof {family} daddr . numgen random mod 65536 : {family} daddr"),
            ("services", f"type {kind} : verdict"),
            ("guards", f"type {kind} : verdict"),
            (DATAGRAMS, f"type {kind}; flags dynamic; size {_DATAGRAMS_MAX}"),
        ),
        chains=(
            ("known", ""),
            ("empty", ""),
            ("check", "{ type filter hook output priority -150; }"),
            ("out", "{ type nat hook output priority -100; }"),
            *((f"spread_{count}", "") for count in counts),
        ),
        rules=(
            ("known", f"meta l4proto udp ct state new add @{DATAGRAMS} {{ {family} daddr }}"),
            ("known", "ct state new,invalid tcp flags & (syn | rst) == 0 reject with tcp reset"),
            ("empty", "ct state new meta l4proto tcp reject with tcp reset"),
            ("empty", "ct state new reject"),
            ("empty", "goto known"),
            ("check", f"{family} daddr vmap @guards"),
            ("out", f"{family} daddr vmap @services"),
            *((f"spread_{count}", _draw(family, count)) for count in counts),
        ),
        elements=frozenset(
            (name, f"{key} : {value}")
            for address, found in backends.items()
            for name, key, value in _elements(address, found)
        ),
    )


class Elements(NamedTuple):
    """Elements (key, value) to add to or remove from a map in the table of ``family``."""

    family: str
    map: str
    is_added: bool
    elements: tuple[tuple[str, str], ...]


def elements(family: str, old: VipBackends, new: VipBackends) -> tuple[Elements, ...]:
    """Return the changes from the elements of ``old`` to the elements of ``new``, in the order to apply them.

    Compares addresses instead of whole tables, because usually one of hundreds of services changes, in each of a
    hundred namespaces.
    """
    gone: dict[str, list[tuple[str, str]]] = {name: [] for name in _MAPS}
    added: dict[str, list[tuple[str, str]]] = {name: [] for name in _MAPS}
    for address in sorted(old.keys() | new.keys()):
        if old.get(address) == new.get(address):
            continue
        before = set(_elements(address, old.get(address)))
        after = set(_elements(address, new.get(address)))
        for name, key, value in sorted(before - after):
            gone[name].append((key, value))
        for name, key, value in sorted(after - before):
            added[name].append((key, value))
    return tuple(
        Elements(family, name, is_added, tuple(changed[name]))
        for is_added, changed in ((False, gone), (True, added))
        for name in _MAPS
        if changed[name]
    )


def noted(addresses: Iterable[str]) -> str:
    """Return the command that notes UDP flows to ``addresses``."""
    return "".join(
        f"add element {family} {NAME} {DATAGRAMS} {{ {one} }}\n"
        for one in sorted(addresses)
        for family in [FAMILIES[is_ipv6(one)]]
    )


def in_place(before: Backends, backends: Backends) -> Backends:
    """Return ``backends`` in an order that keeps as many as possible at the index that they had ``before``.

    A removed backend leaves a gap, which a new backend fills, or else the last one.  So the number of changed elements
    is the number of changed backends, wherever they are in the order.
    """
    stays, coming = set(backends), [one for one in backends if one not in before]
    slots: list[str | None] = [one if one in stays else None for one in before]
    slots += [None] * (len(backends) - len(slots))
    while len(slots) > len(backends):
        last = slots.pop()
        if last is not None:
            coming.append(last)
    waiting = iter(coming)
    return tuple(one if one is not None else next(waiting) for one in slots)


def is_ipv6(address: str) -> bool:
    """Return whether the text of an address is IPv6."""
    return ":" in address


def first_of_family(addresses: Iterable[str], ipv6: bool) -> str:
    """Return the first IPv6 address if ``ipv6``, else the first IPv4 address, or an empty text."""
    return next((one for one in addresses if is_ipv6(one) is ipv6), "")


def _of_family(backends: VipBackends, family: str) -> VipBackends:
    return {address: found for address, found in backends.items() if is_ipv6(address) is (family == "ip6")}


def _changes(family: str, old: WrittenTable, new: VipBackends) -> str:
    table = f"{family} {NAME}"
    lines = []
    for count in sorted(_counts(new) - old.counts):
        lines += [
            f"add chain {table} spread_{count}\n",
            f"add rule {table} spread_{count} {_draw(family, count)}\n",
        ]
    for change in elements(family, old.backends, new):
        verb = "add" if change.is_added else "delete"
        listed = (f"{key} : {value}" if change.is_added else key for key, value in change.elements)
        lines.append(f"{verb} element {table} {change.map} {{ {', '.join(listed)} }}\n")
    return "".join(lines)


def _draw(family: str, count: int) -> str:
    return f"dnat to {family} daddr . numgen random mod {count} map @backends"


def _counts(backends: VipBackends) -> frozenset[int]:
    """Return the numbers n of backends for which a chain ``spread_<n>`` is needed."""
    return frozenset(len(found) for found in backends.values() if found)


def _elements(address: str, backends: Backends | None) -> Iterator[tuple[str, str, str]]:
    """Yield map, key and value of each element for ``address``.  None as ``backends`` yields nothing."""
    if backends is None:
        return
    yield "guards", address, "goto known" if backends else "goto empty"
    if backends:
        yield "services", address, f"goto spread_{len(backends)}"
    for number, backend in enumerate(backends):
        yield "backends", f"{address} . {number}", backend
