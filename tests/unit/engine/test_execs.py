"""How many execs are started at a time."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skep.aio.clock import SystemClock
from skep.engine.bundle import Bundles
from skep.engine.conmon import StartError
from skep.engine.container import Container, ContainerState, ExecConfig
from skep.engine.events import Events
from skep.engine.execs import STARTS_MAX, Execs
from skep.engine.runtime import Runtime
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


async def test_no_more_than_a_few_are_started_at_the_same_moment(tmp_path: Path) -> None:
    runtime, running = Counting(), Container(**{**_fields(a_container()), "state": ContainerState.RUNNING})
    execs = Execs(
        cast(
            "Bundles", SimpleNamespace(prepare_exec=lambda *_: Path(), exec_path=lambda *_: tmp_path / "gone")
        ),
        cast("Runtime", runtime),
        Events(SystemClock()),
        SystemClock(),
        container=lambda _: running,
        spawn=asyncio.create_task,
    )
    ids = [execs.create(running.id, ExecConfig(command=("true",))) for _ in range(3 * STARTS_MAX)]
    assert runtime.expected == len(ids), "when they are created, before any is started"
    starts = [asyncio.create_task(execs.start(id)) for id in ids]
    async with asyncio.timeout(10):
        while runtime.begun < STARTS_MAX:  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0)
        runtime.gate.set()
        await asyncio.wait(starts)
    assert (runtime.begun, runtime.most) == (3 * STARTS_MAX, STARTS_MAX)
    for start in starts:
        with pytest.raises(StartError):
            start.result()


def _fields(container: Container) -> dict[str, Any]:
    return {name: getattr(container, name) for name in container.__struct_fields__}
