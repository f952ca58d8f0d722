"""Trees as clients list them: what is accepted, and that nothing is ever written outside."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.tree import Contents, KeptTree, Listing, TreeEntry, TreeLimits, write_tree
from skep.errors import InvalidArgument, ResourceExhausted, SkepError

DIRECTORY, SYMLINK, PIPE, SOCKET, DEVICE = 1 << 31, 1 << 27, 1 << 25, 1 << 24, 1 << 26
CHARACTER, IRREGULAR = 1 << 21, 1 << 19
LIMITS = TreeLimits(bytes=1000, entries=20, depth=5)


def a_directory(path: str, mode: int = 0o755) -> pb.Stat:
    return pb.Stat(path=os.fsencode(path), mode=DIRECTORY | mode)


def a_file(path: str, size: int = 3, mode: int = 0o644, **fields: object) -> pb.Stat:
    return pb.Stat(path=os.fsencode(path), mode=mode, size=size, **fields)  # type: ignore[arg-type]


def a_link(path: str, target: str) -> pb.Stat:
    return pb.Stat(path=os.fsencode(path), mode=SYMLINK | 0o777, linkname=target.encode())


def listed(*stats: pb.Stat) -> Sequence[TreeEntry]:
    listing = Listing(LIMITS)
    for entry in stats:
        listing.add(entry)
    return listing.entries


def written(root: Path, *stats: pb.Stat) -> Sequence[TreeEntry]:
    """A tree of ``stats``; each file has as many ``x`` as its size says."""
    entries = listed(*stats)
    needed = write_tree(root, entries)
    contents = Contents(root, entries, needed, 1000)
    for number in needed:
        contents.request(number)
        contents.write(number, b"x" * entries[number].size)
        contents.write(number, b"")
    assert contents.is_whole
    return entries


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_a_tree_is_written_as_it_was_listed(root: Path) -> None:
    written(
        root,
        a_directory("a", 0o700 | (1 << 20)),
        a_file(
            "a/b", 3, 0o600 | (1 << 23), mod_time=1_500_000_000_123_456_789, uid=os.getuid(), gid=os.getgid()
        ),
        a_link("a/c", "/etc/passwd"),
        pb.Stat(path=b"hard", mode=0o600, linkname=b"a/b"),
        pb.Stat(path=b"pipe", mode=PIPE | 0o640),
        pb.Stat(path=b"socket", mode=SOCKET | 0o640),
        a_file("z", 0),
    )
    assert (root / "a" / "b").read_bytes() == b"xxx"
    found = (root / "a" / "b").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o4600, 1_500_000_000_123_456_789)
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o1700
    assert os.readlink(root / "a" / "c") == "/etc/passwd"
    assert (root / "hard").samefile(root / "a" / "b")
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    assert not (root / "socket").exists()
    assert (root / "z").read_bytes() == b""


@pytest.mark.parametrize("path", ["", "/", "/a", "..", "../a", "a/../b", "a//b", "./a", "a/", "a/.", "a\0b"])
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        listed(a_directory("a"), a_file(path))


def test_nothing_is_written_through_a_symbolic_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    with pytest.raises(InvalidArgument, match="changes out of order: 'a/b'"):
        listed(a_link("a", "../outside"), a_file("a/b"))
    assert not list((tmp_path / "outside").iterdir())


def test_a_directory_that_was_left_cannot_be_entered_again() -> None:
    with pytest.raises(InvalidArgument, match="changes out of order"):
        listed(a_directory("a"), a_file("b"), a_file("a/c"))


@pytest.mark.parametrize(
    "stats",
    [
        (a_file("b"), a_file("a")),
        (a_file("a"), a_file("a")),
        (a_directory("a"), a_link("a", "b")),
        (a_file("x/y"),),
    ],
)
def test_entries_out_of_order_are_refused(stats: Sequence[pb.Stat]) -> None:
    with pytest.raises(InvalidArgument, match="changes out of order"):
        listed(*stats)


@pytest.mark.parametrize("target", ["a/missing", "../../etc/passwd", "/etc/passwd", "link", "a"])
def test_a_hard_link_leads_only_to_a_file_that_was_listed(target: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid link"):
        listed(
            a_directory("a"),
            a_link("link", "/etc/passwd"),
            pb.Stat(path=b"new", mode=0o600, linkname=target.encode()),
        )


@pytest.mark.needs("root")
def test_devices_are_made_and_not_opened(root: Path) -> None:
    entries = written(
        root,
        pb.Stat(path=b"null", mode=DEVICE | CHARACTER | 0o666, devmajor=450, devminor=7),
        pb.Stat(path=b"sda", mode=DEVICE | 0o640, devmajor=450, devminor=1 << 19),
    )
    null, sda = ((root / entry.path).lstat() for entry in entries)
    assert (null.st_mode, null.st_rdev) == (stat.S_IFCHR | 0o666, os.makedev(450, 7))
    assert (sda.st_mode, sda.st_rdev) == (stat.S_IFBLK | 0o640, os.makedev(450, 1 << 19))


def test_an_unknown_kind_and_an_impossible_device_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="unknown kind of file in the build context: 'x'"):
        listed(pb.Stat(path=b"x", mode=IRREGULAR | 0o644))
    with pytest.raises(InvalidArgument, match="invalid device"):
        listed(pb.Stat(path=b"x", mode=DEVICE | 0o644, devmajor=-1))


def test_names_in_any_encoding_are_written_as_they_are(root: Path) -> None:
    written(
        root,
        pb.Stat(path=b"caf\xe9", mode=DIRECTORY | 0o755),
        pb.Stat(path=b"caf\xe9/\xff", mode=0o644, size=3),
        pb.Stat(path=b"link", mode=SYMLINK | 0o777, linkname=b"caf\xe9/\xff"),
        pb.Stat(path=b"same", mode=0o644, linkname=b"caf\xe9/\xff"),
    )
    assert sorted(os.listdir(os.fsencode(root))) == [b"caf\xe9", b"link", b"same"]
    assert (root / "link").read_bytes() == b"xxx"
    assert (root / "same").samefile(root / "link")


@pytest.mark.parametrize(
    "entry", [a_file("a", -1), a_file("a", uid=0xFFFFFFFF), a_file("a", mod_time=1 << 62), a_link("a", "")]
)
def test_values_that_nothing_can_have_are_refused(entry: pb.Stat) -> None:
    with pytest.raises(InvalidArgument):
        listed(entry)


@pytest.mark.parametrize(
    "stats",
    [
        [a_file(f"{number:03}") for number in range(21)],
        [a_file("a", 600), a_file("b", 600)],
    ],
    ids=["entries", "bytes"],
)
def test_a_tree_is_bounded(stats: Sequence[pb.Stat]) -> None:
    with pytest.raises(ResourceExhausted):
        listed(*stats)


def test_directories_are_no_deeper_than_the_bound() -> None:
    with pytest.raises(InvalidArgument, match="too deep"):
        listed(*(a_directory("/".join("a" * depth)) for depth in range(1, 8)))


def test_a_file_that_is_as_it_was_is_taken_from_the_tree_before(root: Path, tmp_path: Path) -> None:
    same, other = a_file("same", mod_time=5), a_file("other", mod_time=5)
    kept = KeptTree(root, {entry.path: entry for entry in written(root, other, same)})
    (tmp_path / "next").mkdir()
    entries = listed(a_file("other", mod_time=6), same)
    assert write_tree(tmp_path / "next", entries, kept) == [0]
    assert (tmp_path / "next" / "same").read_bytes() == b"xxx"


def test_a_file_of_the_tree_before_that_is_gone_is_asked_for(root: Path, tmp_path: Path) -> None:
    kept = KeptTree(root, {entry.path: entry for entry in written(root, a_file("same"))})
    (root / "same").unlink()
    (tmp_path / "next").mkdir()
    assert write_tree(tmp_path / "next", listed(a_file("same")), kept) == [0]


def test_contents_that_were_not_asked_for_are_refused(root: Path) -> None:
    entries = listed(a_file("a"), a_file("b"))
    contents = Contents(root, entries, write_tree(root, entries), 1000)
    contents.request(0)
    with pytest.raises(InvalidArgument, match="invalid file request 1"):
        contents.write(1, b"x")
    contents.write(0, b"")
    with pytest.raises(InvalidArgument, match="invalid file request 0"):
        contents.write(0, b"x")


def test_a_file_that_has_grown_is_taken_and_not_kept_and_bounded(root: Path) -> None:
    entries = listed(a_file("a", 1))
    contents = Contents(root, entries, write_tree(root, entries), 10)
    contents.request(0)
    contents.write(0, b"12345")
    contents.write(0, b"")
    assert (root / "a").read_bytes() == b"12345"
    assert contents.changed == {"a"}
    again = Contents(root, entries, [0], 10)
    again.request(0)
    with pytest.raises(ResourceExhausted):
        again.write(0, b"x" * 11)
    again.close()


NAMES = st.sampled_from(["a", "b", "c", "..", ".", "", "outside", "a.b"])
PATHS = (
    st.builds("/".join, st.lists(NAMES, min_size=1, max_size=3)).map(str.encode)
    | st.just(b"/outside/x")
    | st.binary(max_size=3)
)
STATS = st.builds(
    pb.Stat,
    path=PATHS,
    mode=st.sampled_from(
        [
            0o644,
            0o4755,
            DIRECTORY | 0o755,
            DIRECTORY,
            SYMLINK | 0o777,
            PIPE,
            SOCKET,
            DEVICE,
            DEVICE | CHARACTER,
        ]
    ),
    size=st.integers(-1, 4),
    linkname=st.just(b"") | PATHS | st.sampled_from([b"../outside", b"/", b"../outside/precious"]),
    mod_time=st.integers(-(1 << 63), (1 << 63) - 1),
)


@given(stats=st.lists(STATS, max_size=8), data=st.lists(st.tuples(st.integers(0, 8), st.binary(max_size=4))))
def test_whatever_comes_nothing_is_written_outside(
    tmp_path_factory: pytest.TempPathFactory, stats: list[pb.Stat], data: list[tuple[int, bytes]]
) -> None:
    place = tmp_path_factory.mktemp("tree")
    (place / "outside").mkdir()
    (place / "outside" / "precious").write_text("precious")
    (place / "root").mkdir()
    listing = Listing(LIMITS)
    for entry in stats:
        try:
            listing.add(entry)
        except SkepError:
            continue
    contents = None
    try:
        needed = write_tree(place / "root", listing.entries)
        contents = Contents(place / "root", listing.entries, needed, 1000)
        for number in needed:
            contents.request(number)
        for number, piece in data:
            contents.write(number, piece)
    except (SkepError, OSError):
        pass
    finally:
        if contents is not None:
            contents.close()
    assert sorted(path.name for path in place.iterdir()) == ["outside", "root"]
    assert [path.name for path in (place / "outside").iterdir()] == ["precious"]
    assert (place / "outside" / "precious").read_text() == "precious"
    assert (place / "outside" / "precious").stat().st_nlink == 1
