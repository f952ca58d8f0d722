"""A container's whole network: a namespace, its overlays, and the gateway bridge last."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog
from pyroute2.netlink.exceptions import NetlinkError

from skep.aio.groups import errors_as_they_are
from skep.errors import SkepError, Unavailable
from skep.model.ids import ContainerId
from skep.node.network.gateway import Gateway
from skep.node.network.ingress.mesh import Mesh
from skep.node.network.namespaces import Namespaces
from skep.node.network.naming import Naming
from skep.node.network.overlay.domain import Domain
from skep.node.network.overlay.healing import Healing
from skep.node.network.overlay.overlays import Overlays
from skep.node.network.overlay.settling import Settling
from skep.node.network.paths.prober import PathProber
from skep.node.oci.container import Container, Endpoint, Place

log = structlog.get_logger()

_CONTAINER_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
}


class ContainerNetwork:
    """Gives containers their places (``oci.networking.Networking``)."""

    def __init__(
        self,
        *,
        namespaces: Namespaces,
        home: Domain,
        gateway: Gateway,
        overlays: Overlays,
        mesh: Mesh,
        healing: Healing,
        settling: Settling,
        prober: PathProber,
        naming: Naming | None = None,
    ) -> None:
        """``naming``: None where nobody answers for names."""
        self._namespaces = namespaces
        self._home = home
        self.gateway = gateway
        self.overlays = overlays
        self.mesh = mesh
        self.prober = prober
        self._healing = healing
        self._naming = naming
        self._settling = settling
        self.repairs = healing.repairs

    @property
    def home(self) -> Path:
        """The node's own network namespace."""
        return self._home.path

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep what containers are given, whatever others change, until the block ends."""
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            tasks = (
                group.create_task(self._healing.run(), name="healing of networks"),
                group.create_task(self._settling.run(), name="clearing of networks"),
                group.create_task(self.mesh.run(), name="published ports"),
                group.create_task(self.prober.run(), name="probes of other nodes"),
            )
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def restore(self, live: Collection[Container]) -> None:
        """Make the node ready, keep what belongs to the ``live`` containers, free all other containers' things.

        Raises: SkepError: this node cannot network containers.
        """
        endpoints = {one.id: one.endpoint for one in live if one.endpoint is not None}
        self.overlays.restore(endpoints)
        await self.gateway.restore(endpoints)
        await self._healing.watch(self._home)
        await self.prober.restore()
        await self.overlays.begin(endpoints)
        for id, endpoint in endpoints.items():
            await self._join_mesh(id, endpoint)
        if self._naming is not None:
            await self._naming.restore(live)
        for pinned in self._namespaces.pinned():
            if pinned not in endpoints:
                await self._namespaces.destroy(pinned)

    async def attach(self, container: Container) -> Endpoint:
        """A namespace with ``eth0`` and so on: its places in their order, then the gateway bridge; and names in it.

        Who is on internal networks only has no way out, and no ports of the node.  Raises: AlreadyExists: a port is
        taken; SkepError.
        """
        container_id, places = container.id, container.config.places
        endpoint = Endpoint(netns=str(self._namespaces.path(container_id)))
        try:
            netns = await self._namespaces.create(container_id, _CONTAINER_SYSCTLS)
            connected = await self.overlays.connect(container_id, netns, places)
            endpoint = msgspec.structs.replace(endpoint, places=connected)
            if has_way_out(places):
                interface, ports = f"eth{len(places)}", container.config.ports
                endpoint = await self.gateway.connect(
                    container_id, netns, interface, ports, wants_ipv6=has_way_out_by_ipv6(places)
                )
                endpoint = msgspec.structs.replace(endpoint, places=connected)
            await self.overlays.settle_container(container_id, endpoint)
            await self._join_mesh(container_id, endpoint, is_new=True)
            if self._naming is not None:
                await self._naming.attach(msgspec.structs.replace(container, endpoint=endpoint))
        except BaseException as error:
            await asyncio.shield(self._undo(container_id, endpoint))
            if isinstance(error, OSError | NetlinkError):
                raise Unavailable(f"cannot connect the container to its networks: {error}") from error
            raise
        return endpoint

    async def detach(self, container_id: ContainerId, endpoint: Endpoint) -> None:
        """Free everything that ``attach`` gave; harmless when it is free already."""
        await self._undo(container_id, endpoint)

    async def _join_mesh(
        self, container_id: ContainerId, endpoint: Endpoint, *, is_new: bool = False
    ) -> None:
        """Answers of a container that serves published ports go back the way their questions came."""
        for one in endpoint.places:
            if one.place.head.is_ingress:
                await self.mesh.joined(
                    container_id,
                    Path(endpoint.netns),
                    one.interface,
                    endpoint.address,
                    way_out6=endpoint.address6,
                    is_new=is_new,
                )

    async def _undo(self, container_id: ContainerId, endpoint: Endpoint) -> None:
        self.mesh.left(container_id)
        self.overlays.disconnect(container_id, endpoint.places)
        try:
            if self._naming is not None and endpoint.places:
                await self._naming.detach(container_id)
        except SkepError as error:  # a namespace that is gone is noticed there, too
            log.warning("names not forgotten", container=container_id, reason=str(error))
        finally:
            try:
                await self.gateway.disconnect(container_id, endpoint)
            finally:
                await self._namespaces.destroy(container_id)


def has_way_out(places: Sequence[Place]) -> bool:
    """Whether the container gets the gateway bridge.

    Source: moby, libnetwork/default_gateway.go (needDefaultGW).
    """
    return not places or any(not place.head.is_internal for place in places)


def has_way_out_by_ipv6(places: Sequence[Place]) -> bool:
    """Whether the gateway bridge is to lead the container out by IPv6, too: a network with a way out has IPv6."""
    return any(
        ":" in address for place in places if not place.head.is_internal for address in place.addresses
    )
