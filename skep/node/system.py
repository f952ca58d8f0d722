"""The node as ``/_ping``, ``/version``, ``/info`` and ``/events`` show it."""

import hashlib
from base64 import b32encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from skep.api.client import Client
from skep.api.versions import NEWEST
from skep.configuration.configuration import Configuration
from skep.engine.container import Counts
from skep.engine.engine import Engine
from skep.model.times import timestamp
from skep.node import features, info
from skep.node.docker_engine import DockerEngine
from skep.node.events import EventRequest, Message, NodeEvents
from skep.node.membership import Membership


class NodeSystem:
    """Implements ``routes.system``.

    Args:
        engine: this node's containers; None: it runs none.
        docker: the machine's Docker Engine, if there is one.
        warnings: sentences about the configuration, conditions, published ports and connections to other nodes.
    """

    def __init__(
        self,
        node: info.Node,
        *,
        membership: Membership,
        manager_api: Client,
        events: NodeEvents,
        engine: Engine | None,
        docker: DockerEngine | None,
        warnings: Callable[[], Sequence[str]],
    ) -> None:
        self._node = node
        self._membership = membership
        self._manager_api = manager_api
        self._events = events
        self._engine = engine
        self._docker = docker
        self._warnings = warnings

    def configure(self, configuration: Configuration) -> None:
        """Show ``configuration`` from now on (it was reloaded)."""
        self._node = msgspec.structs.replace(self._node, configuration=configuration)

    @property
    def swarm_header(self) -> str:
        """See ``routes.system.System``."""
        return self._membership.header

    def version(self) -> Mapping[str, Any]:
        """With the version of the Docker Engine, if there is one."""
        if self._docker is None:
            return info.version(self._node, str(NEWEST))
        node = msgspec.structs.replace(self._node, engine=self._docker.version)
        return info.version(node, str(self._docker.api_version))

    async def info(self) -> Mapping[str, Any]:
        """Of this node, its membership, and the Docker Engine, if there is one."""
        swarm = await self._membership.info()
        counts = self._engine.counts() if self._engine is not None else Counts()
        if self._docker is not None:
            counts += await self._docker.counts()
        return info.info(
            self._node,
            counts=counts,
            swarm=swarm,
            warnings=(
                *swarm.get("Warnings", ()),
                *features.warnings(self._node.features),
                *(f"WARNING: {sentence}" for sentence in self._warnings()),
            ),
            now=timestamp(self._events.clock.now_ns()),
        )

    async def stream_events(self, request: EventRequest, send: Callable[[Message], Awaitable[None]]) -> None:
        """Events of this node, of its manager, and of the Docker Engine."""
        sources = [self._manager_api] if self._membership.is_manager else []
        if self._docker is not None:
            sources.append(self._docker.api)
        await self._events.stream(request, sources, send)


def engine_id(data_dir: Path) -> str:
    """The ``ID`` of ``/info``: the same for as long as this data directory stays on this machine."""
    try:
        machine = Path("/etc/machine-id").read_bytes()
    except OSError:
        machine = b""
    text = b32encode(hashlib.sha256(machine + bytes(data_dir)).digest()).decode()[:48]
    return ":".join(text[start : start + 4] for start in range(0, 48, 4))
