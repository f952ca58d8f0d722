"""The gateway bridge: the default route of every container, and host-mode ports.

Each node has one such bridge, with a subnet that overlaps no route of the machine.  A container gets an interface and
an address on it, and its default route leads there.  The bridge is part of the desired state of the node's own
namespace, which ``NetnsReconciler`` maintains.

A container on a network with IPv6 also gets IPv6 egress if the machine has it.  Its address is in a unique local /64
that the node has chosen at random, and is translated to the node's own address.  The node's IPv6 settings are not
changed before a container needs that.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from itertools import chain
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
    derived_ipv6,
    free_subnet,
    mac_of,
    unique_local,
)
from skep.dataplane.netns.deferred import DeferredChanges
from skep.dataplane.netns.diff import DeleteLink
from skep.dataplane.netns.kernel.forwarding import forward_ipv6, ipv6_refusal
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.state import Address, Link, NamespaceState, VethPeer
from skep.dataplane.netns.write import apply_operations
from skep.dataplane.plan.flows import stale_host_ports
from skep.dataplane.plan.gateway import HostPort, between_table, gateway_table, gateway_table_ipv6
from skep.dataplane.plan.overlay import USUAL_MTU
from skep.dataplane.plan.packet_filter import Owner, spoofing_filter
from skep.dataplane.ports import PortReservations
from skep.dataplane.stale_flows import delete_flows
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable
from skep.linux.files import is_no_file, replace_file
from skep.model.networks.sandbox import PublishedPort, Sandbox
from skep.model.service import PublishMode
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

Network = TypeVar("Network", IPv4Network, IPv6Network)

_Port: TypeAlias = tuple[str, int, str]
"""Protocol, number and address of a reserved port."""

BRIDGE = "skep-gw"
_PART = "gateway"
_TWINS_MAX = 10
"""Number of attempts to find a port number that is free for both IPv4 and IPv6."""
_FAMILIES = {IPv4Network: socket.AF_INET, IPv6Network: socket.AF_INET6}
_HOME_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    # Bridged frames are not the node's own traffic, so its nat chains must not see them.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}


class Gateway:
    """The gateway bridge of one node.

    Args:
        state: File with the chosen IPv4 subnet.  The IPv6 subnet is in the same folder.
        pools: Address pools for the subnet.
    """

    def __init__(
        self,
        *,
        namespaces: Namespaces,
        home: NetnsReconciler,
        deferred: DeferredChanges,
        ports: PortReservations,
        state: Path,
        pools: Sequence[Subnets] = DEFAULT_POOLS,
    ) -> None:
        self._namespaces = namespaces
        self.home = home
        self._deferred = deferred
        self._reservations = ports
        self.state = state
        self._state6 = state.with_name(f"{state.name}6")
        self._pools = pools
        self._addresses: Addresses[IPv4Network] | None = None
        self._subnet6: IPv6Network | None = None
        self._forwards_ipv6 = False
        self._sandboxes: dict[ContainerId, Sandbox] = {}
        self._holders: dict[_Port, ContainerId] = {}
        """The container that holds each reserved port.

        A container's record may name a port from an earlier run that another container has by now, so this decides.
        """
        self._unheld: frozenset[_Port] = frozenset()
        """Ports of containers that another program has taken while no net process held them.

        They are not published.
        """
        self._reserving = 0
        """Number of reservations in progress.  Their ports may already be held without being in ``_holders``."""
        self._changing = asyncio.Lock()

    async def restore(self, live: Mapping[ContainerId, Sandbox]) -> None:
        """Create the bridge and its rules, keep addresses and ports of the ``live`` containers, and release all other
        ports.

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
            # Flows may still lead to other containers, because of an earlier process's rules.
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
        serves_ipv6: bool = False,
        mac_address: str = "",
    ) -> Sandbox:
        """Create a container's interface and publish its host-mode ``ports``.

        The interface has no address and no route yet.

        Args:
            is_open: Whether the container reaches other open containers through the bridge.
            wants_ipv6: Whether it gets IPv6 egress if the machine has it.
            serves_ipv6: See ``Sandbox.serves_ipv6``.
            mac_address: The MAC address that the user has chosen, or empty.

        Raises: AlreadyExists: a port is in use; SkepError.
        """
        addresses = self._require_addresses()
        address = addresses.take(container_id)
        reserved: list[PublishedPort] = []
        try:
            for port in ports:
                if port.publish_mode is PublishMode.HOST:
                    reserved += await self._reserve(container_id, port, str(address))
            subnet6 = self._subnet6 if wants_ipv6 or serves_ipv6 else None
            sandbox = Sandbox(
                netns=str(netns),
                address=str(address),
                prefix_length=addresses.subnet.prefixlen,
                gateway=str(addresses.gateway),
                mac_address=mac_address or mac_of(address),
                network=BRIDGE,
                interface=interface,
                port=new_port_name(),
                is_open=is_open,
                ports=tuple(reserved),
                address6=str(derived_ipv6(address, subnet6)) if subnet6 is not None else "",
                gateway6=str(subnet6[1]) if subnet6 is not None else "",
                serves_ipv6=serves_ipv6 and subnet6 is not None,
            )
            self._sandboxes[container_id] = sandbox
            await self._apply()
            await self._delete_flows([sandbox])
        except BaseException:
            await asyncio.shield(self._undo(container_id))
            raise
        return sandbox

    async def disconnect(self, container_id: ContainerId) -> None:
        """Release the addresses and ports that ``connect`` allocated.

        Idempotent.  After an error, the container stays in ``users`` and the call must be repeated.
        """
        if container_id in self.users() or container_id in self._sandboxes:
            await self._undo(container_id)

    async def cut(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Disconnect a running container and remove its interface.  Raises: SkepError."""
        if sandbox.port:
            await apply_operations(self._namespaces, self._namespaces.home, [DeleteLink(sandbox.port)])
        await self.disconnect(container_id)

    async def change(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Change whether a connected container is open, as ``sandbox`` says.  Raises: SkepError."""
        before, self._sandboxes[container_id] = self._sandboxes[container_id], sandbox
        try:
            await self._apply()
        except BaseException:
            self._sandboxes[container_id] = before
            raise

    async def sweep(self) -> None:
        """Release ports without a container, and reserve ports again that the net process has lost (for example in a
        crash).

        If the answer to a reservation was lost, the port is held without a container.  Raises: Unavailable.
        """
        async with self._changing:
            if self._addresses is None:
                return  # the containers' ports are not known yet
            published = self._published()  # before the listing: a port reserved in between is not lost
            held = frozenset(await self._reservations.list_held())
            for port in held:
                if not self._reserving and port not in self._holders:
                    await self._reservations.release(*port)
            before = self._unheld
            await self._hold_again(published, held)
            if self._unheld != before:
                await self._apply()
                await self._delete_flows(self._sandboxes.values())

    def sandbox_of(self, container_id: ContainerId) -> Sandbox | None:
        """Return the sandbox that ``connect`` created, or None if the container is not connected."""
        return self._sandboxes.get(container_id)

    # --- another subnet ---------------------------------------------------------------------------------------

    @property
    def bridge(self) -> str:
        """Name of the bridge's link."""
        return BRIDGE

    @property
    def subnet(self) -> IPv4Network | None:
        """Subnet of the bridge, or None before the bridge is created."""
        return self._addresses.subnet if self._addresses is not None else None

    def users(self) -> Sequence[str]:
        """Ids of the connected containers."""
        return self._addresses.owners() if self._addresses is not None else ()

    async def move(self, subnet: IPv4Network | None) -> None:
        """Change the bridge's subnet, or choose a free one if ``subnet`` is None.

        Raises: FailedPrecondition: a container is connected; Forbidden: the machine routes that subnet; SkepError.
        """
        if subnet is not None:
            async with self._namespaces.netlink(self._namespaces.home) as home:
                taken = await _networks_except(home, await _index(home, BRIDGE), IPv4Network)
            for network in taken:
                if network.prefixlen and network.overlaps(subnet):
                    raise Forbidden(
                        f"Pool overlaps with other one on this address space: {subnet} and {network}, "
                        "which this machine routes already"
                    )
        if self.users():
            raise FailedPrecondition("containers are on the node's gateway bridge")
        # No address of the old subnet is allocated from now on.
        before, self._addresses = self._addresses, None
        try:
            # Remove the link with all its addresses, because it may have addresses that the desired state does not
            # know.
            await self.home.remove(BRIDGE)
            if subnet is None:
                self.state.unlink(missing_ok=True)
            else:
                _save(self.state, subnet)
            async with self._changing:
                await self._choose_addresses()
                await self._apply()
        except BaseException:
            if self._addresses is None and before is not None:  # the next container creates the bridge again
                self._addresses = before
                with suppress(OSError):
                    # so that the next process reads the subnet that is still in use
                    _save(self.state, before.subnet)
            raise

    async def _undo(self, container_id: ContainerId) -> None:
        sandbox = self._sandboxes.pop(container_id, None)
        if sandbox is not None:
            self.home.expect_removal(sandbox.port)
            self._set_part()
        ports = [port for port, holder in self._holders.items() if holder == container_id]
        if ports:
            try:
                await self.home.apply()  # remove the old rules before another container gets the port
            except SkepError as error:  # the next comparison removes it
                log.warning("gateway rules not removed", container=container_id, error=str(error))
            if sandbox is not None:
                await self._delete_flows([sandbox], is_published=False)
        else:
            self._deferred.soon(_PART, self.home.apply)
        for port in ports:
            await self._release(container_id, port)
        # last, so that ``sweep`` finds the ports until then
        self._require_addresses().release_all(container_id)

    async def _delete_flows(self, sandboxes: Iterable[Sandbox], *, is_published: bool = True) -> None:
        """Delete UDP flows through ports of ``sandboxes`` that lead elsewhere.

        Without ``is_published``, delete the flows that lead to them.
        """
        subnet = str(self._require_addresses().subnet)
        stale = [
            port
            for one in sandboxes
            for port in stale_host_ports(one.ports, one.address, subnet, is_published=is_published)
        ]
        if stale:  # only if needed, because a search takes 9 ms in the kernel
            deletion = self._namespaces.run(self._namespaces.home, delete_flows, stale)
            # not fatal, because new clients are served anyway
            await isolate(deletion, "stale flows not deleted")

    async def _apply(self) -> None:
        """Apply the bridge, ports and rules.  Raises: SkepError."""
        self._set_part()
        if self._used_subnet6() is not None and not self._forwards_ipv6:
            await self._namespaces.run(self._namespaces.home, forward_ipv6)
            self._forwards_ipv6 = True
        await self.home.apply()

    def _set_part(self) -> None:
        subnet, subnet6, sandboxes = (
            self._require_addresses().subnet,
            self._used_subnet6(),
            self._sandboxes.values(),
        )
        state = gateway_state(BRIDGE, subnet, sandboxes, subnet6)
        owners = [
            Owner(one.port, one.mac_address, tuple(filter(None, (one.address, one.address6))))
            for one in sandboxes
            if one.port
        ]
        held = [(one, [it for it in one.ports if _reserved(it) not in self._unheld]) for one in sandboxes]
        host_ports = chain.from_iterable(_host_ports(one.address, ports) for one, ports in held)
        between = between_table((one.port, one.is_open) for one in sandboxes if one.port)
        rules = [gateway_table(BRIDGE, subnet, host_ports), spoofing_filter(owners), between]
        if subnet6 is not None:
            served = (_host_ports(one.address6, ports) for one, ports in held if one.serves_ipv6)
            rules.append(gateway_table_ipv6(BRIDGE, subnet6, chain.from_iterable(served)))
        self.home.set_part(_PART, state, *rules)

    def _used_subnet6(self) -> IPv6Network | None:
        """Return the IPv6 subnet, or None while no container has IPv6 egress."""
        return self._subnet6 if any(one.address6 for one in self._sandboxes.values()) else None

    # --- ports ------------------------------------------------------------------------------------------------

    async def _reserve(self, id: ContainerId, port: PublishedPort, address: str) -> tuple[PublishedPort, ...]:
        """Reserve ``port`` of the container with ``address``.

        Without a host address it is published for IPv4 and for IPv6.
        """
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

        # not interrupted, because a reserved port without a record would be held forever
        return await run_to_end(reserve())

    async def _release(self, id: ContainerId, port: _Port) -> None:
        await self._reservations.release(*port)
        if self._holders.get(port) == id:  # another container may hold it already
            del self._holders[port]

    async def _restore_ports(self) -> None:
        published = self._published()
        # Before the first await, because a sweep releases ports without a holder.
        self._holders = {port: id for port, (id, _, _) in published.items()}
        held = frozenset(await self._reservations.list_held())
        await self._hold_again(published, held)
        for gone in sorted(held - published.keys()):  # ports of removed containers
            await self._reservations.release(*gone)

    def _published(self) -> Mapping[_Port, tuple[ContainerId, PublishedPort, str]]:
        """Return, for each host-mode port: the container, the published port, and the container's address."""
        return {
            _reserved(port): (id, port, one.address)
            for id, one in self._sandboxes.items()
            for port in one.ports
        }

    async def _hold_again(
        self, published: Mapping[_Port, tuple[ContainerId, PublishedPort, str]], held: frozenset[_Port]
    ) -> None:
        """Reserve each port of ``published`` that is not ``held``.

        A port that cannot be held is not published until it can.
        """
        unheld = set()
        for key in sorted(published.keys() - held):
            id, port, address = published[key]
            try:
                await self._reserve_one(id, port, address)
            except SkepError as error:
                if self._holders.get(key) != id:  # another container has the port by now
                    continue
                unheld.add(key)
                if key not in self._unheld:
                    log.warning("host port no longer published", port=key, container=id, reason=str(error))
            else:
                if id not in self._sandboxes:  # disconnected meanwhile, without releasing this port
                    await self._release(id, key)
        self._unheld = frozenset(unheld)

    # --- subnet -----------------------------------------------------------------------------------------------

    async def _choose_addresses(self) -> Addresses[IPv4Network]:
        subnet, self._subnet6 = await self._choose_subnets()
        self._addresses = Addresses(subnet)
        return self._addresses

    async def _choose_subnets(self) -> tuple[IPv4Network, IPv6Network | None]:
        """Choose the subnet for IPv4, and for IPv6 if this machine can provide IPv6 egress to containers."""
        at_home = self._namespaces.home
        refusal = await self._namespaces.run(at_home, ipv6_refusal)
        if refusal:
            log.info("no ipv6 egress for containers", reason=refusal)
        async with self._namespaces.netlink(at_home) as home:
            index = await _index(home, BRIDGE)
            taken = await _networks_except(home, index, IPv4Network)
            subnet = stored_subnet(
                self.state, taken, IPv4Network, lambda: free_subnet(taken, self._pools, IPv4Network)
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
) -> NamespaceState:
    """Return the desired state of the gateway network in the node's own namespace.

    ``subnet6`` is None while IPv6 is unused.

    The bridge has a fixed MAC address.  Otherwise the kernel uses the lowest MAC address of its ports, which changes
    with the ports.
    """
    links = {bridge: Link(name=bridge, kind="bridge", mtu=USUAL_MTU, mac=mac_of(subnet[1]))}
    for one in sandboxes:
        if one.port:
            peer = VethPeer(netns=one.netns, interface=one.interface, mac=one.mac_address)
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
    return NamespaceState(
        links=links,
        addresses=frozenset(addresses),
        sysctls={
            **_HOME_SYSCTLS,
            # Clients on the node connect to 127.0.0.1.  Packets from outside are dropped (chain ``raw``).
            f"net/ipv4/conf/{bridge}/route_localnet": "1",
            f"net/ipv4/conf/{bridge}/rp_filter": "0",
            # A port is published before its container's interface is up.  If a packet arrives at that moment, all later
            # packets wait for the second ARP request, by default for a second.  So the interval is 40 ms, and 75
            # requests keep the usual total of 3 s.  40 ms are whole ticks of every kernel's clock, so the same value is
            # read back.
            f"net/ipv4/neigh/{bridge}/retrans_time_ms": "40",
            f"net/ipv4/neigh/{bridge}/mcast_solicit": "75",
            **sysctls6,
        },
    )


def new_port_name() -> str:
    """Return a new name for a container's port on the bridge.  The kernel accepts 15 characters.

    It is not derived from the container's id, because the kernel may need a moment to remove the port of an earlier
    start.
    """
    return f"vs{secrets.token_hex(6)}"


def _reserved(port: PublishedPort) -> _Port:
    return port.protocol, port.published_port, port.host_ip


def _host_ports(address: str, ports: Sequence[PublishedPort]) -> list[HostPort]:
    """Return the kernel's ports: those on IPv4, or for an IPv6 ``address`` TCP on all of IPv6.  Others are relayed."""
    is_6 = ":" in address
    return [
        HostPort(port.protocol, port.published_port, address, port.target_port, "" if is_6 else port.host_ip)
        for port in ports
        if port.publish_mode is PublishMode.HOST
        and ((port.host_ip, port.protocol) == ("::", "tcp") if is_6 else ":" not in port.host_ip)
    ]


async def _index(route: AsyncIPRoute, name: str) -> int:
    """Return the index of a link, or 0 if it does not exist."""
    found = await route.link_lookup(ifname=name)
    return found[0] if found else 0


async def _networks_except(route: AsyncIPRoute, index: int, version: type[Network]) -> list[Network]:
    """Return the destinations of the node's routes, except those through the link ``index``."""
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
    """Return the subnet stored in ``file``.  If it overlaps ``taken``, or none is stored, store a ``fresh`` one.

    Args:
        taken: Destinations of the machine's routes.

    Raises: The errors of ``fresh``; OSError: the file cannot be read or written.
    """
    try:
        remembered = version(file.read_text().strip())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise  # keep the subnet: containers may use it
    else:
        # The default route overlaps everything.
        if not any(remembered.overlaps(network) for network in taken if network.prefixlen):
            return remembered
        log.warning("gateway subnet overlaps a route, choosing another", subnet=str(remembered))
    subnet = fresh()
    _save(file, subnet)
    return subnet


def _save(file: Path, subnet: IPv4Network | IPv6Network) -> None:
    """Store ``subnet`` for the next process.  Raises: OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, f"{subnet}\n".encode(), is_durable=False)
