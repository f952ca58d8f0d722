"""The gateway bridge: every container's way out, and the way in by host-mode ports.

One bridge per node with a subnet that collides with no route of the machine.  Each container gets a
namespace of its own with ``eth0`` on the bridge.  ``restore`` puts everything right after a restart,
whatever was left half done.
"""

import asyncio
import secrets
import socket
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import msgspec
import structlog
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from skep.errors import SkepError, Unavailable
from skep.linux.files import replace_file
from skep.model.ids import ContainerId
from skep.model.service import PortConfig, PublishMode
from skep.node.network import nft, rules
from skep.node.network.addresses import Addresses, free_subnet, mac_of
from skep.node.network.namespaces import Namespaces, set_sysctl
from skep.node.network.ports import PortReservations
from skep.node.network.rules import HostPort
from skep.node.oci.container import Endpoint

log = structlog.get_logger()

BRIDGE = "skep-gw"
INTERFACE = "eth0"
_CONTAINER_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
}
_HOME_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    # Bridged frames are not the node's own traffic: its nat chains must not see them.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}


class Gateway:
    """The gateway bridge of one node.  ``state``: file that remembers the chosen subnet."""

    def __init__(
        self, *, namespaces: Namespaces, ports: PortReservations, state: Path, bridge: str = BRIDGE
    ) -> None:
        self._namespaces = namespaces
        self._reservations = ports
        self._state = state
        self._bridge = bridge
        self._bridge_index = 0
        self._addresses: Addresses | None = None
        self._published: dict[ContainerId, tuple[HostPort, ...]] = {}
        self._changing = asyncio.Lock()

    async def restore(self, live: Mapping[ContainerId, Endpoint]) -> None:
        """Make bridge and rules, keep what belongs to the ``live`` containers and free everything else.

        Raises: SkepError: this node cannot network containers.
        """
        async with self._changing, self._namespaces.netlink(self._namespaces.home) as home:
            subnet = await self._make_bridge(home)
            self._addresses = Addresses(subnet)
            for id, endpoint in live.items():
                self._addresses.claim(IPv4Address(endpoint.address), id)
                self._published[id] = tuple(_host_ports(endpoint.address, endpoint.ports))
            await self._restore_ports()
            await self._in_home(self._apply_setup, subnet)
        for pinned in self._namespaces.pinned():
            if pinned not in live:
                await self._namespaces.destroy(pinned)

    async def attach(self, container_id: ContainerId, ports: Sequence[PortConfig]) -> Endpoint:
        """A namespace for a container with a way out, and its host-mode ``ports`` published.

        Raises: AlreadyExists: a port is taken; SkepError.
        """
        addresses = self._opened()
        address = addresses.take(container_id)
        reserved: list[PortConfig] = []
        try:
            for port in ports:
                if port.publish_mode is PublishMode.HOST:
                    number = await self._reservations.reserve(port.protocol, port.published_port)
                    reserved.append(msgspec.structs.replace(port, published_port=number))
            netns = await self._namespaces.create(container_id, _CONTAINER_SYSCTLS)
            mac = mac_of(address)
            await self._connect(netns, address, mac)
            endpoint = Endpoint(
                netns=str(netns),
                address=str(address),
                prefix_length=addresses.subnet.prefixlen,
                gateway=str(addresses.gateway),
                mac_address=mac,
                network=self._bridge,
                ports=tuple(reserved),
            )
            await self._publish(container_id, endpoint)
        except BaseException as error:
            await asyncio.shield(self._undo(container_id, address, reserved))
            if isinstance(error, (OSError, NetlinkError)):
                raise Unavailable(f"cannot connect the container to {self._bridge}: {error}") from error
            raise
        return endpoint

    async def detach(self, container_id: ContainerId, endpoint: Endpoint) -> None:
        """Free everything that ``attach`` gave; harmless when it is free already."""
        await self._undo(container_id, IPv4Address(endpoint.address), endpoint.ports)

    # --- ports ------------------------------------------------------------------------------------------------

    async def _publish(self, container_id: ContainerId, endpoint: Endpoint) -> None:
        published = tuple(_host_ports(endpoint.address, endpoint.ports))
        if published:
            await self._in_home(nft.run, rules.published(published))
            self._published[container_id] = published

    async def _undo(
        self, container_id: ContainerId, address: IPv4Address, ports: Sequence[PortConfig]
    ) -> None:
        published = self._published.pop(container_id, ())
        if published:
            try:
                await self._in_home(nft.run, rules.withdrawn(published))
            except nft.NftFailed as error:  # somebody else changed our table
                log.warning("host port was not withdrawn", container=container_id, error=str(error))
        await self._namespaces.destroy(container_id)
        for port in ports:
            if port.publish_mode is PublishMode.HOST:
                await self._reservations.release(port.protocol, port.published_port)
        self._opened().release(address, container_id)

    async def _restore_ports(self) -> None:
        held = set(await self._reservations.held())
        wanted = {
            (port.protocol, port.published_port, port.host_ip)
            for ports in self._published.values()
            for port in ports
        }
        for protocol, number, address in sorted(wanted - held):
            try:
                await self._reservations.reserve(protocol, number, address)
            except SkepError as error:  # the container has it by the rules all the same
                log.warning("host port not reserved again", protocol=protocol, port=number, error=str(error))
        for protocol, number, address in sorted(held - wanted):  # of containers that are gone
            await self._reservations.release(protocol, number, address)

    # --- links ------------------------------------------------------------------------------------------------

    async def _make_bridge(self, home: AsyncIPRoute) -> IPv4Network:
        """The bridge, up, with its address; gives its subnet."""
        self._bridge_index = await _index(home, self._bridge)
        if not self._bridge_index:
            await home.link("add", ifname=self._bridge, kind="bridge", br_mcast_snooping=0)
            self._bridge_index = await _index(home, self._bridge)
        subnet = await self._choose_subnet(home)
        present = await _addresses_of(home, self._bridge_index)
        if (str(subnet[1]), subnet.prefixlen) not in present:
            for address, length in present:
                await home.addr("del", index=self._bridge_index, address=address, prefixlen=length)
            await home.addr(
                "add", index=self._bridge_index, address=str(subnet[1]), prefixlen=subnet.prefixlen
            )
        # Without an address of its own a bridge takes its lowest port's, and changes it with the ports.
        await home.link("set", index=self._bridge_index, address=mac_of(subnet[1]), state="up")
        return subnet

    async def _choose_subnet(self, home: AsyncIPRoute) -> IPv4Network:
        """The remembered subnet, unless a route of the machine collides with it by now."""
        taken = await _networks_except(home, self._bridge_index)
        try:
            remembered = IPv4Network(self._state.read_text().strip())
            if not any(remembered.overlaps(network) for network in taken if network.prefixlen):
                return remembered
            log.warning("the gateway's subnet collides with a route and is changed", subnet=str(remembered))
        except (OSError, ValueError):
            pass
        subnet = free_subnet(taken)
        self._state.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._state, f"{subnet}\n".encode(), is_durable=False)
        return subnet

    async def _connect(self, netns: Path, address: IPv4Address, mac: str) -> None:
        """A veth from the bridge to ``eth0`` in the container's namespace, with address and default route."""
        addresses = self._opened()
        port = new_port_name()
        with netns.open("rb") as namespace:
            async with self._namespaces.netlink(self._namespaces.home) as home:
                await home.link(
                    "add",
                    ifname=port,
                    kind="veth",
                    master=self._bridge_index,
                    state="up",
                    peer={"ifname": INTERFACE, "net_ns_fd": namespace.fileno(), "address": mac},
                )
        async with self._namespaces.netlink(netns) as inside:
            index = await _index(inside, INTERFACE)
            await inside.link("set", index=1, state="up")
            await inside.addr("add", index=index, address=str(address), prefixlen=addresses.subnet.prefixlen)
            await inside.link("set", index=index, state="up")
            await inside.route("add", dst="default", gateway=str(addresses.gateway))

    def _apply_setup(self, subnet: IPv4Network) -> None:
        for name, value in _HOME_SYSCTLS.items():
            set_sysctl(name, value)
        # A client on the node may use 127.0.0.1; nothing from outside gets there (chain ``raw``).
        set_sysctl(f"net/ipv4/conf/{self._bridge}/route_localnet", "1")
        set_sysctl(f"net/ipv4/conf/{self._bridge}/rp_filter", "0")
        host_ports = [port for ports in self._published.values() for port in ports]
        nft.run(rules.setup(self._bridge, subnet, host_ports))

    async def _in_home(self, call: Any, *arguments: Any) -> None:
        await self._namespaces.run(self._namespaces.home, call, *arguments)

    def _opened(self) -> Addresses:
        if self._addresses is None:
            raise Unavailable("the node's network is not set up yet")
        return self._addresses


def new_port_name() -> str:
    """Name of a container's port on the bridge; the kernel takes 15 characters.

    Not made from the container's id: the port of an earlier start may take the kernel a moment to vanish.
    """
    return f"vs{secrets.token_hex(6)}"


def _host_ports(address: str, ports: Sequence[PortConfig]) -> list[HostPort]:
    return [
        HostPort(port.protocol, port.published_port, address, port.target_port)
        for port in ports
        if port.publish_mode is PublishMode.HOST
    ]


async def _index(route: AsyncIPRoute, name: str) -> int:
    """Index of a link, 0 when there is none."""
    found = await route.link_lookup(ifname=name)
    return found[0] if found else 0


async def _addresses_of(route: AsyncIPRoute, index: int) -> list[tuple[str, int]]:
    answers = await route.addr("dump", index=index, family=socket.AF_INET)
    return [(answer.get("address"), answer["prefixlen"]) async for answer in answers]


async def _networks_except(route: AsyncIPRoute, index: int) -> list[IPv4Network]:
    """What the node's routes reach, leaving out those through the link ``index``."""
    networks = []
    async for answer in await route.route("dump", family=socket.AF_INET):
        destination = answer.get("dst")
        if destination and answer.get("oif") != index:
            networks.append(IPv4Network(f"{destination}/{answer['dst_len']}", strict=False))
    return networks
