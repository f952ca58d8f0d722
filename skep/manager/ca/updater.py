"""Keeps a manager's certificates up to date: its own key pair, the trusted roots, and revocations.

The key pair comes from the node's agent (files), the roots and the revocations from the store.  The updater passes them
to the server, writes them for etcd, and reports certificates that expire soon.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import structlog
from cryptography import x509
from msgspec.structs import replace

from skep.aio.clock import Clock, tick
from skep.errors import SkepError
from skep.manager.ca.admission import renew_window_of
from skep.manager.ca.caller_check import is_manager
from skep.manager.ca.expiry_warnings import Expiry, expiring
from skep.manager.ca.peer_files import PeerFiles, RestartTurn
from skep.manager.control_loops.informer import observe_commits, run_informer
from skep.manager.nodes.revocation import is_foreign, is_revoked, revoke_others
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, moment
from skep.security import keypair
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.reloading import KeyPairFiles
from skep.security.tls import ServerTls
from skep.security.trust import root_digest
from skep.store.interface import Commit, Created, Store, Transaction, Updated, View
from skep.store.kinds import Revocation

log = structlog.get_logger(__name__)

CHECK_EVERY_S = 5.0
"""Seconds between two checks of the node's files.  Most changes come with a commit, and are handled at once."""

WARN_EVERY_S = 24 * 3600.0
"""Seconds between two warnings about the same certificate."""

Disconnect = Callable[[Callable[[NodeIdentity], bool]], None]
"""Ends the connections of callers for which the predicate is true."""


class CertificateUpdater:
    """Serves with the node's current key pair and the trusted roots.

    Args:
        own: This manager's node.
        root_gone: Called when a root is no longer trusted.  Existing connections with its certificates stay open.
        peers: The files of this manager's etcd, or None in tests without etcd.
    """

    def __init__(
        self,
        store: Store,
        own: NodeId,
        tls: ServerTls,
        files: KeyPairFiles,
        clock: Clock,
        root_gone: Callable[[], None],
        peers: "PeerCertificates | None" = None,
    ) -> None:
        self._store = store
        self._own = own
        self._tls = tls
        self._files = files
        self._clock = clock
        self._root_gone = root_gone
        self._peers = peers
        self._pair: KeyPair | None = None
        self._served: KeyPair | None = None
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow files and store until cancelled."""
        await run_informer(
            self._store,
            (Swarm, Node, Revocation),
            on_snapshot=lambda _: self._changed.set(),
            on_commit=self._on_commit,
            work=self._work,
        )

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Node() as node) | Updated(_, Node() as node) if (
                    node.id != self._own and node.manager_status is None
                ):
                    continue  # most commits are heartbeats or tasks of workers
            self._changed.set()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._poll_files(), name="poll the key pair")
            while True:
                await self._changed.wait()
                self._changed.clear()
                try:
                    await self._update()
                except (SkepError, OSError) as error:
                    log.warning("certificate not updated, will retry", reason=str(error))

    async def _poll_files(self) -> None:
        while True:
            await tick(self._clock, CHECK_EVERY_S)
            self._changed.set()

    async def _update(self) -> None:
        """Apply all changes.  Raises: SkepError, OSError: a failure, which the next attempt retries."""
        self._pair = await asyncio.to_thread(self._files.changed) or self._pair
        view = self._store.view()
        swarms = view.find(Swarm)
        if self._pair is None or not swarms:
            return
        trusted = trusted_roots(swarms[0])
        if not trusted:
            return  # the roots are unreadable, so this manager keeps its present ones
        serial = _serial_of(self._pair)
        if is_foreign(view.lookup(Revocation, self._own), serial):
            # This certificate was requested before the others were revoked.
            await self._store.update(revoke_others, self._own, serial, _window_ns(swarms[0]))
        serving = self._pair.with_root(trusted)
        if not _is_same(serving, self._served):
            self._tls.replace(serving)
            if self._served is not None and self._served.root_pem != trusted and swarms[0].rotation is None:
                self._root_gone()
            self._served = serving
            log.info("serving with new certificate", until=serving.not_after.isoformat())
        if self._peers is not None:
            serials = (one.serial for kept in view.find(Revocation) for one in (*kept.serials, *kept.foreign))
            await asyncio.to_thread(self._peers.files.refuse, frozenset(serials))
            await self._peers.update(self._pair, swarms[0])


class PeerCertificates:
    """Certificates that this manager's etcd reads, and its restarts after the roots have changed.

    Args:
        own: This manager's node.
        is_evicting: Returns whether a manager is being evicted.
    """

    def __init__(
        self, store: Store, own: NodeId, files: PeerFiles, clock: Clock, is_evicting: Callable[[View], bool]
    ) -> None:
        self.files = files
        self._store = store
        self._own = own
        self._clock = clock
        self._is_evicting = is_evicting
        self._written: KeyPair | None = None
        self._peer_roots = b""
        self._turn = RestartTurn()

    async def update(self, pair: KeyPair, swarm: Swarm) -> None:
        """Write the files, and restart etcd for changed roots when it is this manager's turn.

        Raises:
            SkepError, OSError: A failure.  Call it again.
        """
        roots = swarm.tls_info.trust_root.encode()
        wanted = pair.with_root(roots)
        if self._written is None:
            self._written = await asyncio.to_thread(keypair.load, self.files.directory)
            self._peer_roots = self._written.root_pem  # the roots with which the member started
        if not _is_same(wanted, self._written):
            await asyncio.to_thread(keypair.save, wanted, self.files.directory)
            self._written = wanted
        if self._peer_roots != roots:
            nodes = self._store.view().find(Node)
            if self._turn.has_come(self._own, nodes, root_digest(roots), self._clock.monotonic()):
                log.info("restarting etcd: its peers' roots have changed")
                await self.files.restart()
                self._peer_roots = roots
                self._turn = RestartTurn()
        node, trusted = self._store.view().lookup(Node, self._own), root_digest(self._peer_roots)
        if node is not None and node.peer_roots != trusted:
            show = partial(show_peer_roots, is_evicting=self._is_evicting, window_ns=_window_ns(swarm))
            await self._store.update(show, self._own, trusted, _serial_of(pair))


async def warn_of_expiry(store: Store, on_expiry: Callable[[Expiry], None], clock: Clock) -> None:
    """Log every certificate that expires soon, and call ``on_expiry`` with it, once a day until cancelled."""
    while True:
        for expiry in expiring(store.view(), moment(clock.now_ns())):
            log.warning("certificate expires soon", warning=expiry.warning)
            on_expiry(expiry)
        await clock.sleep(WARN_EVERY_S)


async def disconnect_revoked(store: Store, disconnect: Disconnect) -> None:
    """End the connections of callers that would no longer be accepted, until cancelled."""

    def on_snapshot(view: View) -> None:
        for revocation in view.find(Revocation):
            _disconnect(view.lookup(Node, revocation.id), revocation, disconnect)

    def on_commit(commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Revocation() as revocation) | Updated(_, Revocation() as revocation):
                    _disconnect(store.view().lookup(Node, revocation.id), revocation, disconnect)

    await observe_commits(store, (Revocation,), on_snapshot=on_snapshot, on_commit=on_commit)


def _disconnect(node: Node | None, revocation: Revocation, disconnect: Disconnect) -> None:
    if revocation.is_removed:
        disconnect(lambda peer: peer.node_id == revocation.id)
        return
    disconnect(lambda peer: peer.node_id == revocation.id and is_foreign(revocation, peer.serial))
    is_none = node is None or not is_manager(node)
    disconnect(
        lambda peer: (
            peer.node_id == revocation.id
            and _acts_as_manager(peer)
            and (is_none or is_revoked(revocation, peer.issued_s, peer.serial))
        )
    )


def trusted_roots(swarm: Swarm) -> bytes:
    """Return the roots that callers' certificates may have, in PEM: the current one, and the next one during a
    rotation.
    """
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
    """Write the digest of the roots that this manager's etcd trusts.

    After an eviction, its certificates except the one with ``serial`` are revoked.
    """
    node = tx.lookup(Node, own)
    if node is not None and node.manager_status is not None:
        tx.put(replace(node, peer_roots=digest))
        if is_evicting(tx):
            revoke_others(tx, own, serial, window_ns)


def _serial_of(pair: KeyPair) -> str:
    return f"{x509.load_pem_x509_certificate(pair.certificate_pem).serial_number:x}"


def _window_ns(swarm: Swarm) -> int:
    return round(renew_window_of(swarm.spec).total_seconds()) * SECOND_NS


def _acts_as_manager(peer: NodeIdentity) -> bool:
    return peer.role.value == "manager"


def _is_same(one: KeyPair, other: KeyPair | None) -> bool:
    return (
        other is not None
        and one.certificate_pem == other.certificate_pem
        and one.key_pem == other.key_pem
        and one.root_pem == other.root_pem
    )
