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
  each backend.  During a staged update it is ``spread_<n>_<m>_<p>``, which first draws whether a flow is among the
  ``p`` percent for the ``m`` new backends.  These have numbers from ``drawing.NEW_FROM`` on.
* ``backends`` maps the virtual address and the drawn number to the backend's address.  All later packets of the flow
  follow connection tracking, so established connections are not affected by changes of the maps.

The sender's address is not translated, so a backend sees the address of its client.  The client may itself be a
backend.  Every protocol is handled: TCP, UDP, SCTP, and ICMP, so that a ping is answered by a backend.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.dataplane.netns import nft_table
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.plan.drawing import Draw, numbered
from skep.model.networks.tables import NetworkTable, TableEndpoint
from skep.model.staging.shares import shares_of
from skep.model.values.ids import ServiceId

NAME = "skep_virtual"
FAMILIES = ("ip", "ip6")
DATAGRAMS = "datagrams"
_MAPS = ("backends", "services", "guards")
_DATAGRAMS_MAX = 1024
"""Size of the set ``datagrams``.  The kernel allocates all of it (16 KiB) when the set is created."""
_ADDRESS_TYPE = {"ip": "ipv4_addr", "ip6": "ipv6_addr"}


class SplitBackends(msgspec.Struct, frozen=True):
    """Backends during a staged update.  A new flow leads to one of ``new`` in ``percent`` of all cases."""

    even: tuple[str, ...]
    new: tuple[str, ...]
    percent: int

    def __iter__(self) -> Iterator[str]:
        return chain(self.even, self.new)


Backends: TypeAlias = tuple[str, ...] | SplitBackends
VipBackends: TypeAlias = Mapping[str, Backends]
"""The backends' addresses by virtual address, of the same family.  Without backends, connections are refused."""


def vip_backends(table: NetworkTable) -> Mapping[ServiceId, VipBackends]:
    """Return the backends of each service's virtual addresses, in the order of their tasks' ids.

    The ingress network has no virtual addresses, because its ports are published by nodes.  On the front door's
    network, only the proxies open connections, to the tasks' own addresses.
    """
    if table.head.is_ingress or table.head.is_door:
        return {}
    serving: dict[ServiceId, list[TableEndpoint]] = defaultdict(list)
    for _, endpoint in sorted(table.endpoints.items()):
        if endpoint.gets_connections:
            serving[endpoint.service_id].append(endpoint)
    found: dict[ServiceId, VipBackends] = {}
    for id, service in table.services.items():
        if service.virtual_ips:
            shares = shares_of(service, serving[id])
            found[id] = {
                address: _backends(
                    _addresses(shares.even, address), _addresses(shares.new, address), shares.percent
                )
                for address in service.virtual_ips
            }
    return found


def _addresses(tasks: Iterable[TableEndpoint], virtual: str) -> tuple[str, ...]:
    """Return the tasks' addresses of the same family as a ``virtual`` address."""
    return tuple(filter(None, (first_of_family(one.addresses, is_ipv6(virtual)) for one in tasks)))


def _backends(even: tuple[str, ...], new: tuple[str, ...], percent: int) -> Backends:
    return SplitBackends(even, new, percent) if even and new else even or new


class WrittenTable(msgspec.Struct, frozen=True):
    """One family's table as it was written: its backends, and the spreads for which a chain exists."""

    backends: VipBackends
    spreads: frozenset[Draw]


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
            has_more |= not _spreads(new) <= old.spreads
            after[family] = WrittenTable(new, (old.spreads | _spreads(new)) - _unused(old, new))
            for address, found in old.backends.items():
                if set(found) - set(new.get(address, ())):
                    stale[address] = new.get(address, ())
        elif new:
            has_more = True
            table = vip_table(family, new)
            texts.append(nft_table.whole(table) if written is None else nft_table.fresh(table))
            after[family] = WrittenTable(new, _spreads(new))
            if written is None:
                stale.update(new)
        elif written is None:
            has_more = True
            texts.append(nft_table.absent(f"{family} {NAME}"))
    return VipPlan("".join(texts), None if has_more else tuple(changed), after, stale, written is None)


def vip_table(family: str, backends: VipBackends) -> NftTable:
    """Return the complete table of one family."""
    kind = _ADDRESS_TYPE[family]
    spreads = sorted(_spreads(backends))
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
            *((one.chain, "") for one in spreads),
        ),
        rules=(
            ("known", f"meta l4proto udp ct state new add @{DATAGRAMS} {{ {family} daddr }}"),
            ("known", "ct state new,invalid tcp flags & (syn | rst) == 0 reject with tcp reset"),
            ("empty", "ct state new meta l4proto tcp reject with tcp reset"),
            ("empty", "ct state new reject"),
            ("empty", "goto known"),
            ("check", f"{family} daddr vmap @guards"),
            ("out", f"{family} daddr vmap @services"),
            *((one.chain, rule) for one in spreads for rule in one.rules(_dnat(family))),
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
    """Return ``backends`` in an order that keeps as many as possible at the number that they had ``before``."""
    old_even, old_new = _parts(before)
    even, new = _parts(backends)
    even, new = _in_place(old_even, even), _in_place(old_new, new)
    return replace(backends, even=even, new=new) if isinstance(backends, SplitBackends) else even


def _parts(backends: Backends) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (backends.even, backends.new) if isinstance(backends, SplitBackends) else (backends, ())


def _in_place(before: tuple[str, ...], backends: tuple[str, ...]) -> tuple[str, ...]:
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
    for spread in sorted(_spreads(new) - old.spreads):
        lines.append(f"add chain {table} {spread.chain}\n")
        lines += [f"add rule {table} {spread.chain} {rule}\n" for rule in spread.rules(_dnat(family))]
    for change in elements(family, old.backends, new):
        verb = "add" if change.is_added else "delete"
        listed = (f"{key} : {value}" if change.is_added else key for key, value in change.elements)
        lines.append(f"{verb} element {table} {change.map} {{ {', '.join(listed)} }}\n")
    for spread in sorted(_unused(old, new)):
        lines.append(f"flush chain {table} {spread.chain}\ndelete chain {table} {spread.chain}\n")
    return "".join(lines)


def _unused(old: WrittenTable, new: VipBackends) -> frozenset[Draw]:
    """Return the spreads of staged updates whose chains can be deleted.

    That happens when another chain is added, since nft must parse that change in any case.  The chains for even spreads
    stay, because there are few of them, and a number of backends often returns.
    """
    spreads = _spreads(new)
    if spreads <= old.spreads:
        return frozenset()
    return frozenset(one for one in old.spreads - spreads if one.new)


def _dnat(family: str) -> Callable[[str], str]:
    """Return what makes the statement that sends a packet to the backend of a number."""
    return lambda number: f"dnat to {family} daddr . {number} map @backends"


def _spread(backends: Backends) -> Draw:
    even, new = _parts(backends)
    percent = backends.percent if isinstance(backends, SplitBackends) else 0
    return Draw("spread", len(even), len(new), percent)


def _spreads(backends: VipBackends) -> frozenset[Draw]:
    """Return the spreads for which a chain is needed."""
    return frozenset(_spread(found) for found in backends.values() if found != ())


def _elements(address: str, backends: Backends | None) -> Iterator[tuple[str, str, str]]:
    """Yield map, key and value of each element for ``address``.  None as ``backends`` yields nothing."""
    if backends is None:
        return
    yield "guards", address, "goto empty" if backends == () else "goto known"
    if backends != ():
        yield "services", address, f"goto {_spread(backends).chain}"
    even, new = _parts(backends)
    for number, backend in numbered(even, new):
        yield "backends", f"{address} . {number}", backend
