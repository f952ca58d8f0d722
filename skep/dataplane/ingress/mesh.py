"""The routing mesh of one node: follows the ingress network's table."""

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.guard import contain, persist
from skep.dataplane.ingress import flows
from skep.dataplane.ingress.flows import Misled
from skep.dataplane.ingress.obstacles import forwarding_tables, obstacles
from skep.dataplane.ingress.returns import Returns
from skep.dataplane.netns import netlink, nft
from skep.dataplane.netns.forwarding import forward_ipv6
from skep.dataplane.netns.namespaces import Namespaces, set_sysctl
from skep.dataplane.netns.node_tables import NodeTables
from skep.dataplane.plan import ingress_tables
from skep.dataplane.plan.ingress import MeshPort, Plan, plan
from skep.dataplane.plan.ingress_tables import FAMILIES, IPV4, Family, MeshRules
from skep.dataplane.ports import AddressNotHere, PortReservations
from skep.dataplane.proxy.relays import relay_ports
from skep.errors import AlreadyExists, SkepError
from skep.linux.files import replace_file
from skep.model.ids import ContainerId, NetworkId, NodeId
from skep.model.tables import Table

log = structlog.get_logger()

_FIRST_RETRY_S, _RETRY_S_MAX = 1.0, 30.0
_LINKS = socket.NETLINK_ROUTE, (netlink.GROUP_LINK,)
_NOTICE_BYTES = 1 << 16
OBSTACLES_S = 15.0
"""Between two looks at what other firewalls of the machine forbid."""

PortKey = tuple[str, int, str]
"""Protocol, published port, the only address or empty."""


class Mesh:
    """The published ports of this node.

    Args:
        tables: the node's own nftables tables, which it keeps.
        ports: holds the published ports, so that nobody on the node takes one.
        relays: file that tells the net process which ports it serves itself (``relays.py``).
    """

    def __init__(
        self,
        *,
        namespaces: Namespaces,
        tables: NodeTables,
        ports: PortReservations,
        relays: Path,
        clock: Clock,
        chance: Callable[[], float],
    ) -> None:
        self._namespaces = namespaces
        self._tables = tables
        self._ports = ports
        self._relays = relays
        self._clock = clock
        self._chance = chance
        self._backoff = Backoff(_FIRST_RETRY_S, _RETRY_S_MAX, chance=chance)
        self._returns = Returns(namespaces)
        self._node_id = NodeId("")
        self._table: Table | None = None
        self._held: set[PortKey] | None = None
        self._plan: Plan | None = None
        self._written: dict[str, MeshRules] = {}
        self._turn = asyncio.Lock()
        self._again = asyncio.Event()
        self._obstacles: tuple[str, ...] = ()
        self.conflicts: Mapping[PortKey, str] = {}
        """Ports that are not published here because somebody else on this node has them; why, in Docker's words."""

    def identify(self, node_id: NodeId) -> None:
        """The node's id in its present swarm."""
        self._node_id = node_id

    async def apply(self, tables: Mapping[NetworkId, Table], changed: frozenset[NetworkId]) -> None:
        """Publish what the ingress network's table says; without one nothing is published.

        A port that somebody else has is tried again by itself.  Raises: SkepError: the rest is not as it should be.
        """
        self._table = next((table for table in tables.values() if table.head.is_ingress), None)
        await self._follow()

    async def apply_nothing(self) -> None:
        """This node has no tables: what an earlier process left is cleared up."""
        try:
            await self.apply({}, frozenset())
        except SkepError as error:
            log.warning("published ports not cleared", reason=str(error))

    async def run(self) -> None:
        """Until cancelled: try again what failed, and look after the bridge's settings."""
        parts: dict[str, Callable[[], Awaitable[None]]] = {
            "mesh-retries": self._try_again,
            "mesh-bridge": self._watch_bridge,
            "mesh-rules": self._tables.watch,
            "mesh-returns": partial(self._returns.run, self._clock),
            "mesh-obstacles": self._look_for_obstacles,
        }
        keep = partial(persist, clock=self._clock, chance=self._chance)
        async with asyncio.TaskGroup() as group:
            for name, run in parts.items():
                group.create_task(keep(run, "part of the mesh failed", part=name), name=name)

    async def joined(
        self,
        container_id: ContainerId,
        netns: Path,
        interface: str,
        way_out: str,
        *,
        way_out6: str = "",
        is_new: bool = False,
    ) -> None:
        """A container is on the ingress network; returns when its answers find their way to clients.

        ``way_out``, ``way_out6``: its addresses on the interface of its IPv4 and IPv6 default routes, empty without
        one; ``is_new``: nothing of it was ever written.  Raises: NftFailed, OSError, NetlinkError.
        """
        await self._returns.add(container_id, netns, interface, way_out, way_out6=way_out6, is_new=is_new)

    def left(self, container_id: ContainerId) -> None:
        """The container's namespace goes."""
        self._returns.forget(container_id)

    def warnings(self) -> tuple[str, ...]:
        """Sentences for ``/info``."""
        conflicts = (
            f"port {port}/{protocol} is not published on this node: {reason}"
            for (protocol, port, _), reason in sorted(self.conflicts.items())
        )
        return (*conflicts, *self._obstacles)

    @property
    def repairs(self) -> int:
        """How often somebody's changes to rules of the mesh were undone since the start."""
        return self._tables.repairs + self._returns.repairs

    async def _follow(self) -> None:
        async with self._turn:
            wanted = plan(self._table, self._node_id) if self._table is not None else Plan()
            try:
                await self._publish(wanted)
            except (SkepError, OSError) as error:
                self._plan = None  # nobody knows what is in force
                raise SkepError(f"published ports are not as they should be: {error}") from error
            if self.conflicts:
                self._again.set()
            else:
                self._backoff.reset()

    async def _publish(self, wanted: Plan) -> None:
        """Bring everything to ``wanted``: whoever is led to a task can be answered, and its port is held before."""
        if self._held is None:
            self._held = set(await self._ports.held())
        wanted = await self._hold(wanted)
        if wanted == self._plan:
            return
        await self._returns.apply(wanted)
        await self._write(wanted)
        self._relays.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._relays, msgspec.json.encode(relay_ports(wanted)), is_durable=False)
        await self._move_flows(wanted)
        await self._release(wanted)
        self._plan = wanted

    # --- holding --------------------------------------------------------------------------------------------------

    async def _hold(self, wanted: Plan) -> Plan:
        """Hold the ports; gives the plan without those that somebody else has."""
        assert self._held is not None
        kept, conflicts = [], {}
        for port in wanted.ports:
            key = _key(port)
            if _is_held_here(port) and key not in self._held:
                try:
                    await self._ports.reserve(*key)
                    self._held.add(key)
                except AlreadyExists as error:
                    conflicts[key] = str(error)
                    continue
                except AddressNotHere:
                    pass  # no packet comes to this address
                except SkepError as error:
                    if port.protocol != "sctp":  # a kernel without it has nobody who could take the port
                        raise
                    log.debug("port not held", port=key, reason=str(error))
            kept.append(port)
        for key in conflicts.keys() - self.conflicts.keys():
            log.warning("port is not published here", port=key[1], protocol=key[0], reason=conflicts[key])
        for key in self.conflicts.keys() - conflicts.keys():
            log.info("port is free again", port=key[1], protocol=key[0])
        self.conflicts = conflicts
        return msgspec.structs.replace(wanted, ports=tuple(kept))

    async def _release(self, wanted: Plan) -> None:
        assert self._held is not None
        for key in sorted(self._held - {_key(port) for port in wanted.ports if _is_held_here(port)}):
            await self._ports.release(*key)
            self._held.discard(key)

    # --- rules ----------------------------------------------------------------------------------------------------

    async def _write(self, wanted: Plan) -> None:
        families = [family for family in FAMILIES if family is IPV4 or _has_ipv6()]
        if not wanted.ports:
            for family in families:
                self._tables.forget(family.table)
                self._written.pop(family.name, None)
            await self._tables.run("".join(map(ingress_tables.absent, families)))
            return
        text, after = "", {}
        for family in families:
            new = ingress_tables.mesh_rules(wanted, family)
            before = self._written.get(family.name) if self._plan is not None else None
            text += (
                ingress_tables.whole(new, family)
                if before is None
                else ingress_tables.difference(before, new, family)
            )
            counts = new.counts | (before.counts if before else frozenset())
            after[family.name] = MeshRules(counts, new.elements)
        await self._namespaces.run(self._namespaces.home, _set_up, wanted.has_ipv6)
        if text:
            await self._tables.run(text)
        self._written = after
        for family in families:
            self._tables.keep(family.table, partial(self._whole, family))

    def _whole(self, family: Family) -> str:
        return ingress_tables.whole(self._written[family.name], family)

    async def _move_flows(self, wanted: Plan) -> None:
        before = {_key(port): port for port in self._plan.ports} if self._plan is not None else {}
        for version in (4, 6) if wanted.has_ipv6 else (4,):
            misled = []
            for port in wanted.ports:
                addresses, earlier = _addresses(port, version), before.get(_key(port))
                if port.protocol == "udp" and (
                    earlier is None or not addresses >= _addresses(earlier, version)
                ):
                    misled.append(Misled(port.published, addresses, wanted.subnets))
            if misled:
                await self._namespaces.run(self._namespaces.home, flows.forget, tuple(misled), version)

    # --- what goes on ---------------------------------------------------------------------------------------------

    async def _try_again(self) -> None:
        while True:
            await self._again.wait()
            await self._backoff.sleep(self._clock)
            self._again.clear()
            await contain(self._follow(), "ports are not published", on_error=lambda _: self._again.set())

    async def _look_for_obstacles(self) -> None:
        while True:
            found: tuple[str, ...] = ()
            if self._plan is not None and self._plan.ports:
                work = self._namespaces.run(self._namespaces.home, _find_obstacles)
                found = await contain(work, "others' rules not read") or ()
            for sentence in set(found) - set(self._obstacles):
                log.warning(sentence)
            self._obstacles = found
            await self._clock.sleep(OBSTACLES_S)

    async def _watch_bridge(self) -> None:
        """The bridge may be made later than its rules, or anew: its settings begin with it."""
        notices = await self._namespaces.run(self._namespaces.home, netlink.listening, *_LINKS)
        try:
            loop = asyncio.get_running_loop()
            while True:
                try:
                    received = await loop.sock_recv(notices, _NOTICE_BYTES)
                    concerns_bridge = ingress_tables.BRIDGE.encode() in received
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    concerns_bridge = True
                if concerns_bridge and self._plan is not None and self._plan.ports:
                    work = self._namespaces.run(self._namespaces.home, _set_up, self._plan.has_ipv6)
                    await contain(work, "settings of the ingress bridge not made")
        finally:
            notices.close()


def _key(port: MeshPort) -> PortKey:
    return port.protocol, port.published, port.only_address


def _is_held_here(port: MeshPort) -> bool:
    """Whether its IPv4 port is held by a reservation; the net process holds what it serves itself."""
    return port.answers_ipv4 and not port.options.proxy_protocol


def _addresses(port: MeshPort, version: int) -> frozenset[str]:
    return frozenset(backend.address for backend in (port.ipv4 if version == 4 else port.ipv6))


def _find_obstacles() -> tuple[str, ...]:
    names = forwarding_tables(nft.run("list chains"))
    return obstacles((nft.run(f"list table {name}") for name in names), (ingress_tables.BRIDGE,))


def _has_ipv6() -> bool:
    return os.path.exists("/proc/net/if_inet6")


def _set_up(has_ipv6: bool) -> None:
    """Settings of the present namespace without which nothing is forwarded."""
    set_sysctl("net/ipv4/ip_forward", "1")
    # A client on the node may use 127.0.0.1; nothing from outside gets there (chain ``raw``).
    set_sysctl(f"net/ipv4/conf/{ingress_tables.BRIDGE}/route_localnet", "1")
    set_sysctl(f"net/ipv4/conf/{ingress_tables.BRIDGE}/rp_filter", "0")
    if has_ipv6:
        forward_ipv6()
