"""Places of plain containers on this node's bridge networks, and the names by which they find each other there.

A bridge network is made as an overlay is that has no other node: a namespace with a bridge, from its first container to
its last.  Its table of names is written here, where the net process reads those of the cluster's networks.
"""

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from skep.dataplane.addresses import Addresses
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.local.objects import LocalNetwork, find, gateway_of, head_of, is_local, subnet_of
from skep.engine.container import Container
from skep.errors import InvalidArgument, SkepError
from skep.linux.files import replace_file
from skep.model.ids import ContainerId, NetworkId, NodeId, TaskId
from skep.model.sandbox import EndpointConfig, EndpointRequest
from skep.model.tables import Table, TableEndpoint

log = structlog.get_logger()

_SHORT_ID_CHARACTERS = 12


class Readers(Protocol):
    """Reads the tables (``NetClient``)."""

    async def refresh(self, networks: Iterable[NetworkId] = ()) -> None: ...


class LocalEndpoints:
    """Addresses and names on bridge networks.

    Args:
        networks: which there are.
        tables: where the net process reads tables.
        readers: None where names are not served.
    """

    def __init__(self, networks: LocalNetworks, tables: Path, readers: Readers | None) -> None:
        self._networks = networks
        self._tables = tables
        self._readers = readers
        self._addresses: dict[str, Addresses] = {}
        self._endpoints: dict[str, dict[ContainerId, TableEndpoint]] = {}

    def find(self, word: str) -> LocalNetwork | None:
        """The bridge network that a user means by ``word``."""
        return find(self._networks.bridges(), word)

    async def restore(self, live: Collection[Container]) -> None:
        """Keep what ``live`` containers hold; tables of networks without containers go."""
        for container in live:
            for connected in container.sandbox.endpoints if container.sandbox is not None else ():
                place = connected.config
                if is_local(place.head.id) and (network := self.find(place.head.id)) is not None:
                    self._addresses_of(network).claim(_address(place), container.id)
                    self._enter(container.id, container.name, place)
        if self._tables.is_dir():
            for path in self._tables.iterdir():
                if is_local(path.name) and path.name not in self._endpoints:
                    path.unlink(missing_ok=True)
        for id in tuple(self._endpoints):
            await self._tell(id)

    async def take(
        self, container: Container, network: LocalNetwork, request: EndpointRequest
    ) -> EndpointConfig:
        """An address on ``network``, and its names in force.

        Raises: InvalidArgument, FailedPrecondition, ResourceExhausted: no such address; SkepError.
        """
        addresses = self._addresses_of(network)
        if request.address:
            address = addresses.take_requested(_parsed(request.address), container.id)
        else:
            address = addresses.take(container.id)
        place = EndpointConfig(
            head=head_of(network),
            addresses=(f"{address}/{addresses.subnet.prefixlen}",),
            aliases=request.aliases,
        )
        try:
            self._enter(container.id, container.name, place)
            await self._tell(network.id)
        except BaseException:
            await self.give_back(container.id, place)
            raise
        return place

    async def give_back(self, container_id: ContainerId, place: EndpointConfig) -> None:
        """The container has left.  Harmless when it had."""
        id = place.head.id
        if (known := self._addresses.get(id)) is not None:
            known.release(_address(place), container_id)
        if self._endpoints.get(id, {}).pop(container_id, None) is None:
            return
        if not self._endpoints[id]:
            del self._endpoints[id]
        try:
            await self._tell(id)
        except SkepError as error:
            log.warning("names of a network not forgotten yet", network=id, reason=str(error))

    async def rename(self, container: Container) -> None:
        """The container has another name now.  Raises: SkepError."""
        for connected in container.sandbox.endpoints if container.sandbox is not None else ():
            if container.id in self._endpoints.get(connected.network_id, {}):
                self._enter(container.id, container.name, connected.config)
                await self._tell(connected.network_id)

    def _enter(self, id: ContainerId, name: str, place: EndpointConfig) -> None:
        endpoints = self._endpoints.setdefault(place.head.id, {})
        endpoints[id] = TableEndpoint(
            task_id=TaskId(id),
            node_id=NodeId(""),
            name=name,
            aliases=(id[:_SHORT_ID_CHARACTERS], *place.aliases),
            addresses=(str(_address(place)),),
            is_running=True,
            is_serving=True,
        )

    async def _tell(self, id: str) -> None:
        """Write the table of a network and have it read.  Raises: SkepError; OSError."""
        path, network = self._tables / id, self.find(id)
        endpoints: Mapping[ContainerId, TableEndpoint] = self._endpoints.get(id, {})
        if network is None or not endpoints:
            path.unlink(missing_ok=True)
        else:
            self._tables.mkdir(parents=True, exist_ok=True)
            table = Table(head=head_of(network), endpoints={one.task_id: one for one in endpoints.values()})
            replace_file(path, msgspec.msgpack.encode(table), is_durable=False)
        if self._readers is not None:
            await self._readers.refresh((NetworkId(id),))

    def _addresses_of(self, network: LocalNetwork) -> Addresses:
        known = self._addresses.get(network.id)
        if known is None:
            config = network.configs[0]
            known = self._addresses[network.id] = Addresses(
                subnet_of(network),
                gateway=gateway_of(network),
                pool=IPv4Network(config.ip_range, strict=False) if config.ip_range else None,
                reserved=map(IPv4Address, config.auxiliary_addresses.values()),
            )
        return known


def _address(place: EndpointConfig) -> IPv4Address:
    return IPv4Address(place.addresses[0].partition("/")[0])


def _parsed(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise InvalidArgument(f"invalid IPv4 address: {text}") from None
