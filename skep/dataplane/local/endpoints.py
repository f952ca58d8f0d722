"""Endpoints of plain containers on this node's bridge networks, and the names by which they find each other there.

A bridge network is built like an overlay without other nodes: a namespace with a bridge, from its first container to
its last.  Its network table is written to the folder where the net process reads the tables of cluster networks.
"""

import socket
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from pathlib import Path
from typing import TypeAlias

import msgspec
import structlog

from skep.api.formats.networks import SubnetBody
from skep.dataplane.addresses import Addresses
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.local.objects import LocalNetwork, find, head_of, is_chosen, is_local
from skep.dataplane.net_process.name_registration import NameRegistration
from skep.errors import InvalidArgument, SkepError, Unavailable, Unimplemented
from skep.linux.files import replace_file
from skep.model.networks.addresses import Address, parsed
from skep.model.networks.sandbox import EndpointConfig, EndpointRequest, Sandbox, SandboxConfig
from skep.model.networks.tables import NetworkTable, TableEndpoint
from skep.model.values.ids import ContainerId, NetworkId, NodeId, TaskId

log = structlog.get_logger()

_Pool: TypeAlias = Addresses[IPv4Network] | Addresses[IPv6Network]

_SHORT_ID_CHARACTERS = 12
"""Length of Docker's short ids, by which containers are reached on their networks."""
_NO_SUBNET = (
    "user specified IP address is supported only when connecting to networks with user configured subnets"
)


class LocalEndpoints:
    """Allocates addresses and names on bridge networks.

    Args:
        networks: The node's networks.
        tables: Folder where the net process reads tables.
        naming: Registers names, or None if names are not served.
    """

    def __init__(self, networks: LocalNetworks, tables: Path, naming: NameRegistration | None) -> None:
        self._networks = networks
        networks.is_used = self.is_used
        self._tables = tables
        self._naming = naming
        self.pools: dict[str, tuple[_Pool, ...]] = {}
        """Address pools of each network in use: one for IPv4, and one for IPv6 if the network has IPv6."""
        self._endpoints: dict[str, dict[ContainerId, TableEndpoint]] = {}
        self._unwritten: set[str] = set()
        """Networks whose table file could not be written, so that it still has names of removed containers."""

    @property
    def predefined_ids(self) -> Mapping[str, str]:
        """Ids of the networks that every node has, by name.  Empty while the node's networks cannot be read."""
        try:
            return {one.name: one.id for one in self._networks.predefined()}
        except Unavailable:
            return {}

    def find(self, word: str) -> LocalNetwork | None:
        """Return this node's network with the id, name or id prefix ``word``, or None.

        A cluster network that this node has created is found only by its id.
        """
        if is_local(word):
            return find(self._networks.all(), word)
        return find(self._networks.bridges(), word)

    def is_used(self, id: str) -> bool:
        """Return whether containers are on the network."""
        return id in self._endpoints

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        """Keep the allocations of ``live`` sandboxes, and remove the tables of networks without containers."""
        for container, sandbox in live:
            for endpoint in sandbox.endpoints:
                config = endpoint.config
                if is_local(config.head.id) and (network := self.find(config.head.id)) is not None:
                    for address in _addresses(config):
                        for pool in self._pools_of(network):
                            if pool.subnet.version == address.version:
                                pool.claim(address, container.id)
                    self._enter(container, config)
        if self._tables.is_dir():
            for path in self._tables.iterdir():
                if is_local(path.name) and path.name not in self._endpoints:
                    path.unlink(missing_ok=True)
        for id in tuple(self._endpoints):
            await self._publish(id)

    async def take(
        self, container: SandboxConfig, network: LocalNetwork, request: EndpointRequest
    ) -> EndpointConfig:
        """Allocate an address of each IP version on ``network``, and serve the container's names there.

        Raises: InvalidArgument, FailedPrecondition, ResourceExhausted: no such address; SkepError.
        """
        if request.mac_address and network.driver == "ipvlan":
            raise Unimplemented("ipvlan interfaces do not support custom mac address assignment")
        config = EndpointConfig(
            head=head_of(network),
            addresses=self._take(container.id, network, request),
            aliases=request.aliases,
            mac_address=request.mac_address,
            links=request.links,
            gw_priority=request.gw_priority,
            sysctls=request.sysctls,
        )
        try:
            self._enter(container, config)
            await self._publish(network.id)
        except BaseException:
            await self.give_back(container.id, config)
            raise
        return config

    async def fill(self, container: SandboxConfig, wanted: EndpointConfig) -> EndpointConfig:
        """Return a task's endpoint with an address, on a cluster network that each node creates itself (macvlan,
        ipvlan).

        Raises: NotFound: the network can no longer be created; the errors of ``take``.
        """
        devices = [name for _, name in socket.if_nameindex()]
        network = await self._networks.for_start(wanted.head.id, devices, self.is_used)
        return await self.take(
            container, network, EndpointRequest(network=network.id, aliases=wanted.aliases)
        )

    async def give_back(self, container_id: ContainerId, config: EndpointConfig) -> None:
        """Release the address and the names of an endpoint.  Does nothing if they are released already.

        Raises: OSError: the names are still served, and the call must be repeated.
        """
        id = config.head.id
        for pool in self.pools.get(id, ()):
            for address in _addresses(config):
                pool.release(address, container_id)
        if self._endpoints.get(id, {}).pop(container_id, None) is None and id not in self._unwritten:
            return
        if id in self._endpoints and not self._endpoints[id]:
            del self._endpoints[id]
            if (network := self.find(id)) is not None and network.cluster_id:
                self.pools.pop(id, None)
                await self._networks.remove_bridge(id)  # the next task creates it again
        try:
            await self._publish(id)
        except SkepError as error:
            log.warning("names of a network not removed yet", network=id, reason=str(error))

    async def rename(self, container: SandboxConfig, sandbox: Sandbox) -> None:
        """Change the name of a running container to ``container.name``.  Raises: SkepError."""
        for endpoint in sandbox.endpoints:
            if container.id in self._endpoints.get(endpoint.network_id, {}):
                self._enter(container, endpoint.config)
                await self._publish(endpoint.network_id)

    def _take(
        self, container_id: ContainerId, network: LocalNetwork, request: EndpointRequest
    ) -> tuple[str, ...]:
        """Allocate an address from each pool, and return them as ``ip/length``.

        Raises: InvalidArgument, FailedPrecondition, ResourceExhausted: nothing was allocated.
        """
        requested = {4: request.address, 6: request.address6}
        for version, text in requested.items():
            if text and not is_chosen(network, version):
                raise InvalidArgument(_NO_SUBNET)
        taken: list[tuple[_Pool, Address]] = []
        try:
            for pool in self._pools_of(network):
                if text := requested[pool.subnet.version]:
                    address = pool.take_requested(parsed(text), container_id)
                else:
                    address = pool.take(container_id)
                taken.append((pool, address))
        except SkepError:
            for pool, address in taken:
                pool.release(address, container_id)
            raise
        return tuple(f"{address}/{pool.subnet.prefixlen}" for pool, address in taken)

    def _enter(self, container: SandboxConfig, config: EndpointConfig) -> None:
        endpoints = self._endpoints.setdefault(config.head.id, {})
        endpoints[container.id] = TableEndpoint(
            task_id=TaskId(container.id),
            node_id=NodeId(""),
            name=container.name,
            aliases=tuple(
                filter(
                    None,
                    dict.fromkeys((container.id[:_SHORT_ID_CHARACTERS], container.hostname, *config.aliases)),
                )
            ),
            addresses=tuple(map(str, _addresses(config))),
            is_running=True,
            is_serving=True,
        )

    async def _publish(self, id: str) -> None:
        """Write the table of a network and make the net process reload it.  Raises: SkepError; OSError."""
        path, network = self._tables / id, self.find(id)
        endpoints: Mapping[ContainerId, TableEndpoint] = self._endpoints.get(id, {})
        self._unwritten.add(id)
        if network is None or not endpoints:
            path.unlink(missing_ok=True)
        else:
            self._tables.mkdir(parents=True, exist_ok=True)
            table = NetworkTable(
                head=head_of(network), endpoints={one.task_id: one for one in endpoints.values()}
            )
            replace_file(path, msgspec.msgpack.encode(table), is_durable=False)
        self._unwritten.discard(id)
        if self._naming is not None:
            await self._naming.refresh((NetworkId(id),))

    def _pools_of(self, network: LocalNetwork) -> tuple[_Pool, ...]:
        known = self.pools.get(network.id)
        if known is None:
            known = self.pools[network.id] = tuple(map(_pool, network.configs))
        return known


def _pool(config: SubnetBody) -> _Pool:
    subnet, gateway = ip_network(config.subnet), parsed(config.gateway)
    reserved = map(parsed, config.auxiliary_addresses.values())
    within = ip_network(config.ip_range, strict=False) if config.ip_range else subnet
    if isinstance(subnet, IPv6Network):
        assert isinstance(within, IPv6Network), "of the subnet, as checked when the network was made"
        return Addresses(subnet, gateway=gateway, pool=within, reserved=reserved)
    assert isinstance(within, IPv4Network), "of the subnet, as checked when the network was made"
    return Addresses(subnet, gateway=gateway, pool=within, reserved=reserved)


def _addresses(config: EndpointConfig) -> list[Address]:
    """Return the addresses of an endpoint, without the prefix length."""
    return [ip_interface(one).ip for one in config.addresses]
