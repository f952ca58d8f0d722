"""Computes the operations from a namespace's present state to its desired state, in an order that the kernel accepts.

Removals come first, because an address that moves to another device can be on one device only.  A device is recreated
if a property differs that cannot be changed.  Its addresses, routes and entries are lost with it and added again.
"""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from skep.dataplane.netns.state import (
    Address,
    EntryKind,
    Link,
    NamespaceState,
    NeighborEntry,
    Route,
    RouteKind,
    RoutingRule,
)


class AddLink(msgspec.Struct, frozen=True):
    """Create a device."""

    link: Link


class ChangeLink(msgspec.Struct, frozen=True):
    """Change an existing device."""

    link: Link


class DeleteLink(msgspec.Struct, frozen=True):
    """Remove a device."""

    name: str


class SetSysctl(msgspec.Struct, frozen=True):
    """Set a sysctl ``net/...``."""

    name: str
    value: str


class Put(msgspec.Struct, frozen=True):
    """Add an address, a route, an entry or a rule."""

    item: Address | Route | NeighborEntry | RoutingRule


class Remove(msgspec.Struct, frozen=True):
    """Remove an address, a route, an entry or a rule."""

    item: Address | Route | NeighborEntry | RoutingRule


Operation = AddLink | ChangeLink | DeleteLink | SetSysctl | Put | Remove

_LINK_ORDER = ("bridge", "vxlan", "veth")
"""Order in which links are created: a bridge before its ports."""


def difference(
    wanted: NamespaceState, actual: NamespaceState, *, is_exclusive: bool = True
) -> list[Operation]:
    """Return the operations from ``actual`` to ``wanted``.

    With ``is_exclusive``, everything in ``actual`` that is not wanted is removed.  A container's namespace is not
    exclusive: items that its processes have added stay.  Only policy rules and their routes are removed there too,
    because they always belong to Skep.  If ``actual`` lacks a sysctl, this kernel does not have it, unless its device
    is about to be created.  Comparing again after applying the operations returns ``[]``.
    """
    renewed = {
        name
        for name, link in wanted.links.items()
        if name in actual.links and _needs_new_device(link, actual.links[name])
    }
    surplus = set(actual.links) - set(wanted.links) if is_exclusive else set()
    gone = renewed | surplus
    kept = {name: link for name, link in actual.links.items() if name not in gone}
    # A port that moves to another bridge loses its entries in the old one.
    moved = {
        name
        for name, link in kept.items()
        if name in wanted.links and wanted.links[name].master not in ("", link.master)
    }
    moved |= {name for name, link in kept.items() if link.master in gone}
    held_entries = (
        frozenset(
            one
            for one in actual.entries
            if one.link in kept and not (one.kind is EntryKind.PORT and one.link in moved)
        )
        if gone or moved
        else actual.entries
    )
    held_addresses = frozenset(one for one in actual.addresses if one.link not in gone)
    held_routes = frozenset(one for one in actual.routes if one.link not in gone)
    held = msgspec.structs.replace(actual, addresses=held_addresses, routes=held_routes, entries=held_entries)
    operations: list[Operation] = list(_removals(wanted, held, is_exclusive=is_exclusive))
    held_routes = frozenset(one for one in held_routes if not one.is_policy or one in wanted.routes)
    operations += [DeleteLink(name) for name in sorted(gone)]
    missing = [link for name, link in wanted.links.items() if name not in kept]
    operations += [AddLink(link) for link in sorted(missing, key=_link_order)]
    operations += _changes(wanted.links, kept, gone)
    operations += [
        SetSysctl(name, value)
        for name, value in wanted.sysctls.items()
        if actual.sysctls.get(name, value) != value or _is_of(name, {one.name for one in missing})
    ]
    operations += [Put(one) for one in sorted(wanted.rules - actual.rules)]
    operations += [Put(one) for one in sorted(wanted.addresses - held_addresses)]
    # The kernel adds its own routes by itself, when an address is added or a link is set up.
    made_anew = {one.link for one in wanted.addresses - held_addresses} | {
        name for name in wanted.links if name not in kept or not kept[name].is_up
    }
    missing_routes = [
        one for one in wanted.routes - held_routes if not (one.is_kernels and one.link in made_anew)
    ]
    operations += [Put(one) for one in sorted(missing_routes, key=_route_order)]
    operations += [Put(one) for one in sorted(wanted.entries - held_entries)]
    return operations


def _removals(wanted: NamespaceState, held: NamespaceState, *, is_exclusive: bool) -> Iterable[Remove]:
    surplus = sorted(held.routes - wanted.routes)
    yield from (Remove(one) for one in sorted(held.rules - wanted.rules) if one.is_policy)
    yield from (Remove(one) for one in surplus if one.is_policy)
    if is_exclusive:
        yield from (Remove(one) for one in surplus if not one.is_kernels and not one.is_policy)
        yield from map(Remove, sorted(_surplus(held.entries, wanted.entries)))
        yield from map(Remove, sorted(held.addresses - wanted.addresses))
        yield from (Remove(one) for one in surplus if one.is_kernels)


def _surplus(held: frozenset[NeighborEntry], wanted: frozenset[NeighborEntry]) -> Iterable[NeighborEntry]:
    """Return the entries to remove.

    Entries that a wanted one replaces are left out, so that no frame is lost in between.
    """
    replaced = {(one.link, one.mac) for one in wanted - held if one.kind is EntryKind.FORWARD}
    return (
        one
        for one in held - wanted
        if not (one.kind is EntryKind.FORWARD and (one.link, one.mac) in replaced)
    )


def _changes(
    wanted: Mapping[str, Link], kept: Mapping[str, Link], gone: Collection[str]
) -> Iterable[ChangeLink]:
    for name in sorted(wanted.keys() & kept.keys()):
        found = kept[name]
        if found.master in gone:
            found = msgspec.structs.replace(found, master="")
        if _differs(wanted[name], found):
            # Setting a device's address, even to the same value, makes it forget its neighbors.
            mac = "" if wanted[name].mac == found.mac else wanted[name].mac
            yield ChangeLink(msgspec.structs.replace(wanted[name], mac=mac))


def _needs_new_device(wanted: Link, found: Link) -> bool:
    """Return whether the device must be recreated."""
    return wanted.kind != found.kind or wanted.vxlan != found.vxlan


def _differs(wanted: Link, found: Link) -> bool:
    return (
        wanted.is_up != found.is_up
        or (wanted.mtu not in (0, found.mtu))
        or (wanted.mac not in ("", found.mac))
        or (wanted.master not in ("", found.master))
        or (wanted.offloads not in (None, found.offloads))
        or (wanted.is_closed_port and not found.is_closed_port)
    )


def _route_order(route: Route) -> tuple[bool, bool, Route]:
    """Return a sort key that puts a route's prerequisites first: local addresses, then networks that contain a
    gateway.
    """
    return bool(route.gateway), route.kind is not RouteKind.LOCAL, route


def _link_order(link: Link) -> tuple[int, str]:
    return _LINK_ORDER.index(link.kind) if link.kind in _LINK_ORDER else len(_LINK_ORDER), link.name


def _is_of(sysctl: str, links: Collection[str]) -> bool:
    """Return whether ``net/ipv4/conf/<link>/...`` belongs to one of these devices."""
    words = sysctl.split("/")
    return len(words) > 3 and words[2] in ("conf", "neigh") and words[3] in links
