"""The gateway bridge: the default route of every container, and host-mode ports.

One bridge per node with a subnet that overlaps no route of the machine.  Each container gets an address on it, and an
interface with the default route.  Its kernel state is a part of the wanted state of the node's own namespace
(``NetnsReconciler``), which repairs it.

A container on a network with IPv6 has IPv6 egress as well, where the machine has it: from a unique local /64 that the
node chose once, translated to the node's own address.  Without such containers nothing of the node's IPv6 is changed.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import structlog
from pyroute2 import AsyncIPRoute

from skep.aio.failures import isolate
from skep.aio.race import run_to_end
from skep.api.errors import Forbidden
from skep.dataplane.addresses import (
    DEFAULT_POOLS,
    UNIQUE_LOCAL_BITS,
    Addresses,
    Subnets,
    beside,
    free_subnet,
    mac_of,
    unique_local,
)
from skep.dataplane.netns.deferred import DeferredChanges
from skep.dataplane.netns.diff import DeleteLink
from skep.dataplane.netns.forwarding import forward_ipv6, ipv6_refusal
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.state import Address, Link, Peer, State
from skep.dataplane.netns.write import apply_operations
from skep.dataplane.plan.flows import stale_host_ports
from skep.dataplane.plan.gateway import HostPort, between_table, gateway_table, gateway_table_ipv6
from skep.dataplane.plan.overlay import USUAL_MTU
from skep.dataplane.plan.packet_filter import Owner, spoofing_filter
from skep.dataplane.ports import PortReservations
from skep.dataplane.stale_flows import delete_flows
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable
from skep.linux.files import is_no_file, replace_file
from skep.model.ids import ContainerId
from skep.model.sandbox import PublishedPort, Sandbox
from skep.model.service import PublishMode

log = structlog.get_logger()

Network = TypeVar("Network", IPv4Network, IPv6Network)

_Port: TypeAlias = tuple[str, int, str]
"""Protocol, number and address of a reserved port."""

BRIDGE = "skep-gw"
_PART = "gateway"
_TWINS_MAX = 10
"""Attempts to find a number that is free for IPv4 and for IPv6."""
_FAMILIES = {IPv4Network: socket.AF_INET, IPv6Network: socket.AF_INET6}
_HOME_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    # Bridged frames are not the node's own traffic: its nat chains must not see them.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}


class Gateway:
    """The gateway bridge of one node.

    Args:
        state: file with the chosen subnet; the IPv6 one is beside it.
        pools: where the subnet is from.
    """

    def __init__(
        self,
        *,
        namespaces: Namespaces,
        home: NetnsReconciler,
        deferred: DeferredChanges,
        ports: PortReservations,
        state: Path,
        bridge: str = BRIDGE,
        pools: Sequence[Subnets] = DEFAULT_POOLS,
    ) -> None:
        self._namespaces = namespaces
        self._home = home
        self._deferred = deferred
        self._reservations = ports
        self._state = state
        self._state6 = state.with_name(f"{state.name}6")
        self._bridge = bridge
        self._pools = pools
        self._addresses: Addresses[IPv4Network] | None = None
        self._subnet6: IPv6Network | None = None
        self._forwards_ipv6 = False
        self._sandboxes: dict[ContainerId, Sandbox] = {}
        self._holders: dict[_Port, ContainerId] = {}
        """Who has each reserved port: the next one may have what a record of an earlier run says."""
        self._unheld: frozenset[_Port] = frozenset()
        """Ports of containers that another program took while the net process held none: they are not published."""
        self._reserving = 0
        """Reservations without an answer so far: the port may be held, and is in no record."""
        self._changing = asyncio.Lock()

    async def restore(self, live: Mapping[ContainerId, Sandbox]) -> None:
        """Make bridge and rules, keep addresses and ports of the ``live`` containers and release all other ports.

        Raises: SkepError: this node cannot network containers.
        """
        async with self._changing:
            addresses = await self._choose_addresses()
            for id, sandbox in live.items():
                if sandbox.address:
                    addresses.claim(IPv4Address(sandbox.address), id)
                    self._sandboxes[id] = sandbox
            await self._restore_ports()
            await self._apply()
            # Rules of an earlier process may have led to other containers.
            await self._delete_flows(self._sandboxes.values())

    async def connect(
        self,
        container_id: ContainerId,
        netns: Path,
        interface: str,
        ports: Sequence[PublishedPort],
        *,
        is_open: bool = False,
        wants_ipv6: bool = False,
        mac_address: str = "",
    ) -> Sandbox:
        """An interface for a container, without address and route so far, and its host-mode ``ports`` published.

        ``is_open``: it reaches other open ones by the bridge; ``wants_ipv6``: with IPv6 egress, where the machine has
        it; ``mac_address``: that its user has chosen.  Raises: AlreadyExists: a port is in use; SkepError.
        """
        addresses = self._require_addresses()
        address = addresses.take(container_id)
        reserved: list[PublishedPort] = []
        try:
            for port in ports:
                if port.publish_mode is PublishMode.HOST:
                    reserved += await self._reserve(container_id, port, str(address))
            subnet6 = self._subnet6 if wants_ipv6 else None
            sandbox = Sandbox(
                netns=str(netns),
                address=str(address),
                prefix_length=addresses.subnet.prefixlen,
                gateway=str(addresses.gateway),
                mac_address=mac_address or mac_of(address),
                network=self._bridge,
                interface=interface,
                port=new_port_name(),
                is_open=is_open,
                ports=tuple(reserved),
                address6=str(beside(address, subnet6)) if subnet6 is not None else "",
                gateway6=str(subnet6[1]) if subnet6 is not None else "",
            )
            self._sandboxes[container_id] = sandbox
            await self._apply()
            await self._delete_flows([sandbox])
        except BaseException:
            await asyncio.shield(self._undo(container_id))
            raise
        return sandbox

    async def disconnect(self, container_id: ContainerId) -> None:
        """Release addresses and ports of ``connect``.  Idempotent; after an error the container is one of ``users``."""
        if container_id in self.users() or container_id in self._sandboxes:
            await self._undo(container_id)

    async def cut(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """``disconnect`` a running container: its interface is removed, too.  Raises: SkepError."""
        if sandbox.port:
            await apply_operations(self._namespaces, self._namespaces.home, [DeleteLink(sandbox.port)])
        await self.disconnect(container_id)

    async def change(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """``sandbox`` is what a connected container has now: whether it is open differs.  Raises: SkepError."""
        before, self._sandboxes[container_id] = self._sandboxes[container_id], sandbox
        try:
            await self._apply()
        except BaseException:
            self._sandboxes[container_id] = before
            raise

    async def sweep(self) -> None:
        """Release ports that no container has, and hold those that the net process has lost, in a crash for instance.

        A port may have been reserved without an answer.  Raises: Unavailable.
        """
        async with self._changing:
            if self._addresses is None:
                return  # which ports containers have is not known so far
            published = self._published()  # before the list: one that is reserved meanwhile is not lost
            held = frozenset(await self._reservations.held())
            for port in held:
                if not self._reserving and port not in self._holders:
                    await self._reservations.release(*port)
            before = self._unheld
            await self._hold_again(published, held)
            if self._unheld != before:
                await self._apply()
                await self._delete_flows(self._sandboxes.values())

    def sandbox_of(self, container_id: ContainerId) -> Sandbox | None:
        """The result of ``connect`` of a connected container; None: it is not connected."""
        return self._sandboxes.get(container_id)

    # --- another subnet ---------------------------------------------------------------------------------------

    @property
    def bridge(self) -> str:
        """Name of its link."""
        return self._bridge

    @property
    def subnet(self) -> IPv4Network | None:
        """Of the bridge; None: it is not made yet."""
        return self._addresses.subnet if self._addresses is not None else None

    def users(self) -> Sequence[str]:
        """Ids of the connected containers."""
        return self._addresses.owners() if self._addresses is not None else ()

    async def move(self, subnet: IPv4Network | None) -> None:
        """Give the bridge another subnet; None: one that is free.

        Raises: FailedPrecondition: a container is on it; Forbidden: the machine has that network; SkepError.
        """
        if subnet is not None:
            async with self._namespaces.netlink(self._namespaces.home) as home:
                taken = await _networks_except(home, await _index(home, self._bridge), IPv4Network)
            for network in taken:
                if network.prefixlen and network.overlaps(subnet):
                    raise Forbidden(
                        f"Pool overlaps with other one on this address space: {subnet} and {network}, "
                        "which this machine reaches by itself"
                    )
        if self.users():
            raise FailedPrecondition("containers are on the node's gateway bridge")
        before, self._addresses = self._addresses, None  # no more addresses of the old subnet
        try:
            # With all its addresses: it may have others than the wanted state.
            await self._home.remove(self._bridge)
            if subnet is None:
                self._state.unlink(missing_ok=True)
            else:
                _save(self._state, subnet)
            async with self._changing:
                await self._choose_addresses()
                await self._apply()
        except BaseException:
            if self._addresses is None and before is not None:  # the next container has the bridge made again
                self._addresses = before
                with suppress(OSError):
                    _save(self._state, before.subnet)  # as it is in memory, for the next process
            raise

    async def _undo(self, container_id: ContainerId) -> None:
        sandbox = self._sandboxes.pop(container_id, None)
        if sandbox is not None:
            self._home.expect_removal(sandbox.port)
            self._set_part()
        ports = [port for port, holder in self._holders.items() if holder == container_id]
        if ports:
            try:
                await self._home.apply()  # before another container gets the port
            except SkepError as error:  # the next comparison removes it
                log.warning("gateway rules not removed", container=container_id, error=str(error))
            if sandbox is not None:
                await self._delete_flows([sandbox], is_published=False)
        else:
            self._deferred.soon(_PART, self._home.apply)
        for port in ports:
            await self._release(container_id, port)
        self._require_addresses().release_all(container_id)  # last: until then a sweep finds the ports

    async def _delete_flows(self, sandboxes: Iterable[Sandbox], *, is_published: bool = True) -> None:
        """Delete UDP flows through ports of ``sandboxes`` that lead elsewhere, or to them if they are unpublished."""
        subnet = str(self._require_addresses().subnet)
        stale = [
            port
            for one in sandboxes
            for port in stale_host_ports(one.ports, one.address, subnet, is_published=is_published)
        ]
        if stale:  # a search takes the kernel 9 ms
            deletion = self._namespaces.run(self._namespaces.home, delete_flows, stale)
            await isolate(deletion, "stale flows not deleted")  # new clients are served all the same

    async def _apply(self) -> None:
        """Apply bridge, ports and rules.  Raises: SkepError."""
        self._set_part()
        if self._used_subnet6() is not None and not self._forwards_ipv6:
            await self._namespaces.run(self._namespaces.home, forward_ipv6)
            self._forwards_ipv6 = True
        await self._home.apply()

    def _set_part(self) -> None:
        subnet, subnet6, sandboxes = (
            self._require_addresses().subnet,
            self._used_subnet6(),
            self._sandboxes.values(),
        )
        state = gateway_state(self._bridge, subnet, sandboxes, subnet6)
        owners = [
            Owner(one.port, one.mac_address, tuple(filter(None, (one.address, one.address6))))
            for one in sandboxes
            if one.port
        ]
        host_ports = [
            port
            for one in sandboxes
            for port in _host_ports(
                one.address, [it for it in one.ports if _reserved(it) not in self._unheld]
            )
        ]
        between = between_table((one.port, one.is_open) for one in sandboxes if one.port)
        rules = [gateway_table(self._bridge, subnet, host_ports), spoofing_filter(owners), between]
        if subnet6 is not None:
            rules.append(gateway_table_ipv6(self._bridge, subnet6))
        self._home.set_part(_PART, state, *rules)

    def _used_subnet6(self) -> IPv6Network | None:
        """None: no container has IPv6 egress at present."""
        return self._subnet6 if any(one.address6 for one in self._sandboxes.values()) else None

    # --- ports ------------------------------------------------------------------------------------------------

    async def _reserve(self, id: ContainerId, port: PublishedPort, address: str) -> tuple[PublishedPort, ...]:
        """What ``port`` publishes of the container with ``address``: with no address of the node, IPv4 and IPv6."""
        if port.host_ip or port.protocol == "sctp":
            return (await self._reserve_one(id, port, address),)
        for left in reversed(range(_TWINS_MAX)):
            first = await self._reserve_one(id, port, address)
            twin = msgspec.structs.replace(first, host_ip="::")
            try:
                return first, await self._reserve_one(id, twin, address)
            except AlreadyExists:
                await self._release(id, _reserved(first))
                if port.published_port or not left:
                    raise
            except FailedPrecondition:  # this node has no IPv6
                return (first,)
            except BaseException:
                await asyncio.shield(self._release(id, _reserved(first)))
                raise
        raise AssertionError("the last try returns or raises")

    async def _reserve_one(self, id: ContainerId, port: PublishedPort, address: str) -> PublishedPort:
        target = (address, port.target_port) if ":" in port.host_ip else None

        async def reserve() -> PublishedPort:
            self._reserving += 1
            try:
                number = await self._reservations.reserve(
                    port.protocol, port.published_port, port.host_ip, target
                )
            finally:
                self._reserving -= 1
            reserved = msgspec.structs.replace(port, published_port=number)
            self._holders[_reserved(reserved)] = id
            self._unheld -= {_reserved(reserved)}
            return reserved

        return await run_to_end(reserve())  # a reserved port in no record would be held for good

    async def _release(self, id: ContainerId, port: _Port) -> None:
        await self._reservations.release(*port)
        if self._holders.get(port) == id:  # the next holder may have it already
            del self._holders[port]

    async def _restore_ports(self) -> None:
        published = self._published()
        # Known before anything is waited for: a sweep releases what has no holder.
        self._holders = {port: id for port, (id, _, _) in published.items()}
        held = frozenset(await self._reservations.held())
        await self._hold_again(published, held)
        for gone in sorted(held - published.keys()):  # of containers that are gone
            await self._reservations.release(*gone)

    def _published(self) -> Mapping[_Port, tuple[ContainerId, PublishedPort, str]]:
        """The container, the port and the container's address of each host-mode port."""
        return {
            _reserved(port): (id, port, one.address)
            for id, one in self._sandboxes.items()
            for port in one.ports
        }

    async def _hold_again(
        self, published: Mapping[_Port, tuple[ContainerId, PublishedPort, str]], held: frozenset[_Port]
    ) -> None:
        """Hold what is ``published`` and not ``held``; what cannot be held is not published until it can."""
        unheld = set()
        for key in sorted(published.keys() - held):
            id, port, address = published[key]
            try:
                await self._reserve_one(id, port, address)
            except SkepError as error:
                if self._holders.get(key) != id:  # another container has it by now
                    continue
                unheld.add(key)
                if key not in self._unheld:
                    log.warning(
                        "host port is not published any longer", port=key, container=id, reason=str(error)
                    )
            else:
                if id not in self._sandboxes:  # disconnected meanwhile, without this port
                    await self._release(id, key)
        self._unheld = frozenset(unheld)

    # --- subnet -----------------------------------------------------------------------------------------------

    async def _choose_addresses(self) -> Addresses[IPv4Network]:
        subnet, self._subnet6 = await self._choose_subnets()
        self._addresses = Addresses(subnet)
        return self._addresses

    async def _choose_subnets(self) -> tuple[IPv4Network, IPv6Network | None]:
        """For IPv4, and for IPv6 if this machine can give containers IPv6 egress."""
        at_home = self._namespaces.home
        refusal = await self._namespaces.run(at_home, ipv6_refusal)
        if refusal:
            log.info("no ipv6 egress for containers", reason=refusal)
        async with self._namespaces.netlink(at_home) as home:
            index = await _index(home, self._bridge)
            taken = await _networks_except(home, index, IPv4Network)
            subnet = stored_subnet(
                self._state, taken, IPv4Network, lambda: free_subnet(taken, self._pools, IPv4Network)
            )
            if refusal:
                return subnet, None
            taken6 = await _networks_except(home, index, IPv6Network)
            return subnet, stored_subnet(self._state6, taken6, IPv6Network, _fresh_unique_local)

    def _require_addresses(self) -> Addresses[IPv4Network]:
        if self._addresses is None:
            raise Unavailable("the node's network is not set up yet")
        return self._addresses


def gateway_state(
    bridge: str, subnet: IPv4Network, sandboxes: Iterable[Sandbox], subnet6: IPv6Network | None = None
) -> State:
    """The gateway network's part of the node's own namespace.  ``subnet6``: None: IPv6 is unused.

    The bridge has a fixed MAC address: otherwise it has that of its lowest port, which changes with the ports.
    """
    links = {bridge: Link(name=bridge, kind="bridge", mtu=USUAL_MTU, mac=mac_of(subnet[1]))}
    for one in sandboxes:
        if one.port:
            peer = Peer(netns=one.netns, interface=one.interface, mac=one.mac_address)
            links[one.port] = Link(name=one.port, kind="veth", mtu=USUAL_MTU, master=bridge, peer=peer)
    addresses, sysctls6 = {Address(bridge, f"{subnet[1]}/{subnet.prefixlen}")}, {}
    if subnet6 is not None:
        addresses.add(Address(bridge, f"{subnet6[1]}/{subnet6.prefixlen}"))
        sysctls6 = {
            "net/ipv6/conf/all/forwarding": "1",
            f"net/ipv6/conf/{bridge}/accept_dad": "0",
            f"net/ipv6/conf/{bridge}/accept_ra": "0",
            f"net/ipv6/conf/{bridge}/addr_gen_mode": "0",
            f"net/ipv6/conf/{bridge}/disable_ipv6": "0",
        }
    return State(
        links=links,
        addresses=frozenset(addresses),
        sysctls={
            **_HOME_SYSCTLS,
            # For clients on the node at 127.0.0.1; packets from outside are dropped (chain ``raw``).
            f"net/ipv4/conf/{bridge}/route_localnet": "1",
            f"net/ipv4/conf/{bridge}/rp_filter": "0",
            # A port is published before its container's interface is up.  A packet of that moment would have all later
            # ones wait for the second ARP request, by default a second later.  75 of them take the usual 3 s; 40 ms are
            # whole ticks of each kernel's clock, so that the same value is read back.
            f"net/ipv4/neigh/{bridge}/retrans_time_ms": "40",
            f"net/ipv4/neigh/{bridge}/mcast_solicit": "75",
            **sysctls6,
        },
    )


def new_port_name() -> str:
    """Name of a container's port on the bridge; the kernel takes 15 characters.

    Not derived from the container's id: the kernel may take a moment to remove the port of an earlier start.
    """
    return f"vs{secrets.token_hex(6)}"


def _reserved(port: PublishedPort) -> _Port:
    return port.protocol, port.published_port, port.host_ip


def _host_ports(address: str, ports: Sequence[PublishedPort]) -> list[HostPort]:
    """Those of IPv4; the net process relays the others."""
    return [
        HostPort(port.protocol, port.published_port, address, port.target_port, port.host_ip)
        for port in ports
        if port.publish_mode is PublishMode.HOST and ":" not in port.host_ip
    ]


async def _index(route: AsyncIPRoute, name: str) -> int:
    """Index of a link, 0 when there is none."""
    found = await route.link_lookup(ifname=name)
    return found[0] if found else 0


async def _networks_except(route: AsyncIPRoute, index: int, version: type[Network]) -> list[Network]:
    """Destinations of the node's routes, without those through the link ``index``."""
    networks = []
    async for response in await route.route("dump", family=_FAMILIES[version]):
        destination = response.get("dst")
        if destination and response.get("oif") != index:
            networks.append(version(f"{destination}/{response['dst_len']}", strict=False))
    return networks


def _fresh_unique_local() -> IPv6Network:
    return unique_local(secrets.randbits(UNIQUE_LOCAL_BITS))


def stored_subnet(
    file: Path, taken: Iterable[Network], version: type[Network], fresh: Callable[[], Network]
) -> Network:
    """The subnet that ``file`` has, unless one of ``taken`` collides with it by now: then a ``fresh`` one.

    ``taken``: what the machine's routes reach.  Raises: what ``fresh`` does; OSError: it cannot be read, or
    not be written.
    """
    try:
        remembered = version(file.read_text().strip())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise  # containers are on it
    else:
        # The default route is everywhere.
        if not any(remembered.overlaps(network) for network in taken if network.prefixlen):
            return remembered
        log.warning("the gateway's subnet collides with a route and is changed", subnet=str(remembered))
    subnet = fresh()
    _save(file, subnet)
    return subnet


def _save(file: Path, subnet: IPv4Network | IPv6Network) -> None:
    """Keep ``subnet`` for the next process.  Raises: OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, f"{subnet}\n".encode(), is_durable=False)
