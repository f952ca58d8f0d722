"""Network namespaces as machines for tests of the routing mesh: nodes, tasks on their ingress network, and clients.

``ip`` commands replace the overlay for containers, so that the mesh is tested by itself.
"""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from skep.aio.clock import SystemClock
from skep.dataplane.addresses import mac_of
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.ingress.reply_routing import ReplyRouting
from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.namespaces import Namespaces, inside
from skep.dataplane.netns.observation import CONTAINER, Scope
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Link, NamespaceState
from skep.dataplane.plan.reply_routing import IngressEndpoint
from skep.dataplane.proxy.relay import ConnectionRelays
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
    TableSplit,
)
from skep.model.values.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from tests.support.networks.reservations import OwnReservations

T = TypeVar("T")

NETWORK = NetworkId("ingress0")
SERVICE = ServiceId("web0")
_HEAD = NetworkHead(
    id=NETWORK,
    name="ingress",
    is_ingress=True,
    segments=(
        Segment(subnet="10.0.0.0/24", gateway="10.0.0.1", vni=4096),
        Segment(subnet="fd00:1::/64", gateway="fd00:1::1", vni=4096),
    ),
)
_BARE = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}
CLIENT, CLIENT_IPV6 = "192.0.2.100", "2001:db8::100"


class LabTask:
    """A task's namespace with servers that respond with its name and the client's address."""

    def __init__(self, name: str, node: "LabNode", number: int, *, has_ipv6: bool) -> None:
        self.name = name
        self.node = node
        self.addresses = (f"10.0.0.{number}", *((f"fd00:1::{number}",) if has_ipv6 else ()))
        self.netns = node.lab.places.path(name)
        self.is_serving = True
        self.version = 0
        """The version of the service's spec."""
        self._servers: list[Any] = []

    def endpoint(self) -> TableEndpoint:
        return TableEndpoint(
            task_id=TaskId(self.name),
            node_id=self.node.id,
            service_id=SERVICE,
            addresses=self.addresses,
            is_running=True,
            is_serving=self.is_serving,
            version=self.version,
        )

    async def serve(self, port: int = 80) -> None:
        """Serve TCP and UDP over IPv4 and IPv6."""
        loop = asyncio.get_running_loop()
        for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            tcp, udp = await self.node.lab.places.run(self.netns, _server_sockets, family, any_address, port)
            self._servers.append(await asyncio.start_server(self._answer, sock=tcp))
            transport, _ = await loop.create_datagram_endpoint(lambda: _UdpServer(self.name), sock=udp)
            self._servers.append(transport)

    def close(self) -> None:
        for server in self._servers:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Respond to each line with the task's name, the client's address, and the line."""
        with suppress(ConnectionError):
            while line := await reader.readline():
                peer = writer.get_extra_info("peername")[0]
                writer.write(f"{self.name} {peer} ".encode() + line)
                await writer.drain()
            writer.write(b"bye\n")
        writer.close()


class LabNode:
    """A node: a namespace on the underlay, the bridge of the ingress network, and its mesh."""

    def __init__(self, lab: "MeshLab", number: int) -> None:
        self.lab = lab
        self.number = number
        self.id = NodeId(f"n{number}")
        self.address = f"192.0.2.{number}"
        self.address_ipv6 = f"2001:db8::{number}"
        self.ingress = (f"10.0.0.{200 + number}", *((f"fd00:1::{200 + number}",) if lab.has_ipv6 else ()))
        self.netns = lab.places.path(self.id)
        self.namespaces = Namespaces(lab.root / "ns", self.netns)
        self.reservations = OwnReservations(self.namespaces)
        self.repairs = Repairs()
        self.healer = self._new_healer()
        self.relays = lab.root / f"run-{number}" / "relays.json"
        self.mesh = self.new_mesh()

    def new_mesh(self) -> Mesh:
        """Create a mesh without the state of the previous one, as after a restart of the node process."""
        self.healer.close()
        self.healer = self._new_healer()
        scope = Scope(has_own_routes=False)
        self.home = NetnsReconciler("node", self.netns, self.namespaces, self.repairs, scope)
        return Mesh(
            namespaces=self.namespaces,
            home=self.home,
            reply_routing=ReplyRouting(self.healer),
            ports=self.reservations,
            relays=self.relays,
            clock=SystemClock(),
            rng=random.random,
        )

    def _new_healer(self) -> Healer:
        return Healer(self.namespaces, SystemClock(), self.repairs, rng=random.random)

    @asynccontextmanager
    async def relaying(self) -> AsyncIterator[None]:
        """Run the relays of this node, which usually run in the net process."""
        with ThreadPoolExecutor(1) as thread:

            def in_namespace(call: Callable[[], socket.socket]) -> socket.socket:
                return thread.submit(inside, self.netns, call).result()

            relays = ConnectionRelays(
                self.relays, SystemClock(), random.random, self.reservations.sockets, in_namespace
            )
            running = asyncio.create_task(relays.run())
            try:
                yield
            finally:
                running.cancel()
                await asyncio.wait([running])

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Let this node's mesh retry failures, and follow addresses that move."""
        running = asyncio.create_task(self.mesh.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def nft(self, text: str) -> str:
        """Change nftables as another program on the node would."""
        return await self.lab.places.run(self.netns, nft.run, text)

    @asynccontextmanager
    async def healing(self) -> AsyncIterator[None]:
        """Compare and repair this node's namespaces."""
        await self.healer.watch(self.home)
        running = asyncio.create_task(self.healer.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])


class MeshLab:
    """``node_count`` nodes and a client on one underlay."""

    def __init__(self, root: Path, node_count: int, *, has_ipv6: bool) -> None:
        self.root = root
        self.has_ipv6 = has_ipv6
        self.has_ways_out_ipv6 = False
        """Whether tasks that are added from now on have a default route for IPv6."""
        self.places = Namespaces(root / "ns")
        self.ports: tuple[TablePort, ...] = ()
        self.split: TableSplit | None = None
        """Share of the new tasks during a staged update."""
        self.tasks: list[LabTask] = []
        self.nodes = [LabNode(self, number) for number in range(1, node_count + 1)]
        self.known = list(self.nodes)
        """Nodes in the table."""
        self.client = self.places.path("client")
        self._revision = 0

    def table(self) -> NetworkTable:
        segments = _HEAD.segments if self.has_ipv6 else _HEAD.segments[:1]
        return NetworkTable(
            head=msgspec.structs.replace(_HEAD, segments=segments),
            revision=self._revision,
            nodes={
                node.id: TableNode(id=node.id, underlay=node.address, addresses=node.ingress)
                for node in self.known
            },
            endpoints={TaskId(task.name): task.endpoint() for task in self.tasks},
            services={SERVICE: TableService(id=SERVICE, name="web", ports=self.ports, split=self.split)},
        )

    def publish(self, *ports: tuple[str, int, int], **options: Any) -> None:
        """Publish ports, each with protocol, published port and target port."""
        self.ports = tuple(
            TablePort(
                protocol=protocol, published=published, target=target, options=PublishOptions(**options)
            )
            for protocol, published, target in ports
        )

    async def spread(self) -> None:
        """Send the current table to all nodes."""
        self._revision += 1
        for node in self.nodes:
            await node.mesh.apply(node.id, {NETWORK: self.table()}, frozenset({NETWORK}))

    async def add_task(self, name: str, node: LabNode) -> LabTask:
        """Create a task that serves on port 80, with its return route.  The next ``spread`` adds it to the table."""
        task = LabTask(name, node, 10 + len(self.tasks), has_ipv6=self.has_ipv6)
        await self.places.create(name, _BARE)
        await self._connect_task(task)
        await self.join(task)
        await task.serve()
        self.tasks.append(task)
        return task

    async def join(self, task: LabTask) -> None:
        """Connect a task as the node does for a new container, or for a container of an earlier process."""
        last = task.addresses[0].rpartition(".")[2]
        endpoint = IngressEndpoint(
            "eth0", f"172.18.0.{last}", f"fd12::{last}" if self.has_ways_out_ipv6 else ""
        )
        node = task.node
        reconciler = NetnsReconciler(task.name, task.netns, node.namespaces, node.repairs, CONTAINER)
        reconciler.set_part("container", NamespaceState(links={"eth0": Link(name="eth0", kind="veth")}))
        await node.healer.watch(reconciler)
        await node.mesh.reply_routing.add(ContainerId(task.name), reconciler, endpoint)

    async def ask(self, address: str, port: int, protocol: str = "tcp", *, timeout_s: float = 3.0) -> str:
        """Return the task that responds to the client, and the source address it saw: ``t1 192.0.2.100``.  Raises:
        OSError.
        """
        return await self.places.run(self.client, ask, address, port, protocol, timeout_s)

    async def ask_on(
        self, node: LabNode, address: str, port: int, protocol: str = "tcp", *, timeout_s: float = 3.0
    ) -> str:
        """Return the same for a node as the client."""
        return await self.places.run(node.netns, ask, address, port, protocol, timeout_s)

    async def in_client(self, call: Callable[..., T], *arguments: Any) -> T:
        return await self.places.run(self.client, call, *arguments)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["MeshLab"]:
        made = ["underlay", "client", *(node.id for node in self.nodes)]
        for name in made:
            await self.places.create(name, _BARE)
        try:
            await self._connect_nodes()
            yield self
        finally:
            for task in self.tasks:
                task.close()
            for node in self.nodes:
                node.healer.close()
                node.reservations.close()
                node.namespaces.close()
            for name in self.places.pinned():
                await self.places.destroy(name)
            self.places.close()

    async def _connect_nodes(self) -> None:
        await self.batch(
            "underlay",
            "link set lo up",
            "link add ub type bridge mcast_snooping 0",
            "link set ub up",
        )
        everybody = [(node.id, node.address, node.address_ipv6) for node in self.nodes]
        for name, address, address_ipv6 in [*everybody, ("client", CLIENT, CLIENT_IPV6)]:
            peer = f"link add u-{name} type veth peer name eth0 netns {self.places.path(name)}"
            await self.batch("underlay", peer, f"link set u-{name} master ub up")
            await self.batch(
                name,
                "link set lo up",
                "link set eth0 up",
                f"addr add {address}/24 dev eth0",
                f"addr add {address_ipv6}/64 dev eth0 nodad",
            )
        for node in self.nodes:
            await self.batch(
                node.id,
                f"link add skep-ingress address {mac_of(IPv4Address(node.ingress[0]))} type bridge mcast_snooping 0",
                "link set skep-ingress mtu 1450 up",
                f"addr add {node.ingress[0]}/24 dev skep-ingress",
                *(f"addr add {address}/64 dev skep-ingress nodad" for address in node.ingress[1:]),
                f"link add vx type vxlan id 4096 dstport 4789 local {node.address} nolearning proxy",
                "link set vx master skep-ingress mtu 1450 up",
                # the gateway bridge, with a default route that does not lead to the clients
                "link add skep-gw type bridge mcast_snooping 0",
                "link set skep-gw up",
                "addr add 172.18.0.1/16 dev skep-gw",
                "addr add fd12::1/64 dev skep-gw nodad",
            )
        for node in self.nodes:
            for other in self.nodes:
                if other is not node:
                    await self._neighbor(node, other.ingress, other.address)

    async def _connect_task(self, task: LabTask) -> None:
        mac = mac_of(IPv4Address(task.addresses[0]))
        short = task.addresses[0].rpartition(".")[2]
        peer = f"type veth peer name {{}} netns {task.netns}"
        await self.batch(
            task.node.id,
            f"link add i{short} mtu 1450 " + peer.format(f"eth0 address {mac}"),
            f"link set i{short} master skep-ingress up",
            f"link add g{short} " + peer.format("eth1"),
            f"link set g{short} master skep-gw up",
        )
        await self.batch(
            task.name,
            "link set lo up",
            "link set eth0 mtu 1450 up",
            "link set eth1 up",
            f"addr add {task.addresses[0]}/24 dev eth0",
            *(f"addr add {address}/64 dev eth0 nodad" for address in task.addresses[1:]),
            f"addr add 172.18.0.{short}/16 dev eth1",
            "route add default via 172.18.0.1",
            *(
                (f"addr add fd12::{short}/64 dev eth1 nodad", "route add ::/0 via fd12::1")
                if self.has_ways_out_ipv6
                else ()
            ),
        )
        for node in self.nodes:
            if node is not task.node:
                await self._neighbor(node, task.addresses, task.node.address)

    async def _neighbor(self, node: LabNode, addresses: Sequence[str], underlay: str) -> None:
        mac = mac_of(IPv4Address(addresses[0]))
        commands = [
            f"bridge fdb replace {mac} dev vx dst {underlay} self permanent",
            f"bridge fdb replace {mac} dev vx master static",
            *(f"ip neigh replace {address} lladdr {mac} dev vx nud permanent" for address in addresses),
        ]
        await self.shell(node.id, " && ".join(commands))

    async def batch(self, name: str, *commands: str) -> None:
        """Run ``ip`` commands in the namespace ``name``."""
        await self.shell(name, "ip -batch -", "\n".join(commands))

    async def shell(self, name: str, command: str, stdin: str = "") -> None:
        """Run a command line in the namespace ``name``."""
        process = await asyncio.create_subprocess_exec(
            "nsenter",
            f"--net={self.places.path(name)}",
            "sh",
            "-c",
            command,
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate(stdin.encode())
        assert process.returncode == 0, f"{name}: {command}\n{stdin}\n{errors.decode()}"


def ask(address: str, port: int, protocol: str = "tcp", timeout_s: float = 3.0) -> str:
    """Send one line from the current namespace.  Return the response without its echo."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as client:
        client.settimeout(timeout_s)
        client.connect((address, port))
        client.send(b"hello\n")
        return client.recv(1000).decode().removesuffix(" hello\n")


def _server_sockets(family: int, address: str, port: int) -> tuple[socket.socket, socket.socket]:
    tcp = socket.create_server((address, port), family=family, dualstack_ipv6=False)
    udp = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    udp.bind((address, port))
    return tcp, udp


class _UdpServer(asyncio.DatagramProtocol):
    def __init__(self, name: str) -> None:
        self._name = name
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        self._transport.sendto(f"{self._name} {peer[0]} ".encode() + data, peer)
