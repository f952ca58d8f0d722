"""The pause of a container while an image is made of it."""

import asyncio
from types import SimpleNamespace
from typing import Any

from skep.engine.containers import commits
from skep.engine.containers.container import ContainerState


class Freezing:
    """An engine with one container, whose pause takes effect at once and returns later."""

    def __init__(self) -> None:
        self.container: Any = SimpleNamespace(id="c", state=ContainerState.RUNNING)
        self.is_frozen = False
        self.begun, self.may_return = asyncio.Event(), asyncio.Event()

    def get(self, id: str) -> Any:
        return self.container

    async def pause(self, id: str) -> None:
        self.is_frozen = True
        self.begun.set()
        await self.may_return.wait()
        self.container.state = ContainerState.PAUSED

    async def unpause(self, id: str) -> None:
        self.is_frozen = False
        self.container.state = ContainerState.RUNNING


async def test_a_commit_that_is_cancelled_during_its_pause_leaves_no_frozen_container() -> None:
    freezing = Freezing()
    engine: Any = freezing

    async def commit() -> None:
        async with commits.keep_paused(engine, freezing.container, pauses=True):
            await asyncio.Event().wait()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        work = group.create_task(commit())
        await freezing.begun.wait()
        work.cancel()
        await asyncio.sleep(0)
        freezing.may_return.set()
    assert work.cancelled()
    assert not freezing.is_frozen
