"""Keeps the return paths of this node's containers (``return_path.py``) as nodes and containers come and go."""

import asyncio
import socket
from pathlib import Path

import msgspec
import structlog
from pyroute2.netlink.exceptions import NetlinkError

from skep.aio.clock import Clock
from skep.aio.guard import contain
from skep.dataplane.ingress.return_kernel import (
    FAMILIES,
    index_of,
    read_ways,
    remove_rules,
    wanted_ways,
    write_routes,
    write_udp_route,
)
from skep.dataplane.netns import netlink, nft
from skep.dataplane.netns.namespaces import Namespaces, set_sysctl
from skep.dataplane.plan.ingress import Plan
from skep.dataplane.plan.reply_routing import (
    SYSCTLS,
    TABLE,
    ReturnPath,
    difference,
    return_path,
    routes,
    uses_udp_route,
    whole,
)
from skep.model.ids import ContainerId

log = structlog.get_logger()

_AT_ONCE_MAX = 16
"""Namespaces that are worked on at the same time; there are no more threads for it."""
_GROUPS = (
    netlink.GROUP_LINK,
    netlink.GROUP_ROUTE4,
    netlink.GROUP_RULE4,
    netlink.GROUP_ROUTE6,
    netlink.GROUP_RULE6,
)
_NOTICE_BYTES = 1 << 16
SETTLE_S = 1.0
"""Between a change in a container's namespace and a look at it: what belongs together is looked at once."""


class _Place(msgspec.Struct, frozen=True):
    netns: Path
    interface: str
    way_out: str
    way_out6: str


class Returns:
    """The return paths of all containers of this node that are on the ingress network."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._places: dict[ContainerId, _Place] = {}
        self._written: dict[ContainerId, ReturnPath] = {}
        self._plan = Plan()
        self._turn = asyncio.Lock()
        self._listings: dict[ContainerId, tuple[str, ...]] = {}
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
                    await contain(self._repair(container_id), "return path not seen", container=container_id)
        finally:
            for container_id in tuple(self._sockets):
                self._listen_no_more(container_id)

    async def add(
        self,
        container_id: ContainerId,
        netns: Path,
        interface: str,
        way_out: str,
        *,
        way_out6: str,
        is_new: bool,
    ) -> None:
        """A container is on the ingress network by its ``interface``; returns when its answers find their way.

        ``way_out``, ``way_out6``: its addresses on the interface of its IPv4 and IPv6 default routes.  ``is_new``:
        nothing is there yet.  Raises: NftFailed, OSError, NetlinkError.
        """
        async with self._turn:
            self._places[container_id] = _Place(netns, interface, way_out, way_out6)
            await self._listen(container_id, netns)
            await self._write(container_id, is_new=is_new)

    def forget(self, container_id: ContainerId) -> None:
        """The container's namespace goes, with what is in it."""
        self._places.pop(container_id, None)
        self._written.pop(container_id, None)
        self._listings.pop(container_id, None)
        self._listen_no_more(container_id)

    async def apply(self, plan: Plan) -> None:
        """Bring all containers to ``plan``; one that cannot be is logged, and tried with the next plan."""
        async with self._turn:
            self._plan = plan
            limit = asyncio.Semaphore(_AT_ONCE_MAX)
            await asyncio.gather(*(self._guarded(id, limit) for id in tuple(self._places)))

    async def _repair(self, container_id: ContainerId) -> None:
        async with self._turn:
            place, written = self._places.get(container_id), self._written.get(container_id)
            if place is None or written is None:
                return
            try:
                if await self._is_intact(container_id, place.netns, written):
                    return
            except (OSError, NetlinkError) as error:
                log.warning("return path not seen", container=container_id, reason=str(error))
            self._written.pop(container_id, None)
            if await self._guarded(container_id, asyncio.Semaphore(1)):
                self.repairs += 1
                log.warning("return path repaired", container=container_id)

    async def _is_intact(self, container_id: ContainerId, netns: Path, written: ReturnPath) -> bool:
        """Whether what was written is there."""
        async with self._namespaces.netlink(netns) as inside:
            if await read_ways(inside) != wanted_ways(written):
                return False
        return await self._namespaces.run(netns, _listings) == self._listings.get(container_id)

    async def _listen(self, container_id: ContainerId, netns: Path) -> None:
        self._listen_no_more(container_id)
        opened = (
            await self._namespaces.run(netns, netlink.listening, socket.NETLINK_ROUTE, _GROUPS),
            await self._namespaces.run(
                netns, netlink.listening, netlink.NETFILTER, (netlink.GROUP_NFTABLES,)
            ),
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

    async def _write(self, container_id: ContainerId, *, is_new: bool = False) -> None:
        place, before = self._places.get(container_id), self._written.get(container_id)
        if place is None or not self._plan.subnets:
            return
        wanted = return_path(self._plan, place.interface, place.way_out, place.way_out6)
        if wanted == before:
            return
        async with self._namespaces.netlink(place.netns) as inside:
            index = await index_of(inside, place.interface)
            for version in FAMILIES:
                await write_routes(inside, index, routes(wanted, version), version, is_new=is_new)
            if uses_udp_route(wanted):
                await write_udp_route(inside, index, wanted.own.ipv6, is_new=is_new)
            text = difference(before, wanted) if before else whole(wanted, is_new=is_new)
            self._listings[container_id] = await self._namespaces.run(place.netns, _apply, text)
            if not is_new:
                for version in FAMILIES:
                    await remove_rules(inside, routes(wanted, version), version)
        self._written[container_id] = wanted
        self._due.add(container_id)
        self._wake.set()


def _apply(text: str) -> tuple[str, ...]:
    """Gives the tables as they are then."""
    for name, value in SYSCTLS.items():
        set_sysctl(name, value)
    if text:
        nft.run(text)
    return _listings()


def _listings() -> tuple[str, ...]:
    """The tables of both families, whatever the order of their elements; empty where there is none."""
    found = []
    for family in ("ip", "ip6"):
        try:
            text = nft.run(f"list table {family} {TABLE}")
        except nft.NftFailed:
            text = ""
        found.append(" ".join(nft.in_any_order(text)))
    return tuple(found)
