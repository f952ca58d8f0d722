"""What a client has begun on a container is carried out when the client goes away (moby: a context without cancel)."""

import asyncio
import signal
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from sim.world.time import VirtualClock, VirtualLoop
from skep.api.http import server
from skep.api.http.versions import ApiVersion
from skep.engine.api import containers
from skep.engine.containers.container import ContainerState, MountPoint
from skep.engine.lifecycle.driver import KILLED_S_MAX
from skep.errors import Unavailable
from tests.support.engine.stub_engine import ID, Body, StubEngine, a_container, on_virtual_time

Run: TypeAlias = Callable[[Body], None]

VOLUME = MountPoint(type="volume", name="v" * 64, source="", destination="/data", anonymous=True)


@pytest.fixture
def simulated(tmp_path: Path) -> Run:
    """Run a test's body on virtual time, with an engine that has one running container."""
    running = a_container()
    config = msgspec.structs.replace(running.config, mounts=(VOLUME,))
    return lambda body: on_virtual_time(body, tmp_path, msgspec.structs.replace(running, config=config))


def requested(stubs: StubEngine, action: str, seconds: int) -> Coroutine[Any, Any, Any]:
    """What handles ``POST /containers/{id}/<action>?t=<seconds>``."""
    request = make_mocked_request("POST", f"/containers/{ID}/{action}?t={seconds}", match_info={"id": ID})
    request[server.VERSION_KEY] = ApiVersion("1.41")
    handler = getattr(containers, action)
    return handler(containers.ContainerRoutes(stubs.engine, stubs.clock), request)


async def abandoned(work: Coroutine[Any, Any, Any]) -> None:
    """Begin ``work``, whose caller goes after a second."""
    task = asyncio.create_task(work)
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def test_a_stop_whose_client_goes_kills_after_the_grace_period(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        await abandoned(requested(stubs, "stop", 10))
        await asyncio.sleep(8)
        assert stubs.runtime.signals == [signal.SIGTERM]
        await asyncio.sleep(2)
        assert stubs.runtime.signals == [signal.SIGTERM, signal.SIGKILL]
        await stubs.end(137)
        await asyncio.sleep(1)
        actions = [event.action for event in stubs.engine.events.recent(0) if event.type == "container"]
        assert actions[-1] == "stop"

    simulated(body)


def test_a_restart_whose_client_goes_starts_the_container(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        await abandoned(requested(stubs, "restart", 10))
        await stubs.end(0)
        await asyncio.sleep(1)
        assert stubs.engine.get(ID).state is ContainerState.RUNNING
        assert stubs.runtime.starts == 1
        assert stubs.runtime.signals == [signal.SIGTERM]

    simulated(body)


@pytest.mark.parametrize("leaves", [False, True])
def test_the_error_of_a_stop_is_its_callers_and_logged_only_if_that_has_gone(
    simulated: Run, *, leaves: bool
) -> None:
    async def body(stubs: StubEngine) -> None:
        with capture_logs() as lines:
            if leaves:
                await abandoned(stubs.engine.stop(ID, 10.0))
                await asyncio.sleep(10 + KILLED_S_MAX)
            else:
                with pytest.raises(Unavailable, match="did not receive an exit event"):
                    await stubs.engine.stop(ID, 10.0)
        errors = [line for line in lines if "did not receive an exit event" in line.get("error", "")]
        assert len(errors) == leaves

    simulated(body)


@pytest.mark.parametrize("leaves", [False, True])
def test_the_end_of_the_engine_does_not_wait_for_a_stop(tmp_path: Path, *, leaves: bool) -> None:
    loop = VirtualLoop()

    async def whole() -> None:
        stubs = StubEngine(VirtualClock(loop), tmp_path, a_container())
        async with stubs.engine.running():
            stopping = asyncio.create_task(stubs.engine.stop(ID, 10.0))
            await asyncio.sleep(1)
            if leaves:
                stopping.cancel()
        assert loop.time() == pytest.approx(1)
        await asyncio.wait([stopping])
        assert stopping.cancelled()

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


def test_a_stop_that_begins_with_the_end_of_the_engine_warns_of_nothing(tmp_path: Path) -> None:
    loop = VirtualLoop()

    async def whole() -> None:
        stubs = StubEngine(VirtualClock(loop), tmp_path, a_container())
        async with stubs.engine.running():
            stopping = asyncio.create_task(stubs.engine.stop(ID, 10.0))
            await asyncio.sleep(0)  # its work would begin with the next step
        await asyncio.wait([stopping])
        assert stopping.cancelled()
        assert not stubs.runtime.signals

    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            loop.run_until_complete(whole())
        assert [str(one.message) for one in found] == []
    finally:
        loop.close()


def test_a_removal_whose_caller_goes_removes_the_record_and_the_volumes(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        gate = asyncio.Event()
        stubs.steps["bundles.discard"] = lambda _: gate.wait()
        stubs.engine.volumes.ensure(VOLUME.name)
        await stubs.end()
        await abandoned(stubs.engine.remove(ID, with_volumes=True))
        assert stubs.engine.get(ID).state is ContainerState.REMOVING
        gate.set()
        await asyncio.sleep(1)
        assert not stubs.engine.list()
        assert not stubs.bundles.saved
        assert not stubs.engine.volumes.names()

    simulated(body)
