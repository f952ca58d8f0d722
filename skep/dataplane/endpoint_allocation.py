"""Where a plain container's networks come from: this node's bridge networks, or the cluster's."""

from collections.abc import Collection, Iterable
from typing import Protocol

import msgspec

from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.objects import is_local
from skep.engine.container import Container
from skep.errors import FailedPrecondition
from skep.model.ids import ContainerId, TaskId
from skep.model.sandbox import EndpointConfig, EndpointRequest


class ClusterEndpoints(Protocol):
    """Places on the cluster's networks (``executor.attaching.ClusterAttachments``)."""

    def restore(self, held: Iterable[tuple[TaskId, ContainerId]]) -> None: ...

    async def take(self, container_id: ContainerId, request: EndpointRequest) -> EndpointConfig: ...

    async def give_back(self, id: TaskId) -> None: ...


class EndpointAllocation:
    """Takes places for plain containers and gives them back."""

    def __init__(self, local: LocalEndpoints, cluster: ClusterEndpoints) -> None:
        self._local = local
        self._cluster = cluster

    async def restore(self, live: Collection[Container]) -> None:
        """Keep what ``live`` containers hold."""
        self._cluster.restore(
            (connected.config.attachment, container.id)
            for container in live
            if container.sandbox is not None
            for connected in container.sandbox.endpoints
            if connected.config.attachment
        )
        await self._local.restore(live)

    async def join(self, container: Container) -> tuple[EndpointConfig, ...]:
        """The places that a plain container asks for, in the order of its interfaces.

        Raises: NotFound: no such network; SkepError, in Docker's words.
        """
        taken: list[EndpointConfig] = []
        try:
            for request in container.plain.networks if container.plain is not None else ():
                taken.append(await self.join_one(container, request, taken))
        except BaseException:
            await self.leave(container.id, taken)
            raise
        return tuple(taken)

    async def join_one(
        self, container: Container, request: EndpointRequest, others: Collection[EndpointConfig]
    ) -> EndpointConfig:
        """One more place beside ``others``.  Raises: FailedPrecondition: it is on that network; as ``join``."""
        ids = {other.head.id for other in others}
        network = self._local.find(request.network)
        if network is not None:
            if network.id in ids:
                raise _is_there(container, network.name)
            return await self._local.take(container, network, request)
        named = msgspec.structs.replace(request, aliases=(container.name, *request.aliases))
        place = await self._cluster.take(container.id, named)
        if place.head.id in ids:
            await self._cluster.give_back(place.attachment)
            raise _is_there(container, place.head.name)
        return place

    async def leave(self, container_id: ContainerId, places: Iterable[EndpointConfig]) -> None:
        """Give places back.  Those of a task are the cluster's own business."""
        for place in places:
            if place.attachment:
                await self._cluster.give_back(place.attachment)
            elif is_local(place.head.id):
                await self._local.give_back(container_id, place)

    async def rename(self, container: Container) -> None:
        """Its names change with ``container.name``.

        Raises: FailedPrecondition: it is on a network of the cluster, which knows it by the one before; SkepError.
        """
        places = container.sandbox.endpoints if container.is_running and container.sandbox is not None else ()
        for one in places:
            if one.config.attachment:
                raise FailedPrecondition(
                    f"the cluster knows the container on network {one.network_name} by its name: stop it first, or "
                    f"take it from there (docker network disconnect)"
                )
        await self._local.rename(container)


def _is_there(container: Container, network: str) -> FailedPrecondition:
    """Source: moby 20.10, daemon/container_operations.go (ConnectToNetwork)."""
    return FailedPrecondition(f"endpoint with name {container.name} already exists in network {network}")
