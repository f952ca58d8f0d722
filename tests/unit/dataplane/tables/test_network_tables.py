"""Network tables: which listener gets what, in which order, and what is acknowledged; what lies on the disk."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.aio.clock import SystemClock
from skep.dataplane.tables.files import SharedTables, StoredTable, StoredTables
from skep.dataplane.tables.network_tables import NetworkTables, TableListener
from skep.errors import FailedPrecondition, Unavailable
from skep.linux.files import NEW_SUFFIX
from skep.model.networks.tables import NetworkHead, NetworkTable, TableNode, TableSet, difference, whole
from skep.model.node_reports.revisions import Revision
from skep.model.values.ids import NetworkId, NodeId
from tests.support.file_faults import file_faults
from tests.support.networks.tables import a_member

A, B = NetworkId("a"), NetworkId("b")


def a_table(id: str, *nodes: str, revision: int = 1) -> NetworkTable:
    known = {NodeId(one): TableNode(id=NodeId(one), underlay="192.168.0.1") for one in nodes}
    return NetworkTable(head=NetworkHead(id=NetworkId(id), name=id), revision=revision, nodes=known)


def received(*tables: NetworkTable, is_complete: bool = True) -> TableSet:
    revision = max((table.revision for table in tables), default=1)
    return TableSet(revision=revision, is_complete=is_complete, changes=tuple(map(whole, tables)))


class Part:
    """Notes in ``order`` what it is asked; raises ``error`` while there is one."""

    def __init__(self, name: str = "", order: list[str] | None = None) -> None:
        self.name = name
        self.order = order if order is not None else []
        self.asked: list[frozenset[NetworkId]] = []
        self.tables: Mapping[NetworkId, NetworkTable] = {}
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._moved = asyncio.Event()

    async def wait(self, condition: Callable[[], object]) -> None:
        """Look whenever this part is asked, or is done with it."""
        async with asyncio.timeout(10):
            while not condition():
                self._moved.clear()
                await self._moved.wait()

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        self.order.append(self.name)
        self.asked.append(changed)
        self._moved.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.tables = tables
        self._moved.set()


def some_tables(*parts: TableListener, directory: Path | None = None) -> NetworkTables:
    clock = SystemClock()
    return NetworkTables(StoredTables(directory, clock), parts, a_member(), clock, lambda: 0.0)


@asynccontextmanager
async def running(network_tables: NetworkTables) -> AsyncIterator[None]:
    task = asyncio.create_task(network_tables.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(network_tables: NetworkTables, condition: Callable[[], object]) -> None:
    """Look whenever something more is in force."""
    async with asyncio.timeout(10):
        while not condition():
            network_tables.applied_changed.clear()
            await network_tables.applied_changed.wait()


async def test_parts_are_asked_one_after_another_and_then_it_is_in_force() -> None:
    order: list[str] = []
    first, second = Part("first", order), Part("second", order)
    network_tables = some_tables(first, second)
    async with running(network_tables):
        second.gate.clear()
        network_tables.update(received(a_table("a", revision=5)), 2)
        await second.wait(lambda: second.asked)
        assert network_tables.applied == {}
        second.gate.set()
        await until(network_tables, lambda: network_tables.applied)
    assert order == ["first", "second"]
    assert network_tables.applied == {A: Revision(2, 5)}
    assert first.tables == second.tables == network_tables.tables


async def test_what_comes_meanwhile_is_handed_on_at_once_afterwards() -> None:
    part = Part()
    network_tables = some_tables(part)
    async with running(network_tables):
        part.gate.clear()
        network_tables.update(received(a_table("a", revision=1)), 1)
        await part.wait(lambda: part.asked)
        for revision in range(2, 6):
            network_tables.update(
                received(a_table("a", f"n{revision}", revision=revision), is_complete=False), 1
            )
        network_tables.update(received(a_table("b", revision=6), is_complete=False), 1)
        part.gate.set()
        await until(network_tables, lambda: network_tables.applied.get(B))
    assert part.asked == [{A}, {A, B}]
    assert network_tables.applied == {A: Revision(1, 5), B: Revision(1, 6)}


async def test_an_unchanged_table_is_acknowledged_without_notifying_the_parts() -> None:
    part = Part()
    network_tables = some_tables(part)
    async with running(network_tables):
        network_tables.update(received(a_table("a", revision=1)), 1)
        await until(network_tables, lambda: network_tables.applied)
        network_tables.update(received(a_table("a", revision=9)), 1)
        await until(network_tables, lambda: network_tables.applied[A] == Revision(1, 9))
    assert part.asked == [{A}]


@pytest.mark.parametrize(
    "error", [Unavailable("the kernel says no"), RuntimeError("a bug")], ids=["told", "bug"]
)
async def test_a_part_that_fails_delays_the_acknowledgement_and_nothing_else(error: Exception) -> None:
    failing, other = Part(), Part()
    failing.error = error
    network_tables = some_tables(failing, other)
    with capture_logs() as logs:
        async with running(network_tables):
            network_tables.update(received(a_table("a", revision=1)), 1)
            await failing.wait(lambda: len(failing.asked) == 2)
            assert (other.asked, network_tables.applied) == ([{A}], {})
            network_tables.update(received(a_table("b", revision=2), is_complete=False), 1)
            await other.wait(lambda: other.tables.get(B))
            failing.error = None
            await until(network_tables, lambda: len(network_tables.applied) == 2)
    assert failing.asked[-1] == {A, B}
    (said, *_) = [entry for entry in logs if entry["event"] == "network tables not applied"]
    assert (said["listener"], said["networks"], said["error"]) == ("Part", ["a"], str(error))


async def test_what_was_in_force_stays_acknowledged_while_something_newer_fails() -> None:
    part = Part()
    network_tables = some_tables(part)
    async with running(network_tables):
        network_tables.update(received(a_table("a", revision=1)), 1)
        await until(network_tables, lambda: network_tables.applied)
        part.error = Unavailable("not now")
        network_tables.update(received(a_table("a", "n1", revision=2)), 1)
        await part.wait(lambda: len(part.asked) == 3)
        assert network_tables.applied == {A: Revision(1, 1)}


async def test_an_older_set_is_refused_and_a_new_life_of_the_cluster_is_not() -> None:
    network_tables = some_tables()
    network_tables.update(received(a_table("a", revision=5)), 2)
    for incarnation, revision in ((2, 4), (1, 100)):
        with pytest.raises(FailedPrecondition, match="the manager is behind"):
            network_tables.update(received(a_table("b", revision=revision)), incarnation)
    assert set(network_tables.tables) == {A}
    network_tables.update(received(a_table("b", revision=1)), 3)
    assert set(network_tables.tables) == {B}


async def test_a_node_that_leaves_its_swarm_forgets_everything(tmp_path: Path) -> None:
    part = Part()
    network_tables = some_tables(SharedTables(tmp_path / "run"), part, directory=tmp_path / "disk")
    async with running(network_tables):
        network_tables.update(received(a_table("a", revision=5)), 2)
        async with asyncio.timeout(10):
            await network_tables.clear()
        assert part.asked[-1] == {A}
        assert part.tables == {}
        assert [*(tmp_path / "run").iterdir(), *(tmp_path / "disk").iterdir()] == []
        network_tables.update(received(a_table("a", revision=1)), 1)  # of the next swarm


async def test_tables_are_found_again_and_each_file_is_a_table(tmp_path: Path) -> None:
    network_tables = some_tables(SharedTables(tmp_path / "run"), directory=tmp_path / "disk")
    a, b = a_table("a", "n1", revision=5), a_table("b", revision=5)
    async with running(network_tables):
        network_tables.update(received(a, b), 2)
        await until(network_tables, lambda: network_tables.applied)
        shared = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        assert {name: msgspec.msgpack.decode(data, type=NetworkTable) for name, data in shared.items()} == {
            "a": a,
            "b": b,
        }
    part = Part()
    again = some_tables(part, directory=tmp_path / "disk")
    again.load()
    assert again.tables == {A: a, B: b}
    with pytest.raises(FailedPrecondition):
        again.update(received(a_table("a", revision=4)), 2)
    async with running(again):
        await until(again, lambda: again.applied)
    assert part.asked == [{A, B}]
    change = difference(a, a_table("a", "n2", revision=6))
    assert change is not None
    again.update(TableSet(revision=6, changes=(change,)), 2)
    assert set(again.tables[A].nodes) == {"n2"}


async def test_what_was_in_force_is_newer_than_the_disk(tmp_path: Path) -> None:
    """A process that is killed has written its disk up to a second before."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "a").write_bytes(msgspec.msgpack.encode(StoredTable(2, a_table("a", revision=5))))
    (disk / "b").write_bytes(msgspec.msgpack.encode(StoredTable(2, a_table("b", revision=5))))
    shared = SharedTables(tmp_path / "run")
    newer = a_table("a", "n1", revision=7)
    await shared.apply(NodeId("n1"), {A: newer}, frozenset({A}))
    part = Part()
    network_tables = some_tables(part, directory=disk)
    (tmp_path / "run" / "b").write_bytes(b"damaged")
    network_tables.load(shared.load())
    assert network_tables.tables == {A: newer, B: a_table("b", revision=5)}
    with pytest.raises(FailedPrecondition):
        network_tables.update(received(a_table("a", revision=6)), 2)
    async with running(network_tables):
        await until(network_tables, lambda: network_tables.applied)
    again = some_tables(directory=disk)
    again.load()
    assert again.tables == network_tables.tables


def test_damaged_files_are_logged_and_dropped(tmp_path: Path) -> None:
    good = msgspec.msgpack.encode(StoredTable(1, a_table("a")))
    (tmp_path / "a").write_bytes(good)
    (tmp_path / "b").write_bytes(good)  # of another network
    (tmp_path / "c").write_bytes(good[: len(good) // 2])
    (tmp_path / "a.new").write_bytes(b"")  # what a crash leaves
    network_tables = some_tables(directory=tmp_path)
    with capture_logs() as logs:
        network_tables.load()
    assert set(network_tables.tables) == {A}
    dropped = [entry["path"].rpartition("/")[2] for entry in logs]
    assert dropped == ["a.new", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


async def test_what_an_earlier_process_left_on_tmpfs_is_removed(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"")
    shared = SharedTables(tmp_path)
    await shared.apply(NodeId("n1"), {A: a_table("a")}, frozenset({A}))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class NetProcess:
    """Reads tables when it is asked to; ``read``: the revision of each that it serves by."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.read: dict[str, int] = {}
        self.error: Exception | None = None

    async def refresh(self, networks: Iterable[NetworkId]) -> None:
        if self.error is not None:
            raise self.error
        for id in networks:
            if (path := self._directory / id).exists():
                self.read[id] = msgspec.msgpack.decode(path.read_bytes(), type=NetworkTable).revision


async def test_a_table_is_acknowledged_once_the_net_process_has_read_what_was_written(tmp_path: Path) -> None:
    net, part = NetProcess(tmp_path), Part()
    network_tables = some_tables(SharedTables(tmp_path, net.refresh), part)
    with file_faults(tmp_path) as disk:
        async with running(network_tables):
            network_tables.update(received(a_table("a"), a_table("b")), 1)
            await until(network_tables, lambda: len(network_tables.applied) == 2)
            disk.choose(errno.ENOSPC, lambda call, path: (call, path.name) == ("replace", A + NEW_SUFFIX))
            newer = (a_table("a", "n1", revision=2), a_table("b", "n1", revision=2))
            network_tables.update(received(*newer), 1)
            await until(network_tables, lambda: len(disk.hits) > 1)
            assert net.read == {A: 1, B: 2}, "the other one was written, and read"
            assert network_tables.applied == {A: Revision(1, 1), B: Revision(1, 1)}
            disk.end()
            await until(network_tables, lambda: network_tables.applied[A] == Revision(1, 2))
    assert net.read == {A: 2, B: 2}


async def test_what_an_earlier_process_left_is_removed_though_a_table_could_not_be_written_at_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "old").write_bytes(b"")
    shared = SharedTables(tmp_path)

    with file_faults(tmp_path) as disk:
        disk.choose(errno.ENOSPC, lambda call, _path: call == "unlink")
        with pytest.raises(OSError, match="No space left"):
            await shared.apply(NodeId("n1"), {A: a_table("a")}, frozenset({A}))
    await shared.apply(NodeId("n1"), {A: a_table("a")}, frozenset({A}))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


async def test_tables_that_are_run_again_go_on_writing(tmp_path: Path) -> None:
    stored = StoredTables(tmp_path / "tables", SystemClock())
    network_tables = NetworkTables(stored, [], a_member(), SystemClock(), lambda: 0.5)
    for number in (1, 2):
        running = asyncio.create_task(network_tables.run())
        network_tables.update(received(a_table("a", f"n{number}", revision=number)), incarnation=1)
        async with asyncio.timeout(30):
            while _kept_revision(tmp_path / "tables") != number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])


def _kept_revision(directory: Path) -> int:
    """Without ``load``, which takes a file that is being written for a damaged one."""
    file = directory / A
    return msgspec.msgpack.decode(file.read_bytes(), type=StoredTable).table.revision if file.exists() else 0
