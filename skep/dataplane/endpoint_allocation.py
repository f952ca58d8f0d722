"""Allocates the endpoints of plain containers on this node's networks and on cluster networks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.objects import is_local
from skep.errors import FailedPrecondition, Unimplemented
from skep.model.networks.sandbox import EndpointConfig, EndpointRequest, Sandbox, SandboxConfig
from skep.model.values.ids import ContainerId, TaskId


class ClusterEndpoints(Protocol):
    """Allocates endpoints on cluster networks.

    Each endpoint is represented by a task in the cluster and has its id.
    """

    def restore(self, held: Iterable[tuple[TaskId, ContainerId]]) -> None:
        """Take over the endpoints that containers of an earlier process still have."""

    async def take(self, container_id: ContainerId, request: EndpointRequest) -> EndpointConfig:
        """Allocate an endpoint with its address.  The first of ``request.aliases`` is the container's name.

        Raises: NotFound: no such network; SkepError, in Docker's words.
        """

    async def give_back(self, id: TaskId) -> None:
        """Release the endpoint of a container that has left the network.  Does nothing if it is released already."""


class EndpointAllocation:
    """Allocates the endpoints of plain containers, and releases them."""

    def __init__(self, local: LocalEndpoints, cluster: ClusterEndpoints) -> None:
        self._local = local
        self._cluster = cluster

    @property
    def predefined_ids(self) -> Mapping[str, str]:
        """Ids of the networks that every node has, by name."""
        return self._local.predefined_ids

    async def restore(
        self,
        live: Sequence[tuple[SandboxConfig, Sandbox]],
        invalid: Sequence[tuple[SandboxConfig, Sandbox]] = (),
    ) -> None:
        """Keep the endpoints of ``live`` sandboxes allocated.

        ``invalid``: live sandboxes with invalid addresses.  The cluster keeps their endpoints too.
        """
        self._cluster.restore(
            (endpoint.config.attachment, container.id)
            for container, sandbox in (*live, *invalid)
            for endpoint in sandbox.endpoints
            if endpoint.config.attachment
        )
        await self._local.restore(live)

    async def join(self, container: SandboxConfig) -> tuple[EndpointConfig, ...]:
        """Allocate endpoints on ``container.networks``, in their order.

        Raises: NotFound: no such network; SkepError, in Docker's words.
        """
        taken: list[EndpointConfig] = []
        try:
            for request in container.networks:
                taken.append(await self.join_one(container, request, taken))
        except BaseException:
            await self.leave(container.id, taken)
            raise
        return tuple(taken)

    async def fill(
        self, container: SandboxConfig, endpoints: Sequence[EndpointConfig]
    ) -> tuple[EndpointConfig, ...]:
        """Return a task's ``endpoints`` with addresses on networks that this node creates.  Raises: SkepError."""
        filled: list[EndpointConfig] = []
        try:
            for one in endpoints:
                is_here = one.head.parent is not None and not one.addresses
                filled.append(await self._local.fill(container, one) if is_here else one)
        except BaseException:
            await self.leave(container.id, filled)
            raise
        return tuple(filled)

    async def join_one(
        self, container: SandboxConfig, request: EndpointRequest, others: Collection[EndpointConfig]
    ) -> EndpointConfig:
        """Allocate one more endpoint.

        Raises: FailedPrecondition: one of ``others`` is on that network already; the errors of ``join``."""
        ids = {other.head.id for other in others}
        network = self._local.find(request.network)
        if network is not None:
            if network.id in ids:
                raise _is_there(container, network.name)
            return await self._local.take(container, network, request)
        if request.mac_address:
            raise Unimplemented(
                f"containers on network {request.network} of the cluster cannot have --mac-address: other nodes "
                "compute the MAC address from the IP address"
            )
        # Managers know the container's short id, because it is the default host name.
        hostname = container.hostname if not container.id.startswith(container.hostname) else ""
        own_names = filter(None, dict.fromkeys((container.name, hostname, *request.aliases)))
        named = msgspec.structs.replace(request, aliases=tuple(own_names))
        endpoint = await self._cluster.take(container.id, named)
        if endpoint.head.id in ids:
            await self._cluster.give_back(endpoint.attachment)
            raise _is_there(container, endpoint.head.name)
        return msgspec.structs.replace(
            endpoint, links=request.links, gw_priority=request.gw_priority, sysctls=request.sysctls
        )

    async def leave(self, container_id: ContainerId, endpoints: Iterable[EndpointConfig]) -> None:
        """Release ``endpoints``.  Managers release a task's endpoints when the task ends.

        Raises: The first error, after all other endpoints were released.
        """
        errors = []
        for one in endpoints:
            try:
                if one.attachment:
                    await self._cluster.give_back(one.attachment)
                elif is_local(one.head.id):
                    await self._local.give_back(container_id, one)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def rename(self, container: SandboxConfig, sandbox: Sandbox) -> None:
        """Change the name of a running container to ``container.name``.

        Raises: FailedPrecondition: it is on a cluster network, where its name cannot change; SkepError.
        """
        for one in sandbox.endpoints:
            if one.config.attachment:
                raise FailedPrecondition(
                    f"the container's name is registered on network {one.network_name} of the cluster: stop it "
                    "first, or disconnect it (docker network disconnect)"
                )
        await self._local.rename(container, sandbox)


def _is_there(container: SandboxConfig, network: str) -> FailedPrecondition:
    """Return Docker's error.  Source: moby 20.10, daemon/container_operations.go (ConnectToNetwork)."""
    return FailedPrecondition(f"endpoint with name {container.name} already exists in network {network}")
