"""Each call on a file that a node keeps may fail: it says so, goes on when it can, and has lost nothing."""

import asyncio
import errno
import hashlib
import io
import os
import shutil
import socket
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.agent.session.managers import KnownManager
from skep.agent.session.revisions import SeenRevision
from skep.api.formats.networks import NetworkBody
from skep.bootstrap import STARVED, ManagerConfig, Recovery, encode, load, load_recovery, save_recovery
from skep.configuration.configuration import UnixHost
from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.tables.files import SharedTables, StoredTables
from skep.dataplane.tables.network_tables import NetworkTables
from skep.engine.images import layers
from skep.engine.images.archives.workers import Unpacked
from skep.engine.images.reference import Reference
from skep.engine.images.registry import pulling
from skep.engine.images.registry.endpoints import TRANSFERS
from skep.engine.images.registry.registry import DOCKER_MANIFEST, Document
from skep.engine.images.store import ImageStore
from skep.errors import FailedPrecondition, SkepError
from skep.linux.files import replace_file
from skep.manager.ca.peer_files import REVOKED_FILE, PeerFiles
from skep.manager.process import refusal_in
from skep.manager.process import run as run_manager
from skep.manager.storage.incarnation import Incarnations, read_incarnations, write_incarnations
from skep.manager.storage.keys import load_wrapping_keys, save_wrapping_keys
from skep.model.networks.tables import NetworkTable
from skep.model.node import NodeRole
from skep.model.node_reports.revisions import Revision
from skep.model.values.ids import ClusterId, NetworkId, NodeId, new_container_id
from skep.node.cluster.local import LocalNode, read_local_node, write_local_node
from skep.node.cluster.membership import Membership
from skep.node.front.server import _listening_socket
from skep.paths import Paths
from skep.security import keypair
from skep.security.crl import listed_serials
from skep.security.locking import KeyLock
from skep.store.etcd.peers import EtcdPeer, load_peers, save_peers
from tests.support.engine.oci_rig import QuickClock
from tests.support.file_faults import Faults, file_faults, walk
from tests.support.images.archives import a_config, a_file, a_tar, sha256
from tests.support.images.registry_rig import a_manifest
from tests.support.networks.tables import a_member
from tests.unit.dataplane.tables.test_network_tables import Part, a_table, received
from tests.unit.node.test_runner import Fakes, FakeWork
from tests.unit.security.test_keypair import a_pair

REAL_STAT = os.stat
"""It does not count, and does not fail."""

OLD, NEW = a_tar(a_file("old", b"old")), a_tar(a_file("new", b"new"))


class MemoryRepository:
    """In the place of ``Repository``: an image of one layer, not compressed."""

    def __init__(self, layer: bytes) -> None:
        config = a_config(layer)
        self._blobs = {sha256(content): content for content in (config, layer)}
        self._manifest = a_manifest(config, (layer,))

    transfers = TRANSFERS

    async def manifest(self, name: str, bytes_max: int) -> Document:
        return Document(media_type=DOCKER_MANIFEST, content=self._manifest)

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield self._blobs[digest][start:]

        yield start, pieces()


async def at_endpoints(
    _policy: object, reference: Reference, _auth: object, action: Callable[[Any], Awaitable[Any]]
) -> Any:
    return await action(MemoryRepository(OLD if "old" in str(reference) else NEW))


async def unpack(source: int, target: Path, **_: Any) -> Unpacked:
    """In this process, so that its calls fail as well."""

    def work() -> Unpacked:
        content = b""
        while piece := layers.os.read(source, 1 << 20):  # type: ignore[attr-defined]
            content += piece
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                (target / member.name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        (target.parent / "content").write_bytes(content)
        return Unpacked("sha256:" + hashlib.sha256(content).hexdigest(), len(content), len(content))

    return await asyncio.to_thread(work)


async def opened(directory: Path, report: Callable[[str], None] = lambda _: None) -> ImageStore:
    store = ImageStore(directory, clock=QuickClock(), report=report)
    await store.open()
    return store


def content_of(store: ImageStore, word: str) -> set[str]:
    (top,) = store.layers(store.get(word))
    return {f"{path.name}: {path.read_text()}" for path in top.iterdir()}


async def images_come_and_the_process_changes(directory: Path, faults: Faults) -> None:
    first = await opened(directory)
    try:
        await first.pull("new:1")
    except* (SkepError, OSError):
        pass
    said: list[str] = []
    second = await opened(directory, said.append)
    try:
        await second.pull("new:1")
        await second.tag("new:1", Reference("docker.io", "library/other", "1"))
        await second.remove("new:1", users=list)
    except* (SkepError, OSError):
        pass
    faults.end()
    await second.settle()
    assert said[-1] == second.error == ""
    await second.pull("new:1")
    third = await opened(directory)
    await third.settle()
    for store in (second, third):
        assert content_of(store, "old:1") == {"old: old"}
        assert content_of(store, "new:1") == {"new: new"}
        assert len(store.images()) == len(store.layer_store.all()) == 2
    kept = {"configs", "layers", "manifests", "tmp", "catalog.json"}
    assert {path.name for path in directory.iterdir()} == kept
    assert list(third.scratch.iterdir()) == []


@pytest.mark.parametrize(("count", "step"), [(1, 3), (25, 11), pytest.param(1, 1, marks=pytest.mark.slow)])
async def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, step: int) -> None:
    monkeypatch.setattr(pulling, "at_endpoints", at_endpoints)
    monkeypatch.setattr(layers, "unpack", unpack)
    await (await opened(tmp_path / "template")).pull("old:1")
    assert (
        await walk(
            tmp_path / "lives",
            images_come_and_the_process_changes,
            template=tmp_path / "template",
            count=count,
            step=step,
        )
        > 100
    )
    shutil.rmtree(tmp_path / "lives")


async def test_an_image_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "at_endpoints", at_endpoints)
    monkeypatch.setattr(layers, "unpack", unpack)
    await (await opened(tmp_path / "template")).pull("old:1")

    async def life(place: Path, faults: Faults) -> None:
        said: list[str] = []
        store = await opened(place, said.append)
        assert not any("damaged" in one for one in said)
        faults.end()
        await store.settle()
        assert said[-1] == store.error == ""
        assert content_of(store, "old:1") == {"old: old"}

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 10


# --- what the node knows of its swarm ---------------------------------------------------------------------------------

NODE = LocalNode(node_id=NodeId("n1"), cluster_id=ClusterId("c1"), is_manager=False)
MOVED = LocalNode(
    node_id=NodeId("n1"),
    cluster_id=ClusterId("c1"),
    is_manager=False,
    managers=(KnownManager(NodeId("m1"), "10.0.0.1:2377"),),
)


class MemberWork(FakeWork):
    """Of a node that is a member, whatever its disk refuses."""

    async def remove_all(self) -> None:
        raise AssertionError("the node is in a swarm")


async def a_node_starts_and_receives_managers(directory: Path, faults: Faults) -> None:
    paths = Paths(directory / "data", directory / "run")
    fakes = Fakes(paths, NodeRole.WORKER)
    said: list[str] = []
    membership = Membership(
        msgspec.structs.replace(fakes.dependencies, clock=QuickClock(), work=MemberWork()),
        manager_api=None,  # type: ignore[arg-type]  # a worker uses none
        new_id=lambda: "id",
        show_condition=said.append,
    )
    running = asyncio.create_task(membership.run())
    while not membership.is_in_swarm and membership.status != "error":  # noqa: ASYNC110
        await asyncio.sleep(0)
    if membership.status == "error":
        assert said[-1]
        assert "docker swarm leave" not in said[-1], "the file may be sound"
        with pytest.raises(SkepError):
            await membership.leave(force=False)
    else:
        fakes.save_managers(MOVED.managers)
    faults.end()
    while not membership.is_in_swarm:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert said[-1] == ""
    fakes.save_managers(MOVED.managers)
    while read_local_node(paths.node_json) != MOVED:  # noqa: ASYNC110
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])


async def test_the_nodes_place_in_its_swarm(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "template" / "data", tmp_path / "template" / "run")
    paths.data.mkdir(parents=True)
    paths.run.mkdir()
    write_local_node(paths.node_json, NODE)
    assert await walk(tmp_path / "lives", a_node_starts_and_receives_managers, template=tmp_path / "template")


async def tables_come(directory: Path, faults: Faults) -> None:
    stored, shared = StoredTables(directory / "kept", QuickClock()), SharedTables(directory / "shared")
    part = Part()
    network_tables = NetworkTables(stored, [shared, part], a_member(), QuickClock(), Random(1).random)
    restoring = asyncio.create_task(network_tables.restore(shared))
    while not (restoring.done() or shared.has_unread or stored.has_unread):  # noqa: ASYNC110
        await asyncio.sleep(0)
    if not restoring.done():
        faults.end()
    await restoring
    assert network_tables.tables.keys() == {"a", "b"}, "no table is taken for gone that could not be read"
    running = asyncio.create_task(network_tables.run())
    network_tables.update(received(a_table("a", "new", revision=9), a_table("b", "old")), incarnation=1)
    await part.wait(lambda: "a" in part.tables and "new" in part.tables["a"].nodes)
    faults.end()
    again = StoredTables(directory / "kept", QuickClock())

    def nodes(tables: Mapping[NetworkId, NetworkTable]) -> set[NodeId]:
        return {node for id, table in tables.items() if id == "a" for node in table.nodes}

    while not nodes(shared.load()) == nodes(again.load()[0]) == {"new"}:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    while network_tables.applied != {"a": Revision(1, 9), "b": Revision(1, 1)}:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


@pytest.mark.parametrize(("count", "is_rebooted"), [(1, False), (25, False), (1, True)])
async def test_tables_of_networks(tmp_path: Path, count: int, *, is_rebooted: bool) -> None:
    """A reboot leaves those on the disk alone."""
    template = tmp_path / "template"
    stored, shared = StoredTables(template / "kept", QuickClock()), SharedTables(template / "shared")
    tables = {one.head.id: one for one in (a_table("a", "old"), a_table("b", "old"))}
    if not is_rebooted:
        await shared.apply(NodeId("n1"), tables, frozenset(tables))
    for id, table in tables.items():
        stored.schedule(id, table, 1)
    await stored.flush()
    assert await walk(tmp_path / "lives", tables_come, template=template, count=count) > 10


async def networks_are_used(directory: Path, faults: Faults) -> None:
    networks = LocalNetworks(directory / "local", None, clock=QuickClock(), new_id=new_container_id)
    ids = LocalEndpoints(
        networks, directory / "tables", None
    ).predefined_ids  # every list of containers asks for them
    assert set(ids) in (set(), {"bridge", "host", "none"})
    for attempt in range(2):
        try:
            networks.add_configuration(NetworkBody(name=f"new{attempt}"))
        except (SkepError, OSError):
            pass
    faults.end()
    again = LocalNetworks(directory / "local", None, clock=QuickClock(), new_id=new_container_id)
    names = {one.name for one in again.configurations()}
    assert names >= {"old", *(one.name for one in networks.configurations())}


async def test_the_nodes_own_networks(tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    kept = LocalNetworks(tmp_path / "template" / "local", None, clock=QuickClock(), new_id=new_container_id)
    kept.add_configuration(NetworkBody(name="old"))
    assert await walk(tmp_path / "lives", networks_are_used, template=tmp_path / "template") > 10


async def revisions_are_seen(directory: Path, faults: Faults) -> None:
    try:
        seen = SeenRevision(directory / "seen", NODE.cluster_id, QuickClock())
    except OSError:
        faults.end()
        seen = SeenRevision(directory / "seen", NODE.cluster_id, QuickClock())
    assert seen.seen == Revision(1, 7)
    before = REAL_STAT(directory / "seen").st_ino
    running = asyncio.create_task(seen.run())
    seen.advance(Revision(1, 8))
    while not faults.hits and REAL_STAT(directory / "seen").st_ino == before:  # noqa: ASYNC110
        await asyncio.sleep(0)
    faults.end()
    while SeenRevision(directory / "seen", NODE.cluster_id).seen != Revision(1, 8):  # noqa: ASYNC110
        await asyncio.sleep(0)
    running.cancel()


async def test_the_newest_revision(tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    seen = SeenRevision(tmp_path / "template" / "seen", NODE.cluster_id)
    seen.advance(Revision(1, 7))
    await seen._write()
    assert await walk(tmp_path / "lives", revisions_are_seen, template=tmp_path / "template") > 5


# --- the front ----------------------------------------------------------------------------------------------------


@pytest.mark.needs("root")
async def test_the_socket_of_the_api(tmp_path: Path) -> None:
    """It is served by what it should be, or by nothing, and the next attempt is not disturbed."""

    async def life(place: Path, faults: Faults) -> None:
        host = UnixHost(place / "run/docker.sock")
        with suppress(FailedPrecondition, OSError), _listening_socket(host) as listener:
            listener.listen()
            assert REAL_STAT(host.path).st_mode & 0o117 == 0
        faults.end()
        with _listening_socket(host) as listener:
            listener.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(host.path))
        assert not host.path.exists()

    before = len(os.listdir("/proc/self/fd"))
    assert await walk(tmp_path, life) > 5
    assert len(os.listdir("/proc/self/fd")) == before


# --- what a manager keeps ---------------------------------------------------------------------------------------------


def test_a_manager_that_cannot_read_its_settings_says_that_it_is_worth_another_attempt(
    tmp_path: Path,
) -> None:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.manager.mkdir(parents=True)
    paths.run.mkdir()
    replace_file(paths.manager_config, encode(CONFIG))
    with file_faults(paths.data) as faults, capture_logs():
        faults.plan(0, errno.EMFILE)
        with pytest.raises(SystemExit) as ended:
            run_manager(paths)
    assert ended.value.code == STARVED
    assert paths.last_words("manager").read_text().endswith("config.json: Too many open files")


def test_what_the_machine_refused_is_found_in_groups_and_bugs_are_none() -> None:
    refusal = OSError(errno.ENOSPC, "No space left on device")
    assert refusal_in(ExceptionGroup("", [ValueError(), ExceptionGroup("", [refusal])])) is refusal
    assert refusal_in(ExceptionGroup("", [ValueError(), ConnectionResetError(errno.ECONNRESET, "")])) is None


class Kept(NamedTuple):
    """One file of a manager: what is in it before, and after a change."""

    save: Callable[[Paths, Any], object]
    load: Callable[[Paths], Any]
    old: Any
    new: Any


CONFIG = ManagerConfig(
    data_dir="/data",
    run_dir="/run",
    node_id=NodeId("n1"),
    cluster_id=ClusterId("c1"),
    listen_addr="0.0.0.0:2377",
    advertise_addr="10.0.0.1:2377",
    hostname="one",
)
OLD_PAIR, NEW_PAIR = a_pair(), a_pair()


def _peer(name: str) -> EtcdPeer:
    return EtcdPeer(name=name, url="https://10.0.0.1:2378", ip="10.0.0.1", manager_port=2377)


def _refused(paths: Paths, serials: frozenset[str]) -> None:
    PeerFiles(paths.tls, paths.manager, restart=None).refuse(serials)  # type: ignore[arg-type]


KEPT = {
    "settings": Kept(
        lambda paths, config: replace_file(paths.manager_config, encode(config), mode=0o600),
        lambda paths: load(paths.manager_config),
        CONFIG,
        ManagerConfig(
            **{**{name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}, "hostname": "two"}
        ),
    ),
    "recovery": Kept(save_recovery, load_recovery, Recovery(), Recovery(stage="restored")),
    "incarnation": Kept(
        write_incarnations, read_incarnations, Incarnations(served=1), Incarnations(served=1, later=2)
    ),
    "members": Kept(
        lambda paths, peers: save_peers(paths.etcd, peers),
        lambda paths: load_peers(paths.etcd),
        (_peer("a"),),
        (_peer("a"), _peer("b")),
    ),
    "wrapping key": Kept(save_wrapping_keys, load_wrapping_keys, bytes(32), bytes(32) + b"k" * 32),
    "certificate": Kept(
        lambda paths, pair: keypair.save(pair, paths.certificates, KeyLock(paths)),
        lambda paths: keypair.load(paths.certificates, KeyLock(paths)).certificate_pem,
        OLD_PAIR,
        NEW_PAIR,
    ),
    "list of revoked certificates": Kept(
        _refused,
        lambda paths: listed_serials((paths.manager / REVOKED_FILE).read_bytes()),
        frozenset({"1"}),
        frozenset({"1", "2"}),
    ),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=list(KEPT))
async def test_files_of_a_manager(tmp_path: Path, kept: Kept) -> None:
    def paths_of(directory: Path) -> Paths:
        return Paths(directory / "data", directory / "run")

    paths = paths_of(tmp_path / "template")
    for directory in (paths.etcd, paths.tls, paths.certificates, paths.manager_keys):
        directory.mkdir(parents=True, exist_ok=True)
    kept.save(paths, kept.old)
    old = kept.load(paths)

    async def life(directory: Path, faults: Faults) -> None:
        paths = paths_of(directory)
        try:
            assert kept.load(paths) == old
            kept.save(paths, kept.new)
        except OSError:  # nothing that says that the file is damaged
            pass
        faults.end()
        found = kept.load(paths)
        kept.save(paths, kept.new)
        assert found in (old, kept.load(paths))

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 5
