"""Composes the data plane of one node from its parts, and runs them."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec

from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.aio.groups import errors_as_they_are
from skep.api.formats.networks import NetworkBody
from skep.dataplane.addresses import Subnets, pools_or_default
from skep.dataplane.container_network import ContainerNetwork
from skep.dataplane.endpoint_allocation import ClusterEndpoints, EndpointAllocation
from skep.dataplane.gateway import BRIDGE, Gateway
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.ingress.reply_routing import ReplyRouting
from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.local.objects import head_of
from skep.dataplane.net_process.name_registration import NameRegistration
from skep.dataplane.netns.deferred import DeferredChanges
from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.parents import ParentDevices
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.overlays import Overlays, node_reconciler
from skep.dataplane.ports import PortReservations, UnreservedPorts
from skep.dataplane.probe.data_path import DataPath
from skep.dataplane.probe.namespace import ProbeNamespace
from skep.dataplane.probe.port_probe import PortChecks, PortProbe
from skep.dataplane.probe.prober import PathProber
from skep.dataplane.wireguard.nat_tunnels import TunnelsThroughNat
from skep.dataplane.wireguard.tunnels import Options, WireGuardTunnels
from skep.model.network import ConfigReference
from skep.model.networks.reserved_ports import ReservedPorts
from skep.model.networks.tables import NetworkHead
from skep.model.node_reports.conditions import ConditionName
from skep.model.values.ids import new_container_id
from skep.paths import Paths


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The node on which a data plane works.

    Args:
        namespaces: The containers' namespaces and the node's own.
        rng: Returns random numbers from 0 to 1.
        show_condition: Called with the name of a node condition and its message.  An empty message clears the
            condition.
        own_ports: Returns the ports of the machine that containers must not publish.
        pools: The address pools for subnets of the node's networks (``pools_or_default``).
    """

    paths: Paths
    namespaces: Namespaces
    clock: Clock
    rng: Callable[[], float]
    show_condition: Callable[[ConditionName, str], None] = lambda name, message: None
    own_ports: Callable[[], ReservedPorts] = dict
    pools: Sequence[Subnets] = ()


class NetProcess(msgspec.Struct, frozen=True):
    """Services of the net process.

    Args:
        ports: Reserves the host-mode ports of containers.
        mesh_ports: Reserves the ports of the routing mesh.
        names: Registers names of containers, or None if names are not served.
    """

    ports: PortReservations
    mesh_ports: PortReservations
    names: NameRegistration | None = None


class DataPlane:
    """The networks of one node."""

    def __init__(self, host: Host, net: NetProcess, endpoints: ClusterEndpoints, encryption: Options) -> None:
        """Compose the data plane.

        Args:
            endpoints: Allocates plain containers' endpoints on cluster networks.
            encryption: How this node encrypts traffic between nodes.
        """
        paths, namespaces, clock, rng = host.paths, host.namespaces, host.clock, host.rng
        self._clock = clock
        self._rng = rng
        self.naming = net.names
        self.repairs = Repairs()
        self._healer = Healer(namespaces, clock, self.repairs, rng=rng)
        self._deferred = DeferredChanges(clock)
        home = node_reconciler(namespaces, self.repairs)
        show_encryption = partial(host.show_condition, ConditionName.ENCRYPTED_NETWORKS)
        self.tunnels = WireGuardTunnels(paths, namespaces, encryption, self.repairs, clock, show_encryption)
        self.nat = TunnelsThroughNat(paths, namespaces, encryption, self.repairs, clock, rng, host.own_ports)
        self._show_tunnels = partial(host.show_condition, ConditionName.NAT_TUNNELS)
        data_path = _data_path(host, home, self._healer, encryption.port)
        self.overlays = Overlays(
            namespaces=namespaces,
            pins=Namespaces(paths.overlays, namespaces.home),
            home=home,
            healer=self._healer,
            deferred=self._deferred,
            tunnels=self.tunnels,
            measurements=data_path,
        )
        self.prober = PathProber(
            data_path,
            PortChecks(PortProbe(namespaces, clock, _random_number), self.tunnels),
            paths.measured_paths,
            self.overlays.apply_measurements,
            clock,
            rng,
            self.nat.set_targets,
        )
        replies = ReplyRouting(self._healer)
        self.mesh = Mesh(
            namespaces=namespaces,
            home=home,
            reply_routing=replies,
            ports=UnreservedPorts(net.mesh_ports, host.own_ports),
            relays=paths.relays,
            clock=clock,
            rng=rng,
        )
        self.gateway = _gateway(host, home, self._deferred, net.ports)
        self.local = _local_networks(host, self.gateway)
        self._local_endpoints = LocalEndpoints(self.local, paths.tables, net.names)
        self.containers = ContainerNetwork(
            namespaces=namespaces,
            gateway=self.gateway,
            overlays=self.overlays,
            allocation=EndpointAllocation(self._local_endpoints, endpoints),
            reply_routing=replies,
            naming=net.names,
            show_condition=partial(host.show_condition, ConditionName.NETWORKS),
        )

    def network_of_cluster(self, id: str, name: str, driver: str, configuration: str) -> NetworkHead:
        """Return a cluster network that each node creates from its own ``configuration`` (macvlan, ipvlan).

        Raises: NotFound: no such configuration, in Docker's words; SkepError: the configuration is unusable.
        """
        body = NetworkBody(name=name, driver=driver, config_from=ConfigReference(network=configuration))
        devices = [device for _, device in socket.if_nameindex()]
        return head_of(self.local.of_cluster(id, body, devices, self._local_endpoints.is_used))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the networks in their desired state until the block ends.

        A part that fails is restarted with growing pauses.  The other parts continue.
        """
        parts: dict[str, Callable[[], Awaitable[None]]] = {
            "healing of networks": self._healer.run,
            "clearing of networks": self._deferred.run,
            "published ports": self.mesh.run,
            "probes of other nodes": self.prober.run,
            "encrypted networks": partial(self.tunnels.run, self.overlays.apply_measurements),
            "tunnels through NAT": partial(
                self.nat.run, self.overlays.apply_measurements, self._show_tunnels
            ),
        }
        keep = partial(retry, clock=self._clock, rng=self._rng)
        await self.prober.restore()
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(keep(run, "part of the network failed", part=name), name=name)
                for name, run in parts.items()
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()


def _gateway(
    host: Host, home: NetnsReconciler, deferred: DeferredChanges, ports: PortReservations
) -> Gateway:
    """Compose the gateway of containers, with the node's host-mode ports."""
    return Gateway(
        namespaces=host.namespaces,
        home=home,
        deferred=deferred,
        ports=UnreservedPorts(ports, host.own_ports),
        state=host.paths.networks / "gateway",
        pools=pools_or_default(host.pools),
    )


def _local_networks(host: Host, gateway: Gateway) -> LocalNetworks:
    """Compose the node's own networks and their parent devices."""
    file, devices = host.paths.networks / "local", ParentDevices(host.namespaces)
    pools = pools_or_default(host.pools)
    return LocalNetworks(file, gateway, devices, pools=pools, clock=host.clock, new_id=new_container_id)


def _data_path(host: Host, home: NetnsReconciler, healer: Healer, wireguard_port: int) -> DataPath:
    """Compose the probes of other nodes, which run in a namespace of their own."""
    namespace = ProbeNamespace(
        pins=Namespaces(host.paths.probes, host.namespaces.home),
        home=home,
        repairs=healer.repairs,
        healer=healer,
        bridges=(BRIDGE,),
    )
    return DataPath(namespace, host.namespaces, host.clock, _random_number, wireguard_port)


def _random_number() -> int:
    return secrets.randbits(64)
