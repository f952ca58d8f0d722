"""Online backup of a manager: one stream with a manifest of the cluster and a snapshot of the store."""

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from skep import __version__
from skep.aio.clock import Clock
from skep.api.backups import BackupManifest, BackupRequest, Sealer
from skep.api.formats.networks import PREDEFINED_LABEL
from skep.bootstrap import ManagerConfig
from skep.errors import FailedPrecondition, Unavailable
from skep.manager.cluster import cluster_of
from skep.model.network import Network
from skep.model.node import Node
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.times import timestamp
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.encryption.cipher import split_keys
from skep.store.etcd.snapshots import Verified
from skep.store.interface import Store, View
from skep.store.kinds import ROOT_KEY_ID, Payload

_COUNTED: Mapping[str, type[Any]] = {
    "services": Service,
    "tasks": Task,
    "nodes": Node,
    "networks": Network,
    "secrets": Secret,
    "configs": Config,
}


def _counts(view: View) -> Mapping[str, int]:
    """Return the number of objects by kind, without the networks that every cluster has for its nodes' own."""
    own = sum(PREDEFINED_LABEL in network.spec.labels for network in view.find(Network))
    counts = {name: len(view.find(kind)) for name, kind in _COUNTED.items()}
    return {**counts, "networks": counts["networks"] - own}


class Backups:
    """Creates backups of one manager's store, with or without a quorum."""

    def __init__(
        self,
        config: ManagerConfig,
        store: Store,
        wrapping_key: Callable[[], bytes],
        clock: Clock,
        connect: Callable[[Path], EtcdClient] = EtcdClient,
    ) -> None:
        """``connect`` returns a client of etcd at a socket."""
        self._connect = connect
        self._config = config
        self._store = store
        self._wrapping_key = wrapping_key
        self._clock = clock

    def begin(self, request: BackupRequest) -> Sealer:
        """Return the sealer that encrypts the backup.

        Raises:
            InvalidArgument: The request is invalid.
            FailedPrecondition: As ``check``.
        """
        self.check()
        return Sealer(request.header, request.key)

    def check(self) -> None:
        """Check that a backup could be restored.

        Raises:
            FailedPrecondition: An external CA holds the root key.  No certificate could be issued for a restored
                manager.
        """
        if self._store.view().lookup(Payload, ROOT_KEY_ID) is None:
            raise FailedPrecondition(
                "an external CA holds the key of the cluster's root, so a backup could not be restored: rotate to "
                "a root CA of the cluster's own first (docker swarm ca --rotate)"
            )

    async def pieces(self, sealer: Sealer) -> AsyncIterator[bytes]:
        """Yield the backup file.  Raises: Unavailable, FailedPrecondition: the file is incomplete and lacks its end."""
        manifest = self._manifest()
        yield sealer.manifest(manifest)
        verified = Verified()
        async with self._connect(self._config.paths.etcd_socket) as client:
            async for piece in client.snapshot():
                verified.update(piece)
                yield sealer.add(piece)
        verified.check()
        if not set(split_keys(self._wrapping_key())) <= set(split_keys(manifest.wrapping_key)):
            # Some values may be encrypted with a key newer than the manifest, so the backup could not be read.
            raise Unavailable("the key of the cluster's store is being replaced: run the backup again")
        yield sealer.end()

    def _manifest(self) -> BackupManifest:
        view, config = self._store.view(), self._config
        return BackupManifest(
            cluster_id=config.cluster_id,
            node_id=config.node_id,
            hostname=config.hostname,
            listen_addr=config.listen_addr,
            advertise_addr=config.advertise_addr,
            created_at=str(timestamp(self._clock.now_ns())),
            incarnation=self._store.incarnation,
            skep_version=__version__,
            counts=_counts(view),
            root_pem=cluster_of(view).tls_info.trust_root.encode(),
            root_key_pem=view.get(Payload, ROOT_KEY_ID).data,
            wrapping_key=self._wrapping_key(),
        )
