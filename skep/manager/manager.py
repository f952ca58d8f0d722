"""One manager, with parts that always run and parts that run only while it leads.

Every manager serves the API and the agents from its own replica of the store and never forwards to the leader.  Only
the control loops run on the leader alone, and each of their writes is fenced by its term.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import structlog
from aiohttp import web

from skep.aio.clock import Clock
from skep.aio.event_loop.loop_lag import LoopLag
from skep.aio.failures import retry
from skep.aio.groups import first_alone
from skep.api.http.handover_server import HOOKS, PassedConnections, begin_response
from skep.api.http.server import runner
from skep.api.telemetry.exposition import MetricFamily
from skep.api.telemetry.otlp import exporter_to
from skep.bootstrap import ManagerConfig
from skep.csi.drivers import Drivers
from skep.errors import Unavailable
from skep.manager.autoscaling.state import AutoscalingCounts
from skep.manager.ca.caller_check import CallerCheck
from skep.manager.ca.external import ExternalAuthorities
from skep.manager.ca.peer_files import PeerFiles
from skep.manager.ca.service import CertificateService
from skep.manager.ca.signing import CertificateSigner
from skep.manager.ca.updater import (
    CertificateUpdater,
    PeerCertificates,
    disconnect_revoked,
    warn_of_expiry,
)
from skep.manager.control_loops.loops import loops
from skep.manager.discovery.draining import Draining
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.adoption import SessionAdoption
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.manager.eviction.connections import end_connections
from skep.manager.eviction.loop import Evictions
from skep.manager.eviction.steps import is_evicting_manager
from skep.manager.gossip.relay import GossipRelay
from skep.manager.journal.loop import Journal
from skep.manager.journal.past import PastStates
from skep.manager.link.loop import ManagerLink
from skep.manager.link.relays import LinkRelays
from skep.manager.logbroker.broker import LogBroker
from skep.manager.manager_status import ManagerStatusWriter
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.loop import ManagerReconciler
from skep.manager.membership.peer_addresses import PeerAddresses, sync_peer_addresses
from skep.manager.membership.peer_search import PeerSearch
from skep.manager.membership.service import MembersService
from skep.manager.nodes.attachment_service import AttachmentService
from skep.manager.nodes.image_directory import ImageDirectory
from skep.manager.nodes.tunnels import NodeTunnels
from skep.manager.nodes.worker_reads import WorkerReads
from skep.manager.peer_reports import PeerReports
from skep.manager.probes.diagnostics import Diagnostics
from skep.manager.probes.streams import ProbeStreams
from skep.manager.quorum import Quorum, quorum
from skep.manager.routes import ManagerApi, application
from skep.manager.storage.autolock import Autolock
from skep.manager.storage.backup import Backups
from skep.manager.storage.incarnation import Incarnation
from skep.manager.storage.keys import StoreKeys, WrappingKeys
from skep.manager.storage.store_space import StoreSpace
from skep.manager.telemetry.etcd_metrics import etcd_families
from skep.manager.telemetry.events import ClusterEvents
from skep.manager.telemetry.metrics import ClusterMetrics, StartTimes, autoscaling_families
from skep.manager.telemetry.node_events import AllEvents
from skep.manager.telemetry.task_usages import TaskUsages
from skep.manager.telemetry.traces import TaskSpans, request_spans
from skep.manager.view.cluster import ClusterRows
from skep.manager.view.loop import ClusterView
from skep.model.networks.addresses import parted
from skep.model.values.ids import IdSource, NodeId
from skep.model.values.name_generator import names_from
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.rpc.client import Bounds
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock
from skep.security.reloading import KeyPairFiles
from skep.security.tls import MANAGER_NAME, ServerTls, client_context
from skep.store.etcd.store import EtcdStore
from skep.store.interface import NotLeader, Term
from skep.wire.client import BOUNDS, ManagerChannel, open_channel
from skep.wire.server import Bound, serve
from skep.wire.service import Handler

log = structlog.get_logger(__name__)


class ConsensusMember(NamedTuple):
    """This manager's member of the consensus (its etcd), and the addresses of the others."""

    consensus: Consensus
    peer_addresses: PeerAddresses
    peer_search: PeerSearch
    restart: Callable[[], Awaitable[None]]
    cut_peers: Callable[[], None]
    """Ends the connections that other members have opened to this member."""
    error: Callable[[], str]
    """Returns a sentence about a problem of the member, such as a full disk, or an empty text."""


class Manager:
    """Serves the API always, leads the cluster while elected."""

    def __init__(
        self,
        config: ManagerConfig,
        store: EtcdStore,
        pair: KeyPair,
        member: ConsensusMember,
        clock: Clock,
        new_id: IdSource,
        random: Random,
    ) -> None:
        self._config = config
        self._store = store
        self._member = member
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._tls = ServerTls(pair)
        self._keys = StoreKeys(store, WrappingKeys(config.paths))
        self._external = ExternalAuthorities(lambda: self._tls.pair, clock, random)
        self._signer = CertificateSigner(store, config.node_id, self._external, self._channel_to, clock)
        self._certificates = CertificateService(store, new_id, self._signer)
        self._discovery = Discovery(store, config.node_id, self._session, clock)
        self._draining = Draining(store, config.node_id, self._discovery, self._channel_to, clock, random)
        own, reports = ManagerPeer(node_id=config.node_id, addr=config.advertise_addr), PeerReports()
        self._dispatcher = Dispatcher(
            store, own, clock, new_id, random, wait_unused=self._draining.wait_unused, reports=reports
        )
        self._starts, self._autoscaling = StartTimes(store, clock), AutoscalingCounts()
        self._exporter = exporter_to(config.trace_endpoint, "manager", config.hostname, clock, random.random)
        self._incarnation = Incarnation(store.incarnation)
        self._link = ManagerLink(
            store,
            config.node_id,
            self._connected,
            clock,
            random,
            incarnation=self._incarnation,
            reports=reports,
        )
        self._probes = ProbeStreams(store, config.node_id, self._session, self._discovery.state, clock)
        self._diagnostics = Diagnostics(store, config.node_id, self._probes, self._channel_to, clock)
        self._usages = TaskUsages(store, config.node_id, self._dispatcher.usages, self._channel_to)
        self._tunnels = NodeTunnels(store, config.node_id, self._session, self._channel_to)
        self._logs = LogBroker(store, new_id, clock, config.node_id, LinkRelays(self._link))
        self._attachments = AttachmentService(store, clock, new_id)
        self._image_directory = ImageDirectory(store, config.cluster_id, clock, random)
        self._status = ManagerStatusWriter(
            store, config.node_id, config.advertise_addr, config.peer_advertised, clock, random
        )
        self._space = StoreSpace(store, config.node_id, member.consensus, self._channel_to, clock)
        self._journal = Journal(store, config.node_id, clock, random)
        self._members = MembersService(
            store,
            member.consensus,
            member.peer_addresses,
            self._keys.disk.load,
            self._keys.keep,
            config.cluster_id,
            clock,
        )

    async def run(self) -> None:
        """Run until cancelled.  Any part that fails ends the manager, and its supervisor restarts it."""
        events = ClusterEvents(self._store, self._clock)
        view = ClusterView(self._store, self._clock, ClusterRows(self._store, self._clock, self._quorum).row)
        api = self._api(events, view)
        host, port = parted(self._config.listen_addr)
        check = CallerCheck(self._store.view, self._dispatcher.is_current, self._clock.monotonic)
        async with (
            serve(
                self._handlers(),
                host=host,
                port=int(port),
                tls=self._tls.front,
                cluster_id=self._config.cluster_id,
                check_certificate=check.require,
            ) as bound,
            asyncio.TaskGroup() as group,
        ):
            self._start(group, bound, events, host)
            group.create_task(api.lag.run(self._clock), name="loop lag")
            group.create_task(view.run(), name="cluster view")
            served = self._traced(application(api), group)
            socket = self._config.paths.manager_socket
            async with serving(served, socket, self._config.paths.handover_socket):
                log.info("manager serves", socket=str(socket), listen_addr=self._config.listen_addr)
                await asyncio.Event().wait()

    def _traced(self, app: web.Application, group: asyncio.TaskGroup) -> web.Application:
        """Add spans of requests and tasks if traces are exported."""
        if self._exporter is not None:
            app.middlewares.append(request_spans(self._exporter))
            group.create_task(self._exporter.run(), name="export of traces")
            spans = TaskSpans(self._store, self._config.node_id, self._exporter)
            group.create_task(spans.run(), name="spans of tasks")
        return app

    def _api(self, events: ClusterEvents, view: ClusterView) -> ManagerApi:
        lag, own = LoopLag(), self._config.node_id
        return ManagerApi(
            store=self._store,
            logs=self._logs,
            backups=Backups(self._config, self._store, self._keys.disk.load, self._clock),
            events=events,
            cluster_view=view,
            all_events=AllEvents(self._tunnels, self._store.view, self._clock),
            clock=self._clock,
            new_id=self._new_id,
            new_name=names_from(self._random),
            diagnostics=self._diagnostics,
            external=self._external,
            tunnels=self._tunnels,
            quorum=self._quorum,
            lag=lag,
            journal=self._journal,
            past=PastStates(self._store, self._journal.marks, self._clock),
            metrics=ClusterMetrics(
                self._store,
                lambda: self._store.leader == own and self._dispatcher.is_current(),
                self._starts,
                self._dispatcher.session_count,
                lag,
                partial(etcd_families, self._config.paths.etcd_socket),
                self._counted,
            ),
            collect_usages=self._usages.collect,
            own=own,
            own_error=self._member.error,
        )

    def _counted(self) -> list[MetricFamily]:
        """Return the metric families of autoscaling and, if traces are exported, of the export."""
        traces = self._exporter.families() if self._exporter is not None else []
        return [*autoscaling_families(self._autoscaling), *traces]

    def _handlers(self) -> Sequence[Handler]:
        """Return all gRPC methods of this manager."""
        return (
            *self._certificates.services(),
            *self._signer.services(),
            *self._dispatcher.services(),
            *self._discovery.services(),
            *self._draining.services(),
            *self._probes.services(),
            *self._diagnostics.services(),
            *self._logs.services(),
            *self._tunnels.services(),
            *self._attachments.services(),
            *self._image_directory.services(),
            *WorkerReads(self._store.view, self._config.paths.manager_socket).services(),
            *self._link.services(),
            *self._members.services(),
            *self._member.peer_search.services(),
            *self._space.services(),
        )

    def _start(self, group: asyncio.TaskGroup, bound: Bound, events: ClusterEvents, host: str) -> None:
        """Start the tasks that run on every manager, leader or not."""
        store, clock, random = self._store, self._clock, self._random
        lock = KeyLock(self._config.paths)
        incarnation = partial(self._incarnation.run, self._config.paths)
        addresses = partial(
            sync_peer_addresses, self._member.peer_addresses, store, self._member.consensus, clock, random
        )
        for name, work in (
            ("dispatcher", self._dispatcher.run()),
            ("discovery", self._discovery.run()),
            ("probes", self._probes.run()),
            ("log broker", self._logs.run()),
            ("link", self._link.run()),
            ("incarnation", _retrying(incarnation, "incarnation", clock, random)),
            ("events", events.run()),
            ("journal", self._journal.run()),
            ("times of starts", self._starts.run()),
            ("gossip relay", GossipRelay(store, host, clock, random).run()),
            ("peer addresses", _retrying(addresses, "peer addresses", clock, random)),
            ("manager status", self._status.run()),
            ("certificates", self._certificate_updater(lock, bound).run()),
            ("certificate expiry", warn_of_expiry(store, events.expires, clock)),
            ("revoked connections", disconnect_revoked(store, bound.disconnect)),
            ("autolock", Autolock(store, lock, clock, random).run()),
            ("wrapping keys", self._keys.prune(clock)),
            ("election", self._lead_when_elected()),
        ):
            group.create_task(work, name=name)

    def _certificate_updater(self, lock: KeyLock, bound: Bound) -> CertificateUpdater:
        own, paths = self._config.node_id, self._config.paths
        peer_files = PeerFiles(paths.tls, paths.manager, self._member.restart, self._member.cut_peers)
        return CertificateUpdater(
            self._store,
            own,
            self._tls,
            KeyPairFiles(paths.certificates, lock),
            self._clock,
            partial(end_connections, self._store, bound),
            PeerCertificates(self._store, own, peer_files, self._clock, is_evicting_manager),
        )

    def _quorum(self) -> Quorum:
        lost_s = self._dispatcher.without_quorum_s()
        lost_at = timestamp(self._clock.now_ns() - round(lost_s * SECOND_NS)) if lost_s else Timestamp("")
        silent = self._link.silent(self._clock.monotonic())
        return quorum(self._store.view(), self._config.node_id, silent, lost_at)

    def _session(self, node_id: NodeId, session_id: str) -> LiveSession:
        return self._dispatcher.session(node_id, session_id)

    def _channel_to(self, manager: NodeId) -> ManagerChannel:
        return self._link.channel(manager)

    def _connected(
        self, addr: str, *, bounds: Bounds = BOUNDS
    ) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to another manager with this manager's certificate."""
        return open_channel(addr, client_context(self._tls.pair), MANAGER_NAME, bounds=bounds)

    async def _lead_when_elected(self) -> None:
        terms = self._store.terms(self._config.node_id, self._config.advertise_addr)
        async for term in terms:
            log.info("leadership gained", term=term.number)
            self._status.lead(term)
            async with asyncio.TaskGroup() as group:
                leading = group.create_task(self._lead(term), name=f"lead-{term.number}")
                await term.wait_lost()
                leading.cancel()
            self._status.lead(None)
            # The old term has ended before a new one starts.
            log.info("leadership lost", term=term.number)

    async def _lead(self, term: Term) -> None:
        """Run the control loops for one term.  Returns early if a write showed that the term is over."""
        try:
            async with asyncio.TaskGroup() as group:
                managers = ManagerReconciler(
                    term, self._config.node_id, self._member.consensus, self._link, self._clock, self._random
                )
                group.create_task(managers.run(), name="managers")
                evictions = Evictions(
                    term,
                    self._config.node_id,
                    self._keys,
                    self._channel_to,
                    self._clock,
                    self._new_id,
                    self._random,
                )
                group.create_task(evictions.run(), name="evictions")
                adoption = SessionAdoption(
                    term, self._config.node_id, self._link.silent, self._clock, self._new_id, self._random
                )
                group.create_task(adoption.run(), name="adoption")
                group.create_task(self._space.keep(), name="store's space")
                group.create_task(self._journal.lead(term), name="journal")
                for loop in loops(
                    term,
                    self._clock,
                    self._new_id,
                    self._random,
                    self._store.incarnation,
                    find_driver=Drivers(self._config.paths.csi_sockets, self._clock).get,
                    confirm=term.confirm,
                    collect_usages=self._usages.collect,
                    counts=self._autoscaling,
                ):
                    group.create_task(loop.run(), name=type(loop).__name__)
        except* NotLeader:
            log.info("write refused: there is a newer leader", term=term.number)


def _retrying(
    work: Callable[[], Coroutine[Any, Any, None]], name: str, clock: Clock, random: Random
) -> Coroutine[Any, Any, None]:
    """Return a coroutine that runs ``work`` and retries disk errors while the manager continues."""

    async def run() -> None:
        with first_alone(OSError):
            await work()

    return retry(
        run,
        "part of the manager failed",
        clock=clock,
        longest_s=10.0,
        rng=random.random,
        kinds=(OSError,),
        part=name,
    )


@asynccontextmanager
async def serving(app: web.Application, socket: Path, handover: Path) -> AsyncIterator[None]:
    """Serve HTTP on a Unix socket that only root may open, and on connections passed at ``handover``.

    Raises:
        Unavailable: One of the sockets cannot be bound.
    """
    app.on_response_prepare.append(begin_response)
    serves = runner(app, **HOOKS)
    await serves.setup()
    assert serves.server is not None, "runner.setup creates the server"
    passed = PassedConnections(serves.server)
    try:
        socket.unlink(missing_ok=True)
        try:
            await web.UnixSite(serves, str(socket)).start()
        except OSError as error:
            raise Unavailable(f"cannot listen on {socket}: {error}") from error
        socket.chmod(0o600)
        async with passed.listening(handover):
            yield
    finally:
        await serves.cleanup()
        passed.close()
        socket.unlink(missing_ok=True)
