"""Network changes of plain containers: ``docker network connect`` and ``disconnect``, ``docker rename``.

Source: moby, daemon/container_operations.go (connectToNetwork, DisconnectFromNetwork, updateNetworkSettings),
daemon/rename.go.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
from msgspec.structs import replace

from skep.aio.failures import isolate
from skep.api.errors import Forbidden
from skep.engine.bundle import Bundles
from skep.engine.container import BeingRemoved, Container, PlainOptions
from skep.engine.container_locks import ContainerLocks
from skep.engine.create import NO_ADDRESS, NO_ALIASES
from skep.engine.events import Events, NamedNetwork
from skep.engine.networking import Networking, endpoint_network, sandbox_config
from skep.engine.state import ContainerStore
from skep.errors import FailedPrecondition, InvalidArgument, NotFound
from skep.model.ids import ContainerId
from skep.model.sandbox import EndpointRequest, NetworkMode, Sandbox

log = structlog.get_logger()

T = TypeVar("T")

_BUILTIN = {mode.value: mode for mode in (NetworkMode.BRIDGE, NetworkMode.HOST, NetworkMode.NONE)}
_HAS_ANOTHERS = (
    "container sharing network namespace with another container or host cannot be connected to any other "
    "network"
)
_HAS_NONE = (
    "container cannot be connected to multiple networks with one of the networks in private (none) mode"
)
_HAS_THE_HOSTS = "container cannot be disconnected from host network or connected to host network"


class Lives(Protocol):
    """The driver's interface for changes of networks."""

    locks: ContainerLocks

    async def operate(self, id: ContainerId, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of ``work``, the only operation on the container meanwhile.  It runs to its end."""


class NetworkChanges:
    """Connects plain containers to networks and disconnects them, while they run or before their start.

    The networks of every node are named ``bridge``, ``host`` and ``none``.  A container on ``bridge`` has the mode
    BRIDGE, regardless of its creation.  A container that has left it has the mode NETWORKS.
    """

    def __init__(
        self,
        store: ContainerStore,
        bundles: Bundles,
        network: Networking,
        lives: Lives,
        events: Events,
    ) -> None:
        """Take the parts of one engine."""
        self._store = store
        self._bundles = bundles
        self._network = network
        self._lives = lives
        self._events = events

    async def connect(self, word: str, request: EndpointRequest) -> None:
        """Connect a container to another network, now or at its start.

        Raises: NotFound; BeingRemoved; FailedPrecondition: it is connected; Forbidden: it shares another container's
        networks; SkepError, in Docker's words.
        """
        container, _ = self._store.require_plain(word)
        await self._lives.operate(container.id, partial(self._connect, container.id, request))

    async def _connect(self, id: ContainerId, request: EndpointRequest) -> None:
        async with self._lives.locks.networks(id):
            container, plain = self._require_kept(id)
            if plain.mode is NetworkMode.CONTAINER:
                raise Forbidden(_HAS_ANOTHERS)
            builtin = _BUILTIN.get(request.network)
            if builtin is NetworkMode.HOST and plain.mode is not NetworkMode.HOST:
                raise InvalidArgument(_HAS_THE_HOSTS)
            if plain.mode is NetworkMode.HOST:
                raise FailedPrecondition(_HAS_ANOTHERS)
            if NetworkMode.NONE in (plain.mode, builtin):
                raise FailedPrecondition(_HAS_NONE)
            if builtin is NetworkMode.BRIDGE:
                await self._join_bridge(container, plain, request)
                return
            sandbox = None
            if container.is_running:
                assert container.sandbox is not None, "a running container has one"
                sandbox = await self._network.connect(sandbox_config(container), container.sandbox, request)
            elif any(one.network == request.network for one in plain.networks):
                raise _is_there(container, request.network)
            networks = (*plain.networks, request)
            await self._record(container, sandbox, networks=networks)
            if sandbox is not None:
                self._events.publish_network("connect", endpoint_network(sandbox.endpoints[-1]), container.id)

    async def disconnect(self, word: str, network: str, network_id: str = "") -> None:
        """Disconnect a container from a network.

        ``network`` is the user's word for it, ``network_id`` its id if known.  Raises: NotFound; BeingRemoved;
        FailedPrecondition: it is not connected; Forbidden: it shares another container's networks; SkepError.
        """
        container, _ = self._store.require_plain(word)
        await self._lives.operate(container.id, partial(self._disconnect, container.id, network, network_id))

    async def _disconnect(self, id: ContainerId, network: str, network_id: str) -> None:
        async with self._lives.locks.networks(id):
            container, plain = self._require_kept(id)
            if plain.mode is NetworkMode.CONTAINER:
                raise Forbidden(_not_there(container, network))
            if network in _BUILTIN:
                await self._leave_builtin(container, plain, _BUILTIN[network])
            else:
                await self._leave(container, plain, network, network_id)

    async def evict(self, container_id: ContainerId, network_id: str) -> None:
        """Disconnect a container from a network because the cluster reclaims its address."""
        try:
            await self.disconnect(container_id, network_id, network_id)
        except (NotFound, BeingRemoved, FailedPrecondition) as error:
            log.info("container has left the network already", container=container_id, reason=str(error))

    async def rename(self, id: ContainerId, name: str) -> Container:
        """Rename a plain container, also on its networks.  It keeps its name if that fails.

        Raises: NotFound; BeingRemoved; AlreadyExists: the name is taken; FailedPrecondition: the cluster uses its name;
        SkepError; OSError.
        """
        return await self._lives.operate(id, partial(self._rename, id, name))

    async def _rename(self, id: ContainerId, name: str) -> Container:
        async with self._lives.locks.networks(id):
            before = self._store.require_kept(id, "container is marked for removal and cannot be renamed")
            sandbox = before.sandbox if before.is_running else None
            with self._store.renamed(id, name) as renamed:
                try:
                    await self._network.rename(sandbox_config(renamed), sandbox)
                except FailedPrecondition:  # no name was changed
                    raise
                except BaseException:
                    back = self._network.rename(sandbox_config(before), sandbox)
                    await isolate(back, "container rename not rolled back", container=id)
                    raise
            self._events.publish("rename", renamed, oldName=f"/{before.name}")
            return renamed

    def _require_kept(self, id: ContainerId) -> tuple[Container, PlainOptions]:
        refusal = (
            f"Container {id} is marked for removal and cannot be connected or disconnected to the network"
        )
        return self._store.require_plain(self._store.require_kept(id, refusal).id)

    async def _leave(self, container: Container, plain: PlainOptions, network: str, network_id: str) -> None:
        known, is_there = {network, network_id}, False
        sandbox = container.sandbox if container.is_running else None
        for endpoint in sandbox.endpoints if sandbox is not None else ():
            if {endpoint.network_id, endpoint.network_name} & known:
                is_there = True
                known |= {endpoint.network_id, endpoint.network_name}
                assert container.sandbox is not None, "a running container has one"
                config = sandbox_config(container)
                left = await self._network.disconnect(config, container.sandbox, endpoint.network_id)
                container = await self._observe(container, left)
                self._events.publish_network("disconnect", endpoint_network(endpoint), container.id)
        networks = tuple(one for one in plain.networks if one.network not in known)
        if not is_there and len(networks) == len(plain.networks):
            raise FailedPrecondition(_not_there(container, network))
        await self._record(container, None, networks=networks)

    async def _join_bridge(self, container: Container, plain: PlainOptions, request: EndpointRequest) -> None:
        if request.aliases or request.links:
            raise InvalidArgument(NO_ALIASES)
        if request.address or request.address6:
            raise InvalidArgument(NO_ADDRESS)
        if plain.mode is NetworkMode.BRIDGE:
            raise _is_there(container, request.network)
        mac_address = request.mac_address or plain.mac_address
        joined = replace(plain, mode=NetworkMode.BRIDGE, mac_address=mac_address)
        await self._change_bridge(container, joined)

    async def _leave_builtin(self, container: Container, plain: PlainOptions, network: NetworkMode) -> None:
        if plain.mode is not network:
            raise FailedPrecondition(_not_there(container, network.value))
        if network is NetworkMode.HOST:
            raise InvalidArgument(_HAS_THE_HOSTS)
        await self._change_bridge(container, replace(plain, mode=NetworkMode.NETWORKS))

    async def _change_bridge(self, container: Container, plain: PlainOptions) -> None:
        sandbox = None
        if container.is_running:
            assert container.sandbox is not None, "a running container has one"
            config = sandbox_config(replace(container, plain=plain))
            sandbox = await self._network.change_bridge(config, container.sandbox)
        await self._record(container, sandbox, mode=plain.mode, mac_address=plain.mac_address)
        if sandbox is not None:
            has_joined = plain.mode is NetworkMode.BRIDGE
            bridge = NamedNetwork(self._network.predefined_ids.get("bridge", ""), "bridge", "bridge")
            self._events.publish_network("connect" if has_joined else "disconnect", bridge, container.id)

    async def _record(self, container: Container, sandbox: Sandbox | None, **changed: Any) -> None:
        """Record the ``sandbox`` of the current run, if it changed, and ``changed`` options for the next run."""
        if sandbox is not None:
            await self._observe(container, sandbox)
        _, plain = self._store.require_plain(container.id)  # its user may have stopped it meanwhile
        self._store.change(container.id, plain=replace(plain, **changed))

    async def _observe(self, container: Container, sandbox: Sandbox) -> Container:
        changed = self._store.observe(container.id, sandbox=sandbox)
        try:
            await asyncio.to_thread(self._bundles.refresh_name_files, container, changed)
        except OSError as error:
            log.warning("container name files not written", container=container.id, reason=str(error))
        return changed


def _is_there(container: Container, network: str) -> FailedPrecondition:
    return FailedPrecondition(f"endpoint with name {container.name} already exists in network {network}")


def _not_there(container: Container, network: str) -> str:
    return f"container {container.id} is not connected to network {network}"
