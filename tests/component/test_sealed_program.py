"""A program that is executed from sealed memory, by the kernel itself."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.engine.runtime.sealed_program import SealedProgram


@pytest.fixture(params=["runc", "crun"])
def runc(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A program of this name: ``true``, of which any machine has one."""
    return Path(shutil.copy("/bin/true", tmp_path / request.param))


@pytest.fixture
def sealed(runc: Path) -> Iterator[SealedProgram]:
    program = SealedProgram(runc)
    yield program
    program.close()


def test_it_is_executed_and_cannot_be_written_to(sealed: SealedProgram, runc: Path) -> None:
    path = sealed.path()
    assert path.startswith(f"/proc/{os.getpid()}/fd/")
    assert Path(path).read_bytes() == runc.read_bytes()
    assert subprocess.run([path], check=False).returncode == 0
    with pytest.raises(PermissionError):
        Path(path).write_bytes(b"other")


def test_an_upgrade_of_the_program_is_executed_from_then_on_at_the_same_path(
    sealed: SealedProgram, runc: Path
) -> None:
    before = sealed.path()
    upgrade = Path(shutil.copy("/bin/false", runc.with_name("runc.dpkg-new")))
    upgrade.rename(runc)
    assert sealed.path() == before
    assert subprocess.run([before], check=False).returncode == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("youki", b"\x7fELF"), ("runc", b"#!/bin/sh\n")],
    ids=["another runtime", "a script"],
)
def test_what_is_neither_runc_nor_crun_is_executed_from_its_file(
    tmp_path: Path, name: str, content: bytes
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert SealedProgram(file).path() == str(file)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert SealedProgram(tmp_path / "runc").path() == str(tmp_path / "runc")


def test_its_memory_is_given_back(runc: Path) -> None:
    program = SealedProgram(runc)
    path = program.path()
    program.close()
    assert not os.path.lexists(path)
    assert program.path() == path
    program.close()
