"""Network changes of plain containers: ``docker network connect`` and ``disconnect``, ``docker rename``.

Source: moby, daemon/container_operations.go (connectToNetwork, DisconnectFromNetwork), daemon/rename.go.
"""

from typing import Protocol

import structlog

from skep.engine.containers.container import BeingRemoved, Container
from skep.engine.containers.state import ContainerStore
from skep.engine.lifecycle.life_events import Connect, Disconnect, Rename
from skep.errors import FailedPrecondition, NotFound
from skep.model.networks.sandbox import EndpointRequest
from skep.model.values.ids import ContainerId

log = structlog.get_logger()


class Lives(Protocol):
    """The driver's interface for changes of networks."""

    async def change_networks(self, id: ContainerId, event: Connect | Disconnect | Rename) -> Container:
        """Apply a change, the only operation on the container meanwhile."""


class NetworkChanges:
    """Connects plain containers to networks and disconnects them, while they run or before their start.

    ``lifecycle/network_rules.py`` has the rules.
    """

    def __init__(self, store: ContainerStore, lives: Lives) -> None:
        """Take the parts of one engine."""
        self._store = store
        self._lives = lives

    async def connect(self, word: str, request: EndpointRequest) -> None:
        """Connect a container to another network, now or at its start.

        Raises: NotFound; BeingRemoved; FailedPrecondition: it is connected; Forbidden: it shares another container's
        networks; SkepError, in Docker's words.
        """
        container, _ = self._store.require_plain(word)
        await self._lives.change_networks(container.id, Connect(request))

    async def disconnect(self, word: str, network: str, network_id: str = "") -> None:
        """Disconnect a container from a network.

        ``network`` is the user's word for it, ``network_id`` its id if known.  Raises: NotFound; BeingRemoved;
        FailedPrecondition: it is not connected; Forbidden: it shares another container's networks; SkepError.
        """
        container, _ = self._store.require_plain(word)
        await self._lives.change_networks(container.id, Disconnect(network, network_id))

    async def evict(self, container_id: ContainerId, network_id: str) -> None:
        """Disconnect a container from a network because the cluster reclaims its address."""
        try:
            await self.disconnect(container_id, network_id, network_id)
        except (NotFound, BeingRemoved, FailedPrecondition) as error:
            log.info("container has left the network already", container=container_id, reason=str(error))

    async def rename(self, id: ContainerId, name: str) -> None:
        """Rename a plain container, also on its networks.  It keeps its name if that fails.

        Raises: NotFound; BeingRemoved; AlreadyExists: the name is taken; FailedPrecondition: the cluster uses its name;
        SkepError; OSError.
        """
        await self._lives.change_networks(id, Rename(name))
