"""What runs tasks on this node: the configured executor, and for ``oci`` the container engine below it."""

import shutil
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path

import msgspec
from aiohttp import web

from skep.agent.assignments import LogLine, LogQuery, LogSource
from skep.agent.executor.assembly import oci_executor
from skep.agent.executor.attaching import ClusterAttachments
from skep.agent.executor.interface import Executor
from skep.agent.executor.process import ProcessExecutor
from skep.agent.task_logs import TaskLogs
from skep.agent.worker import PayloadSink
from skep.configuration.configuration import Configuration
from skep.dataplane.client import NetClient
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.local.networks import GatewayBridge, LocalNetworks
from skep.dataplane.name_registration import NameRegistration
from skep.dataplane.overlays import Overlays
from skep.dataplane.probe.prober import PathProber
from skep.dataplane.wireguard.methods import choose
from skep.dataplane.wireguard.tunnels import Options
from skep.engine.api import absent
from skep.engine.api.containers import container_routes, image_users
from skep.engine.api.disk_usage import DiskUsage
from skep.engine.api.images import image_routes
from skep.engine.api.volumes import volume_routes
from skep.engine.capacity import Programs, find_programs
from skep.engine.container import Container, ContainerState
from skep.engine.engine import Engine
from skep.engine.images.local import ImageEvent
from skep.engine.images.registry import Policy
from skep.engine.images.store import ImageStore
from skep.errors import NotFound, SkepError, Unimplemented
from skep.model.meta import Driver
from skep.node.environment import Environment
from skep.node.events import NodeEvents
from skep.node.info import Counts


class ContainerEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An executor, and what the Engine API shows of it.  The parts that are None exist for ``oci`` only."""

    executor: Executor
    logs: LogSource
    payloads: PayloadSink | None = None
    engine: Engine | None = None
    images: ImageStore | None = None
    gateway: GatewayBridge | None = None
    overlays: Overlays | None = None
    naming: NameRegistration | None = None
    mesh: Mesh | None = None
    probes: PathProber | None = None
    attachments: ClusterAttachments | None = None
    local: LocalNetworks | None = None
    encryption_labels: Callable[[], Mapping[str, str]] = dict
    """Engine labels by which the node says how it encrypts networks; empty: it does not."""
    routes: tuple[web.AbstractRouteDef, ...] = ()

    def network_warnings(self) -> tuple[str, ...]:
        """Of published ports and of connections to other nodes, for ``/info``."""
        sources = (one for one in (self.mesh, self.probes) if one is not None)
        return tuple(sentence for one in sources for sentence in one.warnings())

    def counts(self) -> Counts:
        """Containers by state and images, for ``/info``."""
        states = [one.state for one in self.engine.list()] if self.engine is not None else []
        running, paused = states.count(ContainerState.RUNNING), states.count(ContainerState.PAUSED)
        return Counts(
            running=running,
            paused=paused,
            stopped=len(states) - running - paused,
            images=len(self.images.images()) if self.images is not None else 0,
        )

    def list_containers(self) -> Collection[Container]:
        """Every container of this engine."""
        return self.engine.list() if self.engine is not None else ()

    def container(self, word: str) -> Container:
        """By id, name or prefix.  Raises: NotFound."""
        if self.engine is None:
            raise NotFound(f"No such container: {word}")
        return self.engine.get(word)

    def knows_container(self, word: str) -> bool:
        """Whether ``word`` is a container of this engine."""
        if self.engine is None:
            return False
        try:
            self.engine.get(word)
        except NotFound:
            return False
        return True

    def knows_image(self, reference: str) -> bool:
        """Whether ``reference`` is an image of this engine."""
        if self.images is None:
            return False
        try:
            return self.images.resolve(reference) is not None
        except SkepError:
            return False

    def knows_exec(self, id: str) -> bool:
        """Whether ``id`` is an exec in a container of this engine."""
        if self.engine is None:
            return False
        try:
            self.engine.execs.get(id)
        except NotFound:
            return False
        return True


class NetClients(msgspec.Struct, frozen=True):
    """Connections to the net process.  Several, so that ports do not wait for the names of a thousand containers."""

    ports: NetClient
    mesh_ports: NetClient
    names: NetClient


def net_clients(configuration: Configuration, environment: Environment) -> NetClients:
    """Not connected yet."""
    path, random = configuration.paths.net_socket, environment.random.random

    def client(owner: str = "") -> NetClient:
        return NetClient(path, environment.clock, random, owner)

    return NetClients(client(), client("mesh"), client())


def encryption_options(configuration: Configuration, environment: Environment) -> Options:
    """How this node encrypts networks."""
    return Options(
        method=choose(environment.features, configuration.encryption),
        since_boot=environment.clock.since_boot,
        process=environment.processes.new_wireguard,
        port=configuration.wireguard_port,
    )


def oci_engine(configuration: Configuration, environment: Environment, events: NodeEvents) -> ContainerEngine:
    """Containers under runc; ``images`` have to be opened before use."""
    paths, clock = configuration.paths, environment.clock
    net = net_clients(configuration, environment)

    def announce(event: ImageEvent) -> None:
        events.publish("image", event.action, event.id, event.attributes, event.time_ns)

    images = ImageStore(paths.images, policy=registry_policy(configuration), clock=clock, on_event=announce)
    executor = oci_executor(
        paths,
        images,
        clock=clock,
        rng=environment.random.random,
        hostname=environment.machine.hostname,
        cgroup_parent=configuration.cgroup_parent,
        ports=net.ports,
        names=net.names,
        mesh_ports=net.mesh_ports,
        log_default=Driver(name="json-file", options=configuration.log_opts),
        programs=programs(configuration),
        conditions=environment.conditions,
        encryption=encryption_options(configuration, environment),
    )
    engine, network = executor.engine, executor.network
    routes = (
        *image_routes(images, lambda: image_users(engine), clock=clock),
        *container_routes(engine, images, clock),
        *volume_routes(engine.volumes, engine.list),
        *DiskUsage(engine, images, clock).routes(),
        *absent.routes,
    )
    return ContainerEngine(
        executor=executor,
        logs=TaskLogs(engine),
        payloads=executor.payloads,
        engine=engine,
        images=images,
        gateway=network.gateway,
        overlays=network.overlays,
        naming=network.naming,
        mesh=network.mesh,
        probes=network.prober,
        attachments=executor.attachments,
        local=network.local,
        encryption_labels=network.tunnels.labels,
        routes=routes,
    )


class NoLogs:
    """Task logs of the process executor: there are none, the output is a file on the node."""

    def read(self, query: LogQuery) -> AsyncIterator[LogLine]:
        """Raises: Unimplemented."""
        raise Unimplemented(
            "tasks of the process executor have no logs: their output is a file on their node"
        )


def process_engine(configuration: Configuration) -> ContainerEngine:
    """Plain commands: no images, no containers."""
    return ContainerEngine(executor=ProcessExecutor(configuration.paths.processes), logs=NoLogs())


def registry_policy(configuration: Configuration) -> Policy:
    """Which registries are reached without TLS, and by which mirrors."""
    return Policy(
        insecure=frozenset(configuration.insecure_registries), mirrors=configuration.registry_mirrors
    )


def programs(configuration: Configuration) -> Programs:
    """The programs of the configuration, with absolute paths where they are found."""
    found = find_programs()
    return msgspec.structs.replace(
        found,
        runc=Path(shutil.which(configuration.runc) or found.runc),
        conmon=Path(shutil.which(configuration.conmon) or found.conmon),
    )


async def forward_container_events(engine: Engine, events: NodeEvents) -> None:
    """Publish the containers' events in the node's stream until cancelled."""
    with engine.events.subscribed() as subscription:
        async for event in subscription:
            events.publish("container", event.action, event.container_id, event.attributes, event.time_ns)
