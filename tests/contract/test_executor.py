"""What every executor does, whatever it runs tasks with."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import msgspec
import pytest

from skep.agent.executor.interface import Controller, Executor, Rejected
from skep.agent.executor.process import ProcessExecutor
from skep.agent.executor.simulated import Behavior, SimulatedExecutor, SimulatedMachine
from skep.aio.clock import SystemClock
from skep.errors import NotFound
from skep.model.container import ContainerSpec
from skep.model.service import TaskSpec
from skep.model.task import AssignedTask, Task
from skep.model.values.ids import ServiceId, TaskId, new_id
from skep.model.values.times import SECOND_NS
from tests.support.engine.runc_lab import IMAGE, Lab

FOREVER = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
DEAF = ("sh", "-c", "trap '' TERM; while :; do sleep 0.05; done")


def a_task(*command: str, grace_s: float = 5) -> AssignedTask:
    """A task as its node gets it."""
    spec = ContainerSpec(image=IMAGE, command=command, stop_grace_period=round(grace_s * SECOND_NS))
    task = Task(id=TaskId(new_id()), slot=1, service_id=ServiceId("s1"), spec=TaskSpec(container_spec=spec))
    return AssignedTask(task=task, service_name="web")


class Machines:
    """A machine of one kind, and the executors that one after the other work on it."""

    def __init__(
        self, make: Callable[[Behavior], Executor], stack: AsyncExitStack, *, is_real: bool = True
    ) -> None:
        self._make = make
        self._stack = stack
        self._is_real = is_real

    async def executor(self, behavior: Behavior | None = None) -> Executor:
        """A new executor on the same machine.  ``behavior`` tells a simulated one what the commands would
        do."""
        executor = self._make(behavior or Behavior())
        await self._stack.enter_async_context(executor.running())
        return executor

    async def wait_listening(self, controller: Controller) -> None:
        """Wait until the command has set its trap: before that, the first process of a container ignores SIGTERM."""
        observed = controller.observed()
        assert observed is not None
        async with asyncio.timeout(10):
            while self._is_real and not catches_sigterm(observed.container.pid):  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.01)


def catches_sigterm(pid: int) -> bool:
    """Whether the process is the command itself, no longer runc on the way to it, with a handler for SIGTERM."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return words[0] == b"sh" and bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.fixture(
    params=[
        pytest.param("oci", marks=pytest.mark.needs("root", "runc", "conmon", "nft", "ip", "busybox")),
        "process",
        "simulated",
    ]
)
async def machines(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Machines]:
    async with AsyncExitStack() as outer, AsyncExitStack() as stack:
        match request.param:
            case "oci":
                lab = await outer.enter_async_context(Lab(tmp_path).running())
                yield Machines(lambda _: lab.executor(), stack)
            case "process":
                yield Machines(lambda _: ProcessExecutor(tmp_path / "processes"), stack)
            case _:
                machine = SimulatedMachine()
                yield Machines(
                    lambda behavior: SimulatedExecutor(SystemClock(), random.Random(1), machine, behavior),
                    stack,
                    is_real=False,
                )


async def started(executor: Executor, task: AssignedTask) -> Controller:
    controller = executor.controller(task)
    await controller.prepare()
    await controller.start()
    return controller


async def test_a_task_runs_and_ends_with_its_exit_code(machines: Machines) -> None:
    executor = await machines.executor(Behavior(run_s=0.1, exit_code=7))
    controller = await started(executor, a_task("sh", "-c", "sleep 0.1; exit 7"))
    ended = await controller.wait()
    assert (ended.exit_code, ended.message) == (7, "task: non-zero exit (7)")
    await controller.remove()


async def test_success_has_no_message(machines: Machines) -> None:
    executor = await machines.executor(Behavior(run_s=0.05))
    controller = await started(executor, a_task("true"))
    ended = await controller.wait()
    assert (ended.exit_code, ended.message) == (0, "")
    await controller.remove()


async def test_start_gives_the_process_and_the_exit_code_is_observed_later(machines: Machines) -> None:
    executor = await machines.executor()
    task = a_task(*FOREVER)
    controller = executor.controller(task)
    assert controller.observed() is None
    await controller.prepare()
    running = await controller.start()
    assert running.container.pid > 1
    assert running.container.container_id
    await controller.terminate()
    observed = controller.observed()
    assert observed is not None
    assert (observed.container.pid, observed.container.exit_code) == (0, 137)
    await controller.remove()


async def test_every_verb_may_be_repeated(machines: Machines) -> None:
    executor = await machines.executor()
    controller = await started(executor, a_task(*FOREVER))
    first = controller.observed()
    await controller.prepare()
    assert await controller.start() == first
    await controller.shutdown()
    await controller.shutdown()
    assert await controller.wait() == await controller.wait()
    await controller.terminate()
    await controller.remove()
    await controller.remove()


async def test_shutdown_of_what_never_started_is_nothing(machines: Machines) -> None:
    executor = await machines.executor()
    controller = executor.controller(a_task(*FOREVER))
    await controller.shutdown()
    await controller.prepare()
    await controller.shutdown()
    await controller.remove()
    assert await executor.leftovers() == []


async def test_what_was_prepared_and_never_started_has_not_ended_well(machines: Machines) -> None:
    """A node process may end between the two steps of a restart without a manager."""
    executor = await machines.executor()
    controller = executor.controller(a_task(*FOREVER))
    await controller.prepare()
    with pytest.raises(NotFound):
        async with asyncio.timeout(10):
            await controller.wait()
    await controller.remove()


async def test_a_start_that_is_interrupted_at_any_moment_leaves_no_process(tmp_path: Path) -> None:
    """As when the task is retired at that moment."""
    executor = ProcessExecutor(tmp_path)
    async with executor.running():
        for turns in range(40):
            task = a_task("sleep", f"4{turns:02}.5")
            controller = executor.controller(task)
            await controller.prepare()
            starting = asyncio.create_task(controller.start())
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            starting.cancel()
            await asyncio.wait([starting])
            await controller.shutdown()
            await controller.remove()
    left = [one for one in command_lines() if one.startswith(b"sleep\x004") and one.endswith(b".5\x00")]
    assert left == []


def command_lines() -> list[bytes]:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes())
    return found


async def test_shutdown_ends_a_process_within_its_grace(machines: Machines) -> None:
    executor = await machines.executor()
    controller = await started(executor, a_task(*FOREVER, grace_s=20))
    await machines.wait_listening(controller)
    async with asyncio.timeout(10):
        await controller.shutdown()
    await controller.wait()
    await controller.remove()


async def test_shutdown_kills_a_process_that_does_not_listen(machines: Machines) -> None:
    executor = await machines.executor()
    controller = await started(executor, a_task(*DEAF, grace_s=0.2))
    async with asyncio.timeout(10):
        await controller.shutdown()
    # 2: on a crowded machine the signal may come before runc's own process has become the container's.
    assert (await controller.wait()).exit_code in (137, 143, 2)
    await controller.remove()


async def test_a_shutdown_that_is_interrupted_and_repeated_signals_once(machines: Machines) -> None:
    """As when a service is removed while its task stops.  Many programs end at once at the second signal."""
    counting = "trap 'n=$((n + 1)); [ $n -lt 2 ] || exit 9' TERM; while :; do sleep 0.05; done"
    executor = await machines.executor(Behavior(shutdown_s=5))
    controller = await started(executor, a_task("sh", "-c", counting, grace_s=2))
    await machines.wait_listening(controller)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await controller.shutdown()
    async with asyncio.timeout(10):
        await controller.shutdown()
    assert (await controller.wait()).exit_code in (137, 143)
    await controller.remove()


async def test_a_new_executor_adopts_what_runs(machines: Machines) -> None:
    task = a_task(*FOREVER)
    first = await started(await machines.executor(), task)
    before = first.observed()
    assert before is not None
    second = (await machines.executor()).controller(task)
    await second.prepare()
    assert await second.start() == before
    await second.terminate()
    assert (await second.wait()).exit_code == 137
    await second.remove()


async def test_an_unobserved_end_is_reported_afterwards(machines: Machines) -> None:
    task = a_task("sh", "-c", "exit 5")
    first = await started(await machines.executor(Behavior(run_s=0.05, exit_code=5)), task)
    await first.wait()
    second = (await machines.executor()).controller(task)
    await second.prepare()
    await second.start()
    assert (await second.wait()).exit_code == 5
    await second.remove()


async def test_leftovers_are_named_and_can_be_discarded(machines: Machines) -> None:
    task, other = a_task(*FOREVER), a_task(*FOREVER)
    executor = await machines.executor()
    await started(executor, task)
    await executor.controller(other).prepare()
    later = await machines.executor()
    assert list(await later.leftovers()) == sorted([task.task.id, other.task.id])
    await later.discard(task.task.id)
    await later.discard(other.task.id)
    await later.discard(TaskId("nobody"))
    assert await later.leftovers() == []


async def test_many_tasks_at_once_stay_apart(machines: Machines) -> None:
    executor = await machines.executor()
    controllers = await asyncio.gather(*(started(executor, a_task(*FOREVER)) for _ in range(6)))
    observed = [controller.observed() for controller in controllers]
    assert len({one.container.pid for one in observed if one is not None}) == 6
    await controllers[0].terminate()
    assert all(one.observed() == before for one, before in zip(controllers[1:], observed[1:], strict=True))
    await asyncio.gather(*(controller.remove() for controller in controllers))
    assert await executor.leftovers() == []


async def test_a_task_without_a_container_spec_is_rejected(machines: Machines) -> None:
    executor = await machines.executor(Behavior(rejected=1.0))
    task = a_task("true")
    bare = msgspec.structs.replace(task, task=msgspec.structs.replace(task.task, spec=TaskSpec()))
    with pytest.raises(Rejected):
        await executor.controller(bare).prepare()


async def test_plain_commands_are_not_taken_for_confined_processes(tmp_path: Path) -> None:
    """A node of unconfined commands would run them as root."""
    executor = ProcessExecutor(tmp_path / "processes")
    async with executor.running():
        task = a_task("true")
        container = ContainerSpec(image="scratch", args=("true",), labels={"skep.executor": "process"})
        confined = msgspec.structs.replace(task.task, spec=TaskSpec(container_spec=container))
        with pytest.raises(Rejected, match=r"cannot confine skep\.executor=process: remove the label"):
            await executor.controller(msgspec.structs.replace(task, task=confined)).prepare()
