"""Connects containers: creates a namespace, attaches it to the container's networks, and last to the gateway bridge."""

import asyncio
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path

import msgspec
import structlog
from pyroute2.netlink.exceptions import NetlinkError

from skep.aio.failures import describe_error, isolate, log_error
from skep.dataplane.endpoint_allocation import EndpointAllocation
from skep.dataplane.gateway import Gateway
from skep.dataplane.ingress.reply_routing import ReplyRouting
from skep.dataplane.net_process.name_registration import NameRegistration
from skep.dataplane.netns.kernel.conntrack import SYSCTLS as TRACKING_SYSCTLS
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.overlays import Overlays
from skep.dataplane.plan.overlay import check_sandbox
from skep.dataplane.plan.reply_routing import SYSCTLS as REPLY_SYSCTLS
from skep.dataplane.plan.reply_routing import IngressEndpoint
from skep.errors import SkepError, Unavailable
from skep.model.networks.sandbox import EndpointConfig, EndpointRequest, NetworkMode, Sandbox, SandboxConfig
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

_CONTAINER_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv6/conf/lo/disable_ipv6": "1",
}


class ContainerNetwork:
    """Creates and frees the network sandboxes of containers (``engine.networks.networking.Networking``)."""

    def __init__(
        self,
        *,
        namespaces: Namespaces,
        gateway: Gateway,
        overlays: Overlays,
        allocation: EndpointAllocation,
        reply_routing: ReplyRouting,
        naming: NameRegistration | None,
        show_condition: Callable[[str], None],
    ) -> None:
        """Connect the parts.

        Args:
            allocation: Allocates the endpoints of plain containers.
            naming: Registers names, or None if names are not served.
            show_condition: Called with a sentence that lists the containers whose networks are not maintained.  The
                text is empty if all are.
        """
        self._namespaces = namespaces
        self._gateway = gateway
        self._overlays = overlays
        self._allocation = allocation
        self._reply_routing = reply_routing
        self._naming = naming
        self._show_condition = show_condition
        self._left_out: dict[ContainerId, str] = {}

    @property
    def host_gateway(self) -> str:
        """The node's address on the gateway bridge, for ``host-gateway``.  Empty until the bridge has a subnet."""
        subnet = self._gateway.subnet
        return str(subnet[1]) if subnet is not None else ""

    @property
    def predefined_ids(self) -> Mapping[str, str]:
        """Ids of ``bridge``, ``host`` and ``none``, by name."""
        return self._allocation.predefined_ids

    def is_present(self, sandbox: Sandbox) -> bool:
        """Return whether the sandbox's namespace exists."""
        return os.path.ismount(sandbox.netns)

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        """Prepare the node, keep the ``live`` sandboxes, and free all others.

        A sandbox with an invalid record is left alone, and its addresses and ports are not given to other containers.
        Raises: SkepError: this node cannot network containers.
        """
        kept = {config.id for config, _ in live}
        all_live = live
        live = [(config, one) for config, one in all_live if self._is_sound(config.id, one)]
        sandboxes = {config.id: one for config, one in live}
        await self._allocation.restore(live, [one for one in all_live if one[0].id not in sandboxes])
        self._overlays.restore(sandboxes)
        await self._gateway.restore({config.id: one for config, one in all_live if has_sound_egress(one)})
        await self._overlays.begin(sandboxes)
        # not fatal, because a container can itself make its namespace unusable for these rules
        for id, sandbox in sandboxes.items():
            routing = self._route_replies(id, sandbox)
            await isolate(routing, "reply routing not applied yet", container=id)
        if self._naming is not None:
            await self._naming.restore(live)
        for pinned in self._namespaces.pinned():
            if pinned not in kept:
                await isolate(self._namespaces.destroy(pinned), "namespace not removed", container=pinned)

    def _is_sound(self, id: ContainerId, sandbox: Sandbox) -> bool:
        if id in self._left_out:
            return False
        try:
            check_sandbox(sandbox)
        except Exception as error:  # an error concerns only this container
            log_error(error, "network of container not maintained: invalid record", container=id)
            self._left_out[id] = describe_error(error)
            self._report_left_out()
            return False
        return True

    def _report_left_out(self) -> None:
        names = ", ".join(f"{id[:12]} ({reason})" for id, reason in sorted(self._left_out.items()))
        sentence = f"the networks of these containers are not maintained, restart them: {names}"
        self._show_condition(sentence if names else "")

    async def attach(self, config: SandboxConfig) -> Sandbox:
        """Create a container's namespace with its networks and names.

        The endpoints are ``eth0`` and so on, in their order, and the gateway bridge is the last interface.  A container
        on internal networks only has no default route and publishes no ports.
        Raises: AlreadyExists: a port is in use; SkepError.
        """
        if config.mode in (NetworkMode.HOST, NetworkMode.CONTAINER):
            return Sandbox(netns="")
        id, endpoints = config.id, config.endpoints
        sandbox = Sandbox(
            netns=str(self._namespaces.path(id)),
            sysctls=_sysctls_of(config),
            userns=str(self._namespaces.users_path(id)) if config.users is not None else "",
        )
        if config.networks:
            endpoints = await self._allocation.join(config)
        else:
            endpoints = await self._allocation.fill(config, endpoints)
        try:
            netns = await self._namespaces.create(id, sandbox.sysctls, config.users, config.userns)
            connected = await self._overlays.connect(id, netns, endpoints)
            sandbox = msgspec.structs.replace(sandbox, endpoints=connected)
            if needs_egress(config.mode, endpoints):
                sandbox = await self._add_egress(config, sandbox)
            await self._overlays.settle_container(id, sandbox)
            await self._route_replies(id, sandbox)
            if self._naming is not None:
                await self._naming.attach(config, sandbox)
        except BaseException as error:
            await asyncio.shield(self._undo(id, sandbox, endpoints))
            if isinstance(error, OSError | NetlinkError):
                raise Unavailable(f"cannot connect the container to its networks: {error}") from error
            raise
        return sandbox

    async def detach(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Free everything that ``attach`` allocated.  Does nothing if it is free already."""
        # includes endpoints of a change that failed and could not be undone
        kept = self._overlays.endpoints_of(container_id)
        endpoints = (*sandbox.endpoints, *(one for one in kept if one not in sandbox.endpoints))
        sandbox = msgspec.structs.replace(sandbox, endpoints=endpoints)
        undoing = self._undo(container_id, sandbox, [one.config for one in endpoints])
        if self._left_out.pop(container_id, None) is None:
            await undoing
        else:
            await isolate(undoing, "container network not completely freed", container=container_id)
            self._report_left_out()

    async def holders(self) -> Collection[ContainerId]:
        """Return all containers that have a namespace, addresses, ports or names on this node, even if they have
        ended.
        """
        served: Collection[str] = ()
        if self._naming is not None:
            served = await isolate(self._naming.ensure_served(), "names of containers not listed") or ()
        holders = {*self._namespaces.pinned(), *self._overlays.holders(), *self._gateway.users(), *served}
        return sorted(map(ContainerId, holders))

    async def free(self, id: ContainerId) -> None:
        """Free everything that a stopped or removed container still holds.  Raises: SkepError, OSError."""
        held = self._gateway.sandbox_of(id) or Sandbox(netns=str(self._namespaces.path(id)))
        connected = self._overlays.endpoints_of(id)
        log.warning(
            "network of a removed container cleaned up",
            container=id,
            namespace=id in self._namespaces.pinned(),
            addresses=[held.address, *(address for one in connected for address in one.config.addresses)],
        )
        try:
            await self.detach(id, held)
        finally:
            if self._naming is not None:  # ``detach`` removes names only of containers with endpoints
                await self._naming.detach(id)

    async def sweep(self) -> None:
        """Free namespaces, addresses and ports that belong to no container.  Raises: OSError."""
        await isolate(self._gateway.sweep(), "ports not released yet")
        await self._overlays.sweep()

    # --- while it runs ------------------------------------------------------------------------------------------

    async def connect(self, config: SandboxConfig, sandbox: Sandbox, request: EndpointRequest) -> Sandbox:
        """Connect a running plain container to one more network.

        Raises: FailedPrecondition: it is on that network already; NotFound: no such network; SkepError.
        """
        others = [one.config for one in sandbox.endpoints]
        endpoint = await self._allocation.join_one(config, request, others)
        joined, netns = sandbox, Path(sandbox.netns)
        try:
            (connected,) = await self._overlays.connect(
                config.id, netns, (endpoint,), first=_free_interface(sandbox)
            )
            joined = msgspec.structs.replace(sandbox, endpoints=(*sandbox.endpoints, connected))
            if not joined.address and needs_egress(config.mode, [*others, endpoint]):
                joined = await self._add_egress(config, joined)
            await self._overlays.change(config.id, (), joined)
            if self._naming is not None:
                await self._naming.attach(config, joined)
        except BaseException:
            await asyncio.shield(self._undo_connect(config, joined, sandbox, endpoint))
            raise
        return joined

    async def disconnect(self, config: SandboxConfig, sandbox: Sandbox, network_id: str) -> Sandbox:
        """Disconnect a running plain container from a network.  Raises: SkepError."""
        gone = [one.config for one in sandbox.endpoints if one.network_id == network_id]
        kept = tuple(one for one in sandbox.endpoints if one.network_id != network_id)
        left = msgspec.structs.replace(sandbox, endpoints=kept)
        if not needs_egress(config.mode, [one.config for one in kept]):
            left = _without_egress(left)
        await asyncio.shield(self._leave(config, sandbox, left, gone))
        return left

    async def change_bridge(self, config: SandboxConfig, sandbox: Sandbox) -> Sandbox:
        """Connect a running plain container to the node's bridge, or disconnect it, as ``config.mode`` says.

        If one of its other networks needs egress, its interface on the gateway bridge stays, but other containers
        cannot reach it.  Raises: AlreadyExists: a port that it publishes is in use; SkepError.
        """
        if not needs_egress(config.mode, [one.config for one in sandbox.endpoints]):
            left = _without_egress(sandbox)
            await asyncio.shield(self._cut(config, sandbox, left))
            return left
        if sandbox.address:
            changed = msgspec.structs.replace(sandbox, is_open=config.mode is NetworkMode.BRIDGE)
            await self._gateway.change(config.id, changed)
            return changed
        joined = sandbox
        try:
            joined = await self._add_egress(config, sandbox)
            await self._overlays.change(config.id, (), joined)
        except BaseException:
            await asyncio.shield(self._cut(config, joined, sandbox))
            raise
        return joined

    async def rename(self, config: SandboxConfig, sandbox: Sandbox | None) -> None:
        """Register the container under ``config.name``.  ``sandbox`` is None if it does not run.

        Raises: FailedPrecondition: it is on a cluster network, where its name cannot change; SkepError.
        """
        if sandbox is not None:
            await self._allocation.rename(config, sandbox)

    async def _leave(
        self, config: SandboxConfig, before: Sandbox, left: Sandbox, gone: Iterable[EndpointConfig]
    ) -> None:
        await self._cut(config, before, left)
        # After ``_cut``, because a container that could not be disconnected must keep its addresses and its record.
        await self._allocation.leave(config.id, gone)

    async def _undo_connect(
        self, config: SandboxConfig, joined: Sandbox, before: Sandbox, endpoint: EndpointConfig
    ) -> None:
        try:
            await self._cut(config, joined, before)
        finally:
            # If disconnecting failed, the network's resources are freed when the container ends.
            if endpoint.head.id not in {one.network_id for one in self._overlays.endpoints_of(config.id)}:
                await self._allocation.leave(config.id, (endpoint,))

    async def _cut(self, config: SandboxConfig, before: Sandbox, left: Sandbox) -> None:
        """Change a running container's sandbox from ``before`` to ``left``.  Raises: SkepError; OSError."""
        kept = {one.port for one in left.endpoints}
        if before.address and not left.address:
            await self._gateway.cut(config.id, before)
        removed = [one for one in before.endpoints if one.port not in kept]
        await self._overlays.change(config.id, removed, left)
        if self._naming is not None:
            if left.endpoints:
                await self._naming.attach(config, left)
            else:
                await self._naming.detach(config.id)

    async def _add_egress(self, config: SandboxConfig, sandbox: Sandbox) -> Sandbox:
        """Return ``sandbox`` with a new interface on the gateway bridge.  Raises: SkepError."""
        found = await self._gateway.connect(
            config.id,
            Path(sandbox.netns),
            _free_interface(sandbox),
            config.ports,
            is_open=config.mode is NetworkMode.BRIDGE,
            mac_address=config.mac_address,
            wants_ipv6=has_ipv6_egress([one.config for one in sandbox.endpoints]),
            serves_ipv6=config.serves_ipv6,
        )
        return msgspec.structs.replace(
            found, endpoints=sandbox.endpoints, sysctls=sandbox.sysctls, userns=sandbox.userns
        )

    async def _route_replies(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Route replies of a container on the ingress network back through the node that the client connected to."""
        for one in sandbox.endpoints:
            if one.config.head.is_ingress:
                await self._reply_routing.add(
                    container_id,
                    self._overlays.reconciler_of(container_id),
                    IngressEndpoint(one.interface, sandbox.address, sandbox.address6),
                )

    async def _undo(
        self, container_id: ContainerId, sandbox: Sandbox, endpoints: Iterable[EndpointConfig]
    ) -> None:
        self._reply_routing.remove(container_id)
        self._overlays.disconnect(container_id, sandbox.endpoints)
        try:
            if self._naming is not None and sandbox.endpoints:
                await self._naming.detach(container_id)
        except SkepError as error:  # the net process also notices that a namespace was deleted
            log.warning("container names not removed", container=container_id, reason=str(error))
        finally:
            try:
                await self._gateway.disconnect(container_id)
            finally:
                try:
                    await self._namespaces.destroy(container_id)
                finally:
                    await self._allocation.leave(container_id, endpoints)


def has_sound_egress(sandbox: Sandbox) -> bool:
    """Return whether the record of a sandbox is valid apart from its networks."""
    try:
        check_sandbox(msgspec.structs.replace(sandbox, endpoints=()))
    except Exception:  # as for the whole record
        return False
    return True


def needs_egress(mode: NetworkMode, endpoints: Sequence[EndpointConfig]) -> bool:
    """Return whether a container with ``endpoints`` needs an interface on the gateway bridge.

    A network on a device of the machine (macvlan, ipvlan) already provides egress, unless another network's gateway has
    a higher priority.

    Source: moby, libnetwork/default_gateway.go (needDefaultGW).
    """
    match mode:
        case NetworkMode.BRIDGE:
            return True
        case NetworkMode.NETWORKS:
            external = [one for one in endpoints if not one.head.is_internal]
            by_priority = sorted(external, key=lambda one: (-one.gw_priority, one.head.parent is None))
            return bool(by_priority) and by_priority[0].head.parent is None
        case NetworkMode.NONE | NetworkMode.HOST | NetworkMode.CONTAINER:
            return False


def _without_egress(sandbox: Sandbox) -> Sandbox:
    """Return ``sandbox`` without its interface on the gateway bridge and its published ports."""
    return Sandbox(
        netns=sandbox.netns, endpoints=sandbox.endpoints, sysctls=sandbox.sysctls, userns=sandbox.userns
    )


def _sysctls_of(config: SandboxConfig) -> Mapping[str, str]:
    """Return the sysctls that the node sets in the container's namespace, except those set by the user."""
    users = {name.replace(".", "/") for name in config.sysctls}
    if "net/ipv6/conf/all/disable_ipv6" in users:
        users.add("net/ipv6/conf/lo/disable_ipv6")  # IPv6 on lo follows
    wanted = {**_CONTAINER_SYSCTLS, **TRACKING_SYSCTLS}
    if any(one.head.is_ingress for one in config.endpoints):
        wanted = {**wanted, **REPLY_SYSCTLS}
    return {name: value for name, value in wanted.items() if name not in users}


def has_ipv6_egress(endpoints: Sequence[EndpointConfig]) -> bool:
    """Return whether the container gets an IPv6 default route through the gateway bridge: one of its networks with
    egress has IPv6.
    """
    return any(":" in address for one in endpoints if not one.head.is_internal for address in one.addresses)


def _free_interface(sandbox: Sandbox) -> str:
    """Return the first ``ethN`` that is not the name of one of the container's interfaces."""
    used = {one.interface for one in sandbox.endpoints} | ({sandbox.interface} if sandbox.address else set())
    return next(name for number in count() if (name := f"eth{number}") not in used)
