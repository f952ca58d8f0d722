"""What COPY finds in a tree, and where it puts it."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from skep.engine.build.dockerfile.instructions import Copy
from skep.engine.build.dockerfile.modes import parse_mode
from skep.engine.build.files.copies import prepare
from skep.engine.build.files.copying import Copier, Ownership, destination_of
from skep.engine.build.files.sources import CopySource, digest_of, find
from skep.engine.build.files.trees import BuildCancelled, CopyLimits, Tree, Work
from skep.engine.confinement.users import ProcessUser
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, ResourceExhausted

pytestmark = pytest.mark.needs("root")


def work(*, bytes_max: int = 1 << 30, entries_max: int = 10_000) -> Work:
    return Work(CopyLimits(bytes_max=bytes_max, entries_max=entries_max))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``one``, ``two``, ``dir/three``, ``dir/sub/four``, and links in and out; beside it a file ``secret``."""
    root = tmp_path / "tree"
    (root / "dir/sub").mkdir(parents=True)
    for name in ("one", "two", "dir/three", "dir/sub/four"):
        (root / name).write_text(f"{name}\n")
    (root / "inside").symlink_to("/dir")
    (root / "outside").symlink_to("../../secret")
    (root / "absolute").symlink_to("/secret")
    (root / "loop").symlink_to("loop")
    (tmp_path / "secret").write_text("secret\n")
    return root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    root = tmp_path / "target"
    root.mkdir()
    return root


def sources(tree: Path, *names: str) -> Sequence[CopySource]:
    return find(tree, names, work(), is_context=True)


def digest_of_all(found: Sequence[CopySource]) -> str:
    return digest_of([one.digest for one in found])


def copied(
    tree: Path, target: Path, destination: str, *names: str, ownership: Ownership | None = None
) -> list[str]:
    """What is in ``target`` after a copy."""
    with Tree(target) as opened:
        copier = Copier(opened, ownership or Ownership(owner=ProcessUser()), work())
        for source in sources(tree, *names):
            copier.copy(source, destination)
    return sorted(str(path.relative_to(target)) for path in target.rglob("*"))


# --- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["one"], ["one"]),
        (["/one", "./two"], ["one", "two"]),
        (["t*", "o?e"], ["two", "one"]),
        (["dir/*"], ["dir/sub", "dir/three"]),
        (["*/t[g-i]ree"], ["dir/three"]),
        (["inside/three"], ["dir/three"]),
        (["."], [""]),
    ],
)
def test_names_and_patterns_mean_files(tree: Path, names: list[str], found: list[str]) -> None:
    assert [one.resolved for one in sources(tree, *names)] == found


async def test_a_device_is_no_archive_and_is_not_opened_to_see_that(tree: Path, tmp_path: Path) -> None:
    os.mknod(tree / "device", 0o20600, os.makedev(450, 7))  # no driver has it: it cannot be opened
    add = Copy(keyword="ADD", text="", sources=("device",), destination="/", is_add=True)
    prepared = await prepare(ImageStore(tmp_path / "images"), add, tree, tmp_path, {}, is_buildkit=False)
    assert [one.resolved for one in prepared.sources] == ["device"]
    assert not prepared.archives


def test_a_pattern_that_fits_nothing_finds_nothing(tree: Path) -> None:
    assert sources(tree, "x*", "inside/t*") == []


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "nosuch",
            "file not found in build context or excluded by .dockerignore: stat nosuch: file does not exist",
        ),
        ("outside", "file not found in build context"),
        ("absolute", "file not found in build context"),
        ("../secret", r"forbidden path outside the build context: ../secret \(\)"),
        ("dir/../../tree/one", r"forbidden path outside the build context"),
        ("/..", r"forbidden path outside the build context"),
        ("loop", "too many links"),
        ("[", "syntax error in pattern"),
    ],
)
def test_a_source_outside_of_its_tree_is_not_there(tree: Path, name: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        sources(tree, name)


def test_a_digest_is_of_what_is_copied_and_not_of_its_time(tree: Path) -> None:
    before = {name: digest_of_all(sources(tree, name)) for name in ("one", "dir", ".")}
    os.utime(tree / "dir/three", ns=(1, 1))
    assert digest_of_all(sources(tree, "dir")) == before["dir"]
    (tree / "dir/three").chmod(0o600)
    assert digest_of_all(sources(tree, "dir")) != before["dir"]
    assert digest_of_all(sources(tree, "one")) == before["one"]
    (tree / "one").rename(tree / "uno")
    assert digest_of_all(sources(tree, "uno")) != before["one"]
    assert digest_of_all(sources(tree, ".")) != before["."]
    assert digest_of_all(sources(tree, "two", "uno")).startswith("multi:")


def test_looking_at_more_files_than_allowed_is_an_error(tree: Path) -> None:
    with pytest.raises(ResourceExhausted, match="more than 3 files"):
        find(tree, ["."], work(entries_max=3), is_context=True)


# --- where they go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("working_dir", "requested", "expected"),
    [
        ("", "x", "/x"),
        ("/w", "x/", "/w/x/"),
        ("/w", ".", "/w/"),
        ("/w", "./", "/w/"),
        ("/w", "/a/../b", "/b"),
        ("/w", "../../..", "/"),
        ("", "/", "/"),
    ],
)
def test_a_destination_is_below_the_working_directory(
    working_dir: str, requested: str, expected: str
) -> None:
    assert destination_of(working_dir, requested) == expected


def test_a_file_gets_the_name_of_its_destination_or_goes_into_it(tree: Path, target: Path) -> None:
    (target / "there").mkdir()
    assert copied(tree, target, "/a/b", "one") == ["a", "a/b", "there"]
    assert copied(tree, target, "/there", "one")[-1] == "there/one"
    assert "new/one" in copied(tree, target, "/new/", "one")
    assert (target / "new/one").read_text() == "one\n"


def test_of_a_directory_its_content_is_copied(tree: Path, target: Path) -> None:
    assert copied(tree, target, "/x", "dir") == ["x", "x/sub", "x/sub/four", "x/three"]


def test_directories_are_merged_and_other_files_replaced(tree: Path, target: Path) -> None:
    (target / "x/sub/kept").mkdir(parents=True)
    (target / "x/three").mkdir()
    (target / "x/three/gone").touch()
    (target / "elsewhere").write_text("mine")
    (target / "x/sub/four").symlink_to("/elsewhere")
    copied(tree, target, "/x", "dir")
    assert (target / "x/three").read_text() == "dir/three\n"
    assert (target / "x/sub/kept").is_dir()
    assert (target / "x/sub/four").read_text() == "dir/sub/four\n"
    assert (target / "elsewhere").read_text() == "mine"


def test_links_of_the_destination_lead_to_its_own_files(tree: Path, target: Path) -> None:
    (target / "up").symlink_to("../../../..")
    (target / "tmp").symlink_to("/var/made")
    copied(tree, target, "/up/x/", "one")
    copied(tree, target, "/tmp/y", "one")
    assert (target / "x/one").is_file()
    assert (target / "var/made/y").is_file()
    assert not Path("/var/made").exists()


def test_owner_mode_and_time(tree: Path, target: Path) -> None:
    os.chown(tree / "one", 7, 8)
    (tree / "one").chmod(0o4755)
    os.utime(tree / "one", ns=(1_000, 2_000))
    copied(tree, target, "/kept", "one", ownership=Ownership())
    copied(
        tree,
        target,
        "/p/mine",
        "one",
        ownership=Ownership(owner=ProcessUser(uid=3, gid=4), mode=parse_mode("600")),
    )
    kept, mine, parent = ((target / name).stat() for name in ("kept", "p/mine", "p"))
    assert (kept.st_uid, kept.st_gid, stat.S_IMODE(kept.st_mode)) == (7, 8, 0o4755)
    assert kept.st_mtime_ns == mine.st_mtime_ns == 2_000
    assert (mine.st_uid, mine.st_gid, stat.S_IMODE(mine.st_mode)) == (3, 4, 0o600)
    assert (parent.st_uid, stat.S_IMODE(parent.st_mode)) == (3, 0o755)


def test_every_kind_of_file_is_copied_and_hard_links_stay_links(tree: Path, target: Path) -> None:
    os.link(tree / "dir/three", tree / "dir/again")
    os.mkfifo(tree / "dir/pipe")
    os.mknod(tree / "dir/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(tree / "dir/three", "user.note", b"x")
    (tree / "dir/link").symlink_to("/nowhere")
    copied(tree, target, "/x", "dir")
    found = target / "x"
    assert (found / "three").stat().st_ino == (found / "again").stat().st_ino
    assert stat.S_ISFIFO((found / "pipe").lstat().st_mode)
    assert (found / "null").lstat().st_rdev == os.makedev(1, 3)
    assert os.getxattr(found / "three", "user.note") == b"x"
    assert os.readlink(found / "link") == "/nowhere"


def test_a_directory_is_not_copied_over_a_file(tree: Path, target: Path) -> None:
    (target / "file").touch()
    with pytest.raises(InvalidArgument, match="cannot copy to non-directory: /file"):
        copied(tree, target, "/file", "dir")


def test_a_copy_ends_at_its_limit_and_when_it_is_stopped(tree: Path, target: Path) -> None:
    (source,) = sources(tree, "dir")
    limited, stopped = work(bytes_max=12), work()
    stopped.stop()
    with Tree(target) as opened:
        with pytest.raises(ResourceExhausted, match="more than 12 bytes"):
            Copier(opened, Ownership(owner=ProcessUser()), limited).copy(source, "/x")
        with pytest.raises(BuildCancelled):
            Copier(opened, Ownership(owner=ProcessUser()), stopped).copy(source, "/x")
