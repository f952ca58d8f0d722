"""Every manager's care for certificates: what it serves with, whom it trusts, whose connections it ends.

The key pair comes from the node's agent (files), the roots and the revocations from the store; what follows from them
is handed to the server, written where etcd reads it, and told to whoever asks for warnings.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import structlog
from cryptography import x509
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.ca.admission import renew_window_of
from skep.manager.ca.expiry import Expiry, expiring
from skep.manager.ca.peer_files import PeerFiles
from skep.manager.ca.peers import Turn
from skep.manager.ca.standing import is_manager
from skep.manager.informer import run_informer
from skep.manager.revocation import is_foreign, is_taken_back, take_back_others
from skep.model.ids import NodeId
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.times import SECOND_NS, moment
from skep.security import keypair
from skep.security.identity import Identity
from skep.security.keypair import KeyPair
from skep.security.reloading import KeyPairFiles
from skep.security.tls import ServerTls
from skep.security.trust import root_digest
from skep.store.interface import Commit, Created, Store, Transaction, Updated, View
from skep.store.kinds import Revocation

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 1.0
"""How often the node's files are looked at; most changes come with a commit, and then at once."""

WARN_EVERY_S = 24 * 3600.0


class Upkeep:
    """Follows files and store, until cancelled.

    Args:
        own: this manager's node.
        disconnect: ends the connections of callers for whom it is true.
        root_gone: called when certificates of a root are not taken any more; connections that were made with them stay.
        peers: None where no etcd is (tests).
        tell: called once a day with everything that expires soon.
        is_evicting: whether a manager is evicted at present.
    """

    def __init__(
        self,
        store: Store,
        own: NodeId,
        tls: ServerTls,
        files: KeyPairFiles,
        clock: Clock,
        *,
        disconnect: Callable[[Callable[[Identity], bool]], None],
        root_gone: Callable[[], None] = lambda: None,
        peers: PeerFiles | None = None,
        tell: Callable[[Expiry], None] = lambda _: None,
        is_evicting: Callable[[View], bool] = lambda _: False,
    ) -> None:
        self._is_evicting = is_evicting
        self._store = store
        self._tell = tell
        self._own = own
        self._tls = tls
        self._files = files
        self._clock = clock
        self._disconnect = disconnect
        self._root_gone = root_gone
        self._peers = peers
        self._pair: KeyPair | None = None
        self._served: KeyPair | None = None
        self._written: KeyPair | None = None
        self._peer_roots = b""
        self._turn = Turn()
        self._news = asyncio.Event()

    async def run(self) -> None:
        await run_informer(
            self._store,
            (Swarm, Node, Revocation),
            on_snapshot=self._on_snapshot,
            on_commit=self._on_commit,
            work=self._work,
        )

    def _on_snapshot(self, view: View) -> None:
        for revocation in view.find(Revocation):
            self._cut(view, revocation)
        self._news.set()

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Revocation() as revocation) | Updated(_, Revocation() as revocation):
                    self._cut(self._store.view(), revocation)
                case Created(Node() as node) | Updated(_, Node() as node) if (
                    node.id != self._own and node.manager_status is None
                ):
                    continue  # most commits: some worker's heartbeat or tasks
            self._news.set()

    def _cut(self, view: View, revocation: Revocation) -> None:
        """End the connections that ``wire`` would not take any more."""
        node = view.lookup(Node, revocation.id)
        if revocation.is_removed:
            self._disconnect(lambda peer: peer.node_id == revocation.id)
        else:
            self._disconnect(
                lambda peer: peer.node_id == revocation.id and is_foreign(revocation, peer.serial)
            )
            is_none = node is None or not is_manager(node)
            self._disconnect(
                lambda peer: (
                    peer.node_id == revocation.id
                    and _acts_as_manager(peer)
                    and (is_none or is_taken_back(revocation, peer.issued_s))
                )
            )

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_now_and_then(), name="look at the key pair")
            group.create_task(self._warn(), name="warn of expiry")
            while True:
                await self._news.wait()
                self._news.clear()
                try:
                    await self._keep_up()
                except (SkepError, OSError) as error:
                    log.warning("certificate not taken over yet", error=str(error))

    async def _look_now_and_then(self) -> None:
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            self._news.set()

    async def _keep_up(self) -> None:
        """Take over what has changed.  Raises: SkepError, OSError: not yet; the next look tries again."""
        self._pair = await asyncio.to_thread(self._files.changed) or self._pair
        view = self._store.view()
        swarms = view.find(Swarm)
        if self._pair is None or not swarms:
            return
        trusted = trusted_roots(swarms[0])
        serial = _serial_of(self._pair)
        if is_foreign(view.lookup(Revocation, self._own), serial):
            # It was being renewed in the moment in which the others were taken back.
            await self._store.update(take_back_others, self._own, serial, _window_ns(swarms[0]))
        serving = self._pair.with_root(trusted)
        if not _is_same(serving, self._served):
            self._tls.replace(serving)
            if self._served is not None and self._served.root_pem != trusted and swarms[0].rotation is None:
                self._root_gone()
            self._served = serving
            log.info("certificate taken over", until=serving.not_after.isoformat())
        if self._peers is not None:
            serials = (one.serial for kept in view.find(Revocation) for one in (*kept.serials, *kept.foreign))
            await asyncio.to_thread(self._peers.refuse, frozenset(serials))
            await self._keep_peers_up(self._peers, self._pair, swarms[0])

    async def _keep_peers_up(self, peers: PeerFiles, pair: KeyPair, swarm: Swarm) -> None:
        """Write what etcd reads; have it restarted for other roots, when it is this manager's turn."""
        roots = swarm.tls_info.trust_root.encode()
        wanted = pair.with_root(roots)
        if self._written is None:
            self._written = await asyncio.to_thread(keypair.load, peers.directory)
            self._peer_roots = self._written.root_pem  # as the member found them at its start
        if not _is_same(wanted, self._written):
            await asyncio.to_thread(keypair.save, wanted, peers.directory)
            self._written = wanted
        node = self._store.view().lookup(Node, self._own)
        if self._peer_roots != roots:
            nodes = self._store.view().find(Node)
            if not self._turn.has_come(self._own, nodes, root_digest(roots), self._clock.monotonic()):
                return
            log.info("restarting etcd: the roots of its peers have changed")
            await peers.restart()
            self._peer_roots = roots
            self._turn = Turn()
        if node is not None and node.peer_roots != root_digest(roots):
            show = partial(show_peer_roots, is_evicting=self._is_evicting, window_ns=_window_ns(swarm))
            await self._store.update(show, self._own, root_digest(roots), _serial_of(pair))

    async def _warn(self) -> None:
        """Say once a day what expires soon."""
        while True:
            now = moment(self._clock.now_ns())
            for expiry in expiring(self._store.view(), now):
                log.warning("certificate expires soon", warning=expiry.warning)
                self._tell(expiry)
            await self._clock.sleep(WARN_EVERY_S)


def trusted_roots(swarm: Swarm) -> bytes:
    """Whose certificates callers may show (PEM): the root's, and the next one's while the cluster rotates to it."""
    return (swarm.tls_info.trust_root + (swarm.rotation.root if swarm.rotation else "")).encode()


def show_peer_roots(
    tx: Transaction,
    own: NodeId,
    digest: str,
    serial: str,
    *,
    is_evicting: Callable[[View], bool],
    window_ns: int,
) -> None:
    """Say which roots this manager's etcd trusts.

    After an eviction its certificates but the one of ``serial`` are taken back.
    """
    node = tx.lookup(Node, own)
    if node is not None and node.manager_status is not None:
        tx.put(replace(node, peer_roots=digest))
        if is_evicting(tx):
            take_back_others(tx, own, serial, window_ns)


def _serial_of(pair: KeyPair) -> str:
    return f"{x509.load_pem_x509_certificate(pair.certificate_pem).serial_number:x}"


def _window_ns(swarm: Swarm) -> int:
    return round(renew_window_of(swarm.spec).total_seconds()) * SECOND_NS


def _acts_as_manager(peer: Identity) -> bool:
    return peer.role.value == "manager"


def _is_same(one: KeyPair, other: KeyPair | None) -> bool:
    return (
        other is not None
        and one.certificate_pem == other.certificate_pem
        and one.key_pem == other.key_pem
        and one.root_pem == other.root_pem
    )
