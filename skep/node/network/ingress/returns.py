"""Keeps the return paths of this node's containers (``return_path.py``) as nodes and containers come and go."""

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path

import structlog
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from skep.model.ids import ContainerId
from skep.node.network import nft
from skep.node.network.ingress.plan import Plan
from skep.node.network.ingress.return_path import (
    RULE_PRIORITY,
    SYSCTLS,
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

log = structlog.get_logger()

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_MAIN_TABLE = 254
_AT_ONCE_MAX = 16
"""Namespaces that are worked on at the same time; there are no more threads for it."""


class Returns:
    """The return paths of all containers of this node that are on the ingress network."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._places: dict[ContainerId, tuple[Path, str]] = {}
        self._written: dict[ContainerId, ReturnPath] = {}
        self._plan = Plan()
        self._turn = asyncio.Lock()

    async def add(self, container_id: ContainerId, netns: Path, interface: str) -> None:
        """A container is on the ingress network by its ``interface``; returns when its answers find their way.

        Raises: NftFailed, OSError, NetlinkError.
        """
        async with self._turn:
            self._places[container_id] = netns, interface
            await self._write(container_id)

    def forget(self, container_id: ContainerId) -> None:
        """The container's namespace goes, with what is in it."""
        self._places.pop(container_id, None)
        self._written.pop(container_id, None)

    async def apply(self, plan: Plan) -> None:
        """Bring all containers to ``plan``; one that cannot be is logged, and tried with the next plan."""
        async with self._turn:
            self._plan = plan
            limit = asyncio.Semaphore(_AT_ONCE_MAX)
            await asyncio.gather(*(self._guarded(id, limit) for id in tuple(self._places)))

    async def repair(self, container_id: ContainerId) -> None:
        """Write everything of one container anew."""
        async with self._turn:
            self._written.pop(container_id, None)
            if container_id in self._places:
                await self._guarded(container_id, asyncio.Semaphore(1))

    def namespaces(self) -> Mapping[ContainerId, Path]:
        """Where the containers are."""
        return {id: netns for id, (netns, _) in self._places.items()}

    async def _guarded(self, container_id: ContainerId, limit: asyncio.Semaphore) -> None:
        async with limit:
            try:
                await self._write(container_id)
            except (OSError, NetlinkError, nft.NftFailed) as error:
                self._written.pop(container_id, None)
                log.warning("return path not written", container=container_id, reason=str(error))

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


def _set_up() -> None:
    for name, value in SYSCTLS.items():
        set_sysctl(name, value)


async def _write_udp_route(inside: AsyncIPRoute, index: int, gateway: str) -> None:
    """For answers over UDP and IPv6, until they have their mark."""
    family = socket.AF_INET6
    await inside.route(
        "replace", family=family, dst="default", gateway=gateway, oif=index, table=UDP_TABLE, flags=["onlink"]
    )
    async for answer in await inside.rule("dump", family=family):
        if answer.get("priority") == UDP_RULE_PRIORITY:
            return
    await inside.rule(
        "add", family=family, ip_proto=socket.IPPROTO_UDP, table=UDP_TABLE, priority=UDP_RULE_PRIORITY
    )


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
