"""One container's name server and virtual addresses, which the net process serves in the container's namespace."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Set
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.dns.networks import NetworkFiles
from skep.dataplane.dns.redirection import ADDRESS, NAME, names_table
from skep.dataplane.dns.resolution import Decision, decide, links_of
from skep.dataplane.dns.server import ContainerServer, DnsSockets, Forwarding, open_sockets
from skep.dataplane.dns.upstream import QueryForwarder, UpstreamServer
from skep.dataplane.net_process.protocol import Named
from skep.dataplane.netns import nft_table
from skep.dataplane.netns.kernel import conntrack, nft
from skep.dataplane.netns.kernel.namespaces import Namespaces, set_sysctl
from skep.dataplane.netns.kernel.nft_changes import TableWatch, open_notifications
from skep.dataplane.plan.vip import FAMILIES, VipBackends, VipPlan
from skep.dataplane.plan.vip import NAME as VIP_TABLE
from skep.dataplane.vip import on_demand
from skep.dataplane.vip.elements import ElementSocket
from skep.dataplane.vip.virtual_addresses import (
    Services,
    VirtualAddresses,
    delete_stale_flows,
    flush_pending,
    redirect_unaccepted,
    write_plan,
)
from skep.errors import SkepError, Unavailable
from skep.linux.files import is_no_file, replace_file
from skep.model.networks.dns_messages import Query
from skep.model.values.ids import NetworkId, ServiceId

log = structlog.get_logger()

OUR_TABLES = frozenset(
    f"{family} {name}" for family in FAMILIES for name in (NAME, VIP_TABLE, on_demand.NAME)
)


class ContainerRecord(msgspec.Struct, frozen=True):
    """A container's state that the net process saves for its successor.

    ``namespace`` has the device and inode of its namespace.  They tell whether the path now belongs to another
    namespace.
    """

    named: Named
    udp_port: int = 0
    tcp_port: int = 0
    loaded: tuple[tuple[NetworkId, ServiceId], ...] = ()
    namespace: tuple[int, int] = (0, 0)

    def is_same_namespace(self) -> bool:
        """Return whether the served namespace still exists.  Raises: OSError: that cannot be determined at present."""
        return self.namespace == namespace_at(Path(self.named.netns))


class SharedResources(msgspec.Struct, frozen=True):
    """Resources that all containers share.  ``start_task`` starts a supervised task."""

    directory: Path
    namespaces: Namespaces
    networks: NetworkFiles
    forwarder: QueryForwarder
    rng: Callable[[], float]
    start_task: Callable[[Awaitable[None]], asyncio.Task[None]]


class ServedContainer:
    """One container that is served.

    ``record`` is either new, or was saved by an earlier process or request.  ``on_foreign_change`` is called when
    another program has changed our tables in the namespace, and ``on_lost_backend`` after virtual addresses that the
    container uses have lost a backend.
    """

    def __init__(
        self,
        environment: SharedResources,
        record: ContainerRecord,
        on_foreign_change: Callable[[], None],
        on_lost_backend: Callable[[Iterable[str]], None],
    ) -> None:
        self.named = record.named
        self.record = record
        self.sockets: DnsSockets | None = None
        self.environment = environment
        self._on_foreign_change = on_foreign_change
        self._on_lost_backend = on_lost_backend
        self.server: ContainerServer | None = None
        self._watch: TableWatch | None = None
        self._packets: socket.socket | None = None
        self._elements: ElementSocket | None = None
        self._is_closed = False
        self._opening = asyncio.Lock()
        self._links = {one.network: links_of(one.links) for one in record.named.networks if one.links}
        self._subnets = self._own_subnets()
        loaded = frozenset(one for one in record.loaded if one[0] in self._network_ids())
        self.virtual = VirtualAddresses(environment.networks.backends, self._write, loaded)

    def adopt(self, sockets: DnsSockets) -> None:
        """Start to serve at ``sockets`` at once.

        An earlier process or object has opened them and written their rules.
        """
        self.sockets = sockets
        self.server = self._new_server(sockets)
        self.server.start()

    async def open(self) -> None:
        """Open sockets, write rules, watch for changes by other programs, and serve.

        Raises: SkepError, OSError: that failed, or the container was closed meanwhile.
        """
        async with self._opening:  # because a second call closes the listeners of the first
            await self._open()

    async def _open(self) -> None:
        path = Path(self.named.netns)
        self._subnets = self._own_subnets()
        if self.server is not None:
            self.server.forwarding = self._forwarding()
        self._stop_listening()  # first, because the kernel logs packets to one socket only
        earlier = self.sockets
        sockets, notifications, packets = await self.environment.namespaces.run(path, self._prepare_namespace)
        if self._is_closed:  # closed meanwhile, and nothing else would close the new sockets
            for one in (notifications, packets, sockets if sockets is not earlier else None):
                if one is not None:
                    one.close()
            raise Unavailable("the container was removed while its names were set up")
        self._packets = packets
        if packets is not None:
            asyncio.get_running_loop().add_reader(packets, self._read_packets, packets)
        self._watch = TableWatch(notifications, self.environment.namespaces.writer, self._note_changes)
        if self.sockets is None:
            self.adopt(sockets)
        self.virtual.mark_unknown()
        await self.virtual.apply()
        udp, tcp = sockets.ports
        self.record = msgspec.structs.replace(
            self.record, udp_port=udp, tcp_port=tcp, namespace=namespace_at(path)
        )
        self.save()

    def is_open(self) -> bool:
        """Return whether this container is served and its namespace was not replaced since."""
        return self._watch is not None and self._watch.is_open and self.record.is_same_namespace()

    async def repair(self) -> None:
        """Write all tables again.  Raises: SkepError, OSError."""
        if self.sockets is not None:
            tables = [names_table(*self.sockets.ports)]
            tables += on_demand.on_demand_tables(self._subnets) if self._packets else ()
            path, text = Path(self.named.netns), "".join(map(nft_table.whole, tables))
            await self.environment.namespaces.run(path, nft.run, text)
        self.virtual.mark_unknown()
        await self.virtual.apply()

    async def redirect_unaccepted(self, addresses: Set[str]) -> None:
        """Send connections to ``addresses`` that a removed backend has not accepted to a present one.

        Raises: SkepError, OSError.
        """
        backends = {one: found for one, found in self.virtual.backends.items() if one in addresses}
        await self.environment.namespaces.run(Path(self.named.netns), redirect_unaccepted, backends)

    def respond(self, message: bytes, client: tuple[str, int]) -> None:
        """Respond to a query that an earlier server of this container has received."""
        if self.server is not None:
            self.server.received(message, client)

    def pause(self) -> tuple[tuple[str, int, bytes], ...]:
        """Stop serving and return the pending queries."""
        return self.server.stop() if self.server is not None else ()

    def resume(self) -> None:
        """Serve again after ``pause``."""
        if self.server is not None:
            self.server.start()

    def release_sockets(self) -> DnsSockets | None:
        """Return the sockets, which the caller owns from now on."""
        sockets, self.sockets = self.sockets, None
        return sockets

    def close(self) -> None:
        """Close sockets and watches.  The rules stay in the namespace."""
        self._is_closed = True
        self.pause()
        self.server = None
        self._stop_listening()
        self._close_elements()
        if self.sockets is not None:
            self.sockets.close()
            self.sockets = None

    def save(self) -> None:
        """Save the record for the next process, unless this object is closed."""
        if self._is_closed:
            return
        loaded = tuple(sorted(self.virtual.loaded))
        self.record = msgspec.structs.replace(self.record, loaded=loaded)
        content = msgspec.msgpack.encode(self.record)
        replace_file(self.environment.directory / self.named.id, content, is_durable=False)

    # --- resolver (dns.server) ---------------------------------------------------------------------------------

    def resolve(self, query: Query) -> Decision:
        """Decide how to respond to ``query``."""
        networks = self.environment.networks
        indices = [networks.index(id) for id in self._network_ids()]
        return decide(query, indices, self.environment.rng(), self._links)

    def is_loaded(self, virtual: Services) -> bool:
        """Return whether the rules for the virtual addresses of these services are in the namespace."""
        return self.virtual.is_usable(virtual)

    async def load(self, virtual: Services) -> None:
        """Write the rules of these services.  Raises: SkepError, OSError."""
        await self.virtual.load(virtual)
        self.save()

    # ----------------------------------------------------------------------------------------------------------

    def _network_ids(self) -> list[NetworkId]:
        return [attachment.network for attachment in self.named.networks]

    def _own_subnets(self) -> tuple[IPv4Network | IPv6Network, ...]:
        networks = self.environment.networks
        return tuple(subnet for id in self._network_ids() for subnet in networks.index(id).subnets)

    def has_other_subnets(self) -> bool:
        """Return whether the subnets of its networks have changed since it was opened."""
        return self._own_subnets() != self._subnets

    def _prepare_namespace(self) -> tuple[DnsSockets, socket.socket, socket.socket | None]:
        """In the namespace, open sockets unless there are some already, write their rules, and set sysctls.

        Returns the sockets, a socket for nftables notifications, and a socket for logged packets to unresolved
        addresses.  The last is None if the kernel does not support it.
        """
        earlier = self.sockets
        sockets = earlier or open_sockets(self.record.udp_port, self.record.tcp_port)
        try:
            nft.create([names_table(*sockets.ports)])
            packets = on_demand.open_on_demand(self._subnets)
            # only possible now, because the rules have loaded connection tracking
            for name, value in conntrack.SYSCTLS.items():
                set_sysctl(name, value)
            try:
                return sockets, open_notifications(), packets
            except BaseException:
                if packets is not None:
                    packets.close()
                raise
        except BaseException:
            if earlier is None:
                sockets.close()
            raise

    async def _write(self, plan: VipPlan) -> None:
        await self.environment.namespaces.run(Path(self.named.netns), self._write_inside, plan)
        if plan.stale and not plan.is_anew:
            self._on_lost_backend(plan.stale)

    def _write_inside(self, plan: VipPlan) -> None:
        """Write a plan in the namespace.  Only ``virtual`` calls this, one plan at a time."""
        if self._elements is None:
            self._elements = ElementSocket()
        try:
            write_plan(plan, self._elements)
        except BaseException:
            self._close_elements()
            raise
        if self._is_closed:  # closed meanwhile
            self._close_elements()

    def _close_elements(self) -> None:
        if self._elements is not None:
            self._elements.close()
            self._elements = None

    def _new_server(self, sockets: DnsSockets) -> ContainerServer:
        environment = self.environment
        return ContainerServer(
            self.named.id, sockets, self, environment.forwarder, self._forwarding(), environment.start_task
        )

    def _forwarding(self) -> Forwarding:
        subnets, servers = self._own_subnets(), []
        for one in self.named.servers:
            try:
                address = ip_address(one.address.partition("%")[0])
            except ValueError:
                continue  # not an address
            is_inside = any(address in subnet for subnet in subnets)
            if (is_inside or self.named.forwards) and str(address) != ADDRESS:
                servers.append(UpstreamServer(one.address, one.port, is_inside))
        return Forwarding(tuple(servers), self._socket_inside, self.named.forwards_single_labels)

    async def _socket_inside(self, kind: socket.SocketKind, family: socket.AddressFamily) -> socket.socket:
        return await self.environment.namespaces.run(Path(self.named.netns), socket.socket, family, kind)

    def _note_changes(self, tables: frozenset[str] | None) -> None:
        if tables is None or tables & OUR_TABLES:
            self._on_foreign_change()

    def _read_packets(self, packets: socket.socket) -> None:
        """Load the services to whose virtual addresses packets were sent, because their rules may not be loaded yet."""
        for address in on_demand.read(packets):
            for network in self._network_ids():
                _, service = self.environment.networks.index(network).reverse.get(
                    address, ("", ServiceId(""))
                )
                if service and not self.virtual.is_usable(frozenset({(network, service)})):
                    self.environment.start_task(self._load_on_demand(network, service))

    async def _load_on_demand(self, network: NetworkId, service: ServiceId) -> None:
        try:
            await self.load(frozenset({(network, service)}))
            backends = self.environment.networks.backends(network).get(service, {})
            await self.environment.namespaces.run(Path(self.named.netns), _reset_flows, backends)
        # not retried, because the next packet of the flow is logged within half a minute
        except (SkepError, OSError) as error:
            log.warning("virtual address not loaded", container=self.named.id, reason=str(error))

    def _stop_listening(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._packets is not None:
            asyncio.get_running_loop().remove_reader(self._packets)
            self._packets.close()
        self._watch = self._packets = None


def _reset_flows(backends: VipBackends) -> None:
    """Delete flows to these addresses that began before their rules, in the calling thread's namespace."""
    delete_stale_flows(backends)
    flush_pending(backends.keys())


def namespace_at(path: Path) -> tuple[int, int]:
    """Return the device and inode of the namespace at ``path``, or zeros if it does not exist.

    Raises: OSError: that cannot be determined at present."""
    try:
        found = path.stat()
    except OSError as error:
        if is_no_file(error):
            return 0, 0
        raise
    return found.st_dev, found.st_ino
