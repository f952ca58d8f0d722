"""The layer that serves a node: the Engine API with the routes of this node, and its metrics."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from skep.agent.tasks.worker import Worker
from skep.aio.clock import Clock
from skep.aio.failures import isolate
from skep.api.http.server import application
from skep.dataplane.tables.network_tables import NetworkTables
from skep.engine.api.containers import create_routes
from skep.engine.api.routes import engine_routes
from skep.engine.engine import Engine
from skep.node import info
from skep.node.authorization import NodeObjects
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.cluster.membership import Membership
from skep.node.cluster.swarm_info import why_waiting
from skep.node.container_places import ContainerPlaces, add_places
from skep.node.docker.docker_engine import DockerEngine, with_containers_of
from skep.node.docker.engine_images import EngineImages
from skep.node.front.application import Application, close_after_response, tls_of
from skep.node.front.handover import Handover
from skep.node.front.routing import LocalObjects
from skep.node.front.server import DockerSocket, Front, FrontOptions
from skep.node.front.users import KnownUsers
from skep.node.host.disk_space import DiskSpace
from skep.node.layers.agent_parts import AgentParts
from skep.node.layers.foundation import Foundation
from skep.node.layers.task_runtimes import Run, TaskRuntime
from skep.node.routes.cluster_networks import ClusterNetworks
from skep.node.routes.cluster_volumes import with_cluster_volumes
from skep.node.routes.docker_objects import with_objects_of
from skep.node.routes.networks import NetworkSources, network_routes
from skep.node.routes.plain_containers import plain_container_routes
from skep.node.routes.system import NodeSystem, engine_id, swarm_routes, system_routes, unsupported_routes
from skep.node.telemetry.metrics import NodeMetrics, Sources
from skep.node.telemetry.metrics_server import metrics_routes


def object_routes(
    engine: Engine | None,
    docker: DockerEngine | None,
    images: EngineImages | None,
    clock: Clock,
    networks: web.RouteTableDef,
    cluster: ClusterNetworks,
) -> tuple[web.AbstractRouteDef, ...]:
    """Return the routes.

    Args:
        engine: This node's engine, or None on a node without containers.
        docker: The machine's Docker Engine, if there is one.
        images: Images shared by the two engines.
        networks: The routes of networks.
    """
    own = engine_routes(engine, clock) if engine is not None else ()
    if docker is not None and engine is not None and images is not None:
        own = with_objects_of(docker, images, engine.volumes, own)
    own = with_cluster_volumes(cluster, own)
    if docker is not None:
        plain = plain_container_routes(docker, engine, images, cluster.may_have)
        return (*networks, *with_containers_of(docker, own), *plain)
    return (*networks, *own, *(create_routes(engine) if engine is not None else ()))


class EngineApi:
    """The node's own routes, and the sockets that also pass requests to the manager and a Docker Engine."""

    def __init__(
        self,
        foundation: Foundation,
        runtime: TaskRuntime,
        agent: AgentParts,
        membership: Membership,
        disk_space: DiskSpace,
    ) -> None:
        configuration, environment = foundation.configuration, foundation.environment
        self._foundation = foundation
        self._runtime = runtime
        self._membership = membership
        self.system = NodeSystem(
            info.NodeProperties(
                users=environment.users,
                id=engine_id(configuration.data_dir),
                machine=environment.machine,
                features=environment.features,
                configuration=configuration,
                versions=environment.versions,
                runtimes=environment.runtimes,
            ),
            membership=membership,
            reads=ClusterReads(foundation.session, foundation.manager_api),
            events=foundation.events,
            engine=runtime.engine,
            docker=foundation.docker,
            warnings=self._warnings,
        )
        self.metrics = NodeMetrics(
            Sources(
                node=self.system.node,
                engine=runtime.engine,
                events=foundation.events,
                conditions=environment.conditions,
                session=foundation.session,
                load=agent.load.load,
                data_plane=runtime.data_plane,
                usage=runtime.usage_page,
                reads=self.system.reads,
                membership=membership,
                exporter=foundation.exporter,
                disks=lambda: disk_space.disks,
                reports=partial(len, agent.reports),
                door=runtime.door.routes.families,
            ),
            foundation.clock,
        )

    async def application(self, tables: NetworkTables, tasks: Worker) -> web.Application:
        """Return the application with the routes that this node serves itself."""
        foundation, runtime = self._foundation, self._runtime
        engine, docker, local = runtime.engine, foundation.docker, runtime.local_networks
        await isolate(asyncio.to_thread(local.open), "networks of this node not read yet")
        cluster = ClusterNetworks(
            member=self._membership,
            reads=self.system.reads,
            tasks=tasks,
            tables=tables,
            containers=runtime.list,
            clock=foundation.clock,
            rng=foundation.environment.random.random,
        )
        networks = NetworkSources(
            cluster=cluster,
            local=local,
            engine=engine,
            docker=docker.api if docker is not None else None,
        )
        app = application(
            system_routes(self.system),
            metrics_routes(self.metrics),
            swarm_routes(self._membership),
            object_routes(
                engine, docker, runtime.engine_images, foundation.clock, network_routes(networks), cluster
            ),
            unsupported_routes(has_containers=engine is not None),
            newest=lambda: self.system.newest_version,
            objects=NodeObjects(engine, cluster),
        )
        app.on_response_prepare.append(close_after_response)
        add_places(app, ContainerPlaces(self._membership, self.system.reads))
        return app

    def users(self, run: Run) -> KnownUsers:
        """Return the users of the API, and follow them if a TCP host or the dashboard needs them."""
        foundation, configuration = self._foundation, self._foundation.configuration
        random = foundation.environment.random.random
        users = KnownUsers(foundation.manager_api, foundation.clock, random, tls_of(configuration))
        if users.tls is not None or configuration.dashboard is not None:
            run(users.run, "users of the API")
        return users

    def front(self, here: Application, users: KnownUsers) -> Front:
        """Return the API sockets, for ``here`` and for other processes."""
        foundation, images = self._foundation, self._runtime.engine_images
        paths, random = foundation.paths, foundation.environment.random.random
        waiting = partial(why_waiting, paths.manager_waiting)
        return Front(
            here,
            Handover(paths.handover_socket, foundation.clock, random, waiting),
            ownership=LocalObjects(self._runtime.engine, has_docker_engine=foundation.docker is not None),
            membership=self._membership,
            docker=DockerSocket(
                foundation.configuration.engine_socket,
                images.hand_over_given if images is not None else None,
            ),
            users=users,
            options=FrontOptions(divert=self._runtime.apis.divert),
        )

    @asynccontextmanager
    async def serving_dashboard(self, users: KnownUsers, front: Front) -> AsyncIterator[None]:
        """Serve the dashboard to browsers during the block, if the configuration enables it.

        Raises: FailedPrecondition: cannot listen on its address, or its certificate is invalid.
        """
        configuration = self._foundation.configuration
        if configuration.dashboard is None or configuration.tls_cert is None or configuration.tls_key is None:
            yield
            return
        from skep.dashboard.server import DashboardServer, Tls  # imported here: few nodes serve it

        server = DashboardServer(
            Tls.of(configuration.tls_cert, configuration.tls_key),
            users,
            front.serve,
            allows_public=configuration.dashboard_public,
            clock=self._foundation.clock,
            new_secret=partial(secrets.token_hex, 16),
        )
        async with server.listening(*configuration.dashboard):
            yield

    def _warnings(self) -> tuple[str, ...]:
        environment = self._foundation.environment
        return (
            *environment.warnings,
            *environment.conditions.warnings(),
            *self._runtime.network_warnings(),
        )
