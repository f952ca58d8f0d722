"""The composition root of a node: creates each of its parts once, in layers, and runs them.

Containers and their networks come first, then the tables of cluster networks, the agent, the membership of a cluster,
and the Engine API.  Each layer receives the layers below it when it is created.
"""

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from functools import partial

import structlog
from aiohttp import web

from skep.agent.agent import Agent
from skep.agent.executor.attaching import ClusterAttachments, SessionRequests
from skep.agent.executor.interface import Executor
from skep.agent.executor.oci import OciExecutor, oci_executor
from skep.agent.executor.process import ProcessExecutor
from skep.agent.executor.pulling import nothing_beside
from skep.agent.executor.traced import TracedExecutor
from skep.agent.images import ClusterSources
from skep.agent.renewal import KeyPairCredentials
from skep.agent.session.last_seen import LastSeenFile
from skep.agent.session.managers import KnownManager, ManagerList
from skep.agent.session.probe_stream import NodeProbes
from skep.agent.session.reports import Reports
from skep.agent.session.revisions import SeenRevision
from skep.agent.session.session import NodeServices
from skep.agent.session.session_state import SessionState
from skep.agent.tasks.task_files import TaskFiles
from skep.agent.tasks.task_logs import NoLogs, TaskLogs
from skep.agent.tasks.worker import Worker
from skep.aio.event_loop.gc_settings import freeze
from skep.aio.failures import isolate
from skep.api.client.client import ApiClient
from skep.api.http.server import application
from skep.api.telemetry.otlp import exporter_to
from skep.configuration.configuration import Configuration, UnixHost
from skep.dataplane.dataplane import DataPlane, Host, NetProcess
from skep.dataplane.dns.checks import NameChecks
from skep.dataplane.endpoint_allocation import ClusterEndpoints
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.net_process.client import MESH, NetClient
from skep.dataplane.net_process.name_registration import NameRegistration
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.kernel.neighbor_tables import NeighborTables
from skep.dataplane.tables import unreachable
from skep.dataplane.tables.files import SharedTables, StoredTables
from skep.dataplane.tables.network_tables import NetworkTables
from skep.dataplane.wireguard.methods import EncryptionRefusal, choose, reasons_for_fallback
from skep.dataplane.wireguard.tunnels import Options
from skep.engine.api.containers import image_users
from skep.engine.api_sockets import ApiSockets
from skep.engine.capacity import find_programs
from skep.engine.confinement import apparmor
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.engine import EngineConfig
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.images.removal import ImageUser
from skep.engine.images.sharing.spreading import NodeFetcher
from skep.engine.images.store import ImageStore
from skep.engine.metrics.usage import UsagePage
from skep.linux.name_files import RESOLVER
from skep.linux.processes import boot_id
from skep.model.networks.wireguard import EncryptionMethod
from skep.model.node import NodeRole
from skep.model.node_reports.conditions import ConditionName
from skep.model.values.ids import NodeId, new_container_id, new_id
from skep.model.values.meta import Driver
from skep.node import info
from skep.node.authorization import NodeObjects
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.cluster.cluster_work import NodeWork
from skep.node.cluster.local import LocalNode
from skep.node.cluster.manager_files import ManagerFiles
from skep.node.cluster.membership import Membership
from skep.node.cluster.runner import Dependencies
from skep.node.cluster.swarm_info import why_waiting
from skep.node.container_access import tunnel_host
from skep.node.container_apis.server import ContainerApis
from skep.node.container_places import ContainerPlaces, add_places
from skep.node.docker.docker_engine import docker_engine_at
from skep.node.docker.engine_images import EngineImages
from skep.node.events import NodeEvents
from skep.node.front.application import Application, close_after_response, serving, tls_of
from skep.node.front.browsers import serving_dashboard
from skep.node.front.handover import Handover
from skep.node.front.routing import LocalObjects
from skep.node.front.server import DockerSocket, Front
from skep.node.front.users import KnownUsers
from skep.node.host.description import NodeDescriber, has_overlays, port_labels, volume_labels
from skep.node.host.disk_check import DiskCheck
from skep.node.host.disk_space import DiskSpace
from skep.node.host.environment import NodeEnvironment
from skep.node.host.features import Features
from skep.node.host.isolation import keep_profile
from skep.node.host.machine_resources import ResourceReader
from skep.node.host.own_ports import OwnPorts
from skep.node.host.reaping import reap_orphans
from skep.node.image_sharing import ImageSharing
from skep.node.part_runner import run_after, run_part, wait_briefly
from skep.node.routes.cluster_networks import ClusterNetworks
from skep.node.routes.networks import NetworkSources, network_routes
from skep.node.routes.objects import object_routes
from skep.node.routes.swarm import swarm_routes
from skep.node.routes.system import NodeSystem, engine_id, ping_response, system_routes, unsupported_routes
from skep.node.telemetry.load import LoadMeter, reader_of
from skep.node.telemetry.metrics import NodeMetrics, Sources
from skep.node.telemetry.metrics_server import metrics_routes, serving_metrics
from skep.node.telemetry.task_usage import TaskUsageMeter
from skep.security.locking import KeyLock

log = structlog.get_logger()

_CONTAINERS_FOUND_S_MAX = 15.0
"""Seconds after which the API is served even before the containers of earlier processes are found."""

_REVISION_FILE = "seen.json"
"""File with the newest seen revision of assignments, in the directory of the certificates."""


class Node:
    """One node.  ``run`` runs it."""

    def __init__(self, configuration: Configuration, environment: NodeEnvironment) -> None:
        self._configuration = configuration
        self._environment = environment
        self._paths = configuration.paths
        self._clock = environment.clock
        self._random = environment.random.random
        self._manager_api = ApiClient.local(self._paths.manager_socket, "the manager of this node")
        self._docker = docker_engine_at(configuration.engine_socket)
        self._events = NodeEvents(self._clock)
        self._session = SessionState(
            self._clock, LastSeenFile(self._paths.last_seen, self._clock.since_boot, boot_id())
        )
        self._own_ports = OwnPorts(lambda: self._configuration, self._session)
        self._image_sources = ClusterSources(self._session)
        self._engine_images: EngineImages | None = None
        # Containers.  With the executor ``process`` there are none, because tasks are plain commands.
        self._container_apis = ContainerApis(self._clock, lambda: self._engine)
        self._executor = self._make_executor()
        self._exporter = exporter_to(
            configuration.trace_endpoint, "node", environment.machine.hostname, self._clock, self._random
        )
        oci = self._executor if isinstance(self._executor, OciExecutor) else None
        self._engine = oci.engine if oci is not None else None
        self._data_plane = oci.data_plane if oci is not None else None
        self._payloads = oci.payloads if oci is not None else None
        self._cluster_volumes = oci.cluster_volumes if oci is not None else None
        # Networks of the cluster.
        naming = self._data_plane.naming if self._data_plane is not None else None
        self._shared_tables = SharedTables(self._paths.tables, naming.refresh if naming is not None else None)
        self._tables = self._network_tables()
        # The agent's side.
        self._reports = Reports()
        self._image_sharing = ImageSharing(
            self._engine, self._session, self._image_sources, self._clock, lambda: self._configuration
        )
        self._worker = self._make_worker()
        self._probes = self._node_probes()
        self._load = LoadMeter(
            reader_of(environment.machine, Cgroups(configuration.cgroup_parent)), self._clock
        )
        containers = self._engine.list if self._engine is not None else tuple
        self._disk_space = DiskSpace(
            self._paths.written, containers, lambda: self._configuration, environment.conditions, self._clock
        )
        self._usages = TaskUsageMeter(containers, Cgroups(configuration.cgroup_parent), self._clock)
        self._offers = ResourceReader(self._clock, lambda: self._configuration)
        self._describer = NodeDescriber(
            environment.machine,
            environment.features,
            self._offers,
            environment.conditions,
            self._part_labels,
            image_port=self._image_sharing.port,
            has_probes=self._probes is not None,
        )
        self._membership = self._make_membership()
        self._system = self._node_system()
        self._metrics = self._node_metrics()

    async def run(self, ready: Callable[[], None]) -> None:
        """Run until cancelled.  Calls ``ready`` once the API is served.

        Raises: SkepError: cannot listen on a host, or the data directory is damaged.
        """
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            run = partial(run_part, group, self._clock)
            run(self._environment.processes.net.run, "net process")
            await self._open_apis(stack)
            run(await self._offers.prepare(), "offers of the machine")
            run(await self._disk_space.prepare(), "disk space")
            if self._engine is not None:
                await self._engine.images.open()
                await asyncio.to_thread(self._engine.volumes.open)
            if self._paths.node_json.exists():
                await self._tables.restore(self._shared_tables)
            app = await self._application()
            users = KnownUsers(self._manager_api, self._clock, self._random, tls_of(self._configuration))
            if users.tls is not None or self._configuration.dashboard is not None:
                run(users.run, "users of the API")
            front = self._front(
                await stack.enter_async_context(serving(app, partial(ping_response, self._system))), users
            )
            self._run_checks(run)
            group.create_task(self._worker.run(), name="worker")
            run(self._usages.run, "usage of tasks")
            self._run_networks(run)
            group.create_task(self._membership.run(), name="membership")
            if self._cluster_volumes is not None:
                run(self._cluster_volumes.run, "cluster volumes")
            if self._engine is not None:
                run(partial(self._events.forward, self._engine.events), "events")
                run(self._engine.volumes.plugins.run, "volume plugins")
                restarts = self._engine.run_restart_policies
                run(partial(run_after, self._worker.wait_ready, restarts), "plain containers")
            await wait_briefly(self._worker.wait_ready(), _CONTAINERS_FOUND_S_MAX, self._clock)
            await stack.enter_async_context(serving_metrics(self._configuration, self._metrics))
            dashboard = serving_dashboard(self._configuration, users, front, self._clock)
            async with front.listening(self._configuration.api_hosts), dashboard:
                if self._engine is not None:
                    run(partial(self._container_apis.run, front.serve), "API of containers")
                freeze()
                ready()
                await asyncio.Event().wait()

    async def announce_stop(self) -> None:
        """Announce a planned stop to the manager, so that it replaces no tasks during the restart."""
        await self._session.announce_stop()

    def reload(self, configuration: Configuration) -> None:
        """Apply those parts of ``configuration`` that need no restart."""
        self._configuration = configuration
        self._environment.processes.net.reload()
        self._membership.reload()
        self._system.configure(configuration)
        if self._engine is not None:
            self._engine.images.policy = _registry_policy(configuration)

    # --- containers and networks ------------------------------------------------------------------------------

    def _make_executor(self) -> OciExecutor | ProcessExecutor:
        configuration, environment = self._configuration, self._environment
        if configuration.executor == "process":
            return ProcessExecutor(self._paths.processes)
        images = ImageStore(
            self._paths.images,
            policy=_registry_policy(configuration),
            nodes=NodeFetcher(self._image_sources, self._clock, self._random),
            clock=self._clock,
            on_event=self._events.publish_image,
            report=environment.conditions.reporter(ConditionName.IMAGES),
        )
        attachments = ClusterAttachments(SessionRequests(self._session))
        if self._docker is not None:
            self._engine_images = EngineImages(
                self._docker, images, self._image_users, self._paths.images / "engine.json"
            )
        return oci_executor(
            self._paths,
            images,
            self._make_data_plane(attachments),
            attachments,
            EngineConfig(
                starts_max=2 * (os.cpu_count() or 1),
                hostname=environment.machine.hostname,
                log_default=Driver(name=configuration.log_driver, options=configuration.log_opts),
                report_restore=environment.conditions.reporter(ConditionName.RESTORE),
            ),
            self._clock,
            cgroup_parent=configuration.cgroup_parent,
            programs=find_programs(configuration.runc, configuration.conmon),
            cdi_directories=configuration.cdi_spec_dirs,
            allowed=configuration.allow,
            bring=self._engine_images.bring if self._engine_images is not None else nothing_beside,
            apis=ApiSockets(
                [host.path for host in configuration.api_hosts if isinstance(host, UnixHost)],
                self._paths.run,
                self._container_apis,
                self._paths.volumes,
            ),
        )

    def _image_users(self) -> Collection[ImageUser]:
        """Return every container of this node."""
        return image_users(self._engine) if self._engine is not None else ()

    def _make_data_plane(self, endpoints: ClusterEndpoints) -> DataPlane:
        configuration, environment = self._configuration, self._environment
        # Several connections to the net process, so that ports do not wait behind a thousand containers' names.
        net = partial(NetClient, self._paths.net_socket, self._clock, self._random)
        return DataPlane(
            Host(
                paths=self._paths,
                namespaces=Namespaces(self._paths.netns),
                clock=self._clock,
                rng=self._random,
                show_condition=environment.conditions.report,
                own_ports=self._own_ports.present,
                pools=configuration.address_pools,
            ),
            NetProcess(net(), net(MESH), NameRegistration(net(), RESOLVER)),
            endpoints,
            Options(
                method=_encryption(environment.features, configuration.encryption),
                since_boot=self._clock.since_boot,
                process=environment.processes.new_wireguard,
                port=configuration.wireguard_port,
            ),
        )

    def _network_tables(self) -> NetworkTables:
        plane, tables = self._data_plane, self._shared_tables
        # Routes are applied before the names of the endpoints that they lead to.
        users = (plane.overlays, plane.mesh, tables) if plane is not None else (tables,)
        stored = StoredTables(self._paths.kept_tables, self._clock)
        return NetworkTables(stored, users, self._session, self._clock, self._random)

    def _run_networks(self, run: Callable[..., None]) -> None:
        """Keep the cluster networks on this node in the state that their tables describe."""
        plane, tables = self._data_plane, self._tables
        if plane is not None and not tables.tables:
            run(plane.overlays.apply_nothing, "networks of an earlier process")
            run(plane.mesh.apply_nothing, "ports of an earlier process")
        if plane is not None and not self._paths.node_json.exists():
            plane.prober.set_targets(None)
        run(tables.run, "network tables")
        if plane is not None:
            watch = partial(unreachable.watch, self._session, plane.prober, tables.exclude, self._clock)
            run(watch, "silent peers")

    # --- the agent --------------------------------------------------------------------------------------------

    def _make_worker(self) -> Worker:
        executor: Executor = self._executor
        if self._exporter is not None:
            executor = TracedExecutor(executor, self._exporter.add, self._exporter.now_ns)
        return Worker(
            executor=executor,
            files=TaskFiles(self._paths.tasks),
            reports=self._reports,
            clock=self._clock,
            payloads=self._payloads,
            volumes=self._cluster_volumes,
            session_state=self._session,
        )

    def _part_labels(self) -> Mapping[str, str]:
        """Return the engine labels that the parts of the node contribute."""
        plane = self._data_plane
        own = {**self._own_ports.labels(), **(plane.tunnels.labels() if plane is not None else {})}
        mesh = plane.mesh.published if plane is not None else frozenset()
        if self._engine is None:
            return own
        ports = port_labels(self._engine.list(), mesh, self._offers.present.listening)
        return {**own, **ports, **volume_labels(self._engine.volumes.uses)}

    def _node_probes(self) -> NodeProbes | None:
        """Return the probes of other nodes, or None if this node cannot have overlay networks."""
        if self._engine is None or self._data_plane is None or not has_overlays(self._environment.features):
            return None
        names = NameChecks(self._engine.running_sandboxes, self._clock)
        return NodeProbes(self._data_plane.prober, names, self._engine.log_forwarding.set_peers)

    def _new_agent(
        self,
        node: LocalNode,
        save_managers: Callable[[tuple[KnownManager, ...]], None],
        set_role: Callable[[NodeRole], None],
    ) -> Agent:
        """Return an agent for ``node``, not yet running (``runner.NewAgent``)."""
        certificates = self._paths.certificates
        credentials = KeyPairCredentials(
            certificates,
            self._clock,
            self._environment.random,
            on_change=lambda pair: set_role(pair.identity.role),
            lock=KeyLock(self._paths),
        )
        services = NodeServices(
            sink=self._worker,
            reports=self._reports,
            logs=TaskLogs(self._engine) if self._engine is not None else NoLogs(),
            load=self._load.load,
            tables=self._tables,
            probes=self._probes,
            seen=SeenRevision(certificates / _REVISION_FILE, credentials.identity.cluster_id, self._clock),
            tunnels=tunnel_host(self._engine, self._events, credentials.connect),
            volumes=self._cluster_volumes,
            usages=self._usages,
            serve_images=partial(self._image_sharing.exchange, credentials, node),
        )
        managers = ManagerList(
            self._known_managers(node),
            save_managers,
            address_of=node.reach,
            show_unreached=self._environment.conditions.reporter(ConditionName.MANAGER_UNREACHABLE),
        )
        return Agent(
            credentials=credentials,
            managers=managers,
            describe=lambda: self._describer.describe_all(
                node.data_path_addr, self._engine, self._cluster_volumes
            ),
            services=services,
            clock=self._clock,
            random=self._environment.random,
            session_state=self._session,
        )

    def _known_managers(self, node: LocalNode) -> tuple[KnownManager, ...]:
        """Return the managers from the last list that they sent, and the configured ones."""
        sent = {peer.addr for peer in node.managers}
        configured = (addr for addr in self._configuration.managers if addr not in sent)
        return (*node.managers, *(KnownManager(NodeId(""), addr) for addr in configured))

    # --- the cluster ------------------------------------------------------------------------------------------

    def _make_membership(self) -> Membership:
        conditions = self._environment.conditions
        dependencies = Dependencies(
            paths=self._paths,
            clock=self._clock,
            configuration=lambda: self._configuration,
            manager_files=ManagerFiles(lambda: self._configuration, self._environment.machine.hostname),
            processes=self._environment.processes,
            new_agent=self._new_agent,
            work=NodeWork(
                self._worker,
                self._executor,
                self._tables,
                self._clock,
                conditions,
                session=self._session,
                probes=self._probes,
            ),
            look=self._offers.refresh,
        )
        return Membership(
            dependencies,
            manager_api=self._manager_api,
            new_id=new_id,
            show_condition=conditions.reporter(ConditionName.SWARM),
        )

    # --- the Engine API ---------------------------------------------------------------------------------------

    def _node_system(self) -> NodeSystem:
        configuration, environment = self._configuration, self._environment
        node = info.NodeProperties(
            id=engine_id(configuration.data_dir),
            machine=environment.machine,
            features=environment.features,
            configuration=configuration,
            versions=environment.versions,
        )
        return NodeSystem(
            node,
            membership=self._membership,
            reads=ClusterReads(self._session, self._manager_api),
            events=self._events,
            engine=self._engine,
            docker=self._docker,
            warnings=lambda: (
                *environment.warnings,
                *environment.conditions.warnings(),
                *self._network_warnings(),
            ),
        )

    def _node_metrics(self) -> NodeMetrics:
        engine, cgroups = self._engine, Cgroups(self._configuration.cgroup_parent)
        return NodeMetrics(
            Sources(
                node=self._system.node,
                engine=engine,
                events=self._events,
                conditions=self._environment.conditions,
                session=self._session,
                load=self._load.load,
                data_plane=self._data_plane,
                usage=UsagePage(engine.list, cgroups, self._clock) if engine is not None else None,
                reads=self._system.reads,
                membership=self._membership,
                exporter=self._exporter,
                disks=lambda: self._disk_space.disks,
                reports=partial(len, self._reports),
            ),
            self._clock,
        )

    def _network_warnings(self) -> tuple[str, ...]:
        """Return warnings about published ports and connections to other nodes."""
        if self._data_plane is None:
            return ()
        return (*self._data_plane.mesh.warnings(), *self._data_plane.prober.warnings())

    async def _open_apis(self, stack: AsyncExitStack) -> None:
        """Connect to the manager's API, and to the API of the machine's Docker Engine if there is one."""
        await stack.enter_async_context(self._manager_api)
        if self._docker is not None:
            await stack.enter_async_context(self._docker.api)
            if not await self._docker.read_version():
                log.warning(
                    "the docker engine does not respond yet", socket=str(self._configuration.engine_socket)
                )

    async def _application(self) -> web.Application:
        """Return the application with the routes that this node serves itself."""
        engine, docker = self._engine, self._docker
        local = (
            self._data_plane.local
            if self._data_plane is not None
            else LocalNetworks(
                self._paths.networks / "local", None, clock=self._clock, new_id=new_container_id
            )
        )
        await isolate(asyncio.to_thread(local.open), "networks of this node not read yet")
        cluster = ClusterNetworks(
            member=self._membership,
            reads=self._system.reads,
            tasks=self._worker,
            tables=self._tables,
            containers=engine.list if engine is not None else tuple,
            clock=self._clock,
            rng=self._random,
        )
        networks = NetworkSources(
            cluster=cluster,
            local=local,
            engine=engine,
            docker=docker.api if docker is not None else None,
        )
        app = application(
            system_routes(self._system),
            metrics_routes(self._metrics),
            swarm_routes(self._membership),
            object_routes(
                engine, docker, self._engine_images, self._clock, network_routes(networks), cluster
            ),
            unsupported_routes(has_containers=engine is not None),
            newest=lambda: self._system.newest_version,
            objects=NodeObjects(engine, cluster),
        )
        app.on_response_prepare.append(close_after_response)
        add_places(app, ContainerPlaces(self._membership, self._system.reads))
        return app

    def _front(self, here: Application, users: KnownUsers) -> Front:
        waiting = partial(why_waiting, self._paths.manager_waiting)
        given = self._engine_images.hand_over_given if self._engine_images is not None else None
        return Front(
            here,
            Handover(self._paths.handover_socket, self._clock, self._random, waiting),
            ownership=LocalObjects(self._engine, has_docker_engine=self._docker is not None),
            membership=self._membership,
            docker=DockerSocket(self._configuration.engine_socket, given),
            users=users,
            divert=self._container_apis.divert,
        )

    def _run_checks(self, run: Callable[..., None]) -> None:
        """Run the checks that keep this node's conditions current, and the background work of images and volumes."""
        conditions, paths, clock = self._environment.conditions, self._paths, self._clock
        run(partial(reap_orphans, clock), "orphans")
        if self._engine is not None:
            if apparmor.is_supported():
                run(partial(keep_profile, conditions, clock), "apparmor profile")
            run(self._engine.images.settle, "images")
            run(self._image_sharing.collect, "image collection")
        run(DiskCheck((paths.data, paths.run), conditions, clock, paths.store_full).run, "disk check")
        run(self._metrics.run, "metrics")
        if self._exporter is not None:
            run(self._exporter.run, "export of traces")
        if self._data_plane is not None:
            run(NeighborTables(conditions.reporter(ConditionName.NEIGHBOR_TABLE), clock).run, "neighbors")
        if self._docker is not None:
            run(partial(self._docker.follow, clock, self._random), "docker engine")
        if self._engine_images is not None:
            run(partial(self._engine_images.follow, clock, self._random), "images of the docker engine")


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
