"""How many execs are started at a time."""

import asyncio
import gc
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sim.world.time import VirtualLoop
from skep.aio.clock import SystemClock
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import Container, ContainerState, ExecConfig
from skep.engine.containers.execs import SLOW_MAX, SLOW_S, STARTS_MAX, STARTS_MAX_PER_CONTAINER, Execs
from skep.engine.events import Events
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.conmon import StartError
from skep.engine.runtime.runtime import Runtime
from skep.model.values.ids import ContainerId
from tests.support.managers.wire_rig import until
from tests.unit.engine.test_specification import a_container


class Counting:
    """A runtime whose starts wait for ``gate`` and then fail."""

    def __init__(self) -> None:
        self.expected, self.begun, self.at_once, self.most = 0, 0, 0, 0
        self.gate = asyncio.Event()

    def expect_exec(self) -> None:
        self.expected += 1

    async def exec(self, *_: Any, **__: Any) -> None:
        self.begun += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.gate.wait()
        self.at_once -= 1
        raise StartError("no such file", "exec")


def an_id(number: int) -> ContainerId:
    return ContainerId(f"{number:064x}")


def the_execs(directory: Path, runtime: Counting) -> Execs:
    """Of running containers with any id."""
    running = {**_fields(a_container()), "state": ContainerState.RUNNING}
    return Execs(
        cast(
            "Bundles",
            SimpleNamespace(prepare_exec=lambda *_: Path(), exec_path=lambda *_: directory / "gone"),
        ),
        cast("Runtime", runtime),
        Events(SystemClock()),
        SystemClock(),
        container=lambda word: Container(**{**running, "id": ContainerId(word)}),
        spawn=asyncio.create_task,
    )


async def test_no_more_than_a_few_are_started_at_the_same_moment(tmp_path: Path) -> None:
    runtime = Counting()
    execs = the_execs(tmp_path, runtime)
    config = ExecConfig(command=("true",))
    ids = [execs.create(an_id(number), config) for number in range(3 * STARTS_MAX)]
    assert runtime.expected == len(ids), "when they are created, before any is started"
    starts = [asyncio.create_task(execs.start(id)) for id in ids]
    await until(lambda: runtime.begun == STARTS_MAX)
    runtime.gate.set()
    await asyncio.wait(starts)
    assert (runtime.begun, runtime.most) == (3 * STARTS_MAX, STARTS_MAX)
    for start in starts:
        with pytest.raises(StartError):
            start.result()


async def test_a_container_whose_execs_start_slowly_leaves_places_for_the_others(tmp_path: Path) -> None:
    runtime = Counting()
    execs = the_execs(tmp_path, runtime)
    config = ExecConfig(command=("true",))
    slow = [execs.create(an_id(0), config) for _ in range(STARTS_MAX)]
    starts = [asyncio.create_task(execs.start(id)) for id in slow]
    await until(lambda: runtime.begun)
    starts.append(asyncio.create_task(execs.start(execs.create(an_id(1), config))))
    await until(lambda: runtime.begun == STARTS_MAX_PER_CONTAINER + 1)
    starts[-2].cancel()  # it waits
    await asyncio.wait(starts[-2:-1])
    assert execs.get(slow[-1]).exit_code == 126
    runtime.gate.set()
    await asyncio.wait(starts)
    assert (runtime.begun, runtime.most) == (STARTS_MAX, STARTS_MAX_PER_CONTAINER + 1)
    starts.clear()
    gc.collect()  # of the tracebacks
    assert not execs.own_events, "nothing is kept of containers without execs that start"


def test_containers_whose_execs_start_slowly_leave_places_for_the_others(tmp_path: Path) -> None:
    loop = VirtualLoop()

    async def body() -> None:
        runtime = Counting()
        execs = the_execs(tmp_path, runtime)
        config = ExecConfig(command=("true",))

        def begin(containers: Iterable[int]) -> list["asyncio.Task[Attachment]"]:
            ids = [execs.create(an_id(number), config) for number in containers]
            return [asyncio.create_task(execs.start(id)) for id in ids]

        starts = begin(number // STARTS_MAX_PER_CONTAINER for number in range(STARTS_MAX))
        await asyncio.sleep(SLOW_S - 1)
        assert runtime.begun == STARTS_MAX
        starts += begin([90])
        await asyncio.sleep(0.5)
        assert runtime.begun == STARTS_MAX, "they may only have waited for processor time as all do"
        await asyncio.sleep(1)
        assert runtime.begun == STARTS_MAX + 1
        starts += begin(range(100, 100 + 2 * SLOW_MAX))
        await asyncio.sleep(10 * SLOW_S)
        assert runtime.at_once == STARTS_MAX + SLOW_MAX, "no more than that, however slow they are"
        runtime.gate.set()
        await asyncio.wait(starts)
        assert runtime.begun == len(starts)
        runtime.gate.clear()
        runtime.most = 0
        starts = begin(range(2 * STARTS_MAX))
        await asyncio.sleep(1)
        assert runtime.most == STARTS_MAX, "every place is free again, once"
        runtime.gate.set()
        await asyncio.wait(starts)

    try:
        loop.run_until_complete(body())
    finally:
        loop.close()


def _fields(container: Container) -> dict[str, Any]:
    return {name: getattr(container, name) for name in container.__struct_fields__}
