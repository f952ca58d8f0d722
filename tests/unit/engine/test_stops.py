"""How a container is stopped: by which signal, and how long it has until it is killed."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from aiohttp.test_utils import make_mocked_request
from msgspec.structs import replace

from skep.api.errors import NotModified, Untranslated
from skep.api.http import server
from skep.api.http.versions import ApiVersion
from skep.engine.api import containers
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    NotRunning,
    PlainOptions,
)
from skep.engine.runtime.conmon import StartError
from skep.engine.runtime.processes import find
from skep.engine.runtime.runtime import end_all_gracefully
from skep.model.networks.sandbox import Sandbox
from skep.model.values.ids import ContainerId
from tests.support.engine.stub_engine import ID, Body, StubEngine, a_container, on_virtual_time

DAY_S = 86_400
Run: TypeAlias = Callable[[Body, Container], None]


@pytest.fixture
def simulated(tmp_path: Path) -> Run:
    """Run a test's body on virtual time, with an engine that has one container."""
    return lambda body, container: on_virtual_time(body, tmp_path, container, within_s=10 * DAY_S)


async def ask(stubs: StubEngine, action: str, query: str, version: str = "1.42") -> int:
    """The status of ``POST /containers/{id}/<action>?<query>``."""
    request = make_mocked_request("POST", f"/containers/{ID}/{action}?{query}", match_info={"id": ID})
    request[server.VERSION_KEY] = ApiVersion(version)
    handler = getattr(containers, action)
    response = await handler(containers.ContainerRoutes(stubs.engine, stubs.clock), request)
    return int(response.status)


@pytest.mark.parametrize("action", ["stop", "restart"])
@pytest.mark.parametrize(("version", "sent"), [("1.42", signal.SIGQUIT), ("1.41", signal.SIGINT)])
def test_the_signal_of_the_request_is_sent_since_version_1_42(
    simulated: Run, action: str, version: str, sent: int
) -> None:
    async def body(stubs: StubEngine) -> None:
        asking = asyncio.create_task(ask(stubs, action, "signal=SIGQUIT&t=5", version))
        await asyncio.sleep(1)
        assert stubs.runtime.signals == [sent]
        await stubs.end(0)
        assert await asking == 204

    simulated(body, a_container(config=ContainerConfig(path="sh", stop_signal="SIGINT")))


@pytest.mark.parametrize(
    ("action", "words"), [("stop", "cannot stop container"), ("restart", "Cannot restart container")]
)
def test_a_signal_that_there_is_not_stops_nothing(simulated: Run, action: str, words: str) -> None:
    async def body(stubs: StubEngine) -> None:
        with pytest.raises(Untranslated, match=f"^{words}:? {ID}: Invalid signal: BOGUS$"):
            await ask(stubs, action, "signal=BOGUS")
        assert not stubs.runtime.signals
        assert stubs.engine.get(ID).plain == PlainOptions()

    simulated(body, a_container())


@pytest.mark.parametrize(("of_container_s", "query"), [(-1, ""), (10, "t=-1")])
def test_a_negative_time_kills_never(simulated: Run, of_container_s: int, query: str) -> None:
    async def body(stubs: StubEngine) -> None:
        asking = asyncio.create_task(ask(stubs, "stop", query))
        await asyncio.sleep(DAY_S)
        assert stubs.runtime.signals == [signal.SIGTERM]
        await stubs.end(0)
        assert await asking == 204

    container = a_container()
    config = replace(container.config, stop_grace_ns=of_container_s * 10**9)
    simulated(body, replace(container, config=config))


@pytest.mark.parametrize("grace_s", [10.0, 0.0])
def test_a_stop_ends_although_its_user_starts_the_container_again_at_once(
    simulated: Run, grace_s: float
) -> None:
    """The signal ends a paused container while it is thawed, and the stop is still busy with that."""

    async def body(stubs: StubEngine) -> None:
        async def end_and_start() -> None:
            stubs.runtime.during = None
            await stubs.end(137)
            await stubs.engine.start(ID)

        stubs.runtime.during = end_and_start
        async with asyncio.timeout(1):
            await stubs.engine.stop(ID, grace_s)
        await asyncio.sleep(100)
        assert stubs.engine.get(ID).is_running

    simulated(body, a_container(state=ContainerState.PAUSED))


@pytest.mark.parametrize("command", ["kill", "stop"])
@pytest.mark.parametrize("state", [ContainerState.CREATED, ContainerState.EXITED])
def test_a_run_that_another_user_is_starting_is_ended_too(
    simulated: Run, command: str, state: ContainerState
) -> None:
    async def body(stubs: StubEngine) -> None:
        gate = asyncio.Event()
        stubs.steps["runtime.start"] = gate.wait
        starting = asyncio.create_task(stubs.engine.start(ID))
        await asyncio.sleep(1)
        ending = asyncio.create_task(ask(stubs, command, ""))
        await asyncio.sleep(1)
        assert not ending.done()
        gate.set()
        await starting
        await asyncio.sleep(1)
        assert stubs.runtime.signals
        await stubs.end(143)
        assert await ending == 204

    simulated(body, a_container(state=state, process=None))


@pytest.mark.parametrize(("command", "refusal"), [("kill", NotRunning), ("stop", NotModified)])
def test_a_start_that_fails_leaves_nothing_to_stop(
    simulated: Run, command: str, refusal: type[Exception]
) -> None:
    async def body(stubs: StubEngine) -> None:
        gate = asyncio.Event()

        async def fail(*_: object) -> None:
            await gate.wait()
            raise StartError("no such file")

        stubs.steps["runtime.create"] = fail
        starting = asyncio.create_task(stubs.engine.start(ID))
        await asyncio.sleep(1)
        ending = asyncio.create_task(ask(stubs, command, ""))
        await asyncio.sleep(1)
        gate.set()
        with pytest.raises(StartError):
            await starting
        with pytest.raises(refusal):
            await ending

    simulated(body, a_container(state=ContainerState.EXITED, process=None))


async def test_a_container_that_cannot_be_stopped_takes_no_time_from_the_others(tmp_path: Path) -> None:
    trap = f"trap 'echo ended >{tmp_path}/word; exit' TERM; echo; while :; do sleep 0.01; done"
    process = await asyncio.create_subprocess_exec("sh", "-c", trap, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()

    def container(stop_signal: str) -> Container:
        return Container(
            id=ContainerId("c" * 64),
            name="c",
            image="i",
            image_id="sha256:i",
            config=ContainerConfig(path="sh", seccomp="unconfined", stop_signal=stop_signal),
            sandbox=Sandbox(netns="/n"),
            state=ContainerState.RUNNING,
            process=find(process.pid),
        )

    await end_all_gracefully([container("SIGNOPE"), container("SIGTERM")])
    assert (tmp_path / "word").read_text() == "ended\n"
    await process.wait()
