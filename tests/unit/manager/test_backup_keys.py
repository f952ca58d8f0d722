"""A backup opens with the keys that are in it."""

import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from skep.aio.clock import SystemClock
from skep.api.backups import BackupManifest, BackupRequest, Opener, key_of, new_header
from skep.api.formats.networks import PREDEFINED_LABEL
from skep.bootstrap import ManagerConfig
from skep.errors import Unavailable
from skep.manager.storage.backup import Backups
from skep.model.network import Network, NetworkSpec
from skep.model.values.ids import NetworkId, NodeId
from skep.store.etcd.encryption.cipher import KEY_BYTES
from tests.support.managers.wire_rig import Cluster

PRESENT, NEXT = b"a" * KEY_BYTES, b"b" * KEY_BYTES
DATABASE = bytes(16) + bytes.fromhex("edda0ced") + bytes(1000)


class Snapshots:
    """An etcd that gives a snapshot; ``begun`` is called when it is asked for one."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self._begun = begun

    async def __aenter__(self) -> "Snapshots":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def snapshot(self) -> AsyncIterator[bytes]:
        self._begun()
        yield DATABASE + hashlib.sha256(DATABASE).digest()


async def a_backup(before: bytes, during: bytes) -> bytes:
    """The wrapping keys in a backup that is whole."""
    return (await a_manifest(before, during)).wrapping_key


async def a_manifest(before: bytes, during: bytes, *networks: Network) -> BackupManifest:
    """The manifest of a backup that is whole; ``during``: those on the disk from the snapshot on."""
    kept = [before]
    etcd: Any = Snapshots(lambda: kept.append(during))
    cluster = Cluster()
    await cluster.store.update(cluster._found)
    await cluster.store.update(lambda tx: [tx.put(network) for network in networks])
    config = ManagerConfig(
        data_dir=str(Path("/nowhere")),
        run_dir=str(Path("/nowhere")),
        cluster_id=cluster.id,
        node_id=NodeId("m1"),
        listen_addr="0.0.0.0:2377",
        advertise_addr="10.0.0.1:2377",
        hostname="m1",
    )
    header = new_header("hkdf")
    request = BackupRequest(header=header, key=key_of(b"k" * 32, header))
    backups = Backups(config, cluster.store, lambda: kept[-1], SystemClock(), connect=lambda _: etcd)
    sealer = backups.begin(request)
    opener = Opener(request.key)
    async for piece in backups.pieces(sealer):
        opener.feed(piece)
    return opener.check_whole()


async def test_a_backup_during_which_the_store_may_have_come_under_another_key_is_not_whole():
    with pytest.raises(Unavailable, match="run the backup again"):
        await a_backup(PRESENT, PRESENT + NEXT)


@pytest.mark.parametrize(
    ("before", "during"),
    [(PRESENT, PRESENT), (PRESENT + NEXT, PRESENT + NEXT), (PRESENT + NEXT, NEXT)],
    ids=["one key", "a replacement under way", "a replacement that ends"],
)
async def test_a_backup_has_every_key_that_the_store_may_be_under(before, during):
    assert await a_backup(before, during) == before


async def test_networks_that_every_cluster_has_are_not_counted():
    specs = NetworkSpec(name="host", labels={PREDEFINED_LABEL: "true"}), NetworkSpec(name="front")
    networks = [Network(id=NetworkId(spec.name), spec=spec) for spec in specs]
    assert (await a_manifest(PRESENT, PRESENT, *networks)).counts["networks"] == 1
