"""Which platforms a machine runs, by the kernel's handlers."""

from pathlib import Path

import pytest

from skep.engine.build.emulation import Emulator, emulated, parse_emulator, read_emulators, require_runnable
from skep.engine.images.platforms import ImagePlatform, parse_platform
from skep.errors import FailedPrecondition
from tests.support.images.programs import program

ARM64 = """enabled
interpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P
flags: POCF
offset 0
magic 7f454c460201010000000000000000000200b700
mask ffffffffffffff00fffffffffffffffffeffffff
"""
"""The kernel's file, as Debian's package qemu-user-static registers it."""
HERE = ImagePlatform("linux", "amd64", "v3")


def handler(text: str) -> Emulator:
    found = parse_emulator(text)
    assert found is not None
    return found


def test_the_kernels_handler_runs_programs_of_its_processor_only() -> None:
    assert handler(ARM64).runs(program("arm64"))
    assert not handler(ARM64).runs(program("amd64"))
    assert emulated([handler(ARM64)], HERE) == [ImagePlatform("linux", "arm64")]


@pytest.mark.parametrize(
    "text", [ARM64.replace("enabled", "disabled"), "enabled\ninterpreter /x\nextension .py\n"]
)
def test_a_disabled_handler_and_one_for_a_name_do_not_count(text: str) -> None:
    assert parse_emulator(text) is None


def test_a_handler_whose_emulator_is_looked_up_in_the_container_does_not_count() -> None:
    assert not handler(ARM64.replace("POCF", "POC")).runs(program("arm64"))


@pytest.mark.parametrize("name", ["linux/amd64", "linux/386", "linux/arm64"])
def test_own_and_emulated_platforms_run(name: str) -> None:
    require_runnable(parse_platform(name), [handler(ARM64)], HERE)


def test_another_platform_is_refused_with_the_remedy() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        require_runnable(parse_platform("linux/s390x"), [handler(ARM64)], HERE)
    assert str(refused.value) == (
        "this node runs programs for linux/amd64, and has no emulator for linux/s390x: install the package "
        "qemu-user-static on the node, or build on a node for linux/s390x"
    )


def test_handlers_are_read_from_the_kernels_directory(tmp_path: Path) -> None:
    assert read_emulators(tmp_path / "not-mounted") == []
    (tmp_path / "status").write_text("enabled\n")
    (tmp_path / "register").write_text("")
    (tmp_path / "qemu-aarch64").write_text(ARM64)
    (tmp_path / "odd").write_text("enabled\nmagic zz\n")
    assert read_emulators(tmp_path) == [handler(ARM64)]
    (tmp_path / "status").write_text("disabled\n")
    assert read_emulators(tmp_path) == []
