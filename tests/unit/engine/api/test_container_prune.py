"""``docker container prune`` where single containers cannot be removed."""

import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from msgspec.structs import replace
from structlog.testing import capture_logs

from sim.world.time import VirtualClock, VirtualLoop
from skep.engine.api import containers
from skep.engine.containers.container import Container, ContainerState, PlainOptions
from skep.errors import InvalidArgument
from skep.model.values.ids import ContainerId
from skep.model.values.times import timestamp
from tests.support.engine.stub_engine import StubEngine, a_container, disk_full

ENDED = a_container(state=ContainerState.EXITED, process=None, finished_at=timestamp(2))


def numbered(number: int) -> Container:
    """The containers are listed from the highest number down."""
    return replace(ENDED, id=ContainerId(str(number) * 64), name=f"c{number}", created_at=timestamp(number))


def pruning(directory: Path, body: Callable[[StubEngine], Coroutine[Any, Any, None]]) -> None:
    """Run ``body`` with an engine that has three containers, which have ended."""
    loop = VirtualLoop()

    async def whole() -> None:
        stubs = StubEngine(VirtualClock(loop), directory, *map(numbered, (1, 2, 3)))
        async with stubs.engine.running():
            await body(stubs)

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


async def pruned(stubs: StubEngine) -> list[str]:
    """The first digits of what a prune has removed."""
    served = containers.ContainerRoutes(stubs.engine, stubs.clock)
    response = await containers.prune(served, make_mocked_request("POST", "/containers/prune"))
    assert isinstance(response, web.Response)
    assert isinstance(response.body, bytes)
    return [id[0] for id in json.loads(response.body)["ContainersDeleted"] or ()]


def test_one_that_cannot_be_removed_keeps_no_other(tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        stuck = numbered(2).id

        async def refuse(id: ContainerId) -> None:
            if id == stuck:
                raise disk_full()

        stubs.steps["bundles.discard"] = refuse
        with capture_logs() as lines:
            assert await pruned(stubs) == ["3", "1"]
            assert await pruned(stubs) == []
        warnings = [line["container"] for line in lines if line["event"] == "container not pruned"]
        assert warnings == [stuck, stuck]
        stubs.steps.clear()
        assert await pruned(stubs) == ["2"]

    pruning(tmp_path, body)


@pytest.mark.parametrize("is_started", [False, True])
def test_what_is_removed_or_started_meanwhile_keeps_no_other(tmp_path: Path, *, is_started: bool) -> None:
    async def body(stubs: StubEngine) -> None:
        other = numbered(2).id

        async def meanwhile(_: ContainerId) -> None:
            stubs.steps.clear()
            await (stubs.engine.start(other) if is_started else stubs.engine.remove(other))

        stubs.steps["bundles.discard"] = meanwhile
        assert await pruned(stubs) == ["3", "1"]
        assert [one.name for one in stubs.engine.list()] == (["c2"] if is_started else [])

    pruning(tmp_path, body)


def test_a_container_of_a_build_stays(tmp_path: Path) -> None:
    """The build reads its changes after the command has ended, and needs it before the command begins."""

    async def body(stubs: StubEngine) -> None:
        for number, state in ((1, ContainerState.EXITED), (2, ContainerState.CREATED)):
            plain = PlainOptions(is_step=True)
            stubs.engine.store.observe(numbered(number).id, plain=plain, state=state)
        assert await pruned(stubs) == ["3"]

    pruning(tmp_path, body)


def test_a_wrong_time_is_refused_though_there_is_nothing_to_remove(tmp_path: Path) -> None:
    """As Docker Engine 28.5.  It would go unnoticed until the first container ends."""
    loop = VirtualLoop()
    served = containers.ContainerRoutes(StubEngine(VirtualClock(loop), tmp_path).engine, VirtualClock(loop))
    request = make_mocked_request("POST", '/containers/prune?filters={"until":["x"]}')
    with pytest.raises(InvalidArgument):
        loop.run_until_complete(containers.prune(served, request))
    loop.close()
