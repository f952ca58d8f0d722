"""The rules of BuildKit's Dockerfile reference for COPY and ADD, each as a build.

``docs/conformance/dockerfile-files.md`` names the rules.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from skep.errors import InvalidArgument
from tests.support.builds.build_rig import BuildRig, a_tar, fill

pytestmark = pytest.mark.needs("root")

CONTEXT = {
    "a.txt": "a\n",
    "b.txt": "b\n",
    "arr[0].txt": "arr\n",
    "x/a.txt": "xa\n",
    "y/a.txt": "ya\n",
    "src/a.txt": "src a\n",
    "src/b/c.txt": "c\n",
    "src/b/d.md": "d\n",
    "src/b/deep/e.txt": "e\n",
    "node_modules/z/i.js": "i\n",
    "top.txt": "top\n",
    "top.md": "top\n",
    "to-x": "-> x",
    "to-a": "-> x/a.txt",
    "out": "-> ../../secret",
    "base/real/keep": "keep\n",
    "base/real/sub/": "",
    "base/link": "-> real",
    "base/absolute": "-> /real",
    "base/dangling": "-> made/here",
    "base/file": "file\n",
    "base/etc/passwd": "root:x:0:0::/:/bin/sh\nann:x:1001:1005::/:/bin/sh\nnobody:x:65534:65533::/:\n",
    "base/etc/group": "root:x:0:\nstaff:x:50:\n",
    "root/link/new": "new\n",
    "a-file/file/inside": "x\n",
    "a-dir/real": "x\n",
}
BASE = "FROM scratch AS base\nCOPY base /\n"


@pytest.fixture
def rig(tmp_path: Path) -> BuildRig:
    """Context: ``CONTEXT``; beside it a file ``secret``."""
    rig = BuildRig(tmp_path)
    fill(rig.context, CONTEXT)
    (tmp_path / "secret").write_text("secret\n")
    return rig


def on_scratch(*lines: str) -> str:
    return "\n".join(("FROM scratch", *lines, ""))


def on_base(*lines: str) -> str:
    return "\n".join((BASE + "FROM base", *lines, ""))


# --- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("COPY a.txt b.txt /d/", ["d/a.txt", "d/b.txt"]),
        ('COPY ["a.txt", "/d e/"]', ["d e/a.txt"]),
        ("COPY /a.txt /d/", ["d/a.txt"]),
        ("COPY ../../a.txt /d/", ["d/a.txt"]),
        ("COPY x/../../a.txt /d/", ["d/a.txt"]),
        ("COPY x/ /d", ["d/a.txt"]),
        ("COPY x /d", ["d/a.txt"]),
        ("COPY src /", ["a.txt", "b/c.txt", "b/d.md", "b/deep/e.txt"]),
        ("COPY *.txt /d/", ["d/a.txt", "d/arr[0].txt", "d/b.txt", "d/top.txt"]),
        ("COPY ?.txt /d/", ["d/a.txt", "d/b.txt"]),
        ("COPY [a-b].txt /d/", ["d/a.txt", "d/b.txt"]),
        ("COPY [^b].txt /d/", ["d/a.txt"]),
        ("COPY arr[[]0].txt /d/", ["d/arr[0].txt"]),
        ("COPY */a.txt /d/", ["d/a.txt"]),
        ("COPY to-x/*.txt /d/", ["d/a.txt"]),
        ("COPY src/b* /d/", ["d/c.txt", "d/d.md", "d/deep/e.txt"]),
        ("COPY a.txt nosuch* /d/", ["d/a.txt"]),
        ("COPY to-a /d/", ["d/to-a"]),
        ("COPY to-x /d", ["d/a.txt"]),
        ("COPY to-x/a.txt /d", ["d"]),
    ],
)
async def test_sources_are_files_of_the_context(
    rig: BuildRig, instruction: str, found: Sequence[str]
) -> None:
    assert await rig.tree(on_scratch(instruction)) == found


async def test_a_pattern_that_fits_nothing_copies_nothing(rig: BuildRig) -> None:
    assert await rig.tree(on_scratch("COPY a.txt /", "COPY nosuch* /d/")) == ["a.txt"]


@pytest.mark.parametrize(
    ("instruction", "error"),
    [
        ("COPY nosuch /", 'failed to compute cache key: "/nosuch": not found'),
        ("COPY out /", 'failed to compute cache key: "/out": not found'),
        ("COPY ../secret /", 'failed to compute cache key: "/secret": not found'),
        ("COPY --parents x/nosuch /", 'failed to compute cache key: "/x/nosuch": not found'),
        ("COPY --parents to-x/a.txt /", 'failed to compute cache key: "/to-x/a.txt": not found'),
        ("COPY a.txt", "COPY requires at least two arguments"),
        ("COPY [ /", "syntax error in pattern"),
        ("COPY --exclude=[ . /", "syntax error in pattern"),
        ("COPY http://x/y /", "source can't be a URL for COPY"),
        ("COPY https://x/y.git /", "source can't be a git ref for COPY"),
        ("COPY git@x:y /", "source can't be a git ref for COPY"),
        ("COPY --chmod=88 a.txt /", "invalid chmod parameter: '88'"),
        ("COPY --chmod=17777 a.txt /", "invalid chmod parameter: '17777'"),
        ("COPY --chmod=u+q a.txt /", r"invalid chmod parameter: 'u\+q'"),
        ("COPY --chown=nosuch a.txt /", "no such user: nosuch"),
        ("COPY --chown=1:nosuch a.txt /", "no such group: nosuch"),
        ("COPY --from=$X a.txt /", "variable expansion is not supported for --from"),
        ("COPY --from=7 a.txt /", "invalid from flag value 7: index out of bounds"),
        ("COPY --nosuch a.txt /", "Unknown flag: nosuch"),
        ("COPY --link=maybe a.txt /", "Expecting boolean value for flag link, not: maybe"),
        ("COPY --chown=1 --chown=2 a.txt /", "Duplicate flag specified: chown"),
        ("COPY --checksum=x a.txt /", "Unknown flag: checksum"),
        ("COPY --keep-git-dir a.txt /", "Unknown flag: keep-git-dir"),
        ("ADD --from=base a.txt /", "Unknown flag: from"),
        ("ADD --parents a.txt /", "Unknown flag: parents"),
        ("ADD --checksum=sha256:0 a.txt /", r"checksum requires HTTP\(S\) or Git sources"),
        ("ADD --checksum=x http://x/y http://x/z /", "checksum can't be specified for multiple sources"),
        ("ADD --checksum=md5:0 http://x/y /", "unsupported digest algorithm"),
        ("ADD --checksum=sha256:0 http://x/y /", "invalid checksum digest length"),
    ],
)
async def test_what_cannot_be_copied_is_refused_in_buildkits_words(
    rig: BuildRig, instruction: str, error: str
) -> None:
    with pytest.raises(InvalidArgument, match=error):
        await rig.build(on_scratch(instruction))


# --- destinations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["COPY a.txt /abs"], ["abs"]),
        (["COPY a.txt /abs/"], ["abs/a.txt"]),
        (["COPY a.txt /new/dir/name"], ["new/dir/name"]),
        (["WORKDIR /w", "COPY a.txt rel/"], ["w/rel/a.txt"]),
        (["WORKDIR /w", "COPY a.txt ."], ["w/a.txt"]),
        (["WORKDIR /w", "COPY a.txt ../up"], ["up", "w"]),
        (["WORKDIR /w", "COPY a.txt ./"], ["w/a.txt"]),
        (["ENV D=/e", "COPY a.txt $D/${D#/}"], ["e/e"]),
        (["COPY x /d", "COPY a.txt /d"], ["d/a.txt"]),
        (["COPY x/a.txt y/a.txt a.txt /d/"], ["d/a.txt"]),
    ],
)
async def test_a_destination_is_absolute_or_below_the_working_directory(
    rig: BuildRig, lines: Sequence[str], found: Sequence[str]
) -> None:
    assert await rig.tree(on_scratch(*lines)) == found


async def test_the_last_of_several_files_of_one_name_stays(rig: BuildRig) -> None:
    with rig.files(await rig.build(on_scratch("COPY x/a.txt y/a.txt /d/"))) as root:
        assert (root / "d/a.txt").read_text() == "ya\n"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["COPY a.txt /link/"], "real/a.txt"),
        (["COPY a.txt /link"], "real/a.txt"),
        (["COPY a.txt /absolute/sub/named"], "real/sub/named"),
        (["COPY a.txt /dangling"], "made/here"),
        (["COPY x /link"], "real/a.txt"),
        (["WORKDIR /link/sub", "COPY a.txt ."], "real/sub/a.txt"),
        (["WORKDIR /link/new", "COPY a.txt ."], "real/new/a.txt"),
        (["COPY <<E /link/\ntext\nE"], "real/E"),
    ],
)
async def test_a_destination_that_leads_through_links_is_followed(
    rig: BuildRig, lines: Sequence[str], found: str
) -> None:
    with rig.files(await rig.build(on_base(*lines))) as root:
        assert (root / found).is_file()
        assert (root / "link").is_symlink()
        assert (root / "absolute").is_symlink()


@pytest.mark.parametrize(
    ("instruction", "error"),
    [
        ("COPY root /", "cannot copy to non-directory: /link"),
        ("COPY x /file", "cannot copy to non-directory: /file"),
        ("COPY a-file /", "cannot copy to non-directory: /file"),
        ("COPY a-dir /", "cannot replace to directory /real with file"),
        ("COPY a.txt /file/", "mkdir /file: not a directory"),
        ("COPY a.txt /file/x", "mkdir /file: not a directory"),
    ],
)
async def test_nothing_is_replaced_by_something_of_another_kind(
    rig: BuildRig, instruction: str, error: str
) -> None:
    with pytest.raises(InvalidArgument, match=error):
        await rig.build(on_base(instruction))


async def test_directories_are_merged_file_by_file(rig: BuildRig) -> None:
    fill(rig.context, {"over/real/keep": "new\n", "over/real/added": "added\n"})
    with rig.files(await rig.build(on_base("COPY over /"))) as root:
        assert {path.name: path.read_text() for path in (root / "real").iterdir() if path.is_file()} == {
            "keep": "new\n",
            "added": "added\n",
        }


async def test_modes_and_times_are_kept_and_files_belong_to_root(rig: BuildRig) -> None:
    source = rig.context / "src"
    os.chown(source / "a.txt", 33, 33)
    (source / "a.txt").chmod(0o4751)
    (source / "b").chmod(0o700)
    for path in (source / "a.txt", source / "b", source):
        os.utime(path, (1000, 1000))
    with rig.files(await rig.build(on_scratch("COPY src /d"))) as root:
        file, directory, top = ((root / name).stat() for name in ("d/a.txt", "d/b", "d"))
        assert (file.st_uid, file.st_gid, stat.S_IMODE(file.st_mode)) == (0, 0, 0o4751)
        assert stat.S_IMODE(directory.st_mode) == 0o700
        assert stat.S_IMODE(top.st_mode) == 0o755
        assert file.st_mtime == directory.st_mtime == top.st_mtime == 1000


# --- --chmod, --chown --------------------------------------------------------------------------------------------


def modes(root: Path, *names: str) -> Mapping[str, str]:
    return {name: f"{stat.S_IMODE((root / name).stat().st_mode):o}" for name in names}


@pytest.mark.parametrize(
    ("chmod", "expected"),
    [
        ("755", {"d": "755", "d/file": "755", "d/program": "755", "d/sub": "755"}),
        ("0644", {"d": "644", "d/file": "644", "d/program": "644", "d/sub": "644"}),
        ("4755", {"d/file": "4755", "d/sub": "4755"}),
        ("$MODE", {"d/file": "440"}),
        ("+x", {"d": "755", "d/file": "755", "d/program": "751", "d/sub": "711"}),
        ("u=rwX,go=rX", {"d/file": "644", "d/program": "755", "d/sub": "755"}),
        ("g=u", {"d/file": "664", "d/program": "770", "d/sub": "770"}),
        ("go-rwx,u+s", {"d/file": "4600", "d/program": "4700"}),
        ("a=", {"d/file": "0"}),
    ],
)
async def test_chmod_is_octal_or_symbolic(rig: BuildRig, chmod: str, expected: Mapping[str, str]) -> None:
    fill(rig.context, {"m/file": "f", "m/program": "p", "m/sub/x": "x"})
    for name, mode in (("file", 0o644), ("program", 0o740), ("sub", 0o700)):
        (rig.context / "m" / name).chmod(mode)
    image = await rig.build(on_scratch("ARG MODE=440", f"COPY --chmod={chmod} m /d/"))
    with rig.files(image) as root:
        assert modes(root, *expected) == expected


@pytest.mark.parametrize(
    ("chown", "expected"),
    [
        ("55:staff", (55, 50)),
        ("ann", (1001, 1005)),
        ("nobody", (65534, 65533)),
        ("1", (1, 1)),
        ("10:11", (10, 11)),
        ("ann:staff", (1001, 50)),
        ("$WHO", (7, 7)),
    ],
)
async def test_chown_takes_names_and_numbers(rig: BuildRig, chown: str, expected: tuple[int, int]) -> None:
    image = await rig.build(on_base("ENV WHO=7", f"COPY --chown={chown} a.txt src /new/dir/"))
    with rig.files(image) as root:
        for name in ("new", "new/dir", "new/dir/a.txt", "new/dir/b/c.txt"):
            status = (root / name).stat()
            assert (status.st_uid, status.st_gid) == expected, name


# --- --from ------------------------------------------------------------------------------------------------------


async def test_from_names_a_stage_by_name_or_number_and_keeps_owners(rig: BuildRig) -> None:
    lines = [
        "FROM scratch AS one",
        "COPY --chown=5:6 x /x",
        "FROM scratch",
        "COPY --from=one /x/a.txt x/../x /n/",
    ]
    for origin in ("one", "0", "ONE"):
        text = "\n".join(lines).replace("--from=one", f"--from={origin}")
        with rig.files(await rig.build(text)) as root:
            assert ((root / "n/a.txt").stat().st_uid, (root / "n/a.txt").stat().st_gid) == (5, 6)


# --- --link ------------------------------------------------------------------------------------------------------


async def test_link_makes_a_layer_that_knows_nothing_of_those_below(rig: BuildRig) -> None:
    with rig.files(await rig.build(on_base("COPY --link a.txt /link/", "COPY --link x /real/sub"))) as root:
        assert not (root / "link").is_symlink()
        assert (root / "link/a.txt").is_file()
        assert (root / "real/keep").is_file()
        assert (root / "real/sub/a.txt").is_file()
        assert (root / "etc/passwd").is_file()


@pytest.mark.parametrize("flag", ["--link=false", "--link --chmod=644"])
async def test_without_link_or_with_chmod_a_link_is_followed(rig: BuildRig, flag: str) -> None:
    with rig.files(await rig.build(on_base(f"COPY {flag} a.txt /link/"))) as root:
        assert (root / "real/a.txt").is_file()


async def test_link_with_a_name_for_an_owner_reads_the_image_below(rig: BuildRig) -> None:
    with rig.files(await rig.build(on_base("COPY --link --chown=ann a.txt /n/"))) as root:
        assert (root / "n/a.txt").stat().st_uid == 1001


# --- --parents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ("./x/a.txt ./y/a.txt", ["x/a.txt", "y/a.txt"]),
        ("x/./a.txt", ["a.txt"]),
        ("./src/./b/*.txt", ["b/c.txt"]),
        ("./src/**/*.txt", ["src/a.txt", "src/b/c.txt", "src/b/deep/e.txt"]),
        ("src/b", ["src/b/c.txt", "src/b/d.md", "src/b/deep/e.txt"]),
        ("src/./b/deep", ["b/deep/e.txt"]),
        ("src/b/.", ["src/b/c.txt", "src/b/d.md", "src/b/deep/e.txt"]),
        ("src/./b/./deep", ["b/deep/e.txt"]),
        ("./src/b*/./deep/*", ["deep/e.txt"]),
        ("to-x/./a.txt", ["a.txt"]),
        ("**/e.txt", ["src/b/deep/e.txt"]),
        ("../x/a.txt", ["x/a.txt"]),
    ],
)
async def test_parents_keeps_directories_behind_the_pivot(
    rig: BuildRig, sources: str, found: Sequence[str]
) -> None:
    assert await rig.tree(on_scratch(f"COPY --parents {sources} /p/")) == [f"p/{name}" for name in found]


async def test_parents_of_a_pattern_that_fits_nothing_makes_the_destination(rig: BuildRig) -> None:
    assert await rig.tree(on_scratch("COPY --parents src/./nosuch* /p/")) == ["p"]


async def test_directories_that_parents_keeps_have_their_modes(rig: BuildRig) -> None:
    (rig.context / "src/b").chmod(0o711)
    with rig.files(await rig.build(on_scratch("COPY --parents src/b/deep/e.txt /p/"))) as root:
        assert modes(root, "p", "p/src/b") == {"p": "755", "p/src/b": "711"}


# --- --exclude ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("COPY --exclude=*.txt src /s/", ["b/c.txt", "b/d.md", "b/deep/e.txt"]),
        ("COPY --exclude=**/*.txt src /s/", ["b/d.md", "b/deep"]),
        ("COPY --exclude=*/*.md src /s/", ["a.txt", "b/c.txt", "b/deep/e.txt"]),
        ("COPY --exclude=b --exclude=!b/d.md src /s/", ["a.txt", "b/d.md"]),
        ("COPY --exclude=b src /s/", ["a.txt"]),
        ("COPY --exclude=*.txt top* /s/", ["top.md"]),
        ("COPY --exclude=*.txt --exclude=*.md top* a.txt /s/", None),
        ("COPY --parents --exclude=**/deep src/b /s/", ["src/b/c.txt", "src/b/d.md"]),
        ("ADD --exclude=b src /s/", ["a.txt"]),
        ("COPY --exclude=* src /s/", []),
    ],
)
async def test_exclude_leaves_files_out(rig: BuildRig, instruction: str, found: Sequence[str] | None) -> None:
    expected = ["s"] if found == [] else [f"s/{name}" for name in found or ()]
    assert await rig.tree(on_scratch("COPY base/file /file", instruction)) == ["file", *expected]


async def test_the_time_of_a_file_is_no_reason_to_copy_again_and_its_mode_is_one(rig: BuildRig) -> None:
    text = on_scratch("COPY a.txt /a")
    first = await rig.build(text)
    os.utime(rig.context / "a.txt", (5, 5))
    assert await rig.build(text) == first
    (rig.context / "a.txt").chmod(0o700)
    assert await rig.build(text) != first


async def test_what_is_left_out_is_no_reason_to_copy_again(rig: BuildRig) -> None:
    text = on_scratch("COPY --exclude=*.md src/b /s/")
    first = await rig.build(text)
    (rig.context / "src/b/d.md").write_text("changed\n")
    assert await rig.build(text) == first
    (rig.context / "src/b/c.txt").write_text("changed\n")
    assert await rig.build(text) != first


# --- the cases of BuildKit's own tests ------------------------------------------------------------------------------
# Source: buildkit, frontend/dockerfile/dockerfile_parents_test.go, exclude_patterns_test.go.

TREE = {
    "test/a/b/c/d/e/bay": "bay\n",
    "test/a/b/c/d/foo": "foo\n",
    "test/a/b2/c/d/e/bar": "bar\n",
    "test/a/b/c2/d/e/baz": "baz\n",
    "test/a/b/c2/d/e2/baz": "baz\n",
}
DIRECTORIES = {
    "dir1/file-101.png": "2",
    "dir1/file-102.txt": "3",
    "dir1/file-103.jpeg": "4",
    "dir2/file-201.pdf": "6",
    "dir2/file-202.jpeg": "7",
    "dir2/file-203.png": "8",
    "dir3/file-301.mp3": "9",
    "dir3/file-302.mpeg": "10",
    "dir4/file-401.txt": "11",
    "dir4/file-402.txt": "-> file-401.txt",
    "dir4/file-403.txt": "-> file-404.txt",
}


@pytest.mark.parametrize("origin", ["context", "stage"])
@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ("/test/a/b/./c/d", ["c/d/e/bay", "c/d/foo"]),
        ("/test/a/b/c/d/.", ["test/a/b/c/d/e/bay", "test/a/b/c/d/foo"]),
        ("./test/a/b/c/d", ["test/a/b/c/d/e/bay", "test/a/b/c/d/foo"]),
        ("/test/a/./b/./c", ["b/c/d/e/bay", "b/c/d/foo"]),
        ("/test/a/./*/c", ["b/c/d/e/bay", "b/c/d/foo", "b2/c/d/e/bar"]),
        ("/test/a/b*/./c/**/e", ["c/d/e/bar", "c/d/e/bay"]),
        (
            "/test/a/b/c*/./d/**/baz /test/a/b*/./c/**/bar",
            ["c/d/e/bar", "d/e/baz", "d/e2/baz"],
        ),
        ("/test/a/b2*/nosuch", []),
        ("/test/a/b/./c3*", []),
    ],
)
async def test_parents_as_in_buildkits_tests(
    rig: BuildRig, sources: str, found: Sequence[str], origin: str
) -> None:
    fill(rig.context, TREE)
    lines = ["FROM scratch AS base", "COPY test /test"] if origin == "stage" else []
    option = "--from=base " if origin == "stage" else ""
    text = "\n".join((*lines, on_scratch(f"COPY {option}--parents {sources} /out/")))
    assert await rig.tree(text) == ([f"out/{name}" for name in found] or ["out"])


@pytest.mark.parametrize("origin", ["context", "stage"])
@pytest.mark.parametrize(
    ("copy", "found"),
    [
        (
            "--exclude=*/*.png --exclude=*/*.jpeg . /1",
            ["1/" + name for name in DIRECTORIES if not name.endswith((".png", ".jpeg"))],
        ),
        (
            "--exclude=*/*.pdf --exclude=*/*.txt . /2",
            [*("2/" + name for name in DIRECTORIES if not name.endswith((".pdf", ".txt"))), "2/dir4"],
        ),
        ("--exclude=*.mp3 dir3/ /3/", ["3/file-302.mpeg"]),
        (
            "--exclude=*.mp3 --exclude=*.jpeg --exclude=*.png --exclude=*.pdf --exclude=*.txt dir* /4/",
            ["4/file-302.mpeg"],
        ),
        (
            "--exclude=*.mp* --exclude=*.jpeg --exclude=*.png --exclude=*.pdf dir* /5",
            ["5/file-102.txt", "5/file-401.txt", "5/file-402.txt", "5/file-403.txt"],
        ),
        ("--exclude=* dir* /6", ["6"]),
    ],
)
async def test_exclude_as_in_buildkits_tests(
    tmp_path: Path, copy: str, found: Sequence[str], origin: str
) -> None:
    rig = BuildRig(tmp_path)
    fill(rig.context, DIRECTORIES)
    if origin == "stage":
        text = "\n".join(("FROM scratch AS base", "COPY . /", on_scratch(f"COPY --from=base {copy}")))
    else:
        text = on_scratch(f"COPY {copy}")
    assert await rig.tree(text) == found


# --- kinds of files ----------------------------------------------------------------------------------------------


async def test_hard_links_holes_and_special_files(rig: BuildRig) -> None:
    odd = rig.context / "odd"
    odd.mkdir()
    (odd / "one").write_text("one\n")
    os.link(odd / "one", odd / "two")
    os.mkfifo(odd / "pipe")
    os.mknod(odd / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(odd / "socket", stat.S_IFSOCK | 0o700)
    (odd / "link").symlink_to("/nowhere")
    with (odd / "sparse").open("wb") as file:
        file.seek(64 << 20)
        file.write(b"end")
        file.truncate(128 << 20)
    (odd / os.fsdecode(b"caf\xe9")).write_text("latin\n")
    with rig.files(await rig.build(on_scratch("COPY odd /o"))) as root:
        found = root / "o"
        assert (found / "one").stat().st_ino == (found / "two").stat().st_ino
        assert stat.S_ISFIFO((found / "pipe").lstat().st_mode)
        assert (found / "null").lstat().st_rdev == os.makedev(1, 3)
        assert stat.S_ISREG((found / "socket").lstat().st_mode)
        assert (found / "socket").lstat().st_size == 0
        assert os.readlink(found / "link") == "/nowhere"
        sparse = (found / "sparse").stat()
        assert sparse.st_size == 128 << 20
        assert sparse.st_blocks * 512 < 1 << 20
        with (found / "sparse").open("rb") as file:
            file.seek(64 << 20)
            assert file.read(4) == b"end\0"
        assert (found / os.fsdecode(b"caf\xe9")).read_text() == "latin\n"


async def test_a_name_that_is_not_utf8_is_a_source(rig: BuildRig) -> None:
    (rig.context / os.fsdecode(b"caf\xe9")).write_text("latin\n")
    assert await rig.tree(on_scratch("COPY caf? /d/")) == [f"d/{os.fsdecode(bytes([99, 97, 102, 233]))}"]


async def test_a_dockerfile_may_have_names_that_are_not_utf8(rig: BuildRig) -> None:
    name, other = os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8")
    (rig.context / name).write_text("latin\n")
    first = await rig.build(on_scratch(f"COPY {name} /d/{name}"))
    with rig.files(first) as root:
        assert (root / "d" / name).read_text() == "latin\n"
    assert rig.images.get(first).config.history[-1].created_by.startswith("COPY caf\ufffd")
    with rig.files(await rig.build(on_scratch(f"COPY {name} /d/{other}"))) as root:
        assert (root / "d" / other).is_file(), "another name is another step"
    with pytest.raises(InvalidArgument, match="/caf\ufffd"):
        await rig.build(on_scratch(f"COPY {other} /"))


# --- archives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
async def test_add_unpacks_local_archives_by_their_content(rig: BuildRig, mode: str) -> None:
    (rig.context / "any.name").write_bytes(a_tar({"in/": "", "in/x": "x\n"}, mode))
    (rig.context / "empty.tar.gz").write_bytes(b"")
    image = await rig.build(on_scratch("ADD any.name empty.tar.gz /d/"))
    with rig.files(image) as root:
        assert (root / "d/in/x").read_text() == "x\n"
        assert (root / "d/in/x").stat().st_uid == 7
        assert (root / "d/empty.tar.gz").stat().st_size == 0


async def test_unpack_and_chown_of_archives(rig: BuildRig) -> None:
    (rig.context / "a.tar").write_bytes(a_tar({"x": "x\n"}))
    image = await rig.build(
        on_scratch(
            "ADD --unpack=false a.tar /plain/", "ADD --unpack --chown=3:4 a.tar /out/", "COPY a.tar /copied/"
        )
    )
    with rig.files(image) as root:
        assert (root / "plain/a.tar").is_file()
        assert (root / "copied/a.tar").is_file()
        assert ((root / "out/x").stat().st_uid, (root / "out/x").stat().st_gid) == (3, 4)


async def test_an_archive_is_merged_with_what_is_there_and_wins(rig: BuildRig) -> None:
    (rig.context / "a.tar").write_bytes(
        a_tar({"real/": "", "real/keep": "new\n", "file/": "", "file/x": "x\n"})
    )
    with rig.files(await rig.build(on_base("ADD a.tar /"))) as root:
        assert (root / "real/keep").read_text() == "new\n"
        assert (root / "real/sub").is_dir()
        assert (root / "file/x").is_file()


# --- the classic builder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--link", "--chmod=644", "--parents", "--exclude=x"])
async def test_the_classic_builder_refuses_buildkits_options(rig: BuildRig, flag: str) -> None:
    name = flag.removeprefix("--").partition("=")[0]
    with pytest.raises(InvalidArgument, match=f"the --{name} option requires BuildKit"):
        await rig.build(on_scratch(f"COPY {flag} a.txt /"), is_buildkit=False)
