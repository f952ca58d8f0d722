"""The engine's interface for container networks, which the data plane implements, and changes of plain containers.

Source: moby, daemon/container_operations.go (connectToNetwork, DisconnectFromNetwork), daemon/rename.go.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import structlog

from skep.engine.containers.container import BeingRemoved, Container
from skep.engine.containers.state import ContainerStore
from skep.engine.events import Events, NamedNetwork
from skep.engine.lifecycle.life_events import Connect, Disconnect, Rename
from skep.errors import FailedPrecondition, NotFound, Unimplemented
from skep.model.door.settings import KEYS_DIRECTORY
from skep.model.networks.sandbox import Endpoint, EndpointRequest, NetworkMode, Sandbox, SandboxConfig
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.values.ids import ContainerId, TaskId

log = structlog.get_logger()


class Networking(Protocol):
    """Creates and frees the sandboxes of containers.  The data plane implements it."""

    @property
    def host_gateway(self) -> str:
        """The node's address for its containers (``host-gateway``).  Empty without one."""

    @property
    def predefined_ids(self) -> Mapping[str, str]:
        """Ids of the networks ``bridge``, ``host`` and ``none``, by name."""

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        """Prepare the node, keep the ``live`` sandboxes and free all others.  Raises: SkepError."""

    def is_present(self, sandbox: Sandbox) -> bool:
        """Return whether the sandbox's namespace exists."""

    async def attach(self, config: SandboxConfig) -> Sandbox:
        """Create a network namespace with its endpoints and host-mode ports.  Raises: SkepError."""

    async def detach(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Free the sandbox.  Idempotent."""

    async def connect(self, config: SandboxConfig, sandbox: Sandbox, request: EndpointRequest) -> Sandbox:
        """Add an endpoint to a running container.  Raises: FailedPrecondition: it exists; NotFound; SkepError."""

    async def disconnect(self, config: SandboxConfig, sandbox: Sandbox, network_id: str) -> Sandbox:
        """Remove an endpoint of a running container.  Raises: SkepError."""

    async def change_bridge(self, config: SandboxConfig, sandbox: Sandbox) -> Sandbox:
        """Add a running container to the node's bridge or remove it, according to ``config.mode``.

        Raises: SkepError.
        """

    async def rename(self, config: SandboxConfig, sandbox: Sandbox | None) -> None:
        """Use ``config.name`` on its networks from now on.  ``sandbox`` is None if it does not run.

        Raises: FailedPrecondition; SkepError.
        """

    async def holders(self) -> Collection[ContainerId]:
        """Return the containers that hold network resources, whether they need them or not."""

    async def free(self, id: ContainerId) -> None:
        """Free and log all resources held for a container that does not need them.  Raises: SkepError, OSError."""

    async def sweep(self) -> None:
        """Free resources that no container holds.  Raises: SkepError, OSError."""


def sandbox_config(container: Container) -> SandboxConfig:
    """Return the container's configuration for its networks.

    Proxies of the front door have the mount of certificates, and listen for IPv6.
    """
    config = container.config
    return SandboxConfig(
        id=container.id,
        name=container.name,
        hostname=config.hostname,
        task=TaskId(container.labels.get(LABEL_TASK_ID, "")),
        mode=container.mode,
        networks=container.plain.networks if container.plain is not None else (),
        endpoints=config.endpoints,
        mac_address=container.plain.mac_address if container.plain is not None else "",
        ports=config.ports,
        sysctls=config.sysctls,
        nameservers=config.nameservers,
        dns_options=config.dns_options,
        serves_ipv6=any(one.internal and one.destination == KEYS_DIRECTORY for one in config.mounts),
        users=container.users,
    )


def publish_networks(
    events: Events, action: str, container: Container, sandbox: Sandbox | None, ids: Mapping[str, str]
) -> None:
    """Publish that a container's run joins or leaves its networks.  ``ids`` are ``predefined_ids``."""
    if sandbox is None:
        return
    networks = [endpoint_network(one) for one in sandbox.endpoints]
    if (mode := container.mode) in (NetworkMode.BRIDGE, NetworkMode.HOST, NetworkMode.NONE):
        driver = "null" if mode is NetworkMode.NONE else mode.value
        networks.insert(0, NamedNetwork(ids.get(mode.value, ""), mode.value, driver))
    for network in networks:
        events.publish_network(action, network, container.id)


def endpoint_network(endpoint: Endpoint) -> NamedNetwork:
    """Return the network of an endpoint."""
    head = endpoint.config.head
    driver = head.parent.kind if head.parent is not None else "bridge" if head.is_of_node else "overlay"
    return NamedNetwork(head.id, head.name, driver)


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
        networks; Unimplemented: sysctls of an interface of a running container; SkepError, in Docker's words.
        """
        container, _ = self._store.require_plain(word)
        if request.sysctls and container.is_active:
            raise Unimplemented(
                "sysctls of an interface are set when the container starts: stop it before you connect it"
            )
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
