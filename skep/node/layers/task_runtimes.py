"""The layer that runs tasks: as containers with networks, or as plain processes of the machine."""

import asyncio
import os
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from skep.agent.executor.attaching import ClusterAttachments, SessionRequests
from skep.agent.executor.oci import oci_executor
from skep.agent.executor.process import ProcessExecutor
from skep.agent.executor.pulling import nothing_beside
from skep.agent.session.address_stream import HeldAddresses
from skep.agent.session.probe_stream import NodeProbes
from skep.agent.tasks.task_logs import NoLogs, TaskLogs
from skep.aio.failures import isolate
from skep.configuration.configuration import Configuration, UnixHost
from skep.dataplane.dataplane import DataPlane, Host, NetProcess
from skep.dataplane.dns.checks import NameChecks
from skep.dataplane.door.listener import FrontDoor
from skep.dataplane.endpoint_allocation import ClusterEndpoints
from skep.dataplane.failover.machine import HOOK, AddressHook, DoorWatch, MachineAddresses
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.net_process.client import MESH, NetClient
from skep.dataplane.net_process.name_registration import NameRegistration
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.kernel.neighbor_tables import NeighborTables
from skep.dataplane.tables import unreachable
from skep.dataplane.tables.files import SharedTables
from skep.dataplane.tables.network_tables import NetworkTables, TableListener
from skep.dataplane.wireguard.methods import EncryptionRefusal, choose, reasons_for_fallback
from skep.dataplane.wireguard.tunnels import Options
from skep.engine.api.containers import image_users
from skep.engine.api_sockets import ApiSockets
from skep.engine.capacity import find_programs
from skep.engine.confinement import apparmor, selinux
from skep.engine.containers.container import Container
from skep.engine.engine import Engine, EngineConfig
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.images.removal import ImageUser
from skep.engine.images.sharing.spreading import NodeFetcher
from skep.engine.images.store import ImageStore
from skep.engine.metrics.usage import UsagePage
from skep.linux.files import file_exists
from skep.linux.name_files import RESOLVER
from skep.model.door.payloads import DoorPayload
from skep.model.door.settings import NAME as DOOR_VOLUME
from skep.model.networks.used_ports import UsedPort
from skep.model.networks.wireguard import EncryptionMethod
from skep.model.node_reports.conditions import ConditionName
from skep.model.values.ids import new_container_id
from skep.model.values.meta import Driver
from skep.node.container_apis.exchange import Dispatch
from skep.node.container_apis.server import ContainerApis
from skep.node.docker.engine_images import EngineImages
from skep.node.host.description import has_overlays, port_labels, user_labels, volume_labels
from skep.node.host.features import Features
from skep.node.host.isolation import keep_profile, watch_users
from skep.node.layers.foundation import Foundation
from skep.node.part_runner import run_after

log = structlog.get_logger()

Run = Callable[..., None]
"""Runs a part of the node (``part_runner.run_part``), with its name."""


class Containers:
    """Tasks as containers, with their images, volumes and networks."""

    def __init__(self, foundation: Foundation) -> None:
        configuration, environment = foundation.configuration, foundation.environment
        self._foundation = foundation
        self.apis = ContainerApis(foundation.clock, self._present_engine)
        images = ImageStore(
            foundation.paths.images,
            policy=_registry_policy(configuration),
            nodes=NodeFetcher(foundation.image_sources, foundation.clock, environment.random.random),
            clock=foundation.clock,
            on_event=foundation.events.publish_image,
            report=environment.conditions.reporter(ConditionName.IMAGES),
        )
        attachments = ClusterAttachments(SessionRequests(foundation.session))
        docker = foundation.docker
        self.engine_images = (
            EngineImages(docker, images, self._image_users, foundation.paths.images / "engine.json")
            if docker is not None
            else None
        )
        self.executor = oci_executor(
            foundation.paths,
            images,
            _data_plane(foundation, attachments),
            attachments,
            EngineConfig(
                starts_max=2 * (os.cpu_count() or 1),
                hostname=environment.machine.hostname,
                log_default=Driver(name=configuration.log_driver, options=configuration.log_opts),
                report_restore=environment.conditions.reporter(ConditionName.RESTORE),
            ),
            foundation.clock,
            cgroup_parent=configuration.cgroup_parent,
            programs=find_programs(
                environment.runtimes.programs,
                environment.runtimes.default,
                configuration.conmon,
                environment.runtimes.versions,
            ),
            cdi_directories=configuration.cdi_spec_dirs,
            allowed=configuration.allow,
            with_selinux=configuration.selinux_enabled,
            bring=self.engine_images.bring if self.engine_images is not None else nothing_beside,
            apis=ApiSockets(
                [host.path for host in configuration.api_hosts if isinstance(host, UnixHost)],
                foundation.paths.run,
                self.apis,
                foundation.paths.volumes,
            ),
            users=environment.users,
        )
        self.engine = self.executor.engine
        self.data_plane = self.executor.data_plane
        self.payloads = self.executor.payloads
        self.cluster_volumes = self.executor.cluster_volumes
        self.local_networks = self.data_plane.local
        self.logs = TaskLogs(self.engine)
        self.door = FrontDoor(self._door_directory, foundation.clock, self.payloads.write_door)
        self._machine_addresses = _machine_addresses(foundation)
        self.addresses = HeldAddresses(self._machine_addresses, foundation.clock.since_boot, self.door.serves)
        self.usage_page = UsagePage(self.engine.list, foundation.cgroups, foundation.clock)

    def _present_engine(self) -> Engine | None:
        return self.engine

    def _image_users(self) -> Collection[ImageUser]:
        """Return every container of this node."""
        return image_users(self.engine)

    def list(self) -> Sequence[Container]:
        """Return the node's containers."""
        return self.engine.list()

    async def open(self) -> None:
        """Read the images and volumes of earlier processes."""
        await self.engine.images.open()
        await asyncio.to_thread(self.engine.volumes.open)

    def reload(self, configuration: Configuration) -> None:
        """Apply those parts of ``configuration`` that need no restart."""
        self.engine.images.policy = _registry_policy(configuration)

    def shared_tables(self) -> SharedTables:
        """Return the tables that the net process reads."""
        naming = self.data_plane.naming
        refresh = naming.refresh if naming is not None else None
        return SharedTables(self._foundation.paths.tables, refresh)

    def network_listeners(self, shared: SharedTables) -> tuple[TableListener, ...]:
        """Return the users of network tables.  Routes are applied before the names that lead to them.

        The front door is the last one, because HAProxy may be slow to respond.  A rootless node serves no ports of the
        routing mesh, because it cannot forward them.
        """
        watch = DoorWatch(self.addresses.want)
        if self._foundation.environment.features.is_rootless:
            return shared, watch, self.door
        return self.data_plane.overlays, self.data_plane.mesh, shared, watch, self.door

    def _door_directory(self) -> Path | None:
        """Return the directory of the front door's volume, or None if this node has none."""
        volumes = self.engine.volumes
        return volumes.path(DOOR_VOLUME) if volumes.has(DOOR_VOLUME) else None

    def run_networks(self, run: Run, tables: NetworkTables) -> None:
        """Keep the cluster networks on this node in the state that their tables describe."""
        foundation, plane = self._foundation, self.data_plane
        if not tables.tables:
            run(plane.overlays.apply_nothing, "networks of an earlier process")
            run(plane.mesh.apply_nothing, "ports of an earlier process")
        if not file_exists(foundation.paths.node_json):
            plane.prober.set_targets(None)
        run(tables.run, "network tables")
        run(self._machine_addresses.run, "announcements of failover addresses")
        run(self.addresses.run, "failover addresses")
        watch = partial(unreachable.watch, foundation.session, plane.prober, tables.exclude, foundation.clock)
        run(watch, "silent peers")
        run(self.door.run, "requests over the front door")
        run(partial(self._follow_certificates, tables), "certificates of the front door")

    async def _follow_certificates(self, tables: NetworkTables) -> None:
        """Apply the front door's network again when its certificates or challenges change, until cancelled.

        Files are also written if the node has left that network, so that no key outlives the last proxy.
        """
        while True:
            await self.payloads.door_changed.wait()
            self.payloads.door_changed.clear()
            writing = asyncio.to_thread(self.payloads.write_door)
            await isolate(writing, "certificates of the front door not written")
            tables.apply_again(lambda table: table.head.is_door)

    def run_checks(self, run: Run) -> None:
        """Run the checks and the background work of images and networks."""
        conditions, clock = self._foundation.environment.conditions, self._foundation.clock
        random = self._foundation.environment.random.random
        if apparmor.is_supported():
            run(partial(keep_profile, conditions, clock), "apparmor profile")
        users = self._foundation.environment.users
        run(partial(watch_users, conditions, clock, self.engine.list, users), "users of containers")
        if self._foundation.configuration.selinux_enabled:
            _warn_without_selinux(self.engine.bundles.selinux_policy)
        run(self.engine.images.settle, "images")
        run(NeighborTables(conditions.reporter(ConditionName.NEIGHBOR_TABLE), clock).run, "neighbors")
        if self.engine_images is not None:
            run(partial(self.engine_images.follow, clock, random), "images of the docker engine")

    def run_engine(self, run: Run, wait_adopted: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run volumes and events.  Restart policies apply once ``wait_adopted`` returns."""
        run(self.cluster_volumes.run, "cluster volumes")
        run(partial(self._foundation.events.forward, self.engine.events), "events")
        run(self.engine.volumes.plugins.run, "volume plugins")
        run(partial(run_after, wait_adopted, self.engine.run_restart_policies), "plain containers")

    def run_apis(self, run: Run, serve: Dispatch) -> None:
        """Serve the Engine API to containers with ``serve``."""
        run(partial(self.apis.run, serve), "API of containers")

    async def give_up_addresses(self) -> None:
        """Give up the failover addresses of this node."""
        await self.addresses.give_up()

    def probes(self) -> NodeProbes | None:
        """Return the probes of other nodes, or None if this node cannot have overlay networks."""
        if not has_overlays(self._foundation.environment.features):
            return None
        names = NameChecks(self.engine.running_sandboxes, self._foundation.clock)
        return NodeProbes(self.data_plane.prober, names, self.engine.log_forwarding.set_peers)

    def labels(self, listening: frozenset[UsedPort]) -> Mapping[str, str]:
        """Return the engine labels about encryption, ports (``listening`` outside of containers), volumes and users."""
        plane = self.data_plane
        ports = port_labels(self.engine.list(), plane.mesh.published, listening)
        return {
            **plane.tunnels.labels(),
            **(plane.nat.labels() if has_overlays(self._foundation.environment.features) else {}),
            **ports,
            **volume_labels(self.engine.volumes.uses),
            **user_labels(self.engine.bundles.users),
        }

    def network_warnings(self) -> tuple[str, ...]:
        """Return warnings about published ports and connections to other nodes."""
        return (*self.data_plane.mesh.warnings(), *self.data_plane.prober.warnings())


class PlainProcesses:
    """Tasks as processes of the machine, without containers and networks."""

    engine: None = None
    addresses: None = None
    data_plane: None = None
    payloads: None = None
    cluster_volumes: None = None
    engine_images: None = None
    usage_page: None = None

    def __init__(self, foundation: Foundation) -> None:
        self._foundation = foundation
        self.apis = ContainerApis(foundation.clock, _no_engine)
        self.executor = ProcessExecutor(foundation.paths.processes)
        self.local_networks = LocalNetworks(
            foundation.paths.networks / "local", None, clock=foundation.clock, new_id=new_container_id
        )
        self.logs = NoLogs()
        # Plain processes are not on its network, so it has no proxy and no requests.
        self.door = FrontDoor(_no_engine, foundation.clock, DoorPayload)

    def list(self) -> Sequence[Container]:
        """Return no containers."""
        return ()

    async def open(self) -> None:
        """Read nothing, because plain processes have neither images nor volumes."""

    def reload(self, configuration: Configuration) -> None:
        """Apply nothing, because the settings are about images."""

    def shared_tables(self) -> SharedTables:
        """Return the tables, which are only kept."""
        return SharedTables(self._foundation.paths.tables)

    def network_listeners(self, shared: SharedTables) -> tuple[TableListener, ...]:
        """Return the users of network tables."""
        return (shared,)

    def run_networks(self, run: Run, tables: NetworkTables) -> None:
        """Keep the tables of cluster networks current."""
        run(tables.run, "network tables")

    def run_checks(self, run: Run) -> None:
        """Run no further checks."""

    def run_engine(self, run: Run, wait_adopted: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run nothing, because plain processes have neither volumes nor events."""

    def run_apis(self, run: Run, serve: Dispatch) -> None:
        """Serve nothing, because only containers have sockets of their own."""

    async def give_up_addresses(self) -> None:
        """Give up nothing, because only nodes with a proxy hold failover addresses."""

    def probes(self) -> None:
        """Return None, because plain processes cannot use overlay networks."""

    def labels(self, listening: frozenset[UsedPort]) -> Mapping[str, str]:
        """Return no labels."""
        return {}

    def network_warnings(self) -> tuple[str, ...]:
        """Return no warnings."""
        return ()


TaskRuntime = Containers | PlainProcesses


def task_runtime(foundation: Foundation) -> TaskRuntime:
    """Return what runs tasks, by the configured executor."""
    if foundation.configuration.executor == "process":
        return PlainProcesses(foundation)
    return Containers(foundation)


def _no_engine() -> None:
    return None


def _warn_without_selinux(policy: selinux.Policy | None) -> None:
    """Log why ``--selinux-enabled`` labels no containers.  Source: moby, configureKernelSecuritySupport."""
    if policy is None:
        log.warning("selinux not enabled on this machine: containers get no labels")
    elif not policy.is_known:
        log.warning("selinux policy has no rules for containers: none are created", label=policy.process)


def _data_plane(foundation: Foundation, endpoints: ClusterEndpoints) -> DataPlane:
    configuration, environment = foundation.configuration, foundation.environment
    clock, random = foundation.clock, environment.random.random
    # Several connections to the net process, so that ports do not wait behind a thousand containers' names.
    net = partial(NetClient, foundation.paths.net_socket, clock, random)
    return DataPlane(
        Host(
            paths=foundation.paths,
            namespaces=Namespaces(foundation.paths.netns),
            clock=clock,
            rng=random,
            show_condition=environment.conditions.report,
            own_ports=foundation.own_ports.present,
            pools=configuration.address_pools,
        ),
        NetProcess(net(), net(MESH), NameRegistration(net(), RESOLVER)),
        endpoints,
        Options(
            method=_encryption(environment.features, configuration.encryption),
            since_boot=clock.since_boot,
            process=environment.processes.new_wireguard,
            port=configuration.wireguard_port,
        ),
    )


def _machine_addresses(foundation: Foundation) -> MachineAddresses:
    environment, clock = foundation.environment, foundation.clock
    return MachineAddresses(
        Namespaces(foundation.paths.netns),
        clock,
        AddressHook(HOOK, environment.machine.hostname, clock, environment.random.random),
        environment.conditions.reporter(ConditionName.FAILOVER_ADDRESS),
    )


def _registry_policy(configuration: Configuration) -> RegistryPolicy:
    """Return the registries reached without TLS, the mirrors, and the credential helpers."""
    return RegistryPolicy(
        insecure=frozenset(configuration.insecure_registries),
        mirrors=configuration.registry_mirrors,
        helpers=configuration.credential_helpers,
    )


def _encryption(features: Features, setting: str) -> EncryptionMethod | EncryptionRefusal:
    """Choose how this node encrypts networks.  Log why the kernel's WireGuard is not used although it is allowed."""
    if reasons := reasons_for_fallback(features, setting):
        log.info("encrypted networks use wireguard-go, not the kernel's WireGuard", reason=reasons)
    return choose(features, setting)
