"""Trees as a hostile container leaves them go, whatever they are made of; what is left is said."""

import asyncio
import errno
import os
import resource
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.aio import trees as beside
from skep.linux.trees import NotRemoved, RemovalStopped, remove_tree, walk
from tests.support.file_faults import file_faults


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Emptied at once: pytest's own removal recurses."""
    yield tmp_path
    remove_tree(tmp_path)


LEVELS = 1_100
"""More than any recursion of Python's; ``test_a_hundred_thousand_levels`` has more."""


def nest(top: Path, levels: int, name: str = "d", *, file_each: int = 0) -> None:
    """Nested directories, deeper than any path is long."""
    top.mkdir(exist_ok=True)
    here = os.open(top, os.O_RDONLY)
    for level in range(levels):
        os.mkdir(name, dir_fd=here)
        if file_each and level % file_each == 0:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


@contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """This process may have ``free`` descriptors more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + free
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["d", "x" * 255, "\udcff\n"])
def test_any_depth_goes_with_few_descriptors(tmp_path: Path, name: str):
    top = tmp_path / "tree"
    nest(top, LEVELS, name, file_each=7)
    with few_descriptors(110):
        remove_tree(top)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [Path.touch, lambda path: nest(path, 1)], ids=["file", "directory"])
def test_a_name_that_is_taken_at_the_top_is_not_used_for_a_deep_directory(
    tmp_path: Path, make: Callable[[Path], object]
):
    top = tmp_path / "tree"
    nest(top, 60)
    make(top / ".skep-removed-1")
    remove_tree(top, keep=".skep-removed-1")  # so that it is there until the end
    assert not top.exists()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory whose file system is memory."""
    with tempfile.TemporaryDirectory(prefix="skep-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_hundred_thousand_levels(memory: Path):
    top = memory / "tree"
    nest(top, 100_000, "y" * 255, file_each=100)
    remove_tree(top)
    assert not top.exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_directory_of_many_entries_is_never_listed_as_a_whole(memory: Path):
    top = memory / "tree"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for number in range(150_000):
        os.mknod(f"a-rather-long-name-{number}", dir_fd=here)
    os.close(here)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    remove_tree(top)
    assert not top.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000, "KiB"


TREES = st.recursive(
    st.sampled_from(["file", "link", "fifo", "hard"]),
    lambda inner: st.dictionaries(
        st.sampled_from(["a", "b", ".skep-removed-1", "ü", " "]), inner, max_size=4
    ),
    max_leaves=25,
)


def build(path: Path, tree: object, outside: Path) -> None:
    match tree:
        case dict():
            path.mkdir()
            for name, inner in tree.items():
                build(path / name, inner, outside)
        case "file":
            path.write_text("x")
        case "link":
            path.symlink_to(outside)
        case "fifo":
            os.mkfifo(path)
        case "hard":
            os.link(outside / "kept", path)


@settings(max_examples=60, deadline=None)
@given(tree=TREES, above=st.integers(0, 60))
def test_anything_goes_and_nothing_outside_is_touched(
    tmp_path_factory: pytest.TempPathFactory, tree: object, above: int
):
    home = tmp_path_factory.mktemp("trees")
    outside = home / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    path = home / "tree"
    nest(path, above)
    build(path.joinpath(*["d"] * above, "t"), tree, outside)
    remove_tree(path)
    assert os.listdir(home) == ["outside"]
    assert (outside / "kept").read_text() == "kept"


def test_what_is_not_there_is_removed_already(tmp_path: Path):
    remove_tree(tmp_path / "none")
    remove_tree(tmp_path / "none" / "at" / "all")


def test_a_link_in_the_place_of_the_tree_is_not_followed(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "tree").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "tree")
    assert os.listdir(tmp_path) == ["kept"]


def test_the_entry_to_keep_goes_last(tmp_path: Path):
    top = tmp_path / "tree"
    nest(top, 100)
    (top / "record").touch()
    (top / "d" / "record").touch()
    (top / "z").touch()
    gone: list[str] = []

    def note(call: str, path: Path) -> None:
        if call == "unlink" and path.name in ("record", "z"):
            gone.append(path.name)

    with file_faults(tmp_path) as files:
        files.before_each = note
        remove_tree(top, keep="record")
    assert sorted(gone) == ["record", "record", "z"]
    assert gone[-1] == "record"
    assert not top.exists()


def test_what_is_refused_is_named_and_the_rest_and_the_record_are_as_they_should(tmp_path: Path):
    top = tmp_path / "tree"
    nest(top, 200)
    for name in ("record", "bad", "good"):
        (top / name).touch()
    with file_faults(tmp_path) as faults:
        faults.choose(errno.EIO, lambda call, path: (call, path.name) == ("unlink", "bad"))
        with pytest.raises(NotRemoved, match="'bad' cannot be removed: Input/output error") as raised:
            remove_tree(top, keep="record")
    assert raised.value.errno == 5
    assert sorted(os.listdir(top)) == ["bad", "record"]
    remove_tree(top, keep="record")
    assert not top.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes files immutable")
def test_immutable_and_append_only_files_go(tmp_path: Path):
    top = tmp_path / "tree"
    (top / "inner").mkdir(parents=True)
    (top / "inner" / "file").touch()
    (top / "log").touch()
    try:
        subprocess.run(["chattr", "+a", top / "log"], check=True, capture_output=True)
        subprocess.run(
            ["chattr", "+i", top / "inner" / "file", top / "inner"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system with flags here")
    remove_tree(top)
    assert not top.exists()


def test_a_removal_is_stopped_and_goes_on_later(tmp_path: Path):
    nest(tmp_path / "tree", 10)
    stop = threading.Event()
    stop.set()
    with pytest.raises(RemovalStopped):
        remove_tree(tmp_path / "tree", stop)
    assert (tmp_path / "tree").exists()
    remove_tree(tmp_path / "tree")


async def test_a_cancelled_removal_leaves_no_thread(tmp_path: Path):
    nest(tmp_path / "tree", LEVELS)
    task = asyncio.create_task(beside.remove_tree(tmp_path / "tree"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (tmp_path / "tree").mkdir(exist_ok=True)
    (tmp_path / "tree" / "new").touch()
    assert (tmp_path / "tree" / "new").exists()
    await beside.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_a_walk_sees_everything_that_has_a_path(tmp_path: Path):
    nest(tmp_path / "deep", LEVELS)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    found = {path for path, _ in walk(tmp_path)}
    assert {"a", "a/b", "link", "deep", "deep/d"} <= found
    assert len(found) > 1_000
    assert not any(path.startswith("link/") for path in found)


@pytest.mark.parametrize("seen", [["a"], ["a", "a/a"]], ids=["itself", "above another"])
def test_a_directory_that_becomes_a_link_while_it_is_walked_is_not_followed(tmp_path: Path, seen: list[str]):
    top, outside = tmp_path / "top", tmp_path / "outside"
    (outside / "a").mkdir(parents=True)
    (outside / "a/secret").touch()
    (top / "a/a").mkdir(parents=True)
    found = []
    for path, _ in walk(top):
        found.append(path)
        if found == seen:
            (top / "a").rename(tmp_path / "was")
            (top / "a").symlink_to("../outside")  # not absolute: it might lead over a mount
    assert found == seen
