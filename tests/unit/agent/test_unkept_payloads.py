"""Secrets and configs that cannot be kept are tried again, and not after a manager has taken them back."""

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.agent.executor.simulated import SimulatedExecutor, SimulatedMachine
from skep.agent.tasks.task_files import RememberedTask, TaskFiles
from skep.agent.tasks.worker import Worker
from skep.aio.clock import SystemClock
from skep.model.assignment import AssignmentSet, ConfigFile, SecretFile
from skep.model.container import ContainerSpec, SecretReference
from skep.model.service import TaskSpec
from skep.model.task import AssignedTask, TaskState
from skep.model.values.ids import ConfigId, SecretId, TaskId
from tests.support.managers.fake_worker import a_session
from tests.unit.agent.test_worker import QUICK, Reports, assigned


class Payloads:
    """Keeps secrets and configs while there is room."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.has_room = True

    def put(self, secrets: Iterable[SecretFile], configs: Iterable[ConfigFile]) -> None:
        some: list[SecretFile | ConfigFile] = [*secrets, *configs]
        if some and not self.has_room:
            raise OSError("no space left on device")
        self.kept.update((one.id, one.data) for one in some)

    def drop(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        for id in (*secrets, *configs):
            self.kept.pop(id, None)

    def keep_only(self, secrets: Collection[SecretId], configs: Collection[ConfigId]) -> None:
        self.kept = {id: data for id, data in self.kept.items() if id in (*secrets, *configs)}

    def has(self, container: ContainerSpec) -> bool:
        needed = [secret.secret_id for secret in container.secrets]
        return self.kept.keys() >= {*needed, *(config.config_id for config in container.configs)}


class HeldClock(SystemClock):
    """Whoever sleeps does so until the test says that it is enough."""

    def __init__(self) -> None:
        self.enough = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        await self.enough.wait()
        await asyncio.sleep(0)


@asynccontextmanager
async def working(directory: Path, payloads: Payloads, clock: HeldClock) -> AsyncIterator[Worker]:
    worker = Worker(
        executor=SimulatedExecutor(clock, random.Random(1), SimulatedMachine(), QUICK),
        files=TaskFiles(directory),
        reports=Reports(),
        clock=clock,
        payloads=payloads,
        session_state=a_session(),
    )
    async with asyncio.TaskGroup() as group:
        running = group.create_task(worker.run())
        yield worker
        running.cancel()


def brings(
    *secrets: str, configs: Collection[str] = (), complete: bool = False, data: bytes = b"1"
) -> AssignmentSet:
    return AssignmentSet(
        complete=complete,
        secrets=tuple(SecretFile(id=SecretId(id), data=data) for id in secrets),
        configs=tuple(ConfigFile(id=ConfigId(id), data=data) for id in configs),
    )


async def tried_again(payloads: Payloads, clock: HeldClock) -> None:
    payloads.has_room = True
    await some_turns(clock)


async def some_turns(clock: HeldClock) -> None:
    clock.enough.set()
    for _ in range(100):
        await asyncio.sleep(0)


async def test_what_could_not_be_kept_is_kept_in_the_end(tmp_path: Path) -> None:
    payloads, clock = Payloads(), HeldClock()
    async with working(tmp_path, payloads, clock) as worker:
        payloads.has_room = False
        await worker.assign(brings("a", configs=("c",), complete=True))
        await worker.assign(brings("b"))
        assert payloads.kept == {}
        await tried_again(payloads, clock)
        assert payloads.kept == {"a": b"1", "b": b"1", "c": b"1"}


async def test_what_was_taken_back_meanwhile_is_not_written(tmp_path: Path) -> None:
    payloads, clock = Payloads(), HeldClock()
    async with working(tmp_path, payloads, clock) as worker:
        payloads.has_room = False
        await worker.assign(brings("a", "b", configs=("c", "d"), complete=True))
        gone = AssignmentSet(
            complete=False, removed_secrets=(SecretId("a"),), removed_configs=(ConfigId("c"),)
        )
        await worker.assign(gone)
        await tried_again(payloads, clock)
        assert payloads.kept == {"b": b"1", "d": b"1"}


async def test_what_a_complete_assignment_lacks_is_not_written(tmp_path: Path) -> None:
    payloads, clock = Payloads(), HeldClock()
    async with working(tmp_path, payloads, clock) as worker:
        payloads.has_room = False
        await worker.assign(brings("a", "b", configs=("c",), complete=True))
        await worker.assign(brings("b", complete=True))
        await tried_again(payloads, clock)
        assert payloads.kept == {"b": b"1"}


async def test_newer_data_is_not_overwritten(tmp_path: Path) -> None:
    payloads, clock = Payloads(), HeldClock()
    async with working(tmp_path, payloads, clock) as worker:
        payloads.has_room = False
        await worker.assign(brings("a", "b", complete=True))
        payloads.has_room = True
        await worker.assign(brings("a", data=b"2"))
        assert payloads.kept == {"a": b"2"}
        await tried_again(payloads, clock)
        assert payloads.kept == {"a": b"2", "b": b"1"}


def with_secret(id: str) -> AssignedTask:
    task = assigned("t").task
    container = ContainerSpec(image="i", secrets=(SecretReference(secret_id=SecretId(id)),))
    return AssignedTask(task=replace(task, spec=TaskSpec(container_spec=container)), service_name="web")


@pytest.mark.parametrize("is_kept", [False, True])
async def test_a_task_starts_after_a_power_loss_once_its_secret_has_been_sent_again(
    tmp_path: Path, is_kept: bool
) -> None:
    """If the process of the node alone has ended, the secret is still there, and the task starts without a manager."""
    task, payloads, clock = with_secret("a"), Payloads(), HeldClock()
    TaskFiles(tmp_path).write({TaskId("t"): RememberedTask(task, task.task.status)})
    payloads.kept = {"a": b"1"} if is_kept else {}
    async with working(tmp_path, payloads, clock) as worker:
        await worker.wait_ready()
        await some_turns(clock)
        expected = TaskState.RUNNING if is_kept else TaskState.ASSIGNED
        assert worker.statuses()[TaskId("t")].state is expected
        await worker.assign(replace(brings("a", complete=True), tasks=(task,)))
        await some_turns(clock)
        assert worker.statuses()[TaskId("t")].state is TaskState.RUNNING
