"""Keeps the node's own networks over restarts, and applies the user's subnet to the gateway bridge."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Network
from itertools import chain
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.failures import describe_error, isolate, log_error
from skep.aio.trees import discard_tree_now
from skep.api.errors import Forbidden
from skep.api.formats.networks import NetworkBody, SubnetBody
from skep.dataplane.addresses import DEFAULT_POOLS, Subnets
from skep.dataplane.local.bridge_request import bridge_of
from skep.dataplane.local.objects import (
    GATEWAY,
    PARENT_MODES,
    LocalNetwork,
    device_of,
    find,
    parent_of,
    subnets_of,
)
from skep.dataplane.local.parent_request import parent_network_of
from skep.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable, Unimplemented
from skep.linux.files import is_no_file, replace_file
from skep.model.network import ConfigReference
from skep.model.networks.data_planes import why_reserved
from skep.model.networks.routes import Subnet
from skep.model.networks.tables import ParentLink
from skep.model.values.times import Timestamp, timestamp

log = structlog.get_logger()

_PREDEFINED = {"bridge": "bridge", "host": "host", "none": "null"}
_CONFIGURATIONS_MAX = 1000
"""Limit for ``--config-only`` networks on one node.  All are in one file, which each change writes completely."""
_BRIDGES_MAX = 1000
"""Limit for bridge networks on one node, because the kernel keeps them in memory."""
_LEFT_MAX = 32
"""Limit for removed cluster networks that are remembered for containers that still name them."""


class GatewayBridge(Protocol):
    """The gateway bridge (``dataplane/gateway.py``)."""

    @property
    def bridge(self) -> str:
        """Name of the bridge's link."""

    @property
    def subnet(self) -> IPv4Network | None:
        """Subnet of the bridge, or None before the bridge is created."""

    def users(self) -> Sequence[str]:
        """Return the ids of the containers on the bridge."""

    async def move(self, subnet: IPv4Network | None) -> None:
        """Change the bridge's subnet.  None chooses a free one.

        Raises: FailedPrecondition: a container is connected; Forbidden: the machine routes that subnet; SkepError.
        """


class ParentDevices(Protocol):
    """Devices of the machine that the node creates for networks (``dataplane/netns/parents.py``)."""

    async def make(self, parent: ParentLink) -> None:
        """Create the device if it is missing.  Raises: SkepError."""

    async def remove(self, parent: ParentLink) -> None:
        """Remove the device if it exists.  Raises: SkepError."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file with the node's networks."""

    created_at: Timestamp
    ids: Mapping[str, str]
    """Ids of the predefined networks, by name."""
    gateway: LocalNetwork
    is_gateway_removed: bool = False
    configurations: tuple[LocalNetwork, ...] = ()
    bridges: tuple[LocalNetwork, ...] = ()
    left: tuple[LocalNetwork, ...] = ()
    """Cluster networks whose last container has left.

    Remembered, because another container may be being prepared for them.
    """


class LocalNetworks:
    """The node's own networks.

    Args:
        file: File in which the networks are kept.
        gateway: The gateway bridge, or None if this node does not network containers.
        devices: The parent devices, or None if this node does not network containers.
        pools: Address pools for networks without a subnet named by the user.
        new_id: Returns a new id of 64 hexadecimal digits.
    """

    def __init__(
        self,
        file: Path,
        gateway: GatewayBridge | None,
        devices: ParentDevices | None = None,
        *,
        pools: Sequence[Subnets] = DEFAULT_POOLS,
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self._file = file
        self._gateway = gateway
        self._devices = devices
        self._pools = pools
        self._clock = clock
        self._new_id = new_id
        self._kept: _Kept | None = None
        self._leaving: dict[str, str] = {}
        """Devices that are being removed.

        If a network on such a device is created meanwhile, it creates the device again.
        """
        self._removing = asyncio.Lock()
        self.is_used: Callable[[str], bool] = lambda _: False
        """Returns whether the network with this id has containers, including starting ones."""

    def open(self) -> None:
        """Read the networks that an earlier process kept.  Undecodable content is replaced by new networks.

        If not called before, the first use of this object calls it.  Raises: Unavailable: the file cannot be read at
        present, and is not overwritten.
        """
        try:
            self._kept = msgspec.json.decode(self._file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and not is_no_file(error):
                raise Unavailable(f"the node's networks cannot be read: {describe_error(error)}") from error
            aside = self._file.with_suffix(".damaged")
            log_error(
                error,
                "file of local networks damaged, starting with new ones",
                file=str(self._file),
                kept_as=str(aside),
            )
            discard_tree_now(aside)
            with suppress(OSError):
                self._file.rename(aside)
        if self._kept is None:
            now = self._now()
            ids = {name: self._new_id() for name in _PREDEFINED}
            kept = _Kept(created_at=now, ids=ids, gateway=self._new_gateway(NetworkBody(name=GATEWAY)))
            try:
                self._keep(kept)
            except OSError as error:  # the next change writes the file too
                log_error(error, "local networks not saved")
                self._kept = kept

    def predefined(self) -> list[LocalNetwork]:
        """Return the networks that every node has."""
        kept = self._opened()
        return [
            LocalNetwork(id=kept.ids[name], name=name, driver=driver, created_at=kept.created_at)
            for name, driver in _PREDEFINED.items()
        ]

    def configurations(self) -> list[LocalNetwork]:
        """Return the ``--config-only`` networks."""
        return list(self._opened().configurations)

    def gateway(self) -> LocalNetwork | None:
        """Return the gateway bridge.

        Returns None if there is none, or if the user has removed it and no container has needed it since.  If a removed
        bridge has a container again, this records that the bridge exists.
        """
        kept = self._opened()
        if self._gateway is None or self._gateway.subnet is None:
            return None
        if kept.is_gateway_removed:
            if not self._gateway.users():
                return None
            kept = replace(kept, is_gateway_removed=False)
            self._keep(kept)
        subnet = self._gateway.subnet
        config = SubnetBody(subnet=str(subnet), gateway=str(subnet[1]))
        options = {**kept.gateway.options, "com.docker.network.bridge.name": self._gateway.bridge}
        return replace(kept.gateway, configs=(config,), options=options)

    def gateway_users(self) -> Sequence[str]:
        """Return the ids of the containers on the gateway bridge."""
        return self._gateway.users() if self._gateway is not None else ()

    def add_configuration(self, body: NetworkBody) -> LocalNetwork:
        """Keep settings for other networks.  Raises: AlreadyExists; Forbidden: there are too many."""
        kept = self._opened()
        if any(one.name == body.name for one in kept.configurations):
            raise AlreadyExists(f"network with name {body.name} already exists")
        if len(kept.configurations) >= _CONFIGURATIONS_MAX:
            raise Forbidden(f"this node has {_CONFIGURATIONS_MAX} configuration networks already")
        ipam = body.ipam
        network = LocalNetwork(
            id=self._new_id(),
            name=body.name,
            driver="null",
            created_at=self._now(),
            configs=ipam.config if ipam is not None else (),
            ipam_driver=(ipam.driver if ipam is not None else "") or "default",
            ipam_options=ipam.options if ipam is not None else None,
            is_configuration=True,
            has_ipv6=body.enable_ipv6,
            options=body.options,
            labels=body.labels,
        )
        self._keep(replace(kept, configurations=(*kept.configurations, network)))
        return network

    def remove_configuration(self, id: str) -> None:
        """Remove settings.  Raises: NotFound; Forbidden: a network uses them."""
        kept = self._opened()
        rest = tuple(one for one in kept.configurations if one.id != id)
        for gone in kept.configurations:
            if gone.id == id and any(one.config_from == gone.name for one in kept.bridges):
                raise Forbidden(
                    f'error while removing network: configuration network "{gone.name}" is in use'
                )
        if len(rest) == len(kept.configurations):
            raise NotFound(f"network {id} not found")
        self._keep(replace(kept, configurations=rest))

    def bridges(self) -> list[LocalNetwork]:
        """Return the users' networks for containers: bridges, and networks on the machine's own devices."""
        return [one for one in self._opened().bridges if not one.cluster_id]

    def all(self) -> list[LocalNetwork]:
        """Return ``bridges``, and the cluster networks that this node has created for tasks."""
        return list(self._opened().bridges)

    def of_cluster(
        self, cluster_id: str, body: NetworkBody, devices: Collection[str], is_used: Callable[[str], bool]
    ) -> LocalNetwork:
        """Return the cluster network on a device of this machine.  Creates it if needed.

        An unused cluster network on the same device is removed, because its task was never created.

        Args:
            body: The request that names the ``--config-only`` network with the settings.
            is_used: Returns whether the network with the given id has containers.

        Raises: NotFound: no such configuration, in Docker's words; InvalidArgument, Forbidden, Unimplemented: the
        settings cannot be applied.
        """
        kept = self._opened()
        if found := next((one for one in kept.bridges if one.cluster_id == cluster_id), None):
            return found
        configuration = find(kept.configurations, body.config_source) if body.config_source else None
        if configuration is None:
            raise NotFound(f'configuration network "{body.config_source}" does not exist')
        lasting = [one for one in kept.bridges if not one.cluster_id or is_used(one.id)]
        network = parent_network_of(
            body,
            id=self._new_id(),
            created_at=self._now(),
            others=lasting,
            devices=devices,
            made=self._made_devices(),
            pools=self._pools,
            configuration=configuration,
        )
        network = replace(network, cluster_id=cluster_id)
        device = device_of(network)
        others = [one for one in kept.bridges if one in lasting or device_of(one) != device]
        self._keep(replace(kept, bridges=(*others, network)))
        log.info("cluster network created on a device of this machine", network=network.name)
        return network

    async def for_start(
        self, id: str, devices: Collection[str], is_used: Callable[[str], bool]
    ) -> LocalNetwork:
        """Return the network with this id for a container that is about to start.

        A cluster network whose last container has left since the container was prepared is created again, as by
        ``of_cluster``.

        Raises: NotFound; the errors of ``of_cluster``.
        """
        async with self._removing:  # so that its device is not removed while the container starts
            kept = self._opened()
            if found := next((one for one in kept.bridges if one.id == id), None):
                return found
            left = next((one for one in kept.left if one.id == id), None)
            if left is None:
                raise NotFound(f"network {id} not found")
            source = ConfigReference(network=left.config_from)
            body = NetworkBody(name=left.name, driver=left.driver, config_from=source)
            return self.of_cluster(left.cluster_id, body, devices, is_used)

    async def add(
        self, body: NetworkBody, routes: Sequence[Subnet], devices: Collection[str]
    ) -> LocalNetwork:
        """Create a user's bridge network, or a network on a device of the machine (macvlan, ipvlan).

        Args:
            routes: Subnets that the machine routes.
            devices: Names of its network interfaces.

        Raises: AlreadyExists; NotFound; InvalidArgument, Forbidden, Unimplemented: the request cannot be fulfilled.
        """
        kept = self._opened()
        if any(one.name == body.name for one in (*kept.bridges, *kept.configurations)):
            raise AlreadyExists(f"network with name {body.name} already exists")
        if self._gateway is None:
            raise Unimplemented("this node does not network containers, so it has no bridge networks")
        if len(kept.bridges) >= _BRIDGES_MAX:
            raise Forbidden(f"this node has {_BRIDGES_MAX} bridge networks already")
        configuration = find(kept.configurations, body.config_source) if body.config_source else None
        if body.config_source and configuration is None:
            raise NotFound(f"configuration network {body.config_source} not found")
        if body.driver in PARENT_MODES:
            network = parent_network_of(
                body,
                id=self._new_id(),
                created_at=self._now(),
                others=kept.bridges,
                devices=devices,
                made=self._made_devices(),
                routes=routes,
                pools=self._pools,
                configuration=configuration,
            )
        else:
            own = self._gateway.subnet
            others = chain.from_iterable(map(subnets_of, kept.bridges))
            taken = [*routes, *others, *([own] if own is not None else [])]
            network = bridge_of(
                body,
                id=self._new_id(),
                created_at=self._now(),
                taken=taken,
                pools=self._pools,
                configuration=configuration,
            )
        self._keep(replace(kept, bridges=(*kept.bridges, network)))
        if (parent := parent_of(network)) is not None and parent.made and self._devices is not None:
            try:
                await self._devices.make(parent)
            except BaseException:
                self._forget(network.id)
                raise
        log.info(
            "network created", network=network.name, driver=network.driver, subnet=network.configs[0].subnet
        )
        return network

    async def remove_bridge(self, id: str) -> None:
        """Remove a network that has no containers, and the device that was created for it.

        Raises: NotFound; Forbidden: a container has an endpoint on it.
        """
        if (network := find(self.all(), id)) is not None and self.is_used(network.id):
            raise Forbidden(
                f"error while removing network: network {network.name} id {network.id} has active endpoints"
            )
        parent = parent_of(self._forget(id))
        if parent is None or not parent.made or self._devices is None:
            return
        async with self._removing:
            if parent.device in self._made_devices():
                return
            self._leaving[parent.device] = parent.made
            try:
                removal = self._devices.remove(parent)
                await isolate(removal, "device of a network not removed", device=parent.device)
            finally:
                del self._leaving[parent.device]

    def _forget(self, id: str) -> LocalNetwork:
        kept = self._opened()
        gone = next((one for one in kept.bridges if one.id == id), None)
        if gone is None:
            raise NotFound(f"network {id} not found")
        left = (*kept.left, gone)[-_LEFT_MAX:] if gone.cluster_id else kept.left
        self._keep(replace(kept, bridges=tuple(one for one in kept.bridges if one is not gone), left=left))
        return gone

    def _made_devices(self) -> dict[str, str]:
        """Return the kind of each device that the node creates for networks, by name."""
        parents = map(parent_of, self._opened().bridges)
        return self._leaving | {one.device: one.made for one in parents if one is not None and one.made}

    async def make_gateway(self, body: NetworkBody) -> LocalNetwork:
        """Create the gateway bridge as the user specifies it.

        Raises: AlreadyExists; InvalidArgument, Forbidden, Unimplemented: the request cannot be fulfilled.
        """
        if self.gateway() is not None:
            raise AlreadyExists(f"network with name {GATEWAY} already exists")
        if self._gateway is None:
            raise Unimplemented("this node does not network containers, so it has no gateway bridge")
        if body.driver not in ("", "bridge"):
            raise Forbidden(f"{GATEWAY} is this node's gateway bridge and cannot be of driver {body.driver}")
        subnet = _requested_subnet(body)
        await self._gateway.move(subnet)
        network = self._new_gateway(body)
        self._keep(replace(self._opened(), gateway=network, is_gateway_removed=False))
        log.info("gateway bridge created", subnet=str(self._gateway.subnet))
        return network

    def remove_gateway(self) -> None:
        """Remove the gateway bridge from the list.  The next container that needs it, or the user, creates it again.

        Raises: NotFound; Forbidden: containers are on it.
        """
        present = self.gateway()
        if present is None:
            raise NotFound(f"network {GATEWAY} not found")
        if self.gateway_users():
            raise Forbidden(
                f"error while removing network: network {GATEWAY} id {present.id} has active endpoints"
            )
        self._keep(replace(self._opened(), gateway=self._new_gateway(NetworkBody()), is_gateway_removed=True))

    def _new_gateway(self, body: NetworkBody) -> LocalNetwork:
        options = {
            "com.docker.network.bridge.enable_icc": "false",
            "com.docker.network.bridge.enable_ip_masquerade": "true",
        }
        return LocalNetwork(
            id=self._new_id(),
            name=GATEWAY,
            driver="bridge",
            created_at=self._now(),
            options={**options, **body.options},
            labels=body.labels,
        )

    def _opened(self) -> _Kept:
        if self._kept is None:
            self.open()
        assert self._kept is not None, "opened just now"
        return self._kept

    def _keep(self, kept: _Kept) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, msgspec.json.encode(kept))
        self._kept = kept

    def _now(self) -> Timestamp:
        return timestamp(self._clock.now_ns())


def _requested_subnet(body: NetworkBody) -> IPv4Network | None:
    """Return the requested subnet, or None.

    Raises: InvalidArgument: the request must have a single IPv4 subnet that is large enough, with its first address as
    the gateway.
    """
    configs = [one for one in (body.ipam.config if body.ipam is not None else ()) if one != SubnetBody()]
    if not configs:
        return None
    try:
        (config,) = configs
        subnet = IPv4Network(config.subnet, strict=False)
    except ValueError:
        raise InvalidArgument(f"{GATEWAY} has one IPv4 subnet") from None
    if reason := why_reserved(subnet):
        raise InvalidArgument(f"subnet {subnet} {reason}")
    if subnet.num_addresses < 4 or config.ip_range or config.auxiliary_addresses:
        raise InvalidArgument(f"{GATEWAY} takes a whole subnet of four addresses or more")
    if config.gateway not in ("", str(subnet[1])):
        raise InvalidArgument(f"the gateway of {GATEWAY} is the first address of its subnet, {subnet[1]}")
    return subnet
