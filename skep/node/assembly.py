"""Puts one node together and runs it: executor, worker, agent, API, supervised processes."""

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from random import Random

import msgspec
import structlog
from aiohttp import web

from skep.agent.last_heard import LastHeard
from skep.agent.path_stream import NodePaths
from skep.agent.reports import Reports
from skep.agent.task_files import TaskFiles
from skep.agent.worker import Worker
from skep.aio.clock import Clock
from skep.aio.guard import contain
from skep.api.server import application, runner
from skep.api.versions import NEWEST
from skep.configuration.configuration import Configuration
from skep.dataplane.client import NetClient
from skep.dataplane.dns.truth import NameChecks
from skep.dataplane.encrypted.client import ForwarderClient
from skep.dataplane.encrypted.methods import chosen
from skep.dataplane.encrypted.overlays import EncryptedOverlays
from skep.dataplane.encrypted.process import NAME as FORWARDER
from skep.dataplane.local.keeper import LocalNetworks
from skep.dataplane.netns.neighbours import NeighbourTables
from skep.dataplane.tables import silence
from skep.dataplane.tables.files import SharedTables, StoredTables
from skep.dataplane.tables.keeper import TableKeeper
from skep.engine import apparmor
from skep.engine.api.plain_containers import own_container_routes, plain_container_routes
from skep.model.ids import new_container_id, new_id
from skep.node import info
from skep.node.conditions import Conditions
from skep.node.contact import Contact
from skep.node.disk_check import DiskCheck
from skep.node.engine import Engine, with_containers_of
from skep.node.events import NodeEvents
from skep.node.features import Features
from skep.node.front.server import Front, tls_context
from skep.node.isolation import keep_profile
from skep.node.keeping import after, keep_running, within
from skep.node.local_api import LocalApi
from skep.node.machine import Machine
from skep.node.management import ManagerProcess
from skep.node.manager_files import ManagerFiles
from skep.node.membership import Membership
from skep.node.orphans import reap_orphans
from skep.node.parts import NodeParts
from skep.node.routes import swarm as swarm_routes
from skep.node.routes import system as system_routes
from skep.node.routes.cluster_networks import ClusterNetworks
from skep.node.routes.networks import NetworkParts, network_routes
from skep.node.supervision.identity import read_pid_file
from skep.node.system import NodeSystem, engine_id
from skep.node.workload import Workload, forward_container_events, oci_workload, policy, process_workload
from skep.security.locking import KeyLock

log = structlog.get_logger()

FOUND_AGAIN_SECONDS_MAX = 15.0
"""A node that cannot take over its containers answers nevertheless: somebody has to find out why."""


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What the node finds outside of itself, and what only the daemon knows how to make.

    ``net``: the supervised net process.  ``manager``: makes the supervisor of the manager process.
    """

    machine: Machine
    features: Features
    versions: Mapping[str, str]
    warnings: tuple[str, ...]
    clock: Clock
    random: Random
    last_heard: LastHeard
    conditions: Conditions
    net: ManagerProcess
    forwarder: ManagerProcess
    manager: Callable[[], ManagerProcess]
    manager_stands_by: Callable[[bool], Awaitable[None]]


class Node:
    """One running node."""

    def __init__(self, configuration: Configuration, around: Surroundings) -> None:
        self._configuration = configuration
        self._around = around
        self._system: NodeSystem | None = None
        self._workload: Workload | None = None
        self._membership: Membership | None = None
        self._contact: Contact | None = None

    async def run(self, ready: Callable[[], None]) -> None:
        """Run until cancelled; calls ``ready`` once the API is served.

        Raises: SkepError: a host cannot be listened on, the data directory is damaged.
        """
        around, paths = self._around, self._configuration.paths
        clock, chance = around.clock, around.random.random
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            keep = partial(keep_running, group, clock)
            keep(around.net.run, "net process")
            manager_api = LocalApi(paths.manager_socket, "the manager of this node")
            await stack.enter_async_context(manager_api.open())
            engine = await self._engine_of(stack)
            if engine is not None and not await engine.ask_version():
                log.warning(
                    "the docker engine does not answer yet", socket=str(self._configuration.engine_socket)
                )
            events = NodeEvents(clock)
            workload = self._workload = await self._workload_of(events)
            method = chosen(around.features)
            encrypted = EncryptedOverlays(
                method,
                ForwarderClient(paths.forwarder_socket, clock, chance),
                around.forwarder,
                is_running=lambda: read_pid_file(paths.pid_file(FORWARDER)) is not None,
                clock=clock,
                chance=chance,
            )
            if workload.overlays is not None:
                workload.overlays.encrypt_with(encrypted)
            keep(encrypted.run, "encrypted overlays")
            reports = Reports()
            contact = self._contact = Contact(clock, around.last_heard)
            worker = Worker(
                executor=workload.executor,
                files=TaskFiles(paths.tasks),
                reports=reports,
                clock=clock,
                payloads=workload.payloads,
                contact=contact,
            )
            shared = SharedTables(paths.tables)
            # A way first, then names that lead there.
            acting = (workload.overlays, workload.mesh, shared, workload.naming)
            tables = TableKeeper(
                StoredTables(paths.kept_tables, clock),
                [one for one in acting if one is not None],
                clock,
                chance,
            )
            if paths.node_json.exists():
                await tables.restore(shared)
            parts = NodeParts(
                certificates=paths.certificates,
                lock=KeyLock(paths),
                machine=around.machine,
                features=around.features,
                configuration=lambda: self._configuration,
                executor=workload.executor,
                worker=worker,
                reports=reports,
                contact=contact,
                conditions=around.conditions,
                logs=workload.logs,
                tables=tables,
                clock=clock,
                random=around.random,
                manager=around.manager,
                manager_stands_by=around.manager_stands_by,
                manager_files=ManagerFiles(lambda: self._configuration, around.machine.hostname),
                method=method,
                overlay_keys=encrypted.told,
                paths=NodePaths(workload.probes, NameChecks(workload.list_containers, clock))
                if workload.probes is not None
                else None,
                places=workload.attachments,
            )
            membership = self._membership = Membership(
                paths=paths,
                parts=parts,
                manager_api=manager_api,
                clock=clock,
                new_id=new_id,
                say=around.conditions.say("swarm"),
            )
            self._system = NodeSystem(
                self._description(),
                membership=membership,
                manager_api=manager_api,
                events=events,
                clock=clock,
                count=workload.counts,
                engine=engine,
                warnings=around.warnings,
                network_warnings=lambda: (*around.conditions.warnings(), *workload.network_warnings()),
            )
            local = workload.local or LocalNetworks(
                paths.networks / "local", workload.gateway, clock=clock, new_id=new_container_id
            )
            await contain(asyncio.to_thread(local.open), "networks of this node not read yet")
            cluster_networks = ClusterNetworks(
                member=membership,
                manager=manager_api,
                tasks=worker,
                tables=tables,
                containers=workload.list_containers,
                clock=clock,
                chance=chance,
            )
            networks = network_routes(
                NetworkParts(
                    cluster=cluster_networks,
                    engine=engine.api if engine is not None else None,
                    local=local,
                    containers=workload.list_containers,
                    container=workload.container,
                    plain=workload.plain,
                )
            )
            routes: tuple[web.AbstractRouteDef, ...] = (*networks, *workload.routes)
            if engine is not None:
                beside = plain_container_routes(
                    engine, workload.images, workload.plain, cluster_networks.may_have
                )
                routes = (*with_containers_of(engine, routes), *beside)
            elif workload.plain is not None:
                routes = (*routes, *own_container_routes(workload.plain))
            app = application(
                system_routes.routes,
                swarm_routes.routes,
                routes,
                system_routes.last_routes,
                newest=NEWEST if engine is None else lambda: engine.api_version,
            )
            app[system_routes.SYSTEM] = self._system
            app[swarm_routes.MEMBER] = membership
            app.on_response_prepare.append(_close_after_answer)
            here = await stack.enter_async_context(serving(app))
            front = Front(
                here,
                knowledge=Knowledge(self._configuration, membership, workload),
                membership=membership,
                manager_socket=paths.manager_socket,
                manager_waiting=paths.manager_waiting,
                engine_socket=self._configuration.engine_socket,
                clock=clock,
                chance=chance,
            )
            keep(partial(reap_orphans, clock), "orphans")
            if workload.images is not None:
                if apparmor.is_supported():
                    keep(partial(keep_profile, around.conditions, clock), "apparmor profile")
                keep(partial(workload.images.settle, around.conditions.say("images")), "images")
            check = DiskCheck((paths.data, paths.run), around.conditions, clock, paths.store_full)
            keep(check.run, "disk check")
            if workload.overlays is not None:
                keep(NeighbourTables(around.conditions, clock).run, "neighbour tables")
            if engine is not None:
                keep(partial(engine.follow, clock, chance), "docker engine")
            group.create_task(worker.run(), name="worker")
            if workload.overlays is not None and not tables.tables:
                keep(workload.overlays.apply_nothing, "networks of an earlier process")
            if workload.mesh is not None and not tables.tables:
                keep(workload.mesh.apply_nothing, "ports of an earlier process")
            if workload.probes is not None and not paths.node_json.exists():
                workload.probes.wish(None)
            keep(tables.run, "network tables")
            if workload.probes is not None:
                leave_out = partial(silence.watch, contact, workload.probes.latest, tables.leave_out, clock)
                keep(leave_out, "silent peers")
            if workload.containers is not None:
                keep(partial(forward_container_events, workload.containers, events), "events")
            group.create_task(membership.run(), name="membership")
            if workload.plain is not None:
                keep(partial(after, worker.wait_ready, workload.plain.run), "plain containers")
            await within(worker.wait_ready(), FOUND_AGAIN_SECONDS_MAX, clock)
            async with front.listening(self._configuration.api_hosts, tls_of(self._configuration)):
                gc.collect()
                gc.freeze()
                ready()
                await asyncio.Event().wait()

    async def _workload_of(self, events: NodeEvents) -> Workload:
        if self._configuration.executor == "process":
            return process_workload(self._configuration)
        around = self._around

        def net(owner: str = "") -> NetClient:
            """A connection of its own: ports do not wait for the names of a thousand containers."""
            path = self._configuration.paths.net_socket
            return NetClient(path, around.clock, around.random.random, owner)

        return await oci_workload(
            self._configuration,
            around.machine,
            ports=net(),
            mesh_ports=net("mesh"),
            names=net(),
            events=events,
            clock=around.clock,
            chance=around.random.random,
            conditions=around.conditions,
        )

    async def farewell(self) -> None:
        """Tell the manager that this process stops as planned, so that nothing moves until it is back."""
        if self._contact is not None:
            await self._contact.say_farewell()

    def reload(self, configuration: Configuration) -> None:
        """Use the parts of ``configuration`` that need no restart."""
        self._configuration = configuration
        self._around.net.reload()
        self._around.forwarder.reload()
        if self._membership is not None:
            self._membership.reload()
        if self._system is not None:
            self._system.configure(configuration)
        if self._workload is not None and self._workload.images is not None:
            self._workload.images.policy = policy(configuration)

    async def _engine_of(self, stack: AsyncExitStack) -> Engine | None:
        socket = self._configuration.engine_socket
        if socket is None:
            return None
        api = LocalApi(socket, f"the Docker Engine at {socket}")
        await stack.enter_async_context(api.open())
        return Engine(api)

    def _description(self) -> info.Node:
        return info.Node(
            id=engine_id(self._configuration.data_dir),
            machine=self._around.machine,
            features=self._around.features,
            configuration=self._configuration,
            versions=self._around.versions,
        )


class Knowledge:
    """What the front's routing asks about this node."""

    def __init__(self, configuration: Configuration, membership: Membership, workload: Workload) -> None:
        self._membership = membership
        self.has_engine = configuration.engine_socket is not None
        self.knows_container = workload.knows_container
        self.knows_image = workload.knows_image
        self.knows_exec = workload.knows_exec

    @property
    def is_manager(self) -> bool:
        return self._membership.is_manager


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[web.Server]:
    """The protocol factory of ``app`` while the context is open."""
    here = runner(app)
    await here.setup()
    try:
        assert here.server is not None, "set up just now"
        yield here.server
    finally:
        await here.cleanup()


async def _close_after_answer(_request: web.Request, response: web.StreamResponse) -> None:
    """The next request on a connection may not be ours: the client opens another one for it."""
    if response.status != 101:
        response.force_close()
        response.headers["Connection"] = "close"


def tls_of(configuration: Configuration) -> ssl.SSLContext | None:
    """TLS for tcp:// hosts.  Raises: FailedPrecondition."""
    certificate, key, authority = configuration.tls_cert, configuration.tls_key, configuration.tls_ca
    if certificate is None or key is None or authority is None:
        return None
    return tls_context(certificate, key, authority)
