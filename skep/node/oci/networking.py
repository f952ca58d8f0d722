"""What containers need of the node's network."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from skep.model.ids import ContainerId
from skep.model.service import PortConfig
from skep.node.oci.container import Endpoint


class Networking(Protocol):
    """Gives containers their place on the network (``node/network/gateway.py``)."""

    async def restore(self, live: Mapping[ContainerId, Endpoint]) -> None:
        """Make the node ready, keep what belongs to the ``live`` containers, free everything else."""

    async def attach(self, container_id: ContainerId, ports: Sequence[PortConfig]) -> Endpoint:
        """A network namespace with a way out, its host-mode ``ports`` published.  Raises: SkepError."""

    async def detach(self, container_id: ContainerId, endpoint: Endpoint) -> None:
        """Free all of it.  Harmless when nothing is left."""
