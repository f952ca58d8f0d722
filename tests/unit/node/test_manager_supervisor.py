"""The manager process follows the role of the node's certificate."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from skep.model.node import NodeRole
from skep.node.cluster.manager_supervisor import ManagerSupervisor
from skep.node.cluster.membership_states import MembershipState
from skep.paths import Paths
from skep.security.locking import KeyLock, new_unlock_key


class FakeProcess:
    """A manager process that runs until it is cancelled, or until the others remove it."""

    def __init__(self) -> None:
        self.error = ""
        self.removed = asyncio.Event()

    async def run(self) -> None:
        await self.removed.wait()
        self.error = "removed"

    def dismiss(self) -> None:
        pass

    def reload(self) -> None:
        pass


class Rig:
    """A node whose certificate changes."""

    def __init__(self, directory: Path, *, is_manager: bool) -> None:
        self.paths = Paths(directory / "data", directory / "run")
        self.made: list[FakeProcess] = []
        self.is_manager = is_manager
        self.renewals = 0
        self.supervisor = ManagerSupervisor(
            self.paths,
            is_manager=is_manager,
            new_process=self._new_process,
            write_files=self._write_files,
            save_role=self._save_role,
            renew_certificate=self._renew_certificate,
        )
        if is_manager:
            self._write_files()

    @property
    def has_files(self) -> bool:
        return self.paths.manager.exists()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            task = group.create_task(self.supervisor.run())
            yield self
            task.cancel()

    async def wait_processes(self, count: int) -> None:
        while len(self.made) < count:  # noqa: ASYNC110 - the rig announces nothing
            await asyncio.sleep(0.001)

    async def wait_worker(self) -> None:
        while self.is_manager or self.has_files:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)

    def _new_process(self) -> FakeProcess:
        self.made.append(FakeProcess())
        return self.made[-1]

    def _write_files(self) -> None:
        self.paths.manager.mkdir(parents=True)
        self.paths.manager_config.touch()

    def _save_role(self, is_manager: bool) -> None:
        self.is_manager = is_manager

    def _renew_certificate(self) -> None:
        assert self.supervisor.state is MembershipState.REMOVED
        self.renewals += 1


async def test_a_promoted_node_starts_a_manager_and_a_demoted_one_forgets_it(tmp_path: Path) -> None:
    async with Rig(tmp_path, is_manager=False).running() as rig:
        await asyncio.sleep(0)
        assert not rig.made
        rig.supervisor.set_role(NodeRole.MANAGER)
        await rig.wait_processes(1)
        assert rig.is_manager
        assert rig.has_files
        rig.supervisor.set_role(NodeRole.WORKER)
        await rig.wait_worker()
        rig.supervisor.set_role(NodeRole.MANAGER)
        await rig.wait_processes(2)


async def test_a_renewed_certificate_of_the_same_role_changes_nothing(tmp_path: Path) -> None:
    async with Rig(tmp_path, is_manager=True).running() as rig:
        await rig.wait_processes(1)
        rig.supervisor.set_role(NodeRole.MANAGER)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(rig.made) == 1


async def test_a_manager_that_was_removed_starts_over_with_nothing(tmp_path: Path) -> None:
    """It is demoted and promoted again faster than its certificate follows: the others refuse that one for good."""
    async with Rig(tmp_path, is_manager=True).running() as rig:
        await rig.wait_processes(1)
        (rig.paths.manager / "old").touch()
        rig.made[0].removed.set()
        await rig.wait_processes(2)
        assert not (rig.paths.manager / "old").exists()
        assert not rig.supervisor.error
        assert rig.supervisor.state is MembershipState.MANAGER
        assert rig.renewals == 1


async def test_a_manager_that_was_removed_and_demoted_stays_away(tmp_path: Path) -> None:
    async with Rig(tmp_path, is_manager=True).running() as rig:
        await rig.wait_processes(1)
        rig.made[0].removed.set()
        rig.supervisor.set_role(NodeRole.WORKER)
        await rig.wait_worker()
        assert len(rig.made) == 1


async def test_what_autolock_locked_is_in_clear_again_for_the_worker_that_a_manager_became(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path, is_manager=True)
    for directory in (rig.paths.certificates, rig.paths.run):
        directory.mkdir(parents=True)
    rig.paths.node_key.write_bytes(b"key")
    lock = KeyLock(rig.paths)
    lock.turn(new_unlock_key())
    assert rig.paths.node_key.read_bytes() != b"key"
    async with rig.running():
        await rig.wait_processes(1)
        rig.supervisor.set_role(NodeRole.WORKER)
        await rig.wait_worker()
    assert rig.paths.node_key.read_bytes() == b"key"
    assert not lock.is_on
