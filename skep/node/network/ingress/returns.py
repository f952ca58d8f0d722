"""Keeps the return paths of this node's containers (``return_path.py``) as nodes and containers come and go."""

import asyncio
import socket
from pathlib import Path

import structlog
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from skep.aio.clock import Clock
from skep.model.ids import ContainerId
from skep.node.network import nft
from skep.node.network.ingress.plan import Plan
from skep.node.network.ingress.return_path import (
    RULE_PRIORITY,
    SYSCTLS,
    TABLE,
    UDP_RULE_PRIORITY,
    UDP_TABLE,
    ReturnPath,
    ReturnRoute,
    difference,
    return_path,
    routes,
    whole,
)
from skep.node.network.namespaces import Namespaces, set_sysctl
from skep.node.network.overlay import netlink

log = structlog.get_logger()

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_MAIN_TABLE = 254
_AT_ONCE_MAX = 16
"""Namespaces that are worked on at the same time; there are no more threads for it."""
_NETFILTER, _NFTABLES = 12, 7
_LINK, _ROUTE4, _RULE4, _ROUTE6, _RULE6 = 1, 7, 8, 11, 19
_NOTICE_BYTES = 1 << 16
SETTLE_S = 1.0
"""Between a change in a container's namespace and a look at it: what belongs together is looked at once."""


_Found = tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int, str]], tuple[str, ...]]
"""Rules (version, mark), routes (version, table, gateway), tables of nftables."""


class Returns:
    """The return paths of all containers of this node that are on the ingress network."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._places: dict[ContainerId, tuple[Path, str]] = {}
        self._written: dict[ContainerId, ReturnPath] = {}
        self._plan = Plan()
        self._turn = asyncio.Lock()
        self._intact: dict[ContainerId, _Found] = {}
        self._sockets: dict[ContainerId, tuple[socket.socket, ...]] = {}
        self._due: set[ContainerId] = set()
        self._wake = asyncio.Event()
        self.repairs = 0
        """How often a container's return path was put right since the start."""

    async def run(self, clock: Clock) -> None:
        """Put right what somebody changes in containers' namespaces, until cancelled."""
        try:
            while True:
                await self._wake.wait()
                await clock.sleep(SETTLE_S)
                self._wake.clear()
                due, self._due = self._due, set()
                for container_id in sorted(due):
                    await self._repair(container_id)
        finally:
            for container_id in tuple(self._sockets):
                self._listen_no_more(container_id)

    async def add(self, container_id: ContainerId, netns: Path, interface: str) -> None:
        """A container is on the ingress network by its ``interface``; returns when its answers find their way.

        Raises: NftFailed, OSError, NetlinkError.
        """
        async with self._turn:
            self._places[container_id] = netns, interface
            await self._listen(container_id, netns)
            await self._write(container_id)

    def forget(self, container_id: ContainerId) -> None:
        """The container's namespace goes, with what is in it."""
        self._places.pop(container_id, None)
        self._written.pop(container_id, None)
        self._intact.pop(container_id, None)
        self._listen_no_more(container_id)

    async def apply(self, plan: Plan) -> None:
        """Bring all containers to ``plan``; one that cannot be is logged, and tried with the next plan."""
        async with self._turn:
            self._plan = plan
            limit = asyncio.Semaphore(_AT_ONCE_MAX)
            await asyncio.gather(*(self._guarded(id, limit) for id in tuple(self._places)))

    async def _repair(self, container_id: ContainerId) -> None:
        async with self._turn:
            place, intact = self._places.get(container_id), self._intact.get(container_id)
            if place is None or intact is None:
                return
            try:
                if await self._find(place[0]) == intact:
                    return
            except (OSError, NetlinkError) as error:
                log.warning("return path not seen", container=container_id, reason=str(error))
            self._written.pop(container_id, None)
            if await self._guarded(container_id, asyncio.Semaphore(1)):
                self.repairs += 1
                log.warning("return path repaired", container=container_id)

    async def _listen(self, container_id: ContainerId, netns: Path) -> None:
        self._listen_no_more(container_id)
        groups = (_LINK, _ROUTE4, _RULE4, _ROUTE6, _RULE6)
        opened = (
            await self._namespaces.run(netns, netlink.listening, socket.NETLINK_ROUTE, groups),
            await self._namespaces.run(netns, netlink.listening, _NETFILTER, (_NFTABLES,)),
        )
        self._sockets[container_id] = opened
        for one in opened:
            asyncio.get_running_loop().add_reader(one, self._hear, container_id, one)

    def _listen_no_more(self, container_id: ContainerId) -> None:
        for one in self._sockets.pop(container_id, ()):
            asyncio.get_running_loop().remove_reader(one)
            one.close()

    def _hear(self, container_id: ContainerId, notices: socket.socket) -> None:
        """Whatever it was, the namespace is looked at."""
        try:
            while notices.recv(_NOTICE_BYTES):
                pass
        except OSError:  # no more, or more than fitted
            self._due.add(container_id)
            self._wake.set()

    async def _find(self, netns: Path) -> "_Found":
        """What is in a container's namespace of ours."""
        async with self._namespaces.netlink(netns) as inside:
            rules = {(version, mark) for version in _FAMILIES for mark in await _marks(inside, version)}
            if await _has_udp_rule(inside):
                rules.add((6, UDP_TABLE))
            ways = set()
            for version, family in _FAMILIES.items():
                async for answer in await inside.route("dump", family=family):
                    table = answer.get("table")
                    if (version, table) in rules:
                        ways.add((version, table, answer.get("gateway")))
        listings = []
        for family_name in ("ip", "ip6"):
            try:
                text = await self._namespaces.run(netns, nft.run, f"list table {family_name} {TABLE}")
            except nft.NftFailed:
                text = ""  # there is none
            listings.append(" ".join(sorted(text.replace(",", " ").split())))
        return frozenset(rules), frozenset(ways), tuple(listings)

    async def _guarded(self, container_id: ContainerId, limit: asyncio.Semaphore) -> bool:
        """Whether it went well."""
        async with limit:
            try:
                await self._write(container_id)
                return True
            except (OSError, NetlinkError, nft.NftFailed) as error:
                self._written.pop(container_id, None)
                log.warning("return path not written", container=container_id, reason=str(error))
                return False

    async def _write(self, container_id: ContainerId) -> None:
        place = self._places.get(container_id)
        if place is None or not self._plan.subnets:
            return
        netns, interface = place
        before = self._written.get(container_id)
        async with self._namespaces.netlink(netns) as inside:
            way_out = before.way_out if before else await _way_out(inside, interface)
            wanted = return_path(self._plan, interface, way_out)
            if wanted == before:
                return
            index = await _index(inside, interface)
            for version in _FAMILIES:
                await _write_routes(inside, index, routes(wanted, version), version)
            if wanted.own.ipv6:
                await _write_udp_route(inside, index, wanted.own.ipv6)
            if before is None:
                await self._namespaces.run(netns, _set_up)
            text = difference(before, wanted) if before else whole(wanted)
            if text:
                await self._namespaces.run(netns, nft.run, text)
            for version in _FAMILIES:
                await _remove_rules(inside, routes(wanted, version), version)
        self._written[container_id] = wanted
        self._intact[container_id] = await self._find(netns)


def _set_up() -> None:
    for name, value in SYSCTLS.items():
        set_sysctl(name, value)


async def _write_udp_route(inside: AsyncIPRoute, index: int, gateway: str) -> None:
    """For answers over UDP and IPv6, until they have their mark."""
    family = socket.AF_INET6
    await inside.route(
        "replace", family=family, dst="default", gateway=gateway, oif=index, table=UDP_TABLE, flags=["onlink"]
    )
    if not await _has_udp_rule(inside):
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


async def _write_routes(
    inside: AsyncIPRoute, index: int, wanted: tuple[ReturnRoute, ...], version: int
) -> None:
    family = _FAMILIES[version]
    there = await _marks(inside, version)
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


async def _remove_rules(inside: AsyncIPRoute, wanted: tuple[ReturnRoute, ...], version: int) -> None:
    """Of nodes that are no longer there; after nothing gets their marks any more."""
    for mark in await _marks(inside, version) - {route.mark for route in wanted}:
        await inside.rule("del", family=_FAMILIES[version], fwmark=mark, table=mark, priority=RULE_PRIORITY)
        await inside.flush_routes(family=_FAMILIES[version], table=mark)


async def _marks(inside: AsyncIPRoute, version: int) -> set[int]:
    """Marks that have a rule of ours."""
    marks = set()
    async for answer in await inside.rule("dump", family=_FAMILIES[version]):
        if answer.get("priority") == RULE_PRIORITY:
            marks.add(answer.get("fwmark"))
    return marks


async def _way_out(inside: AsyncIPRoute, interface: str) -> str:
    """The container's address on the interface of its IPv4 default route, if that is not ``interface``."""
    own = await _index(inside, interface)
    async for answer in await inside.route("dump", family=socket.AF_INET, table=_MAIN_TABLE):
        if not answer.get("dst") and answer.get("oif") not in (None, own):
            async for address in await inside.addr("dump", index=answer.get("oif"), family=socket.AF_INET):
                return str(address.get("address"))
    return ""


async def _index(route: AsyncIPRoute, name: str) -> int:
    found = await route.link_lookup(ifname=name)
    if not found:
        raise OSError(f"there is no interface {name}")
    return int(found[0])
