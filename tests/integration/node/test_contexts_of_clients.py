"""Contexts as real clients send them: .dockerignore files, odd files, archives on standard input."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tests.integration.node.test_buildkit import built
from tests.support.builds.build_lab import LIMIT_S, BuildLab, build_lab
from tests.support.builds.build_rig import a_tar, fill, listed
from tests.support.machines.plugins import plugin

pytestmark = [pytest.mark.timeout(300), pytest.mark.needs("root")]

ALL = "FROM scratch\nCOPY . /d/\n"


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[BuildLab]:
    async with build_lab(tmp_path) as lab:
        yield lab


def layer(lab: BuildLab, name: str) -> Path:
    """What an image with one layer has in ``/d``."""
    (chain_id,) = lab.images.get(name).chain
    return lab.images.layer_store.directory(chain_id) / "d"


FILES = {
    "a.log": "",
    "keep.log": "",
    "b.md": "",
    "README.md": "",
    "README-secret.md": "",
    "sub/a.log": "",
    "sub/deep/a.tmp": "",
    "sub/deep/b.txt": "",
    "temp1": "",
    "tempx/y": "",
    "#x": "",
    " lead": "",
    "abs/x": "",
    "out/x": "",
    "out/in/keep": "",
    "out/in/drop": "",
    "[odd]": "",
    "caf\udce9": "",
    "node_modules/m/i.js": "",
    "sub/node_modules/m/i.js": "",
    ".git/HEAD": "",
}
GONE = {
    "*.log": ["a.log", "keep.log"],
    "*.log\n!keep.log": ["a.log"],
    "**/*.log": ["a.log", "keep.log", "sub/a.log"],
    "*.md\n!README*.md\nREADME-secret.md": ["b.md", "README-secret.md"],
    "*.md\nREADME-secret.md\n!README*.md": ["b.md"],
    "*/*.log": ["sub/a.log"],
    "*/*/*.tmp": ["sub/deep/a.tmp"],
    "temp?": ["temp1", "tempx/y"],
    "# a comment\n#x\n": [],
    "\\#x": ["#x"],
    " # no comment": [],
    "\t temp1 \t\r\n\r\n": ["temp1"],
    "/abs/": ["abs/x"],
    "./abs/../abs": ["abs/x"],
    "abs/../../x": [],
    "out\n!out/in/keep": ["out/in/drop", "out/x"],
    "out/**\n!out/in": ["out/x"],
    "**/node_modules": ["node_modules/m/i.js", "sub/node_modules/m/i.js"],
    "node_modules": ["node_modules/m/i.js"],
    "**/deep/**": ["sub/deep/a.tmp", "sub/deep/b.txt"],
    "sub/**/*.t??": ["sub/deep/a.tmp", "sub/deep/b.txt"],
    "[[]odd]": ["[odd]"],
    "[a-b].*": ["a.log", "b.md"],
    ".git": [".git/HEAD"],
    "\ufefftemp1\ntemp?/y": ["temp1", "tempx/y"],
    "caf?": ["caf\udce9"],
    "**": [*FILES, "Dockerfile", ".dockerignore"],
    "*\n!temp1": [*(name for name in FILES if name != "temp1"), "Dockerfile", ".dockerignore"],
    ".": [],
    "Dockerfile\n.dockerignore": ["Dockerfile", ".dockerignore"],
}


async def test_an_ignore_file_has_the_rules_of_the_reference(lab: BuildLab, tmp_path: Path) -> None:
    """The client applies the patterns that the engine reads and sends it."""
    wrong = {}
    for number, (text, gone) in enumerate(GONE.items()):
        context = tmp_path / f"c{number}"
        fill(context, {**FILES, "Dockerfile": ALL})
        (context / ".dockerignore").write_bytes(text.encode("utf-8", "surrogateescape"))
        said = await built(lab, context, "-t", f"i{number}")
        names = set(listed(layer(lab, f"i{number}"))) if said.exit == 0 else {said.output}
        if (found := {*FILES, "Dockerfile", ".dockerignore"} - names) != set(gone):
            wrong[text] = found
    assert not wrong


async def test_an_ignore_file_of_the_dockerfile_comes_first(lab: BuildLab, tmp_path: Path) -> None:
    context = tmp_path / "c"
    fill(context, {"one": "", "two": "", "docker/Other": ALL, ".dockerignore": "one\n"})
    (context / "docker/Other.dockerignore").write_text("two\n")
    said = await built(lab, context, "-f", str(context / "docker/Other"), "-t", "other")
    assert said.exit == 0, said.output
    names = listed(layer(lab, "other"))
    assert "one" in names
    assert "two" not in names


async def test_odd_files_of_a_context_come_as_they_are(lab: BuildLab, tmp_path: Path) -> None:
    context = tmp_path / "c"
    fill(context, {"Dockerfile": ALL, "one": "one\n", "link": "-> /nowhere", "empty/": ""})
    os.link(context / "one", context / "two")
    os.mkfifo(context / "pipe")
    os.mknod(context / "device", stat.S_IFCHR | 0o620, os.makedev(450, 7))
    (context / os.fsdecode(b"caf\xe9")).write_text("latin\n")
    (context / "setuid").touch()
    (context / "setuid").chmod(0o4711)
    os.setxattr(context / "one", "user.note", b"x")
    with (context / "sparse").open("wb") as file:
        file.truncate(32 << 20)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(context / "socket"))
        said = await built(lab, context, "-t", "odd")
    assert said.exit == 0, said.output
    found = layer(lab, "odd")
    assert (found / "one").samefile(found / "two")
    assert stat.S_ISFIFO((found / "pipe").lstat().st_mode)
    assert (found / "device").lstat().st_rdev == os.makedev(450, 7)
    assert stat.S_ISREG((found / "socket").lstat().st_mode)
    assert (found / "socket").lstat().st_size == 0
    assert (found / os.fsdecode(b"caf\xe9")).read_text() == "latin\n"
    assert stat.S_IMODE((found / "setuid").stat().st_mode) == 0o4711
    assert os.getxattr(found / "two", "user.note") == b"x"
    assert (found / "sparse").stat().st_size == 32 << 20
    assert os.readlink(found / "link") == "/nowhere"
    assert (found / "empty").is_dir()


async def piped(lab: BuildLab, content: bytes, *words: str) -> tuple[int, str]:
    """``docker buildx build`` with ``content`` on standard input."""
    process = await asyncio.create_subprocess_exec(
        *(str(plugin("docker-buildx")), "build", "--progress", "plain", *words, "-"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(lab.root),
            "DOCKER_HOST": f"unix://{lab.socket}",
        },
    )
    async with asyncio.timeout(LIMIT_S):
        output, _ = await process.communicate(content)
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (a_tar({"Dockerfile": ALL, "d/": "", "d/x": "x"}, "w:gz"), ["Dockerfile", "d/x"]),
        (b"FROM scratch\nCOPY <<E /d/only\nE\n", ["only"]),
    ],
    ids=["archive", "dockerfile"],
)
async def test_a_context_comes_by_standard_input(lab: BuildLab, content: bytes, names: Sequence[str]) -> None:
    exit, output = await piped(lab, content, "-t", "in")
    assert exit == 0, output
    assert listed(layer(lab, "in")) == names


@pytest.mark.parametrize("is_buildkit", [True, False], ids=["buildkit", "classic"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", ""])
async def test_a_context_of_docker_20_comes_by_standard_input(
    lab: BuildLab, mode: str, is_buildkit: bool
) -> None:
    """With BuildKit, an archive comes in a request of its own, beside the build's.  As with the engine."""
    files = {"Dockerfile": "FROM scratch\n", "Other": ALL, "d/x": "x"}
    content = a_tar(files, mode) if mode else b"FROM scratch\nENV A=b\n"
    words = ("build", "-q", *(("-f", "Other") if mode else ()), "-t", "in", "-")
    said = await lab.docker(*words, stdin=content, is_buildkit=is_buildkit)
    assert (said.exit, said.output) == (0, f"{lab.images.get('in').id}\n"), said.output
    assert "d/x" in listed(layer(lab, "in")) if mode else lab.images.get("in").chain == ()
    assert lab.remains() == []


@pytest.mark.parametrize("is_buildkit", [True, False], ids=["buildkit", "classic"])
@pytest.mark.parametrize(
    ("content", "words", "text"),
    [
        (a_tar({"x": "x"}), [], "Dockerfile"),
        (a_tar({"Dockerfile": ALL}), ["-f", "nosuch"], "nosuch"),
        (a_tar({"Dockerfile": ALL}, "w:gz")[:60], [], "unexpected EOF"),
        (a_tar({"Dockerfile": ALL}), ["--isolation", "hyperv"], "solation"),
        (b"\xb5\xff\xfe not text\n", [], "dockerfile parse error line 1: unknown instruction: "),
        (b"", [], "o"),
    ],
    ids=["no-dockerfile", "no-such-file", "cut-off", "isolation", "not-text", "empty"],
)
async def test_a_wrong_context_of_docker_20_is_an_error(
    lab: BuildLab, content: bytes, words: Sequence[str], text: str, is_buildkit: bool
) -> None:
    said = await lab.docker("build", *words, "-", stdin=content, is_buildkit=is_buildkit)
    assert said.exit == 1, said.output
    assert text in said.output
    assert "got itself in trouble" not in said.output
    assert lab.remains() == []


async def test_without_a_context_files_cannot_be_copied(lab: BuildLab) -> None:
    exit, output = await piped(lab, b"FROM scratch\nCOPY file /\n")
    assert exit != 0
    assert '"/file": not found' in output
