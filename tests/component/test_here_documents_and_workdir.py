"""The rules of BuildKit's Dockerfile reference for here-documents in COPY, and for WORKDIR, each as a build."""

import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from skep.errors import InvalidArgument
from tests.support.builds.build_rig import BuildRig, fill

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def rig(tmp_path: Path) -> BuildRig:
    """Context: a small image in ``base``."""
    rig = BuildRig(tmp_path)
    fill(
        rig.context,
        {
            "base/etc/passwd": "root:x:0:0::/:/bin/sh\nann:x:1001:1005::/:/bin/sh\n",
            "base/etc/group": "root:x:0:\nstaff:x:50:\n",
            "base/real/sub/": "",
            "base/link": "-> real",
            "base/file": "file\n",
        },
    )
    return rig


async def document(rig: BuildRig, text: str, *, escape: str = "") -> str:
    """The file of one here-document, with ``name``, ``color`` and ``empty`` as variables."""
    head = f"{escape}FROM scratch\nARG name=world\nENV color=green empty=\n"
    with rig.files(await rig.build(head + text)) as root:
        return (root / "f").read_text()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("COPY <<EOF /f\nplain text\nEOF\n", "plain text\n"),
        ("COPY <<EOF /f\nEOF\n", ""),
        ("COPY <<EOF /f\nHello ${name}, $color!\nEOF\n", "Hello world, green!\n"),
        ("COPY <<EOF /f\n\"$name\" and '${name}'\nEOF\n", "\"world\" and 'world'\n"),
        ("COPY <<EOF /f\nit's \"open\nEOF\n", "it's \"open\n"),
        ('COPY <<EOF /f\n${none:-nothing} ${none:-"q"} ${empty:+x}${color:+y}\nEOF\n', 'nothing "q" y\n'),
        ("COPY <<EOF /f\n$none.\nEOF\n", ".\n"),
        ("COPY <<EOF /f\n${name#wo} ${name%ld} ${name/o/0}\nEOF\n", "rld wor w0rld\n"),
        ('COPY <<EOF /f\n\\$5 \\\\ \\n \\"\nEOF\n', '$5 \\ n "\n'),
        ("COPY <<EOF /f\none \\\ntwo\nEOF\n", "one \ntwo\n"),
        ("COPY <<\"EOF\" /f\n${name} \\$5 \\\\ 'q'\nEOF\n", "${name} \\$5 \\\\ 'q'\n"),
        ("COPY <<'EOF' /f\n$name\nEOF\n", "$name\n"),
        ('COPY <<E"O"F /f\n$name\nEOF\n', "$name\n"),
        ("COPY <<-EOF /f\n\t\tone $name\n\ttwo\tin\n\tEOF\n", "one world\ntwo\tin\n"),
        ('COPY <<-"EOF" /f\n\t$name\nEOF\n', "$name\n"),
        ("COPY <<-EOF /f\n  spaces stay\nEOF\n", "  spaces stay\n"),
        ("COPY <<EOF /f\n# no comment\n\n  EOF\nEOF \nEOF\n", "# no comment\n\n  EOF\nEOF \n"),
        ("ADD <<EOF /f\n$name\nEOF\n", "world\n"),
    ],
)
async def test_a_here_document_is_a_file(rig: BuildRig, text: str, content: str) -> None:
    assert await document(rig, text) == content


async def test_the_escape_character_of_the_file_has_no_meaning_in_a_here_document(rig: BuildRig) -> None:
    text = "COPY <<EOF /f\n`$name \\$name\nEOF\n"
    assert await document(rig, text, escape="# escape=`\n") == "`world $name\n"


async def test_several_here_documents_go_into_a_directory_under_their_names(rig: BuildRig) -> None:
    heads = "<<one <<'two' <<three.conf"
    text = f"COPY --chown=12:34 --chmod=640 {heads} /d/\nfirst $X\none\nsecond $X\ntwo\n3\nthree.conf\n"
    with rig.files(await rig.build(f"FROM scratch\nARG X=x\n{text}")) as root:
        found = {path.name: path.read_text() for path in (root / "d").iterdir()}
        assert found == {"one": "first x\n", "two": "second $X\n", "three.conf": "3\n"}
        status = (root / "d/one").stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o640)


async def test_a_here_document_stands_beside_files_and_has_mode_644(rig: BuildRig) -> None:
    with rig.files(await rig.build("FROM scratch\nCOPY base/file <<EOF /d/\ntext\nEOF\n")) as root:
        assert sorted(path.name for path in (root / "d").iterdir()) == ["EOF", "file"]
        assert stat.S_IMODE((root / "d/EOF").stat().st_mode) == 0o644


async def test_a_here_document_whose_variables_change_is_another_step(rig: BuildRig) -> None:
    text = "FROM scratch\nARG X\nCOPY <<EOF /f\n$X\nEOF\n"
    first = await rig.build(text, arguments={"X": "1"})
    with rig.files(await rig.build(text, arguments={"X": "2"})) as root:
        assert (root / "f").read_text() == "2\n"
    assert await rig.build(text, arguments={"X": "1"}) == first


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("COPY <<EOF /f\nno end\n", "unterminated heredoc"),
        ("COPY base/file <<EOF\nx\nEOF\n", "COPY cannot accept a heredoc as a destination"),
        ("COPY <<EOF /f\n${X:-a\nEOF\n", "syntax error: missing '}'"),
        ("COPY <<EOF /f\n${X:?is wanted}\nEOF\n", "X: is wanted"),
    ],
)
async def test_a_broken_here_document_is_an_error(rig: BuildRig, text: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        await rig.build(f"FROM scratch\n{text}")


# --- WORKDIR -----------------------------------------------------------------------------------------------------

BASE = "FROM scratch AS base\nCOPY base /\nFROM base\n"


@pytest.mark.parametrize(
    ("lines", "directory"),
    [
        (["WORKDIR /a", "WORKDIR b", "WORKDIR c"], "/a/b/c"),
        (["WORKDIR a"], "/a"),
        (["ENV D=/path", "WORKDIR $D/$NONE/x"], "/path/x"),
        (["WORKDIR /a/b", "WORKDIR .."], "/a"),
        (["WORKDIR /a/"], "/a"),
        (["WORKDIR /"], "/"),
        (["ARG A=arg", "WORKDIR /$A"], "/arg"),
        (["WORKDIR /link/made"], "/link/made"),
    ],
)
async def test_a_working_directory_is_made_and_relative_to_the_one_before(
    rig: BuildRig, lines: Sequence[str], directory: str
) -> None:
    image = await rig.build(BASE + "\n".join(lines))
    assert rig.images.get(image).config.defaults.working_dir == directory
    with rig.files(image) as root:
        place = root / directory.lstrip("/").replace("link", "real")
        assert place.is_dir()
        assert stat.S_IMODE(place.stat().st_mode) == 0o755
        assert (root / "link").is_symlink()


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("ann", (1001, 1005)),
        ("1000", (1000, 1000)),
        ("ann:staff", (1001, 50)),
        ("7:8", (7, 8)),
        ("nosuch", (0, 0)),
    ],
)
async def test_a_working_directory_after_user_belongs_to_the_user(
    rig: BuildRig, user: str, expected: tuple[int, int]
) -> None:
    image = await rig.build(BASE + f"WORKDIR /of/root\nUSER {user}\nWORKDIR /of/root/x/y\nWORKDIR /real\n")
    with rig.files(image) as root:
        owners = {
            name: ((root / name).stat().st_uid, (root / name).stat().st_gid)
            for name in ("of", "of/root", "of/root/x", "of/root/x/y", "real")
        }
    assert owners == {
        "of": (0, 0),
        "of/root": (0, 0),
        "of/root/x": expected,
        "of/root/x/y": expected,
        "real": (0, 0),
    }


async def test_the_classic_builder_makes_working_directories_for_root(rig: BuildRig) -> None:
    image = await rig.build(BASE + "USER ann\nWORKDIR /w\n", is_buildkit=False)
    with rig.files(image) as root:
        assert (root / "w").stat().st_uid == 0


async def test_a_working_directory_that_is_a_file_is_an_error(rig: BuildRig) -> None:
    with pytest.raises(InvalidArgument, match="/file is not a directory"):
        await rig.build(BASE + "WORKDIR /file\n")
