"""A conmon that ends before it may start the runtime."""

import asyncio
import secrets
from pathlib import Path

import pytest

from skep.engine.confinement.cgroups import Cgroups
from skep.engine.runtime.conmon import Conmons, StartError, read_pid
from tests.support.engine.runc_lab import remove_cgroups


async def test_a_conmon_that_ends_at_once_is_a_failed_start_and_no_broken_pipe(tmp_path: Path) -> None:
    parent = f"skep-test-{secrets.token_hex(4)}"
    conmons = Conmons(Cgroups(parent))
    try:
        async with conmons.start(["false"], tmp_path, attach=False) as pipes:
            assert await pipes.responses.read() == b"", "it has ended, and no process reads the start pipe"
            pipes.proceed()
            with pytest.raises(StartError, match="conmon ended without a response"):
                await read_pid(pipes.responses, "false")
    finally:
        conmons.close()
        remove_cgroups(parent)


async def test_a_start_expects_the_move_of_its_runtime(tmp_path: Path) -> None:
    parent = f"skep-test-{secrets.token_hex(4)}"
    cgroups = CountedMoves(parent)
    conmons = Conmons(cgroups)
    try:
        async with conmons.start(["true"], tmp_path, attach=False) as pipes:
            await pipes.responses.read()
        await asyncio.get_running_loop().shutdown_default_executor()
    finally:
        conmons.close()
        remove_cgroups(parent)
    assert cgroups.groups_seen
    assert set(cgroups.groups_seen) == {Path("/proc/self/cgroup").read_text()}, "of no group of its own"


class CountedMoves(Cgroups):
    """The groups that the moving thread is in afterwards."""

    def __init__(self, parent: str) -> None:
        super().__init__(parent)
        self.groups_seen: list[str] = []

    def expect_move(self) -> None:
        super().expect_move()
        self.groups_seen.append(Path("/proc/thread-self/cgroup").read_text())
