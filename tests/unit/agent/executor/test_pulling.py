"""Tasks that want an image at the same time share the outcome of one fetch, whatever it is."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from skep.agent.executor.interface import Rejected
from skep.agent.executor.pulling import ImagePuller
from skep.aio.clock import SystemClock
from skep.engine.images.image import Image, ImageConfig
from skep.errors import NotFound, SkepError, Unavailable

IMAGE = Image(id="sha256:" + "a" * 64, config=ImageConfig())


class Registry:
    """Images of which some are here; each pull waits for ``answer`` and then gives it."""

    def __init__(self, local: Image | None, response: SkepError | None) -> None:
        self.local, self.answer = local, response
        self.asked = 0
        self.answers = asyncio.Event()

    def resolve(self, word: str) -> Image | None:
        return self.local

    def layers(self, image: Image) -> Sequence[Path]:
        return ()

    @asynccontextmanager
    async def pin(self, chain: Sequence[str]) -> AsyncIterator[None]:
        yield

    async def pull(self, word: str, auth: str = "", *, uses_helper: bool = False) -> Image:
        self.asked += 1
        await self.answers.wait()
        if self.answer is not None:
            raise self.answer
        self.local = IMAGE
        return IMAGE


async def _together(pulling: ImagePuller, registry: Registry, tasks: int) -> list[Image | BaseException]:
    wanted = asyncio.gather(*(pulling.image("web:1", "") for _ in range(tasks)), return_exceptions=True)
    await asyncio.sleep(0)
    registry.answers.set()
    return await wanted


@pytest.mark.parametrize("failure", [Unavailable("no route"), NotFound("manifest unknown")])
async def test_tasks_that_come_together_share_one_failed_attempt_and_run_the_local_image(
    failure: SkepError,
) -> None:
    registry = Registry(IMAGE, failure)
    assert await _together(ImagePuller(registry, SystemClock()), registry, 20) == [IMAGE] * 20
    assert registry.asked == 1


async def test_without_a_local_image_each_of_them_is_rejected() -> None:
    registry = Registry(None, Unavailable("no route"))
    responses = await _together(ImagePuller(registry, SystemClock()), registry, 3)
    assert [(type(response), str(response)) for response in responses] == [
        (Rejected, "No such image: web:1: no route")
    ] * 3
    assert registry.asked == 1


async def test_a_fetch_that_is_cancelled_is_begun_again_by_another_task() -> None:
    registry = Registry(None, None)
    pulling = ImagePuller(registry, SystemClock())
    async with asyncio.TaskGroup() as group:
        first = group.create_task(pulling.image("web:1", ""))
        second = group.create_task(pulling.image("web:1", ""))
        await asyncio.sleep(0)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        registry.answers.set()
    assert second.result() == IMAGE
    assert registry.asked == 2
