"""What becomes of the processes that a node process has started, when that one fails."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from skep import __version__
from skep.aio.clock import SystemClock
from skep.bootstrap import STARVED
from skep.linux.detached import identify, is_alive, read_pid_file, write_pid_file
from skep.node.supervision import supervisor
from skep.node.supervision.supervisor import CRASHES_MAX, SupervisionPolicy, Supervisor, terminate
from skep.paths import Paths
from tests.support.machines.daemon_rig import INIT, DaemonRig, children_named, wait_until

# --- the supervisor alone ---------------------------------------------------------------------------------------------


class Forks:
    """Starts a process that sleeps, and writes its pid file as a detached one does."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self.started: list[subprocess.Popen[bytes]] = []

    async def fork(self, entry: str, arguments: Sequence[str]) -> int:
        process = self._start()
        self.started.append(process)
        named = identify(process.pid, __version__)
        if named is not None:  # it may have ended already
            write_pid_file(self._paths.pid_file(entry), named)
        return process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "1000"])

    async def reap(self, pid: int) -> int | None:
        return next(one.wait(10) for one in self.started if one.pid == pid)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "run").mkdir()
    return Paths(tmp_path / "data", tmp_path / "run")


@pytest.fixture
def forks(paths: Paths) -> Iterator[Forks]:
    forks = Forks(paths)
    yield forks
    for process in forks.started:
        process.kill()
        process.wait(10)


class FastClock(SystemClock):
    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def supervising(paths: Paths, forks: Forks, ends_with_node: Callable[[], bool] = lambda: False) -> Supervisor:
    return Supervisor(
        "manager",
        paths,
        zygote=forks,
        clock=FastClock(),
        rng=lambda: 0.5,
        ends_with_node=ends_with_node,
    )


async def wait_started(supervised: Supervisor) -> None:
    async with asyncio.timeout(10):
        while supervised.process is None:  # noqa: ASYNC110  # a process announces nothing
            await asyncio.sleep(0.01)


async def test_the_failure_of_a_neighbor_ends_no_process_and_the_next_supervisor_adopts_it(
    paths: Paths, forks: Forks
) -> None:
    first = supervising(paths, forks)

    async def fail() -> None:
        await wait_started(first)
        raise RuntimeError("a bug in the node process")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(first.run())
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        await both()
    assert first.process is not None
    assert is_alive(first.process)

    second = supervising(paths, forks)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(second.run())
        await wait_started(second)
        assert second.process == first.process
        second.dismiss()
        running.cancel()
    assert not is_alive(first.process)
    assert len(forks.started) == 1


async def test_a_planned_stop_of_the_node_ends_its_processes(paths: Paths, forks: Forks) -> None:
    supervised = supervising(paths, forks, lambda: True)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(supervised.run())
        await wait_started(supervised)
        process = supervised.process
        running.cancel()
    assert process is not None
    assert not is_alive(process)


async def test_a_descriptor_that_cannot_be_had_is_no_end_of_the_process(
    paths: Paths, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [OSError(24, "Too many open files")] * 12

    async def wait_end(process: object) -> None:
        if refusals:
            raise refusals.pop()
        await asyncio.Event().wait()

    monkeypatch.setattr(supervisor, "wait_end", wait_end)
    supervised = supervising(paths, forks)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(supervised.run())
        while refusals:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.01)
        running.cancel()
    assert len(forks.started) == 1
    assert supervised.error == ""
    assert supervised.process is not None
    monkeypatch.undo()
    await terminate(supervised.process, 5)


async def test_what_the_machine_refused_is_tried_for_ever_and_said_until_it_lasts(
    paths: Paths,
) -> None:
    class Starving(Forks):
        def _start(self) -> subprocess.Popen[bytes]:
            if len(self.started) < 2 * CRASHES_MAX:
                paths.last_words("manager").write_text("/data/x: No space left on device")
                return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({STARVED})"])
            return super()._start()

    said: list[str] = []
    starving = Starving(paths)
    supervised = Supervisor(
        "manager",
        paths,
        zygote=starving,
        clock=FastClock(),
        rng=lambda: 0.5,
        ends_with_node=lambda: True,
        policy=SupervisionPolicy(starved=STARVED, show_condition=said.append),
    )
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        running = group.create_task(supervised.run())
        while len(starving.started) <= 2 * CRASHES_MAX or said[-1] != "":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert supervised.error == ""
        running.cancel()
    assert "the manager process does not run: /data/x: No space left on device. It is retried" in said


async def test_a_pid_file_that_cannot_be_read_now_is_not_an_absent_process(paths: Paths) -> None:
    paths.pid_file("manager").mkdir()
    with pytest.raises(IsADirectoryError):
        read_pid_file(paths.pid_file("manager"))
    paths.pid_file("manager").rmdir()
    assert read_pid_file(paths.pid_file("manager")) is None
    paths.pid_file("manager").write_bytes(msgspec.json.encode({"odd": 1}))
    assert read_pid_file(paths.pid_file("manager")) is None


# --- the whole daemon -------------------------------------------------------------------------------------------------

FAILING = """
import asyncio, sys
from pathlib import Path
from skep import daemon
from skep.node.node import Node
from skep.node.supervision import zygote

zygote.LASTED_S = 0.0  # one that ends at once is forked again, too
run = Node.run

async def fail() -> None:
    file = Path(sys.argv[1])
    while not file.exists():
        await asyncio.sleep(0.02)
    file.unlink()
    raise RuntimeError("injected")

async def failing_run(self, ready):
    async with asyncio.TaskGroup() as group:
        group.create_task(run(self, ready))
        group.create_task(fail())

Node.run = failing_run
sys.exit(daemon.main(sys.argv[2:]))
"""
"""A daemon whose node process meets an exception that nothing expects, once a file is there."""


class FailingRig(DaemonRig):
    def command(self, *flags: str) -> list[str]:
        _, _, *arguments = super().command(*flags)
        return [sys.executable, "-c", FAILING, str(self.toml.with_name("fail")), *arguments]

    def nodes(self) -> list[int]:
        """Node processes."""
        assert self.process is not None
        return children_named(self.process.pid, "skep-node")


def test_an_exception_in_the_node_process_ends_that_one_alone(rig: DaemonRig) -> None:
    failing = FailingRig(rig.data.parent)
    failing.start()
    rig.process = failing.process  # cleaned up by the fixture
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200

    def pids() -> tuple[int | None, int | None, list[int]]:
        manager = rig.pid_of("manager")
        return manager, rig.pid_of("net"), children_named(manager, "etcd") if manager else []

    before, first = pids(), failing.nodes()
    assert None not in before
    assert before[2]
    assert first
    rig.toml.with_name("fail").touch()
    wait_until(lambda: "RuntimeError: injected" in rig.log.read_text(), "the node process fails")
    wait_until(
        lambda: (
            failing.nodes() not in ([], first) and rig.answers() and rig.swarm()["LocalNodeState"] == "active"
        ),
        "the node is back",
        within_s=50,
    )
    assert pids() == before
