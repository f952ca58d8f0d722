"""One container as the net process serves it: its name server and its virtual addresses, in its namespace."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.dns.messages import Query
from skep.dataplane.dns.networks import Networks
from skep.dataplane.dns.records import Decision, decide
from skep.dataplane.dns.rules import ADDRESS, NAME, names_table
from skep.dataplane.dns.server import ContainerServer, Forwarding, Sockets, open_sockets
from skep.dataplane.dns.upstream import Forwarder, NameServer
from skep.dataplane.netns import conntrack, nft, nft_table
from skep.dataplane.netns.namespaces import Namespaces, set_sysctl
from skep.dataplane.netns.nft_changes import ForeignChanges, open_notifications
from skep.dataplane.plan.vip import FAMILIES, Plan, VipBackends
from skep.dataplane.plan.vip import NAME as VIP_TABLE
from skep.dataplane.protocol import Named
from skep.dataplane.vip import on_demand
from skep.dataplane.vip.elements import ElementSocket
from skep.dataplane.vip.neighbours import flush_pending
from skep.dataplane.vip.virtual_addresses import Services, VirtualAddresses, delete_stale_flows, write_plan
from skep.errors import SkepError, Unavailable
from skep.linux.files import replace_file
from skep.model.ids import NetworkId, ServiceId

log = structlog.get_logger()

OUR_TABLES = frozenset(
    f"{family} {name}" for family in FAMILIES for name in (NAME, VIP_TABLE, on_demand.NAME)
)


class ContainerRecord(msgspec.Struct, frozen=True):
    """What the next process has to know of a container.

    ``namespace``: device and inode of its namespace, so that another one at the same path is not taken for it.
    """

    named: Named
    udp_port: int = 0
    tcp_port: int = 0
    loaded: tuple[tuple[NetworkId, ServiceId], ...] = ()
    namespace: tuple[int, int] = (0, 0)

    def is_same_namespace(self) -> bool:
        """Whether the namespace that was served is still there."""
        return self.namespace == namespace_at(Path(self.named.netns))


class Environment(msgspec.Struct, frozen=True):
    """What all containers share.  ``start_task``: gives a task a parent."""

    directory: Path
    namespaces: Namespaces
    networks: Networks
    forwarder: Forwarder
    rng: Callable[[], float]
    start_task: Callable[[Awaitable[None]], asyncio.Task[None]]


class ServedContainer:
    """One container.  ``record``: of an earlier process or request, or new; ``foreign_change``: called when another
    program has changed tables of ours."""

    def __init__(
        self, environment: Environment, record: ContainerRecord, foreign_change: Callable[[], None]
    ) -> None:
        self.named = record.named
        self.record = record
        self.sockets: Sockets | None = None
        self._environment = environment
        self._foreign_change = foreign_change
        self._server: ContainerServer | None = None
        self._notifications: socket.socket | None = None
        self._packets: socket.socket | None = None
        self._elements: ElementSocket | None = None
        self._is_closed = False
        self._opening = asyncio.Lock()
        self._subnets = self._own_subnets()
        loaded = frozenset(one for one in record.loaded if one[0] in self._network_ids())
        self.virtual = VirtualAddresses(environment.networks.backends, self._write, loaded)

    def adopt(self, sockets: Sockets) -> None:
        """Answer at once at sockets that are open already, with rules that lead to them."""
        self.sockets = sockets
        self._server = self._new_server(sockets)
        self._server.start()

    async def open(self) -> None:
        """Have sockets, rules and notifications in the namespace, and answer.

        Raises: SkepError, OSError: not now, or it was closed meanwhile.
        """
        async with self._opening:  # a second call closes what the first has opened
            await self._open()

    async def _open(self) -> None:
        path = Path(self.named.netns)
        self._subnets = self._own_subnets()
        self._stop_listening()  # packets are logged to one socket only
        had = self.sockets
        sockets, notifications, packets = await self._environment.namespaces.run(path, self._opened)
        if self._is_closed:  # meanwhile: what is new would never be closed
            for one in (notifications, packets, sockets if sockets is not had else None):
                if one is not None:
                    one.close()
            raise Unavailable("the container was forgotten while it was opened")
        self._notifications, self._packets = notifications, packets
        if packets is not None:
            asyncio.get_running_loop().add_reader(packets, self._read_packets, packets)
        changes = ForeignChanges(self._environment.namespaces.writer)
        asyncio.get_running_loop().add_reader(notifications, self._read_changes, notifications, changes)
        if self.sockets is None:
            self.adopt(sockets)
        self.virtual.mark_unknown()
        await self.virtual.apply()
        udp, tcp = sockets.ports
        self.record = msgspec.structs.replace(
            self.record, udp_port=udp, tcp_port=tcp, namespace=namespace_at(path)
        )
        self.write_down()

    def is_in_order(self) -> bool:
        """Whether it is open, in the namespace that is there."""
        return self._notifications is not None and self.record.is_same_namespace()

    async def repair(self) -> None:
        """Write all rules again.  Raises: SkepError, OSError."""
        if self.sockets is not None:
            tables = [names_table(*self.sockets.ports)]
            tables += on_demand.on_demand_tables(self._subnets) if self._packets else ()
            path, text = Path(self.named.netns), "".join(map(nft_table.whole, tables))
            await self._environment.namespaces.run(path, nft.run, text)
        self.virtual.mark_unknown()
        await self.virtual.apply()

    def answer(self, message: bytes, client: tuple[str, int]) -> None:
        """Answer a question that came to an earlier server of this container."""
        if self._server is not None:
            self._server.received(message, client)

    def pause(self) -> tuple[tuple[str, int, bytes], ...]:
        """Answer nothing more; the questions that wait."""
        return self._server.stop() if self._server is not None else ()

    def resume(self) -> None:
        """Answer again."""
        if self._server is not None:
            self._server.start()

    def give_sockets(self) -> Sockets | None:
        """The sockets, for another owner."""
        sockets, self.sockets = self.sockets, None
        return sockets

    def close(self) -> None:
        """Let go of everything; the rules stay, and lead nowhere."""
        self._is_closed = True
        self.pause()
        self._server = None
        self._stop_listening()
        self._close_elements()
        if self.sockets is not None:
            self.sockets.close()
            self.sockets = None

    def write_down(self) -> None:
        """Keep for the next process what it has to know; of one that is closed, nothing."""
        if self._is_closed:
            return
        loaded = tuple(sorted(self.virtual.loaded))
        self.record = msgspec.structs.replace(self.record, loaded=loaded)
        content = msgspec.msgpack.encode(self.record)
        replace_file(self._environment.directory / self.named.id, content, is_durable=False)

    # --- what names stand for ---------------------------------------------------------------------------------

    def decide(self, query: Query) -> Decision:
        networks = self._environment.networks
        return decide(query, [networks.index(id) for id in self._network_ids()], self._environment.rng())

    def is_loaded(self, virtual: Services) -> bool:
        return self.virtual.is_usable(virtual)

    async def load(self, virtual: Services) -> None:
        await self.virtual.load(virtual)
        self.write_down()

    # ----------------------------------------------------------------------------------------------------------

    def _network_ids(self) -> list[NetworkId]:
        return [place.network for place in self.named.networks]

    def _own_subnets(self) -> tuple[IPv4Network | IPv6Network, ...]:
        networks = self._environment.networks
        return tuple(subnet for id in self._network_ids() for subnet in networks.index(id).subnets)

    def has_other_subnets(self) -> bool:
        """Whether its networks have other subnets than when it was opened."""
        return self._own_subnets() != self._subnets

    def _opened(self) -> tuple[Sockets, socket.socket, socket.socket | None]:
        """In the namespace: sockets (unless there are any), the rules that lead to them, times, notifications, and
        packets to addresses that were not resolved (None: this kernel does not log them)."""
        had = self.sockets
        sockets = had or open_sockets(self.record.udp_port, self.record.tcp_port)
        try:
            nft.create([names_table(*sockets.ports)])
            packets = on_demand.open_on_demand(self._subnets)
            for name, value in conntrack.SYSCTLS.items():  # now that there is connection tracking
                set_sysctl(name, value)
            try:
                return sockets, open_notifications(), packets
            except BaseException:
                if packets is not None:
                    packets.close()
                raise
        except BaseException:
            if had is None:
                sockets.close()
            raise

    async def _write(self, plan: Plan) -> None:
        await self._environment.namespaces.run(Path(self.named.netns), self._write_inside, plan)

    def _write_inside(self, plan: Plan) -> None:
        """In the namespace.  Only ``virtual`` writes plans, one after another."""
        if self._elements is None:
            self._elements = ElementSocket()
        try:
            write_plan(plan, self._elements)
        except BaseException:
            self._close_elements()
            raise
        if self._is_closed:  # meanwhile
            self._close_elements()

    def _close_elements(self) -> None:
        if self._elements is not None:
            self._elements.close()
            self._elements = None

    def _new_server(self, sockets: Sockets) -> ContainerServer:
        environment = self._environment
        return ContainerServer(
            self.named.id, sockets, self, environment.forwarder, self._forwarding(), environment.start_task
        )

    def _forwarding(self) -> Forwarding:
        subnets = [
            subnet for id in self._network_ids() for subnet in self._environment.networks.index(id).subnets
        ]
        servers = []
        for one in self.named.servers:
            try:
                address = ip_address(one.address.partition("%")[0])
            except ValueError:
                continue  # not an address: of no use to anyone
            is_inside = any(address in subnet for subnet in subnets)
            if (is_inside or self.named.forwards) and str(address) != ADDRESS:
                servers.append(NameServer(one.address, one.port, is_inside))
        return Forwarding(tuple(servers), self._open_inside, self.named.forwards_single_labels)

    async def _open_inside(self, kind: socket.SocketKind, family: socket.AddressFamily) -> socket.socket:
        return await self._environment.namespaces.run(Path(self.named.netns), socket.socket, family, kind)

    def _read_changes(self, opened: socket.socket, changes: ForeignChanges) -> None:
        try:
            tables = changes.read(opened)
        except OSError:
            self._stop_listening()
            return
        if tables is None or tables & OUR_TABLES:
            self._foreign_change()

    def _read_packets(self, packets: socket.socket) -> None:
        """There were packets to addresses that may be virtual and not led yet."""
        for address in on_demand.read(packets):
            for network in self._network_ids():
                _, service = self._environment.networks.index(network).reverse.get(
                    address, ("", ServiceId(""))
                )
                if service and not self.virtual.is_usable(frozenset({(network, service)})):
                    self._environment.start_task(self._load_late(network, service))

    async def _load_late(self, network: NetworkId, service: ServiceId) -> None:
        try:
            await self.load(frozenset({(network, service)}))
            backends = self._environment.networks.backends(network).get(service, {})
            await self._environment.namespaces.run(Path(self.named.netns), _start_over, backends)
        except (SkepError, OSError) as error:  # the next packet comes in half a minute
            log.warning("a virtual address is not led", container=self.named.id, reason=str(error))

    def _stop_listening(self) -> None:
        for opened in (self._notifications, self._packets):
            if opened is not None:
                asyncio.get_running_loop().remove_reader(opened)
                opened.close()
        self._notifications = self._packets = None


def _start_over(backends: VipBackends) -> None:
    """Drop what was sent to these addresses before they were led, in the thread's namespace."""
    delete_stale_flows(backends)
    flush_pending(backends.keys())


def namespace_at(path: Path) -> tuple[int, int]:
    """Device and inode of the namespace at ``path``; zeros: there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino
