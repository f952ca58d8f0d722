"""Whatever one task or one container has the node meet, the others go on, and so does the node when it is over."""

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from skep.agent.tasks.task_files import RememberedTask, TaskFiles
from skep.agent.tasks.worker import Worker
from skep.engine.containers.container import ContainerState
from skep.errors import Unavailable
from skep.model.task import TaskState, TaskStatus
from tests.support.engine.oci_rig import EngineExecutor, Machine, QuickClock, memory_engine
from tests.support.file_faults import ERRNOS, Faults, file_faults
from tests.support.managers.fake_worker import a_session
from tests.unit.agent.test_worker import Reports, assigned, complete, difference

DEADLINE_S = 30


class Bug(Exception):
    pass


ERRORS: list[type[Exception]] = [Bug, RecursionError, MemoryError, ValueError, OSError, Unavailable]
VERBS = ["attach", "create", "start", "wait", "ended", "detach", "clear", "delete", "status"]


class Life:
    """A node: its worker comes and goes, its files and its machine stay."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.machine = Machine()
        self.reports = Reports()
        self.tasks: list[str] = []

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Worker]:
        engine = memory_engine(self.directory, self.machine)
        worker = Worker(
            executor=EngineExecutor(engine),
            files=TaskFiles(self.directory / "tasks", QuickClock()),
            reports=self.reports,
            clock=QuickClock(),
            session_state=a_session(),
        )
        async with asyncio.TaskGroup() as group:
            running = group.create_task(worker.run())
            await worker.wait_ready()
            yield worker
            assert not running.done()
            running.cancel()

    async def settled(self, id: str) -> TaskState:
        """Return when the task runs, or will not."""
        async with asyncio.timeout(DEADLINE_S):
            while not any(state >= TaskState.RUNNING for state in self.reports.states(id)):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return next(state for state in self.reports.states(id) if state >= TaskState.RUNNING)

    async def wait_empty(self, left: int = 0) -> None:
        """Return when the files of no more than ``left`` containers are there."""
        async with asyncio.timeout(DEADLINE_S):
            while len(list((self.directory / "containers").glob("*"))) > left:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    verb=st.sampled_from(VERBS),
    error=st.sampled_from(ERRORS),
    times=st.integers(1, 6),
    crashes=st.booleans(),
)
async def test_whatever_is_raised_about_one_container_the_others_go_on(
    tmp_path_factory: pytest.TempPathFactory, verb: str, error: type[Exception], times: int, crashes: bool
) -> None:
    life = Life(tmp_path_factory.mktemp("life"))
    left = [times]
    is_begun: list[str] = []

    def fault(at: str, container: str) -> None:
        if is_begun and at == verb and container not in is_begun and left[0]:
            left[0] -= 1
            raise error("injected")

    life.machine.fault = fault
    async with life.working() as worker:
        await worker.assign(complete(assigned("good")))
        assert await life.settled("good") is TaskState.RUNNING
        good = next(iter(life.machine.ended))
        is_begun.append(good)
        await worker.assign(difference(assigned("bad")))
        await life.settled("bad")
        if not crashes:
            await worker.assign(difference(removed=("bad",)))
            await life.wait_empty(left=1)
        assert life.reports.states("good")[-1] is TaskState.RUNNING
    async with life.working() as worker:
        await worker.assign(complete(assigned("good")))
        await life.wait_empty(left=1)
        assert not life.machine.ended[good].is_set()
        await worker.assign(complete())
        await life.wait_empty()


async def a_life(life: Life, faults: Faults) -> None:
    """Tasks come, end, go; the node process is replaced in the middle."""
    async with life.working() as worker:
        await worker.assign(complete(assigned("a"), assigned("b")))
        await life.settled("a")
        if await life.settled("b") is TaskState.RUNNING:
            life.machine.end(next(reversed(life.machine.ended)))
        await worker.assign(difference(removed=("a",)))
    async with life.working() as worker:
        await worker.assign(complete(assigned("b"), assigned("c")))
        await life.settled("c")
        faults.end()
        await worker.assign(complete(assigned("d")))
        assert await life.settled("d") is TaskState.RUNNING, "it goes on by itself when the fault has ended"
        await life.wait_empty(left=1)
        await worker.assign(complete())
        await life.wait_empty()


async def walk(tmp_path: Path, numbers: tuple[int, ...], count: int, step: int) -> int:
    """The n-th call on a file fails, for every n; gives how many there were."""
    errnos = itertools.cycle(numbers)
    for n in itertools.count(0, step):
        life = Life(tmp_path / str(n))
        life.directory.mkdir()
        with file_faults(life.directory) as faults:
            faults.plan(n, next(errnos), count)
            try:
                with capture_logs():  # thousands of traces
                    await a_life(life, faults)
            except BaseException as error:
                error.add_note(f"call {n}: {faults.hits}")
                raise
            if not faults.hits:
                return n
    raise AssertionError("unreachable")


@pytest.mark.parametrize("count", [1, 25])
async def test_calls_on_files_may_fail(tmp_path: Path, count: int) -> None:
    """A part of the walk below, for each day."""
    assert await walk(tmp_path, ERRNOS, count, 17) > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
async def test_every_call_on_a_file_may_fail(tmp_path: Path, number: int) -> None:
    """Each call in a whole life of tasks, with each error."""
    assert await walk(tmp_path, (number,), 1, 1) > 100


async def test_a_task_whose_file_cannot_be_written_is_written_when_there_is_room(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path, QuickClock())
    with file_faults(tmp_path) as faults, capture_logs() as logs:
        faults.plan(0, errno.ENOSPC, 1 << 30)
        files.remember(RememberedTask(assigned("a"), TaskStatus()))
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            running = group.create_task(files.run())
            while not logs:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            faults.end()
            while not (tmp_path / "a.json").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            running.cancel()


async def test_a_container_that_cannot_be_removed_says_why_and_goes_when_it_can(tmp_path: Path) -> None:
    life = Life(tmp_path)
    async with life.working() as worker:
        await worker.assign(complete(assigned("a")))
        await life.settled("a")
        (container,) = worker.executor.engine.list()  # type: ignore[attr-defined]
        upper = life.directory / "containers" / container.id / "upper"
        (upper / "stuck").touch()
        with file_faults(tmp_path) as faults:
            faults.choose(errno.EIO, lambda call, path: (call, path.name) == ("unlink", "stuck"))
            await worker.assign(complete())
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    (left,) = worker.executor.engine.list()  # type: ignore[attr-defined]
                    if left.error:
                        break
                    await asyncio.sleep(0.001)
            assert left.state is ContainerState.REMOVING
            assert left.error.endswith("'stuck' cannot be removed: Input/output error")
            assert (upper.parent / "record").exists()
        await life.wait_empty()
