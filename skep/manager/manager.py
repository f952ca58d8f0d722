"""One manager, with parts that always run and parts that run only while it leads.

Every manager serves the API and the agents from its own replica of the store and never forwards to the leader.  Only
the control loops run on the leader alone, and each of their writes is fenced by its term (``leader.py``).
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import structlog
from aiohttp import web

from skep.aio.clock import Clock
from skep.api.http.handover_server import HOOKS, PassedConnections, begin_response
from skep.api.http.liveness import LivenessConnection
from skep.api.http.server import runner
from skep.bootstrap import ManagerConfig
from skep.errors import Unavailable
from skep.manager.certificates import ManagerCertificates
from skep.manager.environment import ManagerEnvironment
from skep.manager.journal.loop import Journal
from skep.manager.journal.past import PastStates
from skep.manager.leader import Leader
from skep.manager.link.loop import ManagerLink
from skep.manager.manager_status import ManagerStatusWriter
from skep.manager.node_facing import NodeFacingServices
from skep.manager.observation import ManagerObservation
from skep.manager.peer_reports import PeerReports
from skep.manager.quorum import Quorum, quorum
from skep.manager.routes import ManagerApi, application
from skep.manager.storage.incarnation import Incarnation
from skep.manager.store_member import ConsensusMember, StoreMember
from skep.manager.telemetry.node_events import AllEvents
from skep.model.networks.addresses import parted
from skep.model.values.ids import IdSource
from skep.model.values.name_generator import names_from
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.rpc.client import Bounds
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, ServerTls, client_context
from skep.store.etcd.store import EtcdStore
from skep.wire.client import BOUNDS, ManagerChannel, open_channel
from skep.wire.server import Bound, serve
from skep.wire.service import Handler

log = structlog.get_logger(__name__)

BACKLOG = 128
"""Connections to the manager's socket that wait to be accepted, as aiohttp has it."""


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
        environment = self._environment = ManagerEnvironment(config, store, clock, new_id, random)
        own, incarnation, reports = config.node_id, Incarnation(store.incarnation), PeerReports()
        self._tls = ServerTls(pair)
        self._link = ManagerLink(
            store, own, self._connected, clock, random, incarnation=incarnation, reports=reports
        )
        channel_to = self._link.channel
        self._member = StoreMember(environment, member, incarnation, channel_to)
        self._certificates = ManagerCertificates(environment, self._tls, channel_to)
        self._nodes = NodeFacingServices(environment, self._link, reports)
        self._observation = ManagerObservation(environment, self._nodes.dispatcher, channel_to, self._quorum)
        self._status = ManagerStatusWriter(
            store, own, config.advertise_addr, config.peer_advertised, clock, random
        )
        self._journal = Journal(store, own, clock, random)
        self._leader = Leader(
            environment,
            self._link,
            self._member,
            self._status,
            self._observation,
            self._journal,
            self._nodes.tunnels,
        )

    async def run(self) -> None:
        """Run until cancelled.  Any part that fails ends the manager, and its supervisor restarts it."""
        config = self._environment.config
        host, port = parted(config.listen_addr)
        check = self._certificates.caller_check(self._nodes.dispatcher.is_current)
        async with (
            serve(
                self._handlers(),
                host=host,
                port=int(port),
                tls=self._tls.front,
                cluster_id=config.cluster_id,
                check_certificate=check.require,
            ) as bound,
            asyncio.TaskGroup() as group,
        ):
            for name, work in self._tasks(bound, host):
                group.create_task(work, name=name)
            app = application(self._api())
            self._observation.trace(app, group)
            socket = config.paths.manager_socket
            async with serving(app, socket, config.paths.handover_socket):
                log.info("manager serves", socket=str(socket), listen_addr=config.listen_addr)
                await asyncio.Event().wait()

    def _api(self) -> ManagerApi:
        config, store, clock, new_id, random = self._environment
        nodes, observation = self._nodes, self._observation
        return ManagerApi(
            store=store,
            logs=nodes.logs,
            backups=self._member.backups(),
            events=observation.events,
            cluster_view=observation.cluster_view,
            all_events=AllEvents(nodes.tunnels, store.view, clock),
            clock=clock,
            new_id=new_id,
            new_name=names_from(random),
            diagnostics=nodes.diagnostics,
            external=self._certificates.external,
            tunnels=nodes.tunnels,
            quorum=self._quorum,
            lag=observation.lag,
            journal=self._journal,
            past=PastStates(store, self._journal.marks, clock),
            metrics=observation.metrics(),
            collect_usages=observation.usages.collect,
            collect_routes=observation.usages.collect_routes,
            own=config.node_id,
            own_error=self._member.member.error,
        )

    def _handlers(self) -> Sequence[Handler]:
        """Return all gRPC methods of this manager."""
        return (
            *self._certificates.services(),
            *self._nodes.services(),
            *self._link.services(),
            *self._member.services(),
        )

    def _tasks(self, bound: Bound, host: str) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """Yield the work of every manager, leader or not, with its names."""
        yield from self._nodes.tasks(host)
        yield "link", self._link.run()
        yield from self._observation.tasks()
        yield "journal", self._journal.run()
        yield "manager status", self._status.run()
        yield from self._member.tasks()
        yield from self._certificates.tasks(self._member, bound, self._observation.events)
        yield "election", self._leader.run()

    def _quorum(self) -> Quorum:
        config, store, clock, _, _ = self._environment
        lost_s = self._nodes.dispatcher.without_quorum_s()
        lost_at = timestamp(clock.now_ns() - round(lost_s * SECOND_NS)) if lost_s else Timestamp("")
        now, link = clock.monotonic(), self._link
        return quorum(store.view(), config.node_id, link.silent(now), link.reachable(now), lost_at)

    def _connected(
        self, addr: str, *, bounds: Bounds = BOUNDS
    ) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to another manager with this manager's certificate."""
        return open_channel(addr, client_context(self._tls.pair), MANAGER_NAME, bounds=bounds)


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
    accept = partial(LivenessConnection, serves.server)
    listener: asyncio.Server | None = None
    try:
        socket.unlink(missing_ok=True)
        try:
            listener = await asyncio.get_running_loop().create_unix_server(
                accept, str(socket), backlog=BACKLOG
            )
        except OSError as error:
            raise Unavailable(f"cannot listen on {socket}: {error}") from error
        socket.chmod(0o600)
        async with passed.listening(handover):
            yield
    finally:
        if listener is not None:
            listener.close()
        await serves.cleanup()
        passed.close()
        socket.unlink(missing_ok=True)
