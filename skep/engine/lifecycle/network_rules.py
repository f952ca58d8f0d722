"""Rules for the networks of a plain container: which changes are refused, and the networks of the next run.  Pure.

Every node has the networks ``bridge``, ``host`` and ``none``.  A container on ``bridge`` has the mode BRIDGE, however
it was created.  A container that has left ``bridge`` has the mode NETWORKS.

Source: moby, daemon/container_operations.go (connectToNetwork, DisconnectFromNetwork, updateNetworkSettings).
"""

from itertools import chain

from msgspec.structs import replace

from skep.api.errors import Forbidden
from skep.engine.containers.container import Container, PlainOptions
from skep.engine.lifecycle.life_events import Connect, Disconnect
from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from skep.model.networks.sandbox import Endpoint, NetworkMode

NO_ALIASES = "network-scoped alias is supported only for containers in user defined networks"
NO_ADDRESS = "user specified IP address is supported on user defined networks only"
_BUILTIN = {mode.value: mode for mode in (NetworkMode.BRIDGE, NetworkMode.HOST, NetworkMode.NONE)}
_SHORT_ID_LENGTH = 12
"""Number of digits in Docker's short ids.  A shorter word could be the name of another network, such as ``db``."""
_HAS_ANOTHERS = (
    "container sharing network namespace with another container or host cannot be connected to any other "
    "network"
)
_HAS_NONE = (
    "container cannot be connected to multiple networks with one of the networks in private (none) mode"
)
_HAS_THE_HOSTS = "container cannot be disconnected from host network or connected to host network"


def refusal(container: Container, event: Connect | Disconnect) -> SkepError | None:
    """Return the error of a change that is refused, in Docker's words, or None."""
    plain = _plain(container)
    if plain.mode is NetworkMode.CONTAINER:
        return Forbidden(_HAS_ANOTHERS if isinstance(event, Connect) else _not_there(container, event))
    if isinstance(event, Connect):
        return _connection_refusal(container, plain, event)
    return _disconnection_refusal(container, plain, event)


def options_after(container: Container, event: Connect | Disconnect) -> PlainOptions:
    """Return the options after an accepted change: the networks of the next run."""
    plain = _plain(container)
    if isinstance(event, Connect):
        request = event.request
        if is_builtin(event):
            mac_address = request.mac_address or plain.mac_address
            return replace(plain, mode=NetworkMode.BRIDGE, mac_address=mac_address)
        return replace(plain, networks=(*plain.networks, request))
    if is_builtin(event):
        return replace(plain, mode=NetworkMode.NETWORKS)
    left = endpoint(container, event)
    id, names = event.network_id, {event.network, event.network_id}
    if left is not None:
        id, names = left.network_id, {left.network_id, left.network_name}
    kept = (one for one in plain.networks if not (one.network in names or _is_short_id(one.network, id)))
    return replace(plain, networks=tuple(kept))


def is_builtin(event: Connect | Disconnect) -> bool:
    """Return whether it changes the mode of the container, not its endpoints."""
    return (event.request.network if isinstance(event, Connect) else event.network) in _BUILTIN


def endpoint(container: Container, event: Disconnect) -> Endpoint | None:
    """Return the run's endpoint on a network that it leaves, or None for ``bridge`` or if it is not connected."""
    sandbox = container.sandbox if container.is_running else None
    endpoints = sandbox.endpoints if sandbox is not None else ()
    by_id = (one for one in endpoints if one.network_id in (event.network_id, event.network))
    by_name = (one for one in endpoints if one.network_name == event.network)
    return next(chain(by_id, by_name), None)


def _is_short_id(word: str, id: str) -> bool:
    """Return whether ``word`` is a network's id as ``docker network ls`` shows it, or longer."""
    return len(word) >= _SHORT_ID_LENGTH and id.startswith(word)


def _connection_refusal(container: Container, plain: PlainOptions, event: Connect) -> SkepError | None:
    request, builtin = event.request, _BUILTIN.get(event.request.network)
    if builtin is NetworkMode.HOST and plain.mode is not NetworkMode.HOST:
        return InvalidArgument(_HAS_THE_HOSTS)
    if plain.mode is NetworkMode.HOST:
        return FailedPrecondition(_HAS_ANOTHERS)
    if NetworkMode.NONE in (plain.mode, builtin):
        return FailedPrecondition(_HAS_NONE)
    is_there = any(one.network == request.network for one in plain.networks)
    if builtin is NetworkMode.BRIDGE:
        if request.aliases or request.links:
            return InvalidArgument(NO_ALIASES)
        if request.address or request.address6:
            return InvalidArgument(NO_ADDRESS)
        is_there = plain.mode is NetworkMode.BRIDGE
    elif container.is_running:  # the data plane checks that, because a network has several names
        return None
    if is_there:
        name = request.network
        return FailedPrecondition(f"endpoint with name {container.name} already exists in network {name}")
    return None


def _disconnection_refusal(container: Container, plain: PlainOptions, event: Disconnect) -> SkepError | None:
    if (builtin := _BUILTIN.get(event.network)) is not None:
        if plain.mode is not builtin:
            return FailedPrecondition(_not_there(container, event))
        return InvalidArgument(_HAS_THE_HOSTS) if builtin is NetworkMode.HOST else None
    if endpoint(container, event) is None and options_after(container, event) == plain:
        return FailedPrecondition(_not_there(container, event))
    return None


def _not_there(container: Container, event: Disconnect) -> str:
    return f"container {container.id} is not connected to network {event.network}"


def _plain(container: Container) -> PlainOptions:
    assert container.plain is not None, "a task's container keeps its networks"
    return container.plain
