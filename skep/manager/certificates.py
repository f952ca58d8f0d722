"""The certificates that this manager issues, its own one, and the connections that were made with them."""

from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import structlog

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
from skep.manager.environment import ManagerEnvironment
from skep.manager.eviction.steps import eviction_of, is_evicting_manager
from skep.manager.store_member import StoreMember
from skep.manager.telemetry.events import ClusterEvents
from skep.model.node import NodeRole
from skep.model.values.ids import NodeId
from skep.security.reloading import KeyPairFiles
from skep.security.tls import ServerTls
from skep.store.interface import Store
from skep.wire.client import ManagerChannel
from skep.wire.server import Bound
from skep.wire.service import Handler

log = structlog.get_logger(__name__)


def end_connections(store: Store, bound: Bound) -> None:
    """End every connection if the root has changed because of an eviction.

    Connections survive a rotation, as they do in Docker.  But with the old root's key some of them may have been made
    in the names of other nodes.
    """
    eviction = eviction_of(store.view())
    if eviction is not None and eviction.next_step is not None:
        log.warning("root replaced by an eviction: all connections are closed", node=eviction.node_id)
        # Connections of managers have more rights, and there are few of them, so they are closed at once.
        bound.disconnect_all(
            lambda caller: caller.role is NodeRole.MANAGER or caller.node_id in eviction.nodes
        )


class ManagerCertificates:
    """Issues certificates, and renews this manager's own one."""

    def __init__(
        self, environment: ManagerEnvironment, tls: ServerTls, channel_to: Callable[[NodeId], ManagerChannel]
    ) -> None:
        config, store, clock, new_id, random = environment
        self._environment = environment
        self.tls = tls
        self.external = ExternalAuthorities(lambda: tls.pair, clock, random)
        self._signer = CertificateSigner(store, config.node_id, self.external, channel_to, clock)
        self._service = CertificateService(store, new_id, self._signer)

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (*self._service.services(), *self._signer.services())

    def caller_check(self, is_current: Callable[[], bool]) -> CallerCheck:
        """Return the check of callers' certificates."""
        return CallerCheck(self._environment.store.view, is_current, self._environment.clock.monotonic)

    def tasks(
        self, member: StoreMember, bound: Bound, events: ClusterEvents
    ) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """Yield the work that runs on every manager, with its names."""
        store = self._environment.store
        yield "certificates", self._updater(member, bound).run()
        yield "certificate expiry", warn_of_expiry(store, events.expires, self._environment.clock)
        yield "revoked connections", disconnect_revoked(store, bound.disconnect)

    def _updater(self, member: StoreMember, bound: Bound) -> CertificateUpdater:
        config, store, clock, _, _ = self._environment
        paths, etcd = config.paths, member.member
        peer_files = PeerFiles(paths.tls, paths.manager, etcd.restart, etcd.cut_peers)
        return CertificateUpdater(
            store,
            config.node_id,
            self.tls,
            KeyPairFiles(paths.certificates, member.lock),
            clock,
            partial(end_connections, store, bound),
            PeerCertificates(store, config.node_id, peer_files, clock, is_evicting_manager),
        )
