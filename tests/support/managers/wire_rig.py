"""A manager's gRPC services on loopback, with a store in memory, and nodes that connect over real mTLS."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from skep.agent.agent import Agent
from skep.agent.certificates import join
from skep.agent.renewal import KeyPairCredentials
from skep.agent.session.managers import KnownManager, ManagerList
from skep.agent.session.probe_stream import ProbeSource
from skep.agent.session.revisions import SeenRevision
from skep.agent.session.session import NodeServices, unknown_load
from skep.agent.session.session_state import SessionState
from skep.agent.session.table_stream import TableSink
from skep.agent.tunnels import ContainerAccess, TunnelHost
from skep.aio.clock import SystemClock
from skep.errors import Unavailable, Unimplemented
from skep.manager.autoscaling.waking import Wakes
from skep.manager.ca import external
from skep.manager.ca.caller_check import CallerCheck
from skep.manager.ca.expiry_warnings import Expiry
from skep.manager.ca.external import CallLimits, ExternalAuthorities
from skep.manager.ca.loop import CertificateAuthority
from skep.manager.ca.peer_files import PeerFiles
from skep.manager.ca.service import CertificateService
from skep.manager.ca.signing import CertificateSigner
from skep.manager.ca.updater import (
    CertificateUpdater,
    PeerCertificates,
    disconnect_revoked,
    warn_of_expiry,
)
from skep.manager.certificates import end_connections
from skep.manager.control.quotas import check_quota
from skep.manager.discovery.draining import Draining
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.eviction.steps import is_evicting_manager
from skep.manager.failover.keeper import FailoverKeeper
from skep.manager.gossip.keys import first_keys
from skep.manager.logbroker import subscription
from skep.manager.logbroker.broker import LogBroker
from skep.manager.logbroker.subscription import LogLimits
from skep.manager.nodes import tunnels
from skep.manager.nodes.attachment_service import AttachmentService
from skep.manager.nodes.tunnels import NodeTunnels, TunnelLimits
from skep.manager.probes.diagnostics import Diagnostics
from skep.manager.probes.streams import ProbeStreams
from skep.model.networks.data_planes import NODE_LABEL, PATHS_LABEL
from skep.model.node import (
    EngineDescription,
    ManagerStatus,
    Node,
    NodeCertificate,
    NodeDescription,
    NodeRole,
    NodeSpec,
    Reachability,
)
from skep.model.service import Platform, Resources, Service
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, new_id
from skep.model.values.times import SECOND_NS, timestamp
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.reloading import KeyPairFiles
from skep.security.tls import ServerTls, client_context
from skep.security.tokens import new_join_tokens
from skep.security.trust import tls_info
from skep.store.interface import Transaction, View
from skep.store.kinds import GOSSIP_KEYS_ID, ROOT_KEY_ID, Payload
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel, open_channel
from skep.wire.methods import UnaryMethod
from skep.wire.server import NODE_BYTES_MAX, Bound, serve
from skep.wire.service import Handler, unary
from tests.support.builders import a_service, a_task
from tests.support.managers.fake_worker import FakeWorker
from tests.support.managers.wire_calls import METHODS

CLOCK = SystemClock()
MANAGER_ID = NodeId("manager0000000000000000m1")


class Cluster:
    """One manager with its store.  ``serving`` runs it, and the store outlives it as etcd does."""

    def __init__(
        self,
        *,
        heartbeat_s: float = 0.2,
        host: str = "127.0.0.1",
        logs: LogLimits = subscription.LIMITS,
        calls: CallLimits = external.LIMITS,
        node_bytes_max: int = NODE_BYTES_MAX,
        tunnel_limits: TunnelLimits = tunnels.LIMITS,
    ) -> None:
        self.id = ClusterId(new_id())
        self.host = host
        self.port = 0
        self.authority = Authority.create()
        self.store = MemoryStore(SystemClock())
        self.heartbeat_s = heartbeat_s
        self._log_limits, self._call_limits = logs, calls
        self._node_bytes_max = node_bytes_max
        self._tunnel_limits = tunnel_limits
        self.logs: LogBroker
        self.dispatcher: Dispatcher
        self.discovery: Discovery
        self.draining: Draining
        self.paths: ProbeStreams
        self.diagnostics: Diagnostics
        self.tunnels: NodeTunnels
        self.knows_paths = True
        self.ahead_s = 0.0
        """Seconds that have passed for the check of callers."""
        self.tls: ServerTls
        self.bound: Bound
        self.external: ExternalAuthorities

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def view(self) -> View:
        return self.store.view()

    @property
    def swarm(self) -> Swarm:
        return self.view.get(Swarm, self.id)

    def node(self, id: NodeId) -> Node:
        return self.view.get(Node, id)

    def pair(self, node_id: str, role: NodeRole = NodeRole.WORKER, cluster: str = "") -> KeyPair:
        """Return a key pair signed by this cluster's root, whether or not the store knows the node."""
        key = new_private_key()
        identity = NodeIdentity(node_id=NodeId(node_id), cluster_id=ClusterId(cluster or self.id), role=role)
        return KeyPair(
            certificate_pem=self.authority.sign(signing_request(key), identity),
            key_pem=private_pem(key),
            root_pem=self.authority.root_pem,
        )

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["Cluster"]:
        """Run store, CA, dispatcher and log broker behind a server."""
        async with AsyncExitStack() as stack:
            if not self.view.find(Swarm):
                await self.store.update(self._found)
            clock = SystemClock()
            own = ManagerPeer(node_id=MANAGER_ID, addr=f"{self.host}:{port or self.port}")
            self.discovery = self.make_discovery(clock)
            self.draining = Draining(self.store, MANAGER_ID, self.discovery, self.channel, clock, Random(1))
            self.dispatcher = Dispatcher(
                self.store, own, clock, new_id, Random(1), wait_unused=self.draining.wait_unused
            )
            self.paths = ProbeStreams(
                self.store,
                MANAGER_ID,
                lambda node, session: self.dispatcher.session(node, session),
                self.discovery.state,
                clock,
            )
            self.diagnostics = Diagnostics(self.store, MANAGER_ID, self.paths, self.channel, clock)
            self.tunnels = NodeTunnels(
                self.store,
                MANAGER_ID,
                lambda node, session: self.dispatcher.session(node, session),
                self.channel,
                self._tunnel_limits,
            )
            self.failover = FailoverKeeper(
                self.store,
                MANAGER_ID,
                lambda node, session: self.dispatcher.session(node, session),
                clock,
            )
            self.wakes = Wakes(
                self.store, lambda node, session: self.dispatcher.session(node, session), clock, check_quota
            )
            self.logs = LogBroker(self.store, new_id, clock, limits=self._log_limits)
            self.tls = ServerTls(self.pair(MANAGER_ID, NodeRole.MANAGER))
            self.external = ExternalAuthorities(lambda: self.tls.pair, clock, Random(1), self._call_limits)
            signer = CertificateSigner(self.store, MANAGER_ID, self.external, self.channel, clock)
            certificates = CertificateService(self.store, new_id, signer)
            bound = await stack.enter_async_context(
                serve(
                    with_all_methods(self._services(certificates, clock)),
                    host=self.host,
                    port=port,
                    tls=self.tls.front,
                    cluster_id=self.id,
                    check_certificate=CallerCheck(
                        self.store.view,
                        self.dispatcher.is_current,
                        lambda: clock.monotonic() + self.ahead_s,
                    ).require,
                    node_bytes_max=self._node_bytes_max,
                )
            )
            self.bound = bound
            self.port = bound.port
            await self.store.update(self._set_address)
            for loop in (self.dispatcher.run(), self.logs.run(), self.discovery.run(), self.paths.run()):
                stack.push_async_callback(_end, asyncio.create_task(loop))
            yield self

    def _services(self, certificates: CertificateService, clock: SystemClock) -> Sequence[Handler]:
        attachments = AttachmentService(self.store, clock, new_id)
        parts = (
            certificates,
            self.dispatcher,
            self.logs,
            self.discovery,
            attachments,
            self.tunnels,
            self.failover,
            self.wakes,
            *self.path_parts,
        )
        return [handler for part in parts for handler in part.services()]

    @property
    def path_parts(self) -> Sequence[ProbeStreams | Diagnostics]:
        """Return the parts for paths, or none for an older manager."""
        return (self.paths, self.diagnostics) if self.knows_paths else ()

    def make_discovery(self, clock: SystemClock) -> Discovery:
        return Discovery(
            self.store, MANAGER_ID, lambda node, session: self.dispatcher.session(node, session), clock
        )

    def channel(self, manager: NodeId) -> ManagerChannel:
        """Return the link to another manager, which this manager does not have."""
        raise Unavailable(f"manager {manager} cannot be reached")

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        """Run the leader's loop over certificates."""
        loop = CertificateAuthority(self.store, SystemClock(), new_id, Random(1))
        running = asyncio.create_task(loop.run())
        try:
            yield
        finally:
            await _end(running)

    @asynccontextmanager
    async def own_agent(self, directory: Path) -> AsyncIterator[tuple[Agent, "FakeWorker"]]:
        """Run the agent of the manager's own machine, whose certificate the manager serves with."""
        pair = self.pair(MANAGER_ID, NodeRole.MANAGER)
        async with an_agent(self, pair, directory) as own, self.kept_up(directory):
            yield own

    @asynccontextmanager
    async def kept_up(
        self,
        directory: Path,
        peers: PeerFiles | None = None,
        on_expiry: Callable[[Expiry], None] = lambda _: None,
    ) -> AsyncIterator[None]:
        """Run the manager's certificate renewal, with its own key pair in ``directory``."""
        clock = SystemClock()
        updater = CertificateUpdater(
            self.store,
            MANAGER_ID,
            self.tls,
            KeyPairFiles(directory),
            clock,
            partial(end_connections, self.store, self.bound),
            PeerCertificates(self.store, MANAGER_ID, peers, clock, is_evicting_manager) if peers else None,
        )
        running = [
            asyncio.create_task(updater.run()),
            asyncio.create_task(warn_of_expiry(self.store, on_expiry, clock)),
            asyncio.create_task(disconnect_revoked(self.store, self.bound.disconnect)),
        ]
        try:
            yield
        finally:
            for one in running:
                await _end(one)

    def _found(self, tx: Transaction) -> None:
        root_pem = self.authority.root_pem
        dispatcher = msgspec.structs.replace(
            DEFAULT_SWARM_SPEC.dispatcher, heartbeat_period=int(self.heartbeat_s * SECOND_NS)
        )
        tx.put(
            Swarm(
                id=self.id,
                spec=msgspec.structs.replace(DEFAULT_SWARM_SPEC, dispatcher=dispatcher),
                tls_info=tls_info(root_pem),
                join_tokens=new_join_tokens(root_pem),
            )
        )
        tx.put(Payload(id=ROOT_KEY_ID, data=self.authority.key_pem))
        certificate = NodeCertificate(role=NodeRole.MANAGER, state="issued")
        keys = first_keys(secrets.token_bytes, timestamp(0))
        tx.put(Payload(id=GOSSIP_KEYS_ID, data=keys.encode()))
        tx.put(Node(id=MANAGER_ID, spec=NodeSpec(role=NodeRole.MANAGER), certificate=certificate))

    def _set_address(self, tx: Transaction) -> None:
        node = tx.get(Node, MANAGER_ID)
        status = ManagerStatus(leader=True, reachability=Reachability.REACHABLE, addr=self.address)
        tx.put(msgspec.structs.replace(node, manager_status=status))

    async def until(self, condition: Callable[[View], object], within_s: float = 10.0) -> None:
        """Wait until the store shows something."""
        await until(lambda: condition(self.view), within_s)


def with_all_methods(handlers: Sequence[Handler]) -> Sequence[Handler]:
    """Return ``handlers``, and a handler that responds UNIMPLEMENTED to all others, after the access check."""
    served = {handler.method.path for handler in handlers}

    async def refuse(_request: Any, _caller: Caller) -> Any:
        raise Unimplemented("not served by this rig")

    left_out = (method for method in METHODS.values() if method.path not in served)
    return (*handlers, *(unary(UnaryMethod(m.path, m.request, m.reply, m.access), refuse) for m in left_out))


async def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait for a condition that has no event."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 -- the store's view announces nothing to a test
            await asyncio.sleep(0.005)


async def a_worker(cluster: Cluster, directory: Path) -> KeyPair:
    """Return the key pair of a node that joined."""
    pair = await join(cluster.address, cluster.swarm.join_tokens.worker, SystemClock())
    keypair.save(pair, directory)
    return pair


async def put(cluster: Cluster, *objects: msgspec.Struct) -> None:
    """Write objects in one transaction."""
    await cluster.store.update(lambda tx: [tx.put(object) for object in objects])


def service_task(node: NodeId) -> tuple[Service, Task]:
    """Return a service with a task that was just assigned to ``node``."""
    service = a_service(f"web{new_id()[:6]}")
    return service, a_task(new_id(), node=node, service=service, state=TaskState.ASSIGNED)


@asynccontextmanager
async def a_session(cluster: Cluster, pair: KeyPair) -> AsyncIterator[tuple[ManagerChannel, str]]:
    """Open a connection and register a session without an agent.  Yield the channel and the session's id."""
    async with (
        open_channel(cluster.address, client_context(pair), "swarm-manager") as channel,
        channel.stream(methods.SESSION) as call,
    ):
        await call.send(pb.SessionRequest(), end=True)
        message = await call.receive()
        assert message is not None
        yield channel, message.session_id


def describe(hostname: str = "worker", *, probes: bool = False) -> NodeDescription:
    labels = {NODE_LABEL: "true", PATHS_LABEL: "1"} if probes else {}
    return NodeDescription(
        hostname=hostname,
        engine=EngineDescription(engine_version="1" if probes else "", labels=labels),
        platform=Platform(architecture="x86_64", os="linux"),
        resources=Resources(nano_cpus=2_000_000_000, memory_bytes=1 << 30),
    )


@asynccontextmanager
async def an_agent_of(
    managers: Sequence[KnownManager],
    pair: KeyPair,
    directory: Path,
    worker: FakeWorker,
    random: Random,
    load: Callable[[], float | None] = unknown_load,
    tables: TableSink | None = None,
    paths: ProbeSource | None = None,
    containers: ContainerAccess | None = None,
) -> AsyncIterator[Agent]:
    """Run an agent with a fake worker, registered with one of ``managers``."""
    keypair.save(pair, directory)
    credentials = KeyPairCredentials(directory, SystemClock(), random)
    agent = Agent(
        credentials=credentials,
        managers=ManagerList(managers),
        describe=partial(describe, probes=paths is not None),
        services=NodeServices(
            sink=worker,
            reports=worker.reports,
            logs=worker,
            seen=SeenRevision(None, pair.identity.cluster_id),
            load=load,
            tables=tables,
            probes=paths,
            tunnels=TunnelHost(containers, credentials.connect) if containers is not None else None,
        ),
        clock=SystemClock(),
        random=random,
        session_state=SessionState(SystemClock()),
    )
    running = asyncio.create_task(agent.run())
    try:
        async with asyncio.timeout(10):
            await agent.registered.wait()
        yield agent
    finally:
        await _end(running)


def pair_of(agent: Agent) -> KeyPair:
    """Return the current key pair of an agent."""
    assert isinstance(agent.credentials, KeyPairCredentials)
    return agent.credentials.pair


@asynccontextmanager
async def an_agent(
    cluster: Cluster,
    pair: KeyPair,
    directory: Path,
    worker: FakeWorker | None = None,
    load: Callable[[], float | None] = unknown_load,
    tables: TableSink | None = None,
    paths: ProbeSource | None = None,
) -> AsyncIterator[tuple[Agent, FakeWorker]]:
    """Run an agent with a fake worker, registered with the cluster's manager."""
    worker = worker or FakeWorker()
    peers = [KnownManager(MANAGER_ID, cluster.address)]
    async with an_agent_of(peers, pair, directory, worker, Random(1), load, tables, paths) as agent:
        yield agent, worker


async def _end(task: "asyncio.Task[None]") -> None:
    """Cancel ``task``.  Raise its error if it failed."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
