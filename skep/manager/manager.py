"""One manager: what always runs, and what runs while it leads.

Every manager serves the API and the agents from its own replica of the store; none forwards to the leader.  Only the
control loops are the leader's, and each of their writes is fenced by its term.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import structlog
from aiohttp import web

from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.aio.groups import first_alone
from skep.aio.loop_lag import LoopLag
from skep.api.passed import HOOKS, PassedConnections, begin_response
from skep.api.server import runner
from skep.bootstrap import ManagerConfig
from skep.errors import Unavailable
from skep.manager.attachment_service import AttachmentService
from skep.manager.autolock import Autolock
from skep.manager.backup import Backups
from skep.manager.ca.admission import stamp
from skep.manager.ca.peer_files import PeerFiles
from skep.manager.ca.service import CertificateService
from skep.manager.ca.standing import Standing
from skep.manager.ca.upkeep import Upkeep
from skep.manager.discovery.draining import Draining
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.adoption import Adoption
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.messages import ManagerPeer
from skep.manager.dispatcher.sessions import LiveSession
from skep.manager.events import ClusterEvents
from skep.manager.eviction.loop import Evictions, KeyedStore, keep_settled, shut_out
from skep.manager.eviction.steps import is_evicting_manager
from skep.manager.gossip.relay import Relay
from skep.manager.incarnation import Incarnation
from skep.manager.keys import WrappingKeys
from skep.manager.link.loop import ManagerLink
from skep.manager.link.relays import LinkRelays
from skep.manager.logbroker.broker import LogBroker
from skep.manager.loops import loops
from skep.manager.manager_status import ManagerStatusWriter
from skep.manager.membership.addresses import AddressBook, keep_book
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.loop import Managers
from skep.manager.membership.service import MembersService
from skep.manager.membership.whereabouts import Whereabouts
from skep.manager.overload import Overload
from skep.manager.paths.examination import Examinations
from skep.manager.paths.streams import PathStreams
from skep.manager.quorum import Quorum, quorum
from skep.manager.routes import ManagerApi, application
from skep.manager.store_space import StoreSpace
from skep.model.addresses import parted
from skep.model.ids import IdSource, NodeId
from skep.model.readable import names_from
from skep.model.times import SECOND_NS, Timestamp, timestamp
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock
from skep.security.reloading import KeyPairFiles
from skep.security.tls import MANAGER_NAME, ServerTls, client_context
from skep.store.interface import NotLeader, Term
from skep.wire.client import Channel, connected
from skep.wire.server import Bound, serve

log = structlog.get_logger(__name__)


class Manager:
    """Serves the API always, leads the cluster while elected."""

    def __init__(
        self,
        config: ManagerConfig,
        store: KeyedStore,
        pair: KeyPair,
        *,
        consensus: Consensus,
        book: AddressBook,
        whereabouts: Whereabouts,
        restart_member: Callable[[], Awaitable[None]],
        cut_peers: Callable[[], None],
        trouble: Callable[[], str],
        socket: Path,
        clock: Clock,
        new_id: IdSource,
        random: Random,
    ) -> None:
        self._config = config
        self._store = store
        self._socket = socket
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._tls = ServerTls(pair)
        self._certificates = CertificateService(store, new_id)
        own = ManagerPeer(node_id=config.node_id, addr=config.advertise_addr)
        self._discovery = Discovery(store, self._session, clock)
        self._draining = Draining(store, config.node_id, self._discovery, self._channel_to, clock, random)
        overload = Overload()
        self._dispatcher = Dispatcher(
            store, own, clock, new_id, random, wait_unused=self._draining.wait_unused, overload=overload
        )
        self._incarnation = Incarnation(config.paths, store.incarnation)
        self._link = ManagerLink(
            store,
            config.node_id,
            self._connected,
            clock,
            random,
            incarnation=store.incarnation,
            met=self._incarnation.met,
            overload=overload,
        )
        self._paths = PathStreams(store, config.node_id, self._session, self._discovery, clock)
        self._examinations = Examinations(store, config.node_id, self._paths, self._channel_to)
        self._logs = LogBroker(store, new_id, clock, config.node_id, LinkRelays(self._link))
        self._attachments = AttachmentService(store, clock, new_id)
        self._book = book
        self._whereabouts = whereabouts
        self._restart_member = restart_member
        self._cut_peers = cut_peers
        self._trouble = trouble
        self._consensus = consensus
        self._presence = ManagerStatusWriter(
            store, config.node_id, config.advertise_addr, config.peer_advertised, clock, random
        )
        self._space = StoreSpace(store, config.node_id, consensus, self._channel_to, clock)
        self._keys = WrappingKeys(config.paths)
        self._members = MembersService(
            store,
            consensus,
            book,
            self._keys.load,
            self._keep_wrapping_key,
            config.cluster_id,
            clock,
        )

    async def run(self) -> None:
        """Run until cancelled.  Any part that fails takes the manager down; its supervisor starts it again."""
        events = ClusterEvents(self._store, self._clock)
        api = ManagerApi(
            store=self._store,
            logs=self._logs,
            backups=Backups(self._config, self._store, self._keys.load, self._clock),
            events=events,
            clock=self._clock,
            new_id=self._new_id,
            new_name=names_from(self._random),
            examinations=self._examinations,
            quorum=self._quorum,
            lag=LoopLag(),
            own=self._config.node_id,
            trouble=self._trouble,
        )
        host, port = parted(self._config.listen_addr)
        handlers = (
            *self._certificates.services(),
            *self._dispatcher.services(),
            *self._discovery.services(),
            *self._draining.services(),
            *self._paths.services(),
            *self._examinations.services(),
            *self._logs.services(),
            *self._attachments.services(),
            *self._link.services(),
            *self._members.services(),
            *self._whereabouts.services(),
            *self._space.services(),
        )
        async with (
            serve(
                handlers,
                host=host,
                port=int(port),
                tls=self._tls.front,
                cluster_id=self._config.cluster_id,
                standing=Standing(
                    self._store.view, self._dispatcher.is_current, self._clock.monotonic
                ).require,
            ) as bound,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(api.lag.run(self._clock), name="loop lag")
            group.create_task(self._dispatcher.run(), name="dispatcher")
            group.create_task(self._discovery.run(), name="discovery")
            group.create_task(self._paths.run(), name="paths between nodes")
            group.create_task(self._logs.run(), name="log broker")
            group.create_task(self._link.run(), name="link")
            write = partial(_keep_writing, group, self._clock, self._random)
            write(self._incarnation.run, "incarnation")
            group.create_task(events.run(), name="events")
            relay = Relay(self._store, host, self._clock, self._random)
            group.create_task(relay.run(), name="gossip relay")
            book = partial(keep_book, self._book, self._store, self._consensus, self._clock, self._random)
            write(book, "address book")
            group.create_task(self._presence.run(), name="presence")
            lock = KeyLock(self._config.paths)
            group.create_task(self._upkeep(lock, bound, events).run(), name="certificates")
            autolock = Autolock(self._store, lock, self._clock, self._random)
            group.create_task(autolock.run(), name="autolock")
            settling = keep_settled(self._store, self._keys, self._clock)
            group.create_task(settling, name="wrapping keys")
            group.create_task(self._lead_when_elected(), name="election")
            async with serving(application(api), self._socket, self._config.paths.handover_socket):
                log.info("manager serves", socket=str(self._socket), listen_addr=self._config.listen_addr)
                await asyncio.Event().wait()

    def _upkeep(self, lock: KeyLock, bound: Bound, events: ClusterEvents) -> Upkeep:
        return Upkeep(
            self._store,
            self._config.node_id,
            self._tls,
            KeyPairFiles(self._config.paths.certificates, lock),
            self._clock,
            disconnect=bound.disconnect,
            root_gone=partial(shut_out, self._store, bound),
            peers=PeerFiles(
                self._config.paths.tls, self._config.paths.manager, self._restart_member, self._cut_peers
            ),
            is_evicting=is_evicting_manager,
            tell=lambda it: events.expires(it.kind, it.id, it.name, stamp(it.not_after)),
        )

    def _quorum(self) -> Quorum:
        lost_s = self._dispatcher.without_quorum_s()
        lost_at = timestamp(self._clock.now_ns() - round(lost_s * SECOND_NS)) if lost_s else Timestamp("")
        silent = self._link.silent(self._clock.monotonic())
        return quorum(self._store.view(), self._config.node_id, silent, lost_at)

    async def _keep_wrapping_key(self, key: bytes) -> None:
        """Have a key that the store's data keys may soon be wrapped with; it is on the disk when this returns."""
        await self._keys.add(key)
        self._store.learn_wrapping_key(key)

    def _session(self, node_id: NodeId, session_id: str) -> LiveSession:
        return self._dispatcher.session(node_id, session_id)

    def _channel_to(self, manager: NodeId) -> Channel:
        return self._link.channel(manager)

    def _connected(self, addr: str) -> AbstractAsyncContextManager[Channel]:
        """A connection to another manager, as this one."""
        return connected(addr, client_context(self._tls.pair), MANAGER_NAME)

    async def _lead_when_elected(self) -> None:
        terms = self._store.terms(self._config.node_id, self._config.advertise_addr)
        async for term in terms:
            log.info("leading", term=term.number)
            self._presence.lead(term)
            async with asyncio.TaskGroup() as group:
                leading = group.create_task(self._lead(term), name=f"lead-{term.number}")
                await term.wait_lost()
                leading.cancel()
            self._presence.lead(None)
            # The old term has ended before a new one begins.
            log.info("no longer leading", term=term.number)

    async def _lead(self, term: Term) -> None:
        """Run the control loops for one term; returns early when a write found the term to be over."""
        try:
            async with asyncio.TaskGroup() as group:
                managers = Managers(
                    term, self._config.node_id, self._consensus, self._link, self._clock, self._random
                )
                group.create_task(managers.run(), name="managers")
                evictions = Evictions(
                    term,
                    self._config.node_id,
                    self._store,
                    self._keys,
                    self._channel_to,
                    self._clock,
                    self._new_id,
                    self._random,
                )
                group.create_task(evictions.run(), name="evictions")
                adoption = Adoption(
                    term, self._config.node_id, self._link.silent, self._clock, self._new_id, self._random
                )
                group.create_task(adoption.run(), name="adoption")
                group.create_task(self._space.keep(), name="store's space")
                for loop in loops(
                    term,
                    self._clock,
                    self._new_id,
                    self._random,
                    self._store.incarnation,
                ):
                    group.create_task(loop.run(), name=type(loop).__name__)
        except* NotLeader:
            log.info("a write met a newer leader", term=term.number)


def _keep_writing(
    group: asyncio.TaskGroup,
    clock: Clock,
    random: Random,
    work: Callable[[], Coroutine[Any, Any, None]],
    name: str,
) -> None:
    """Have a part run that writes files: what the disk refuses is tried again, while the manager goes on."""

    async def run() -> None:
        with first_alone(OSError):
            await work()

    kept = retry(
        run,
        "part of the manager failed",
        clock=clock,
        longest_s=10.0,
        rng=random.random,
        kinds=(OSError,),
        part=name,
    )
    group.create_task(kept, name=name)


@asynccontextmanager
async def serving(app: web.Application, socket: Path, handover: Path) -> AsyncIterator[None]:
    """Answer HTTP on a unix socket that only root may open, and on connections passed at ``handover``.

    Raises: Unavailable: one of them cannot be bound.
    """
    app.on_response_prepare.append(begin_response)
    serves = runner(app, **HOOKS)
    await serves.setup()
    assert serves.server is not None, "set up just now"
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
