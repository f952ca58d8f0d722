"""The state machine of membership: its table, its drawing, and changes of role that are interrupted anywhere."""

import asyncio
import itertools
import re
from pathlib import Path

import pytest

from skep.aio.trees import discard_tree_now
from skep.model.node import NodeRole
from skep.node.cluster import manager_supervisor
from skep.node.cluster.manager_supervisor import ManagerSupervisor
from skep.node.cluster.membership_states import (
    TRANSITIONS,
    MembershipEvent,
    MembershipState,
    after,
    docker_state,
)
from skep.paths import Paths

PAGE = Path(__file__).parents[3] / "docs" / "design" / "node.md"
INITIAL = {MembershipState.STARTING, MembershipState.PENDING, MembershipState.WORKER, MembershipState.MANAGER}


def test_the_drawing_is_the_table() -> None:
    (drawing,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", PAGE.read_text(), re.DOTALL)
    drawn = re.findall(r"^\s*(\w+) --> (\w+) : (.+)$", drawing, re.MULTILINE)
    table = {(state.value, to.value, event.value) for (state, event), to in TRANSITIONS.items()}
    assert sorted(drawn) == sorted(table)
    assert set(re.findall(r"\[\*\] --> (\w+)", drawing)) == {state.value for state in INITIAL}


def test_every_state_is_reached_and_every_event_is_used() -> None:
    reached = set(INITIAL)
    while found := {to for (state, _), to in TRANSITIONS.items() if state in reached} - reached:
        reached |= found
    assert reached == set(MembershipState)
    assert {event for _, event in TRANSITIONS} == set(MembershipEvent)


def test_a_node_leaves_from_wherever_it_is_a_member_or_may_be_one() -> None:
    for state in (
        MembershipState.MEMBER,
        MembershipState.FAILED,
        MembershipState.LOCKED,
        MembershipState.UNREADABLE,
    ):
        assert after(after(state, MembershipEvent.LEAVE), MembershipEvent.LEFT) is MembershipState.OUTSIDE


def test_an_event_that_a_state_does_not_have_is_an_error_of_the_program() -> None:
    with pytest.raises(AssertionError, match="LEAVE in state OUTSIDE"):
        after(MembershipState.OUTSIDE, MembershipEvent.LEAVE)


@pytest.mark.parametrize(
    ("membership", "session", "error", "shown"),
    [
        (MembershipState.STARTING, None, "", "inactive"),
        (MembershipState.OUTSIDE, None, "", "inactive"),
        (MembershipState.UNREADABLE, None, "disk", "error"),
        (MembershipState.LOCKED, None, "", "locked"),
        (MembershipState.ENTERING, MembershipState.PENDING, "", "pending"),
        (MembershipState.MEMBER, MembershipState.PENDING, "", "pending"),
        (MembershipState.MEMBER, MembershipState.ACTIVE, "", "active"),
        (MembershipState.MEMBER, MembershipState.ACTIVE, "manager given up", "error"),
        (MembershipState.FAILED, MembershipState.ACTIVE, "removed", "error"),
        (MembershipState.LEAVING, None, "", "inactive"),
    ],
)
def test_docker_is_shown_one_of_its_states(
    membership: MembershipState, session: MembershipState | None, error: str, shown: str
) -> None:
    assert docker_state(membership, session, error) == shown


# --- interruptions ----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The node process ends here."""


class Disk:
    """What a node keeps about its role, and the process that crashes before its step number ``crash_at``."""

    def __init__(self, directory: Path, *, is_manager: bool, certificate: NodeRole) -> None:
        self.paths = Paths(directory / "data", directory / "run")
        self.is_manager = is_manager
        self.certificate = certificate
        self.steps_left = -1
        self.processes: list[Process] = []
        if is_manager:
            self._write_files()

    def step(self) -> None:
        if self.steps_left == 0:
            raise Crash
        self.steps_left -= 1

    def supervisor(self) -> ManagerSupervisor:
        """Of the next node process."""
        supervisor = ManagerSupervisor(
            self.paths,
            is_manager=self.is_manager,
            new_process=self._new_process,
            write_files=self._write_files,
            save_role=self._save_role,
            renew_certificate=self.step,
        )
        supervisor.set_role(self.certificate)
        return supervisor

    def _new_process(self) -> "Process":
        self.step()
        assert self.paths.manager_config.exists(), "a manager without its files"
        assert self.is_manager, "node.json names a manager before it starts"
        self.processes.append(Process())
        return self.processes[-1]

    def _write_files(self) -> None:
        self.step()
        self.paths.manager.mkdir(parents=True, exist_ok=True)
        self.step()
        self.paths.manager_config.touch()
        self.step()

    def _save_role(self, is_manager: bool) -> None:
        self.step()
        self.is_manager = is_manager
        self.step()

    @property
    def is_settled(self) -> bool:
        is_manager = self.certificate is NodeRole.MANAGER
        runs = bool(self.processes) and not self.processes[-1].has_ended
        has_files = self.paths.manager_config.exists()
        assert has_files or not runs
        return self.is_manager == has_files == is_manager == runs


class Process:
    """A manager process that runs until it is cancelled, or until the others remove it."""

    error = ""

    def __init__(self) -> None:
        self.removed = asyncio.Event()
        self.has_ended = False

    async def run(self) -> None:
        try:
            await self.removed.wait()
        finally:
            self.has_ended = True

    def dismiss(self) -> None:
        pass

    def reload(self) -> None:
        pass


async def live(disk: Disk, role: NodeRole, *, is_removed: bool = False) -> bool:
    """A node process, in whose life the certificate becomes one of ``role``; whether it got everything settled."""
    supervisor = disk.supervisor()
    running = asyncio.create_task(supervisor.run())
    try:
        async with asyncio.timeout(20):
            while supervisor.state is MembershipState.MANAGER and not (disk.processes or running.done()):  # noqa: ASYNC110
                await asyncio.sleep(0)
            if is_removed:
                for process in disk.processes:
                    process.removed.set()
                while supervisor.state is MembershipState.MANAGER and not running.done():  # noqa: ASYNC110
                    await asyncio.sleep(0)
            disk.certificate = role
            supervisor.set_role(role)
            while not (disk.is_settled or running.done()):  # noqa: ASYNC110
                await asyncio.sleep(0)
            return not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.parametrize(
    ("before", "role", "is_removed"),
    [
        (NodeRole.WORKER, NodeRole.MANAGER, False),
        (NodeRole.MANAGER, NodeRole.WORKER, False),
        (NodeRole.MANAGER, NodeRole.WORKER, True),
        (NodeRole.MANAGER, NodeRole.MANAGER, True),
    ],
)
async def test_a_change_of_role_is_completed_after_a_crash_before_any_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: NodeRole, role: NodeRole, is_removed: bool
) -> None:
    def discard(path: Path) -> None:
        disk.step()
        discard_tree_now(path)
        disk.step()

    monkeypatch.setattr(manager_supervisor, "discard_tree_now", discard)
    for crash_at in itertools.count():
        disk = Disk(tmp_path / str(crash_at), is_manager=before is NodeRole.MANAGER, certificate=before)
        disk.steps_left = crash_at
        if await live(disk, role, is_removed=is_removed):
            break
        disk.steps_left = -1
        disk.processes.clear()
        assert await live(disk, role)
    assert crash_at >= 5
