"""Overlay networks of one node.  Each has a namespace with a bridge and VXLAN devices, except the ingress network.

The ingress network's devices are in the node's own namespace.  A network's namespace is created when its table or its
first container arrives, and removed when neither is left.  It is pinned in a folder next to the containers' namespaces.
Namespaces of earlier processes are reused.  Unneeded ones are removed when the first tables have arrived, because their
owners are not known before.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from skep.aio.failures import isolate
from skep.dataplane.addresses import mac_for
from skep.dataplane.door.derivation import proxies_on
from skep.dataplane.gateway import BRIDGE, new_port_name
from skep.dataplane.netns.deferred import DeferredChanges
from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.kernel import pinned
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.observation import CONTAINER, EXCLUSIVE, Scope
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Link, NamespaceState, NeighborEntry
from skep.dataplane.netns.write import KernelRefused
from skep.dataplane.plan.overlay import (
    INGRESS_BRIDGE,
    INGRESS_VXLAN,
    LocalEndpoint,
    Underlay,
    container_state,
    just_made,
    mtu_of,
    network_state,
    remote_entries,
)
from skep.dataplane.plan.packet_filter import door_filter, owner, spoofing_filter, vxlan_filter
from skep.dataplane.underlays import UnderlayMeasurements, Underlays, find
from skep.dataplane.wireguard.tunnels import WireGuardTunnels
from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from skep.model.networks.sandbox import Endpoint, EndpointConfig, Sandbox
from skep.model.networks.tables import NetworkHead, NetworkTable
from skep.model.values.ids import ContainerId, NetworkId, NodeId

log = structlog.get_logger()

_AT_ONCE = 8
"""Limit for the networks that are changed concurrently.

Each change waits in the kernel, especially deletions of devices.
"""
_FILTER_PART = "vxlan_filter"


def node_reconciler(namespaces: Namespaces, repairs: Repairs) -> NetnsReconciler:
    """Return the reconciler of the node's own namespace, where other programs also have devices and routes.

    It removes nothing before tables have arrived, because it is unknown until then which devices belong to no network.
    """
    scope = Scope(selects=_is_of_ingress, has_own_routes=False)
    return NetnsReconciler("node", namespaces.home, namespaces, repairs, scope)


def _is_of_ingress(link: Link) -> bool:
    is_ours = link.name == INGRESS_BRIDGE or link.name.startswith(INGRESS_VXLAN)
    return is_ours or (link.kind == "veth" and link.master == INGRESS_BRIDGE)


class Overlays:
    """All overlay networks of this node, and the interfaces in its containers' namespaces.

    Args:
        pins: Folder where networks' namespaces are pinned.
        home: Reconciler of the node's own namespace.
        tunnels: Carry encrypted networks between nodes.
    """

    def __init__(
        self,
        *,
        namespaces: Namespaces,
        pins: Namespaces,
        home: NetnsReconciler,
        healer: Healer,
        deferred: DeferredChanges,
        tunnels: WireGuardTunnels,
        measurements: UnderlayMeasurements,
    ) -> None:
        self._namespaces = namespaces
        self._pins = pins
        self._home = home
        self.repairs = healer.repairs
        self._healer = healer
        self._deferred = deferred
        self._tunnels = tunnels
        self._node_id = NodeId("")
        """This node's id in the cluster that has sent the tables."""
        self._tables: Mapping[NetworkId, NetworkTable] = {}
        self._knows_tables = False
        self._is_cleared = False
        self._restored = asyncio.Event()
        self._applying = asyncio.Lock()
        self._heads: dict[NetworkId, NetworkHead] = {}
        self._endpoints: dict[NetworkId, dict[ContainerId, LocalEndpoint]] = {}
        self._reconcilers: dict[NetworkId, NetnsReconciler] = {}
        self._containers: dict[ContainerId, tuple[NetnsReconciler, Sandbox]] = {}
        self._underlays = Underlays(measurements)
        self._locks: dict[NetworkId, asyncio.Lock] = {}
        self._remote: dict[
            NetworkId, tuple[NetworkTable, NodeId, Underlay | None, frozenset[NeighborEntry]]
        ] = {}

    # --- tables -----------------------------------------------------------------------------------------------

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        """Apply the tables of this node's networks.

        If a network fails, the others are still applied.

        Args:
            tables: All tables of this node.
            changed: The networks whose tables changed since the last call.

        Raises:
            SkepError: The kernel refused a change to some network.  It is also retried in the background.
        """
        async with self._applying:
            # Wait until running containers are known, because the ports of unknown containers are removed.
            await self._restored.wait()
            self._node_id = node_id
            await self._apply(tables, changed)

    async def apply_nothing(self) -> None:
        """Remove everything that earlier processes left of networks, because this node has no tables."""
        try:
            await self.apply(NodeId(""), {}, frozenset())
        except SkepError as error:
            log.warning("networks not cleared", error=str(error))

    async def apply_measurements(self) -> None:
        """Apply changed measurements of the underlay to the networks.  All networks are tried.  Raises: SkepError."""
        async with self._applying:
            if self._is_cleared:  # otherwise the first tables will apply them
                refused: list[SkepError] = []
                await self._collect_errors(self._find_underlays(), refused)
                await self._settle_all([id for id in self._tables if self._lies_on_another(id)], refused)
                if refused:
                    raise refused[0]

    async def _apply(self, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]) -> None:
        is_first = not self._is_cleared
        self._tables, self._knows_tables = dict(tables), True
        if is_first:
            for reconciler in (self._home, *self._reconcilers.values()):
                reconciler.invalidate()
        refused: list[SkepError] = []
        await self._collect_errors(self._find_underlays(), refused)
        await self._collect_errors(self._apply_tunnels(), refused)
        await self._collect_errors(self._settle_home(), refused)
        concerned = changed | (tables.keys() | self._endpoints.keys() if is_first else frozenset())
        await self._settle_all(concerned, refused)
        if is_first:
            await self._collect_errors(self._clear_pins(), refused)
        if is_first and not refused:
            await self._collect_errors(self._clear_home(), refused)
        if refused:
            raise refused[0]
        self._is_cleared = True

    async def _find_underlays(self) -> None:
        wanted = self._underlays.addresses(self._node_id, self._tables.values())
        self._underlays.found = await self._namespaces.run(self._namespaces.home, find, wanted)

    async def _apply_tunnels(self) -> None:
        underlay = self._underlays.of_tunnels(self._node_id, self._tables.values())
        await self._tunnels.apply(self._node_id, self._tables.values(), underlay)

    async def _settle_all(self, ids: Iterable[NetworkId], refused: list[SkepError]) -> None:
        limit = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for id in sorted(ids):
                group.create_task(self._settle_whole(id, limit, refused), name=f"network {id}")

    async def _settle_whole(self, id: NetworkId, limit: asyncio.Semaphore, refused: list[SkepError]) -> None:
        async with limit:
            await self._collect_errors(self._settle(id), refused)
            await self._collect_errors(self._settle_containers(id), refused)

    async def _collect_errors(self, work: Coroutine[Any, Any, None], refused: list[SkepError]) -> None:
        try:
            await work
        except SkepError as error:
            refused.append(error)
        except OSError as error:
            refused.append(KernelRefused(str(error)))
        except ValueError as error:  # an invalid table must not stop the other networks
            refused.append(InvalidArgument(f"the table of a network is invalid: {error}"))

    async def _settle_home(self) -> None:
        """Apply the filter of VXLAN packets.  It must exist before any VXLAN device receives packets."""
        if self._tables:
            table = vxlan_filter(self._tables, self._node_id, (BRIDGE,))
            self._home.set_part(_FILTER_PART, NamespaceState(), table)
        else:
            self._home.remove_part(_FILTER_PART)
        await self._home.apply()

    async def _clear_home(self) -> None:
        """Remove everything in the node's own namespace that no network needs.

        Call it only after the desired state of all networks was set."""
        self._home.is_exclusive = True
        self._home.invalidate()
        await self._home.apply()

    # --- containers -------------------------------------------------------------------------------------------

    def restore(self, live: Mapping[ContainerId, Sandbox]) -> None:
        """Register running containers of an earlier process, without touching their networking."""
        for id, sandbox in live.items():
            for endpoint in sandbox.endpoints:
                self._enter(id, sandbox.netns, endpoint)

    async def begin(self, live: Mapping[ContainerId, Sandbox]) -> None:
        """Start to reconcile the namespaces of the node and of the ``live`` containers, and accept tables.

        The gateway bridge must exist already.  Raises: OSError.
        """
        await self._healer.watch(self._home)
        for id, sandbox in live.items():
            reconciler = self._container_reconciler(id, sandbox)
            reconciler.adopt()
            watching = self._healer.watch(reconciler)
            await isolate(watching, "changes in a container's namespace are not reported", container=id)
            self._healer.expect(reconciler)
        self._restored.set()

    async def connect(
        self,
        container_id: ContainerId,
        netns: Path,
        configs: Sequence[EndpointConfig],
        *,
        first: str = "eth0",
    ) -> tuple[Endpoint, ...]:
        """Connect a container to networks: a port on each network's bridge, and an interface in its namespace.

        The interfaces are named ``first`` and the following.  ``settle_container`` sets their addresses.  Raises:
        SkepError.
        """
        for config in configs:
            if reason := self._tunnels.refusal(config.head):
                raise FailedPrecondition(reason)
        numbered = enumerate(configs, int(first.removeprefix("eth")))
        endpoints = tuple(_endpoint(config, f"eth{number}") for number, config in numbered)
        try:
            for one in endpoints:
                self._enter(container_id, str(netns), one)
                if one.config.head.parent is None:
                    await self._settle(one.network_id)
        except BaseException:
            self.disconnect(container_id, endpoints)
            raise
        return endpoints

    async def settle_container(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Set addresses and routes in the container's namespace, and maintain them from now on.  Raises: SkepError."""
        reconciler = await self._watch_container(container_id, sandbox)
        reconciler.assume(just_made(reconciler.wanted, sandbox.sysctls))
        await reconciler.apply()

    async def change(self, id: ContainerId, gone: Iterable[Endpoint], sandbox: Sandbox) -> None:
        """Disconnect a running container from networks.  ``sandbox`` is its new state.  Raises: SkepError; OSError."""
        if (before := self._containers.pop(id, None)) is not None:
            self._healer.forget(before[0])
        try:
            for one in gone:
                if self._endpoints.get(one.network_id, {}).pop(id, None) is not None:
                    await self._settle(one.network_id)
        finally:  # its other networks are maintained even if the kernel refuses to change this one
            reconciler = await self._watch_container(id, sandbox)
        await reconciler.apply()

    def disconnect(self, container_id: ContainerId, endpoints: Sequence[Endpoint]) -> None:
        """Disconnect a container whose namespace is about to be removed together with its ports.

        Unneeded networks are removed a moment later.  Idempotent.
        """
        found = self._containers.pop(container_id, None)
        if found is not None:
            self._healer.forget(found[0])
        for one in endpoints:
            id = one.network_id
            if self._endpoints.get(id, {}).pop(container_id, None) is None:
                continue
            reconciler = self._home if self._head_of(id).is_ingress else self._reconcilers.get(id)
            if reconciler is not None:
                reconciler.expect_removal(one.port)
            self._deferred.soon(id, partial(self._settle, id))

    def reconciler_of(self, container_id: ContainerId) -> NetnsReconciler:
        """Return the reconciler of a container after ``settle_container``."""
        return self._containers[container_id][0]

    def holders(self) -> frozenset[ContainerId]:
        """Return the containers that have an endpoint on a network of this node."""
        return frozenset(self._containers).union(*self._endpoints.values())

    def endpoints_of(self, container_id: ContainerId) -> tuple[Endpoint, ...]:
        """Return the endpoints of one container."""
        return tuple(one[container_id].endpoint for one in self._endpoints.values() if container_id in one)

    async def sweep(self) -> None:
        """Remove namespaces of networks that this node no longer takes part in.  Raises: OSError."""
        if self._is_cleared:
            await self._clear_pins()

    def _enter(self, container_id: ContainerId, netns: str, endpoint: Endpoint) -> None:
        if endpoint.config.head.parent is not None:
            return  # this node has no devices for the network: its only device is in the container's namespace
        self._heads.setdefault(endpoint.network_id, endpoint.config.head)
        endpoints = self._endpoints.setdefault(endpoint.network_id, {})
        endpoints[container_id] = LocalEndpoint(netns, endpoint)

    async def _watch_container(self, container_id: ContainerId, sandbox: Sandbox) -> NetnsReconciler:
        reconciler = self._container_reconciler(container_id, sandbox)
        await self._healer.watch(reconciler)
        return reconciler

    def _container_reconciler(self, container_id: ContainerId, sandbox: Sandbox) -> NetnsReconciler:
        reconciler = NetnsReconciler(
            f"container {container_id[:12]}",
            Path(sandbox.netns),
            self._namespaces,
            self.repairs,
            CONTAINER,
            partial(self._remake, sandbox),
        )
        reconciler.set_part("container", container_state(sandbox, self._networks_of(sandbox)))
        self._containers[container_id] = (reconciler, sandbox)
        return reconciler

    async def _remake(self, sandbox: Sandbox, interface: str) -> None:
        """Recreate an interface of a container together with its bridge port."""
        for one in sandbox.endpoints:
            if one.interface == interface:
                is_ingress = self._head_of(one.network_id).is_ingress
                reconciler = self._home if is_ingress else self._reconcilers.get(one.network_id)
                if reconciler is None:
                    raise KernelRefused(f"network {one.network_name} is not set up on this node yet")
                await reconciler.remake(one.port)
        if interface == sandbox.interface and sandbox.port:
            await self._home.remake(sandbox.port)

    async def _settle_containers(self, id: NetworkId) -> None:
        """Apply a network's changed MTU in the namespaces of its containers."""
        for container_id in tuple(self._endpoints.get(id, {})):
            if container_id in self._containers:
                reconciler, sandbox = self._containers[container_id]
                state = container_state(sandbox, self._networks_of(sandbox))
                if state != reconciler.wanted:
                    reconciler.set_part("container", state)
                    await reconciler.apply()

    def _networks_of(self, sandbox: Sandbox) -> dict[NetworkId, tuple[NetworkHead, int]]:
        found = {}
        for one in sandbox.endpoints:
            if one.config.head.parent is not None:
                found[one.network_id] = (one.config.head, one.config.head.mtu)
                continue
            head, (_, underlay) = self._head_of(one.network_id), self._carried(one.network_id)
            found[one.network_id] = (head, mtu_of(head, underlay))
        return found

    # --- networks ---------------------------------------------------------------------------------------------

    async def _settle(self, id: NetworkId) -> None:
        """Reconcile one network with its present table and containers.  Raises: SkepError; OSError."""
        async with self._locks.setdefault(id, asyncio.Lock()):
            endpoints = tuple(self._endpoints.get(id, {}).values())
            if id not in self._tables and not endpoints:
                await self._remove(id)
                return
            table, underlay = self._carried(id)
            head = table.head if table is not None else self._head_of(id)
            is_tunnelled = table is not None and head.is_encrypted
            if is_tunnelled:
                self._tunnels.require_keys()
            state = network_state(
                head,
                table,
                endpoints,
                node_id=self._node_id,
                underlay=underlay,
                remote=self._remote_entries(table, underlay) if table is not None else frozenset(),
            )
            reconciler = await self.ready_reconciler(id, head)
            owners = [owner(one.endpoint) for one in endpoints]
            filters = [spoofing_filter(owners)]
            # Before the first tables, the proxies are unknown, and the filter of an earlier process stays.
            if table is not None and head.is_door:
                proxies = proxies_on(table, self._node_id)
                filters.append(door_filter(owners, {address for one in proxies for address in one.addresses}))
            reconciler.set_part(id, state, *filters)
            # A container may start before its network's table was applied, or when the network's last container has
            # just ended.
            async with self._tunnels.kept_open() if is_tunnelled else nullcontext():
                await reconciler.apply()

    def _carried(self, id: NetworkId) -> tuple[NetworkTable | None, Underlay | None]:
        """Return a network's table and the underlay of its VXLANs.

        For an encrypted network, both are those inside the tunnels.
        """
        table = self._tables.get(id)
        underlay = self._underlays.of(self._node_id, table)
        if table is not None and table.head.is_encrypted:
            return self._tunnels.table(table), self._tunnels.inside(underlay)
        return table, underlay

    def _remote_entries(self, table: NetworkTable, underlay: Underlay | None) -> frozenset[NeighborEntry]:
        """Return the table's entries.

        Cached, because a large network's table is long and many containers start on it.
        """
        known = self._remote.get(table.head.id)
        if known is None or known[0] is not table or known[1:3] != (self._node_id, underlay):
            entries = remote_entries(table, self._node_id, underlay)
            known = self._remote[table.head.id] = (table, self._node_id, underlay, entries)
        return known[3]

    def _lies_on_another(self, id: NetworkId) -> bool:
        """Return whether a network's entries were made for another underlay or other addresses."""
        known, (table, underlay) = self._remote.get(id), self._carried(id)
        return known is None or known[0] is not table or known[2] != underlay

    async def ready_reconciler(self, id: NetworkId, head: NetworkHead) -> NetnsReconciler:
        if head.is_ingress:
            return self._home
        if not id.isalnum():  # the id becomes a file name
            raise InvalidArgument(f"invalid network id {id!r}")
        reconciler = self._reconcilers.get(id)
        if reconciler is None:
            reconciler = self._reconcilers[id] = NetnsReconciler(
                f"network {head.name}", self._pins.path(id), self._pins, self.repairs, EXCLUSIVE
            )
        await pinned.make_where_missing(self._pins, id, reconciler, self._healer)
        reconciler.is_exclusive = self._knows_tables
        await isolate(self._healer.watch(reconciler), "changes of a network are not reported yet", network=id)
        return reconciler

    async def _remove(self, id: NetworkId) -> None:
        self._heads.pop(id, None)
        self._remote.pop(id, None)
        self._endpoints.pop(id, None)
        reconciler = self._reconcilers.pop(id, None)
        if reconciler is not None:
            self._healer.forget(reconciler)
            await pinned.remove(self._pins, id)
        elif self._home.has_part(id):
            self._home.remove_part(id)
            await self._home.apply()

    async def _clear_pins(self) -> None:
        """Remove namespaces of networks that this node no longer takes part in."""
        in_use = self._reconcilers.keys() | self._tables.keys() | self._endpoints.keys()
        for id in self._pins.pinned():
            if (
                id
                not in in_use  # these are kept, because a network that could not be settled yet has no reconciler
                and not self._locks.setdefault(NetworkId(id), asyncio.Lock()).locked()
            ):
                log.info("namespace of removed network deleted", network=id)
                await pinned.remove(self._pins, id)

    def _head_of(self, id: NetworkId) -> NetworkHead:
        """Return a network's head.  Raises: KernelRefused: the network was removed meanwhile."""
        if id in self._tables:
            return self._tables[id].head
        if id not in self._heads:
            raise KernelRefused(f"network {id} was removed from this node")
        return self._heads[id]


def _endpoint(config: EndpointConfig, interface: str) -> Endpoint:
    """Return an endpoint with ``interface`` in the container and a new bridge port name."""
    mac = config.mac_address or mac_for(one.partition("/")[0] for one in config.addresses)
    return Endpoint(config=config, interface=interface, port=new_port_name(), mac_address=mac)
