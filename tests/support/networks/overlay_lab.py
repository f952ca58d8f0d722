"""Nodes for tests of overlay networks: each a namespace with containers' namespaces, connected by an underlay."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from skep.dataplane.dataplane import DataPlane
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.wireguard.tunnels import NO_ENCRYPTION
from skep.model.networks.sandbox import EndpointConfig, NetworkMode, PublishedPort, Sandbox, SandboxConfig
from skep.model.networks.tables import NetworkHead, NetworkTable, Segment, TableEndpoint, TableNode
from skep.model.networks.wireguard import PublicKey, published_keys
from skep.model.values.ids import ContainerId, NetworkId, NodeId, TaskId, new_container_id
from skep.paths import Paths
from tests.support.engine.runc_lab import a_data_plane
from tests.support.networks.reservations import OwnReservations

WEB = NetworkHead(id=NetworkId("webnet"), name="web", segments=(Segment("10.0.1.0/24", "10.0.1.1", 4097),))
TWO_SUBNETS = NetworkHead(
    id=NetworkId("twonet"),
    name="two",
    segments=(Segment("10.0.2.0/24", "10.0.2.1", 4098), Segment("10.0.3.0/24", "10.0.3.1", 4099)),
)
DUAL = NetworkHead(
    id=NetworkId("dualnet"),
    name="dual",
    segments=(Segment("10.0.4.0/24", "10.0.4.1", 4100), Segment("fd04::/64", "fd04::1", 4100)),
)
INGRESS = NetworkHead(
    id=NetworkId("ingressnet"),
    name="ingress",
    segments=(Segment("10.0.0.0/24", "10.0.0.1", 4096),),
    is_ingress=True,
)


class LabNode:
    """One machine with its containers' networking.  A restarted process creates a new ``network``."""

    def __init__(self, root: Path, id: NodeId, home: Path, underlay: str) -> None:
        self.id = id
        self.encryption = NO_ENCRYPTION
        self.public_keys: Callable[[], tuple[PublicKey, ...]] = tuple
        self.home = home
        self.underlay = underlay
        self.paths = Paths(root / "data", root / "run")
        self.namespaces = Namespaces(self.paths.netns, home)
        self.endpoints: dict[ContainerId, Sandbox] = {}
        self.network: DataPlane | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[DataPlane]:
        """Run a node process, which takes over existing state and leaves it at the end."""
        ports = OwnReservations(self.namespaces)
        network = a_data_plane(self.paths, self.namespaces, ports, encryption=self.encryption)
        self.network = network
        self.public_keys = lambda: published_keys(network.tunnels.labels())
        try:
            async with network.running():
                live = [(a_container(id, ()), one) for id, one in self.endpoints.items()]
                await network.containers.restore(live)
                yield network
        finally:
            ports.close()

    async def attach(self, network: DataPlane, *places: EndpointConfig) -> Sandbox:
        """Create a container's namespace."""
        id = new_container_id()
        self.endpoints[id] = await network.containers.attach(a_container(id, places))
        return self.endpoints[id]

    async def detach(self, network: DataPlane, endpoint: Sandbox) -> None:
        id = next(id for id, one in self.endpoints.items() if one == endpoint)
        await network.containers.detach(id, self.endpoints.pop(id))


def a_container(
    id: ContainerId, endpoints: tuple[EndpointConfig, ...], ports: tuple[PublishedPort, ...] = ()
) -> SandboxConfig:
    """Return the configuration of a task's container."""
    mode = NetworkMode.NETWORKS if endpoints else NetworkMode.BRIDGE
    return SandboxConfig(id=id, name=id, mode=mode, endpoints=endpoints, ports=ports)


class OverlayLab:
    """Several nodes on one underlay, and the tables that managers would send them."""

    def __init__(self, root: Path, *, is_v6: bool = False) -> None:
        self._root = root
        self._spaces = Namespaces(root / "homes")
        self._is_v6 = is_v6
        self.nodes: list[LabNode] = []
        self.tables: dict[NetworkId, NetworkTable] = {}

    @asynccontextmanager
    async def running(self, count: int) -> AsyncIterator["OverlayLab"]:
        """Create ``count`` nodes, each connected to one bridge."""
        wire = await self._spaces.create("wire", {})
        try:
            await shell(wire, "ip link add sw type bridge mcast_snooping 0 && ip link set sw up")
            for number in range(1, count + 1):
                home = await self._spaces.create(f"n{number}", {})
                underlay = f"fd09::{number}" if self._is_v6 else f"192.0.2.{number}"
                length = 64 if self._is_v6 else 24
                await shell(wire, f"ip link add p{number} type veth peer name under netns {home}")
                await shell(wire, f"ip link set p{number} master sw up")
                await shell(
                    home, f"ip addr add {underlay}/{length} dev under {'nodad' if self._is_v6 else ''}"
                )
                await shell(home, "ip link set under up && ip link set lo up")
                self.nodes.append(LabNode(self._root / f"n{number}", NodeId(f"n{number}"), home, underlay))
            yield self
        finally:
            for node in self.nodes:
                for space in (
                    node.namespaces,
                    Namespaces(node.paths.overlays),
                    Namespaces(node.paths.probes),
                    Namespaces(node.paths.tunnels),
                ):
                    for id in space.pinned():
                        await space.destroy(id)
                    space.close()
            for id in self._spaces.pinned():
                await self._spaces.destroy(id)
            self._spaces.close()

    @asynccontextmanager
    async def networks(self) -> AsyncIterator[list[DataPlane]]:
        """Run a node process on each node."""
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(node.running()) for node in self.nodes]

    def tell(self, head: NetworkHead, *, ingress_addresses: Mapping[str, str] | None = None) -> NetworkTable:
        """Return the table of a network with all containers that are currently attached."""
        own = ingress_addresses or {}
        nodes = {
            one.id: TableNode(
                id=one.id,
                underlay=one.underlay,
                addresses=(own[one.id],) if one.id in own else (),
                wireguard_keys=one.public_keys() if head.is_encrypted else (),
            )
            for one in self.nodes
        }
        endpoints = {}
        for node in self.nodes:
            for id, endpoint in node.endpoints.items():
                for place in endpoint.endpoints:
                    if place.network_id == head.id:
                        addresses = tuple(one.partition("/")[0] for one in place.config.addresses)
                        task = TaskId(id[:25])
                        endpoints[task] = TableEndpoint(task_id=task, node_id=node.id, addresses=addresses)
        table = NetworkTable(head=head, nodes=nodes, endpoints=endpoints)
        self.tables[head.id] = table
        return table

    def id_of(self, network: DataPlane) -> NodeId:
        """Return the id of the node that has these networks."""
        return next(one.id for one in self.nodes if one.network is network)

    async def apply(self, networks: Sequence[DataPlane], *ids: NetworkId) -> None:
        """Apply the tables on every node.  ``ids``: changed tables."""
        for network in networks:
            await network.overlays.apply(self.id_of(network), self.tables, frozenset(ids or self.tables))


def place(head: NetworkHead, *addresses: str) -> EndpointConfig:
    return EndpointConfig(head=head, addresses=addresses)


async def shell(namespace: Path | str, command: str) -> str:
    """Return the output of ``command`` in a namespace.  It must succeed."""
    code, output = await try_shell(namespace, command)
    assert code == 0, f"{command}: {output}"
    return output


async def try_shell(namespace: Path | str, command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "nsenter",
        f"--net={namespace}",
        "sh",
        "-c",
        command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode(errors="replace")


async def reaches(source: Sandbox, address: str) -> bool:
    """Return whether one of three pings gets a response."""
    code, _ = await try_shell(
        source.netns, f"busybox ping -c 1 -W 1 {address} || busybox ping -c 2 -W 2 {address}"
    )
    return code == 0


async def carry(namespaces: Namespaces, server: Sandbox, client: Sandbox, address: str, size: int) -> int:
    """Send ``size`` bytes over TCP from ``client`` to ``address`` of ``server``.  Return how many arrive."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = await namespaces.run(
        Path(server.netns), lambda: socket.create_server((address, 7000), family=family)
    )

    def send() -> None:
        with socket.create_connection((address, 7000), timeout=10) as connection:
            connection.sendall(b"x" * size)

    def receive() -> int:
        total = 0
        listener.settimeout(10)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            while piece := connection.recv(1 << 16):
                total += len(piece)
        return total

    with listener:
        receiving = asyncio.to_thread(receive)
        _, total = await asyncio.gather(namespaces.run(Path(client.netns), send), receiving)
    return total
