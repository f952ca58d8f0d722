"""Compares images of the tests' Dockerfiles with another engine's images of them: ``python -m ... unix:///path``.

The other engine builds through the plugin buildx.  Differences are printed, and the exit status is 1 if there are any.
"""

import asyncio
import io
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from skep.errors import SkepError
from tests.component import test_copy_rules as copies
from tests.component import test_here_documents_and_workdir as documents
from tests.support.builds.build_rig import BuildRig, a_tar, fill
from tests.support.machines.plugins import plugin

Files = Mapping[str, tuple[object, ...]]
"""Kind, permissions, owner, group, and content or target, by path."""


def dockerfiles() -> Iterator[str]:
    """Yield the Dockerfiles of the tests of COPY, ADD, here-documents and WORKDIR."""
    of = _parameters
    yield from (copies.on_scratch(line) for line, _ in of(copies.test_sources_are_files_of_the_context))
    refused = copies.test_what_cannot_be_copied_is_refused_in_buildkits_words
    yield from (copies.on_scratch(line) for line, _ in of(refused))
    absolute = copies.test_a_destination_is_absolute_or_below_the_working_directory
    yield from (copies.on_scratch(*lines) for lines, _ in of(absolute))
    followed = copies.test_a_destination_that_leads_through_links_is_followed
    yield from (copies.on_base(*lines) for lines, _ in of(followed))
    kinds = copies.test_nothing_is_replaced_by_something_of_another_kind
    yield from (copies.on_base(line) for line, _ in of(kinds))
    for mode, _ in of(copies.test_chmod_is_octal_or_symbolic):
        yield copies.on_scratch("ARG MODE=440", f"COPY --chmod={mode} m /d/")
        yield copies.on_scratch("ARG MODE=440", f"COPY --chmod={mode} m /x/y/")
    for owner, _ in of(copies.test_chown_takes_names_and_numbers):
        yield copies.on_base("ENV WHO=7", f"COPY --chown={owner} a.txt src /new/dir/")
    for line, _ in of(copies.test_exclude_leaves_files_out):
        yield copies.on_scratch("COPY base/file /file", line)
    for names, _ in of(copies.test_parents_keeps_directories_behind_the_pivot):
        yield copies.on_scratch(f"COPY --parents {names} /p/")
    for line in ("ADD a.tar /d/", "ADD --chown=3:4 a.tar /d", "ADD --unpack=false a.tar /d", "COPY odd /o"):
        yield copies.on_scratch(line)
    for line in (
        "ADD over.tar /",
        "ADD over.tar /link",
        "COPY --link a.txt /link/",
        "COPY base/file /dangling/",
    ):
        yield copies.on_base(line)
    head = "FROM scratch\nARG name=world\nENV color=green empty=\n"
    yield from (head + text for text, _ in of(documents.test_a_here_document_is_a_file))
    yield from (f"FROM scratch\n{text}" for text, _ in of(documents.test_a_broken_here_document_is_an_error))
    made = documents.test_a_working_directory_is_made_and_relative_to_the_one_before
    yield from (documents.BASE + "\n".join(lines) for lines, _ in of(made))
    for user, _ in of(documents.test_a_working_directory_after_user_belongs_to_the_user):
        yield documents.BASE + f"WORKDIR /of/root\nUSER {user}\nWORKDIR /of/root/x/y\n"


def _parameters(test: Any) -> Any:
    return next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")


def _fill(root: Path) -> None:
    fill(root, {**copies.CONTEXT, "m/file": "f", "m/program": "p", "m/sub/x": "x", "odd/one": "1"})
    for name, mode in (("m/file", 0o644), ("m/program", 0o740), ("m/sub", 0o700), ("src/a.txt", 0o4751)):
        (root / name).chmod(mode)
    os.link(root / "odd/one", root / "odd/two")
    os.mkfifo(root / "odd/pipe")
    os.mknod(root / "odd/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "a.tar").write_bytes(a_tar({"in/": "", "in/x": "x\n"}))
    (root / "over.tar").write_bytes(a_tar({"real/": "", "real/keep": "new\n", "file/": "", "file/x": "x\n"}))


def _described(archive: tarfile.TarFile) -> Files:
    found = {}
    for member in archive:
        content = archive.extractfile(member) if member.isreg() else None
        target = member.linkname.removeprefix("./")
        mode = "" if member.issym() else f"{member.mode:o}"
        name = member.name.removeprefix("./").strip("/")
        text = content.read() if content is not None else target
        found[name] = (member.type, mode, member.uid, member.gid, text)
    return {name: entry for name, entry in found.items() if name not in ("", ".")}


def _theirs(host: str, place: Path, text: str) -> Files | str:
    (place / "Dockerfile").write_text(text)
    words = ["build", "-q", "-f", str(place / "Dockerfile"), "--output", f"type=tar,dest={place / 'out'}"]
    done = subprocess.run(
        [str(plugin("docker-buildx")), *words, str(place / "context")],
        env={"PATH": os.environ["PATH"], "HOME": str(place), "DOCKER_HOST": host},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return done.stderr.strip().rpartition("\n")[2]
    with tarfile.open(place / "out") as archive:
        return _described(archive)


async def _ours(rig: BuildRig, text: str) -> Files | str:
    packed = io.BytesIO()
    try:
        with rig.files(await rig.build(text)) as root, tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(root, arcname=".")
    except SkepError as error:
        return str(error)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        return _described(archive)


async def compare(host: str) -> int:
    """Print the differences.  Return the number of Dockerfiles with another result."""
    different = count = 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        place = Path(directory)
        rig = BuildRig(place)
        _fill(rig.context)
        for text in dockerfiles():
            count += 1
            theirs, ours = await asyncio.to_thread(_theirs, host, place, text), await _ours(rig, text)
            if theirs == ours or (isinstance(theirs, str) and isinstance(ours, str)):
                continue
            different += 1
            print(f"{text!r}:")
            if isinstance(theirs, str) or isinstance(ours, str):
                print(f"  theirs: {theirs!s:.300}\n  ours: {ours!s:.300}")
                continue
            for name in sorted({*theirs, *ours}):
                if theirs.get(name) != ours.get(name):
                    print(f"  {name}: theirs {theirs.get(name)}, ours {ours.get(name)}")
    print(f"{different} of {count} differ")
    return different


if __name__ == "__main__":
    sys.exit(bool(asyncio.run(compare(sys.argv[1]))))
