"""The layer that connects a node to the managers of its cluster: its tasks, reports, measurements and description."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from skep.agent.agent import Agent
from skep.agent.executor.interface import Executor
from skep.agent.executor.traced import TracedExecutor
from skep.agent.images import ClusterSources, ImagePort, needed_images
from skep.agent.renewal import KeyPairCredentials
from skep.agent.session.managers import KnownManager, ManagerList
from skep.agent.session.reports import Reports
from skep.agent.session.revisions import SeenRevision
from skep.agent.session.session import NodeServices
from skep.agent.session.session_state import SessionState
from skep.agent.tasks.task_files import TaskFiles
from skep.agent.tasks.worker import Worker
from skep.aio.clock import Clock
from skep.configuration.configuration import Configuration
from skep.dataplane.tables.network_tables import NetworkTables
from skep.dataplane.underlays import prefix_lengths
from skep.engine.api.containers import image_users
from skep.engine.engine import Engine
from skep.engine.images.collecting import ImageCollector, Marks
from skep.engine.images.sharing.serving import ServedImages
from skep.linux.network.route_lookup import source_address
from skep.linux.own_user_namespace import is_rootless
from skep.model.networks.addresses import host_of
from skep.model.networks.data_planes import usable_address
from skep.model.node import NodeDescription, NodeRole
from skep.model.node_reports.conditions import ConditionName
from skep.model.permissions.rights import is_listed
from skep.model.values.ids import NodeId
from skep.node.cluster.cluster_work import NodeWork
from skep.node.cluster.local import LocalNode
from skep.node.cluster.manager_files import ManagerFiles
from skep.node.cluster.runner import Dependencies
from skep.node.container_access import tunnel_host
from skep.node.host.description import NodeDescriber
from skep.node.host.machine_resources import ResourceReader
from skep.node.layers.foundation import Foundation
from skep.node.layers.task_runtimes import TaskRuntime
from skep.node.telemetry.load import LoadMeter, reader_of
from skep.node.telemetry.task_usage import TaskUsageMeter
from skep.security.locking import KeyLock

_REVISION_FILE = "seen.json"
"""File with the newest seen revision of assignments, in the directory of the certificates."""


class ImageSharing:
    """Tasks of a node that concern its images: serving them to other nodes, and removing unused ones.

    Args:
        engine: The node's engine, or None on a node without images.
        configuration: Returns the present configuration, which may be reloaded.
        sources: Finds other nodes from which images can be fetched.
    """

    def __init__(
        self,
        engine: Engine | None,
        session: SessionState,
        sources: ClusterSources,
        clock: Clock,
        configuration: Callable[[], Configuration],
    ) -> None:
        self._engine = engine
        self._session = session
        self._sources = sources
        self._clock = clock
        self._configuration = configuration
        self._port = (
            ImagePort(ServedImages(engine.images, clock), session, clock, configuration().image_port)
            if engine is not None and not is_rootless()  # other nodes do not reach a rootless one
            else None
        )

    def port(self) -> int:
        """Return the port at which other nodes fetch images from this one, or 0."""
        return self._port.port if self._port is not None else 0

    async def exchange(self, credentials: KeyPairCredentials, node: LocalNode) -> None:
        """Exchange images with the other nodes of the cluster until cancelled."""
        with self._sources.using(lambda: credentials.pair):
            if self._port is not None:
                await self._port.run(lambda: credentials.pair, host_of(node.listen_addr))

    async def collect(self) -> None:
        """Remove unused images when their disk fills, while this node is in a cluster."""
        engine = self._engine
        if engine is None:
            return

        def marks() -> Marks:
            configuration = self._configuration()
            return Marks(configuration.image_gc_high, configuration.image_gc_low)

        await self._session.wait_session()
        needed = partial(needed_images, self._session)
        await ImageCollector(engine.images, lambda: image_users(engine), needed, self._clock, marks).run()


class AgentParts:
    """Parts of the agent that live as long as the node.  An agent lives as long as a membership of a cluster."""

    def __init__(self, foundation: Foundation, runtime: TaskRuntime, tables: NetworkTables) -> None:
        environment, clock = foundation.environment, foundation.clock
        self._foundation = foundation
        self._runtime = runtime
        self._tables = tables
        self.reports = Reports()
        self.worker = Worker(
            executor=_traced(foundation, runtime),
            files=TaskFiles(foundation.paths.tasks),
            reports=self.reports,
            clock=clock,
            payloads=runtime.payloads,
            volumes=runtime.cluster_volumes,
            session_state=foundation.session,
        )
        self.image_sharing = ImageSharing(
            runtime.engine,
            foundation.session,
            foundation.image_sources,
            clock,
            foundation.present_configuration,
        )
        self._probes = runtime.probes()
        self.load = LoadMeter(reader_of(environment.machine, foundation.cgroups), clock)
        self.usages = TaskUsageMeter(runtime.list, foundation.cgroups, clock)
        self.offers = ResourceReader(
            clock,
            foundation.present_configuration,
            may_have=_is_accessible if environment.features.is_rootless else is_listed,
        )
        self._describer = NodeDescriber(
            environment.machine,
            environment.features,
            self.offers,
            environment.conditions,
            self._labels,
            image_port=self.image_sharing.port,
            has_probes=self._probes is not None,
        )

    def dependencies(self) -> Dependencies:
        """Return the dependencies of the membership."""
        foundation, environment = self._foundation, self._foundation.environment
        return Dependencies(
            paths=foundation.paths,
            clock=foundation.clock,
            configuration=foundation.present_configuration,
            manager_files=ManagerFiles(foundation.present_configuration, environment.machine.hostname),
            processes=environment.processes,
            new_agent=self._new_agent,
            work=NodeWork(
                self.worker,
                self._runtime.executor,
                self._tables,
                foundation.clock,
                environment.conditions,
                session=foundation.session,
                probes=self._probes,
            ),
            look=self.offers.refresh,
        )

    def _labels(self) -> Mapping[str, str]:
        """Return the engine labels that the parts of the node contribute."""
        own = self._foundation.own_ports.labels()
        return {**own, **self._runtime.labels(self.offers.present.listening)}

    def _new_agent(
        self,
        node: LocalNode,
        save_managers: Callable[[tuple[KnownManager, ...]], None],
        set_role: Callable[[NodeRole], None],
    ) -> Agent:
        """Return an agent for ``node``, not yet running (``runner.NewAgent``)."""
        foundation, runtime = self._foundation, self._runtime
        certificates, environment = foundation.paths.certificates, foundation.environment
        credentials = KeyPairCredentials(
            certificates,
            foundation.clock,
            environment.random,
            on_change=lambda pair: set_role(pair.identity.role),
            lock=KeyLock(foundation.paths),
            changed=foundation.session.description_changed,
        )
        services = NodeServices(
            sink=self.worker,
            reports=self.reports,
            logs=runtime.logs,
            load=self.load.load,
            tables=self._tables,
            probes=self._probes,
            seen=SeenRevision(
                certificates / _REVISION_FILE, credentials.identity.cluster_id, foundation.clock
            ),
            tunnels=tunnel_host(runtime.engine, foundation.events, runtime.door, credentials.connect),
            volumes=runtime.cluster_volumes,
            usages=self.usages,
            addresses=runtime.addresses,
            door=runtime.door,
            serve_images=partial(self.image_sharing.exchange, credentials, node),
        )
        managers = ManagerList(
            self._known_managers(node),
            save_managers,
            address_of=node.reach,
            show_unreached=environment.conditions.reporter(ConditionName.MANAGER_UNREACHABLE),
        )
        return Agent(
            credentials=credentials,
            managers=managers,
            describe=partial(self._describe, node),
            services=services,
            clock=foundation.clock,
            random=environment.random,
            session_state=foundation.session,
        )

    def _describe(self, node: LocalNode) -> NodeDescription:
        runtime = self._runtime
        # Managers compare them with the address that they see.  Behind NAT, these differ.
        hosts = {host_of(one.addr) for one in self._known_managers(node)}
        local = {found for host in hosts if (found := usable_address(source_address(host)))}
        lengths: dict[str, int] = {}
        with suppress(OSError):
            lengths = prefix_lengths()
        named = {f"{found}/{lengths[found]}" if found in lengths else found for found in local}
        return self._describer.describe_all(
            node.data_path_addr, runtime.engine, runtime.cluster_volumes, named
        )

    def _known_managers(self, node: LocalNode) -> tuple[KnownManager, ...]:
        """Return the managers from the last list that they sent, and the configured ones."""
        sent = {peer.addr for peer in node.managers}
        configured = (addr for addr in self._foundation.configuration.managers if addr not in sent)
        return (*node.managers, *(KnownManager(NodeId(""), addr) for addr in configured))


def _is_accessible(path: str) -> bool:
    """Return whether tasks of a rootless node may have a device: its user needs access to the file."""
    return is_listed(path) and os.access(path, os.R_OK)


def _traced(foundation: Foundation, runtime: TaskRuntime) -> Executor:
    """Return the executor of tasks, with spans if traces are exported."""
    exporter = foundation.exporter
    if exporter is None:
        return runtime.executor
    return TracedExecutor(runtime.executor, exporter.add, exporter.now_ns)
