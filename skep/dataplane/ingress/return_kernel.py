"""Return paths in the kernel: rules and routes of one container's namespace, written and read."""

import socket

import msgspec
from pyroute2 import AsyncIPRoute

from skep.dataplane.plan.reply_routing import (
    RULE_PRIORITY,
    UDP_RULE_PRIORITY,
    UDP_TABLE,
    ReturnPath,
    ReturnRoute,
    routes,
    uses_udp_route,
)

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class Ways(msgspec.Struct, frozen=True):
    """Rules as (version, table), routes as (version, table, gateway)."""

    rules: frozenset[tuple[int, int]]
    routes: frozenset[tuple[int, int, str]]


def wanted_ways(path: ReturnPath) -> Ways:
    """What there has to be for ``path``."""
    found = {(version, one.mark, one.gateway) for version in FAMILIES for one in routes(path, version)}
    if uses_udp_route(path):
        found.add((6, UDP_TABLE, path.own.ipv6))
    return Ways(frozenset((version, table) for version, table, _ in found), frozenset(found))


async def read_ways(inside: AsyncIPRoute) -> Ways:
    """What of ours there is."""
    rules = {(version, mark) for version in FAMILIES for mark in await _marks(inside, version)}
    if await _has_udp_rule(inside):
        rules.add((6, UDP_TABLE))
    found = set()
    for version, family in FAMILIES.items():
        async for answer in await inside.route("dump", family=family):
            table = answer.get("table")
            if (version, table) in rules:
                found.add((version, table, answer.get("gateway")))
    return Ways(frozenset(rules), frozenset(found))


async def write_udp_route(inside: AsyncIPRoute, index: int, gateway: str, *, is_new: bool) -> None:
    """For answers over UDP and IPv6, until they have their mark.  Raises: NetlinkError."""
    family = socket.AF_INET6
    await inside.route(
        "replace", family=family, dst="default", gateway=gateway, oif=index, table=UDP_TABLE, flags=["onlink"]
    )
    if is_new or not await _has_udp_rule(inside):
        await inside.rule(
            "add", family=family, ip_proto=socket.IPPROTO_UDP, table=UDP_TABLE, priority=UDP_RULE_PRIORITY
        )


async def _has_udp_rule(inside: AsyncIPRoute) -> bool:
    found = [
        answer
        async for answer in await inside.rule("dump", family=socket.AF_INET6)
        if answer.get("priority") == UDP_RULE_PRIORITY
    ]
    return bool(found)


async def write_routes(
    inside: AsyncIPRoute, index: int, wanted: tuple[ReturnRoute, ...], version: int, *, is_new: bool
) -> None:
    """Routes and their rules.  ``is_new``: there are none yet.  Raises: NetlinkError."""
    family = FAMILIES[version]
    there = set() if is_new else await _marks(inside, version)
    for route in wanted:
        await inside.route(
            "replace",
            family=family,
            dst="default",
            gateway=route.gateway,
            oif=index,
            table=route.mark,
            flags=["onlink"],
        )
        if route.mark not in there:
            await inside.rule(
                "add", family=family, fwmark=route.mark, table=route.mark, priority=RULE_PRIORITY
            )


async def remove_rules(inside: AsyncIPRoute, wanted: tuple[ReturnRoute, ...], version: int) -> None:
    """Of nodes that are no longer there; after nothing gets their marks any more."""
    for mark in await _marks(inside, version) - {route.mark for route in wanted}:
        await inside.rule("del", family=FAMILIES[version], fwmark=mark, table=mark, priority=RULE_PRIORITY)
        await inside.flush_routes(family=FAMILIES[version], table=mark)


async def _marks(inside: AsyncIPRoute, version: int) -> set[int]:
    """Marks that have a rule of ours."""
    marks = set()
    async for answer in await inside.rule("dump", family=FAMILIES[version]):
        if answer.get("priority") == RULE_PRIORITY:
            marks.add(answer.get("fwmark"))
    return marks


async def index_of(route: AsyncIPRoute, name: str) -> int:
    """Index of a link.  Raises: OSError: there is none."""
    found = await route.link_lookup(ifname=name)
    if not found:
        raise OSError(f"there is no interface {name}")
    return int(found[0])
