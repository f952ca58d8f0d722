"""Whatever lies in the folders that a node reads at its start, it starts, and knows what is sound."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skep.agent.tasks.task_files import RememberedTask, TaskFiles
from skep.aio.clock import SystemClock
from skep.dataplane.tables.files import StoredTables
from skep.engine.images.store import ImageStore
from skep.linux.detached import read_pid_file
from skep.linux.trees import remove_tree
from skep.model.task import TaskStatus
from skep.model.values.ids import TaskId
from tests.support.engine.oci_rig import EngineExecutor, Machine, memory_engine, new_container
from tests.unit.agent.test_worker import assigned
from tests.unit.linux.test_trees import nest


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Emptied at once: pytest's own removal recurses."""
    yield tmp_path
    remove_tree(tmp_path)


ODD: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_bytes(b"\xff{"),
    "an empty file": lambda path: path.touch(),
    "a deep directory": lambda path: nest(path, 1100),
    "a link to nowhere": lambda path: path.symlink_to("/nonexistent"),
    "a link to itself": lambda path: path.symlink_to(path),
    "json with bytes that are no text": lambda path: path.write_bytes(b'{"id": "\xff", "version": "\xff"}'),
    "names that are no text": lambda path: path.write_bytes(b'{"references": {"\xff": "\xff"}}'),
    "json of something else": lambda path: path.write_bytes(b'{"id": [' + b"1" * 5000 + b"]}"),
}
odd = pytest.mark.parametrize("make", ODD.values(), ids=list(ODD))


@odd
async def test_in_the_place_of_a_container_and_of_its_record(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    machine = Machine()
    first = memory_engine(tmp_path, machine)
    async with first.running():
        sound = await first.add(new_container("sound"))
        damaged = await first.add(new_container("damaged"))
    (tmp_path / "containers" / damaged.id / "record").unlink()
    make(tmp_path / "containers" / damaged.id / "record")
    make(tmp_path / "containers" / ("0" * 64))
    make(tmp_path / "containers" / "lost+found")
    second = memory_engine(tmp_path, machine)
    async with EngineExecutor(second).running(), asyncio.timeout(30):
        assert [one.id for one in second.list()] == [sound.id]
        left = {sound.id, "lost+found"}
        while {path.name for path in (tmp_path / "containers").iterdir()} - left:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_in_the_place_of_a_file_that_is_being_written_it_keeps_no_other_from_being_written(
    tmp_path: Path,
) -> None:
    nest(tmp_path / "a.new", 1)
    (tmp_path / "c.json").touch()
    files = TaskFiles(tmp_path)
    async with asyncio.TaskGroup() as group, asyncio.timeout(30):
        running = group.create_task(files.run())
        for name in ("a", "b"):
            files.remember(RememberedTask(assigned(name), TaskStatus()))
        files.forget(TaskId("c"))
        while not (tmp_path / "b.json").exists() or (tmp_path / "c.json").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        running.cancel()
    assert not (tmp_path / "a.json").exists()


async def test_in_the_place_of_a_record_that_is_being_written_it_keeps_no_other_from_being_written(
    tmp_path: Path,
) -> None:
    engine = memory_engine(tmp_path, Machine())
    async with engine.running(), asyncio.timeout(30):
        made = [await engine.add(new_container(name)) for name in ("one", "two", "three")]
        records = [tmp_path / "containers" / one.id / "record" for one in made]
        for record in records:
            record.unlink()
            nest(record, 1)
        for one in made:
            engine.store.observe(one.id, error="x")
        for record in records[1:]:
            remove_tree(record)
        while not all(record.is_file() for record in records[1:]):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        remove_tree(records[0])


@odd
async def test_in_the_place_of_a_task(tmp_path: Path, make: Callable[[Path], object]) -> None:
    files = TaskFiles(tmp_path)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(files.run())
        files.remember(RememberedTask(assigned("a"), TaskStatus()))
        while not (tmp_path / "a.json").exists():  # noqa: ASYNC110  # a file announces nothing
            await asyncio.sleep(0.001)
        running.cancel()
    make(tmp_path / "odd.json")
    assert [one.assigned.task.id for one in TaskFiles(tmp_path).load()] == ["a"]


@odd
async def test_among_images(tmp_path: Path, make: Callable[[Path], object]) -> None:
    await ImageStore(tmp_path).open()
    for place in ("configs/odd", "configs/odd.new", "layers/odd", "tmp/odd", "catalog.json"):
        make(tmp_path / place)
    store = ImageStore(tmp_path)
    await store.open()
    assert store.images() == ()
    await store.settle()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert list(tmp_path.glob("gone-*")) == []


@odd
def test_among_networks(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "tables").mkdir()
    make(tmp_path / "tables" / "odd")
    assert StoredTables(tmp_path / "tables", SystemClock()).load()[0] == {}
    assert list((tmp_path / "tables").iterdir()) == []


def test_a_pid_file_that_is_no_text_names_no_process(tmp_path: Path) -> None:
    path = tmp_path / "manager.pid"
    path.write_bytes(b'{"version": "\xff", "pid": 1, "started": 1}')
    assert read_pid_file(path) is None
