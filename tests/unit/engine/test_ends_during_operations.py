"""A container that ends in the middle of an operation stays ended, and nothing waits for it for ever."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest

from skep.engine.containers.container import Container, ContainerState, NotRunning, StillRunning
from skep.engine.lifecycle.driver import KILLED_S_MAX
from skep.errors import Unavailable
from tests.support.engine.stub_engine import ID, Body, StubEngine, a_container, on_virtual_time

Run: TypeAlias = Callable[[Body], None]


@pytest.fixture
def simulated(tmp_path: Path) -> Run:
    """Run a test's body on virtual time, with an engine that has one running container."""
    return lambda body: on_virtual_time(body, tmp_path, a_container())


def actions(stubs: StubEngine) -> list[str]:
    return [event.action for event in stubs.engine.events.recent(0) if event.type == "container"]


@pytest.mark.parametrize("operation", ["pause", "unpause"])
def test_a_container_that_ends_while_it_is_paused_or_unpaused_stays_ended(
    simulated: Run, operation: str
) -> None:
    async def body(stubs: StubEngine) -> None:
        if operation == "unpause":
            await stubs.engine.pause(ID)
        stubs.runtime.during = lambda: stubs.end(7)
        with pytest.raises(NotRunning, match=f"^Container {ID} is not running$"):
            await getattr(stubs.engine, operation)(ID)
        ended = stubs.engine.get(ID)
        assert (ended.state, ended.exit_code) == (ContainerState.EXITED, 7)
        assert actions(stubs)[-1] == "die"
        assert (await stubs.engine.stop(ID)).exit_code == 7
        await stubs.engine.remove(ID, force=True)
        assert not stubs.engine.list()

    simulated(body)


def test_the_next_run_waits_for_the_pause_of_one_that_ends(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        starts: list[asyncio.Task[Container]] = []

        async def end_and_start() -> None:
            await stubs.end()
            starts.append(asyncio.create_task(stubs.engine.start(ID)))
            await asyncio.sleep(1)
            assert not stubs.runtime.starts, "it would be frozen"

        stubs.runtime.during = end_and_start
        with pytest.raises(NotRunning):
            await stubs.engine.pause(ID)
        assert (await starts[0]).state is ContainerState.RUNNING
        assert actions(stubs) == ["die", "start"]

    simulated(body)


@pytest.mark.parametrize("operation", ["pause", "unpause"])
def test_a_pause_that_waits_while_its_run_ends_is_none_of_the_next_run(
    simulated: Run, operation: str
) -> None:
    async def body(stubs: StubEngine) -> None:
        later: list[asyncio.Task[Any]] = []

        async def start_and_pause_behind_this() -> None:
            stubs.runtime.during = None
            for work in (stubs.engine.start(ID), getattr(stubs.engine, operation)(ID)):
                later.append(asyncio.create_task(work))
                await asyncio.sleep(1)
            await stubs.end()

        stubs.runtime.during = start_and_pause_behind_this
        with pytest.raises(NotRunning):
            await stubs.engine.pause(ID)
        starting, pausing = later
        assert (await starting).state is ContainerState.RUNNING
        with pytest.raises(NotRunning):
            await pausing
        assert stubs.runtime.frozen == 1, "that of the first run alone"

    simulated(body)


def test_a_pause_whose_caller_leaves_is_recorded(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        stubs.runtime.during = lambda: asyncio.sleep(1)
        pausing = asyncio.create_task(stubs.engine.pause(ID))
        await asyncio.sleep(0.5)
        pausing.cancel()
        await asyncio.wait([pausing])
        assert stubs.engine.get(ID).state is ContainerState.PAUSED

    simulated(body)


def test_a_pause_and_its_end_are_recorded(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.engine.pause(ID)
        assert stubs.engine.get(ID).state is ContainerState.PAUSED
        await stubs.engine.unpause(ID)
        assert stubs.engine.get(ID).state is ContainerState.RUNNING
        assert actions(stubs) == ["pause", "unpause"]

    simulated(body)


@pytest.mark.parametrize("operation", ["stop", "remove"])
def test_one_that_is_shown_as_running_without_a_process_is_stopped_and_removed(
    simulated: Run, operation: str
) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.end()
        await asyncio.sleep(1)  # everything of its run is freed
        stubs.engine.store.observe(ID, state=ContainerState.RUNNING)
        if operation == "stop":
            assert (await stubs.engine.stop(ID)).state is ContainerState.EXITED
        else:
            await stubs.engine.remove(ID, force=True)
            assert not stubs.engine.list()

    simulated(body)


def test_a_stop_that_cannot_kill_ends_in_time_and_the_end_is_recorded_when_it_comes(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(
            Unavailable, match=r"^tried to kill container, but did not receive an exit event$"
        ):
            await stubs.engine.stop(ID, 10.0)
        assert loop.time() - began == pytest.approx(10 + KILLED_S_MAX)
        assert stubs.engine.get(ID).is_running
        await stubs.end(137)  # the device has responded
        assert (await stubs.engine.stop(ID)).exit_code == 137
        assert (await stubs.engine.start(ID)).is_running

    simulated(body)


def test_a_removal_that_cannot_kill_ends_in_time_and_frees_the_container_for_others(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        removing = loop.create_task(stubs.engine.remove(ID, force=True))
        await asyncio.sleep(1)
        with pytest.raises(StillRunning):  # once it is its turn
            await stubs.engine.remove(ID)
        with pytest.raises(Unavailable, match=r"^cannot remove .* but did not receive an exit event$"):
            await removing
        assert loop.time() - began == pytest.approx(KILLED_S_MAX)
        assert stubs.engine.get(ID).is_running
        stubs.runtime.end(137)  # the device has responded
        await stubs.engine.remove(ID, force=True)
        assert not stubs.engine.list()

    simulated(body)


def test_a_stop_lets_a_paused_container_go_on_so_that_it_ends_by_its_signal(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.engine.pause(ID)
        sent: list[int] = []

        async def resumed() -> None:
            sent.extend(stubs.runtime.signals)
            asyncio.get_running_loop().call_later(1, stubs.runtime.end, 5)

        stubs.runtime.during = resumed
        assert (await stubs.engine.stop(ID, 10.0)).exit_code == 5
        assert sent == [signal.SIGTERM], "before it was resumed"
        assert stubs.runtime.signals == sent
        assert actions(stubs) == ["pause", "kill", "unpause", "die", "stop"]

    simulated(body)


@pytest.mark.parametrize(
    ("stop_signal", "sent", "state"),
    [
        ("SIGQUIT", "SIGQUIT", ContainerState.RUNNING),
        ("SIGQUIT", "SIGTERM", ContainerState.PAUSED),
        ("", "SIGUSR1", ContainerState.RUNNING),
    ],
)
def test_a_signal_ends_a_pause_as_in_docker(
    simulated: Run, stop_signal: str, sent: str, state: ContainerState
) -> None:
    async def body(stubs: StubEngine) -> None:
        config = msgspec.structs.replace(stubs.engine.get(ID).config, stop_signal=stop_signal)
        stubs.engine.store.observe(ID, config=config)
        await stubs.engine.pause(ID)
        await stubs.engine.kill(ID, sent)
        assert stubs.engine.get(ID).state is state

    simulated(body)


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_kill_returns_when_the_container_has_ended(simulated: Run, is_paused: bool) -> None:
    async def body(stubs: StubEngine) -> None:
        if is_paused:
            await stubs.engine.pause(ID)
        asyncio.get_running_loop().call_later(5, stubs.runtime.end, 137)
        await stubs.engine.kill(ID)
        killed = stubs.engine.get(ID)
        assert (killed.state, killed.exit_code) == (ContainerState.EXITED, 137)

    simulated(body)


def test_a_kill_names_a_container_that_does_not_end(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        with pytest.raises(Unavailable, match="did not receive an exit event"):
            await stubs.engine.kill(ID)

    simulated(body)


def test_nothing_is_kept_of_a_container_that_was_removed(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        lifecycle = stubs.engine.lifecycle
        await stubs.end()
        await stubs.engine.start(ID)
        await stubs.end()
        await stubs.engine.remove(ID)
        await asyncio.sleep(1)
        assert not lifecycle.locks.operation_locks
        assert not lifecycle.locks.network_locks

    simulated(body)


def test_a_signal_that_resumes_a_container_records_that_although_the_command_fails(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.engine.pause(ID)

        async def fail() -> None:
            raise Unavailable("it did not end in time")

        stubs.runtime.during = fail
        stubs.runtime.is_all_frozen = False
        await stubs.engine.kill(ID, "SIGTERM")
        assert stubs.engine.get(ID).state is ContainerState.RUNNING

    simulated(body)
