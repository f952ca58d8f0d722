"""What containers need of the node's network."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from skep.model.ids import ContainerId
from skep.node.oci.container import Container, Endpoint, NodePort, Place
from skep.node.oci.processes import is_alive


class Networking(Protocol):
    """Gives containers their places on networks (``node/network/connecting.py``)."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Keep what containers are given, whatever others change, until the block ends."""

    async def restore(self, live: Mapping[ContainerId, Endpoint]) -> None:
        """Make the node ready, keep what belongs to the ``live`` containers, free everything else."""

    async def attach(
        self, container_id: ContainerId, ports: Sequence[NodePort], places: Sequence[Place]
    ) -> Endpoint:
        """A network namespace with ``places`` and a way out, host-mode ``ports`` published.  Raises: SkepError."""

    async def detach(self, container_id: ContainerId, endpoint: Endpoint) -> None:
        """Free all of it.  Harmless when nothing is left."""


def kept_endpoints(containers: Iterable[Container]) -> Mapping[ContainerId, Endpoint]:
    """Network places of the containers of an earlier process that run, or may still be started."""
    return {
        one.id: one.endpoint
        for one in containers
        if one.endpoint is not None
        and os.path.ismount(one.endpoint.netns)
        and (not one.was_started or (one.process is not None and is_alive(one.process)))
    }
