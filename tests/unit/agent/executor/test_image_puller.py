"""When a task's image is pulled, and when the local one is used."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from skep.agent.executor.interface import Rejected
from skep.agent.executor.pulling import RETRY_AFTER_S, ImagePuller
from skep.engine.images.digest import Digest
from skep.engine.images.image import Image, ImageConfig
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable

IMAGE = Image(id=Digest("sha256:" + "a" * 64), config=ImageConfig())


class HandClock:
    """A manually advanced clock."""

    def __init__(self) -> None:
        self.time = 100.0

    def now_ns(self) -> int:
        return round(self.time * 1e9)

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


class Registry:
    """An image store with a configurable registry."""

    def __init__(self, *, is_local: bool, error: SkepError | None) -> None:
        self.is_local = is_local
        self.error = error
        self.asked = 0
        self.answered = asyncio.Event()
        self.answered.set()

    def resolve(self, word: str) -> Image | None:
        if word == "UPPER":
            raise InvalidArgument("invalid reference format")
        return IMAGE if self.is_local else None

    def layers(self, image: Image) -> Sequence[Path]:
        return ()

    @asynccontextmanager
    async def pin(self, chain: Sequence[str]) -> AsyncIterator[None]:
        yield

    async def pull(self, word: str, auth: str = "", *, uses_helper: bool = False) -> Image:
        self.asked += 1
        await self.answered.wait()
        if self.error is not None:
            raise self.error
        self.is_local = True
        return IMAGE


async def test_an_image_comes_from_its_registry() -> None:
    registry = Registry(is_local=False, error=None)
    assert await ImagePuller(registry, HandClock()).image("busybox:1", "") == IMAGE
    assert registry.asked == 1


async def test_a_tag_is_asked_for_even_when_it_is_here() -> None:
    registry = Registry(is_local=True, error=None)
    await ImagePuller(registry, HandClock()).image("busybox:1", "")
    assert registry.asked == 1


@pytest.mark.parametrize("reference", ["busybox@sha256:" + "0" * 64, "sha256:" + "a" * 64, "a" * 12])
async def test_an_image_named_by_its_content_needs_no_registry(reference: str) -> None:
    registry = Registry(is_local=True, error=None)
    await ImagePuller(registry, HandClock()).image(reference, "")
    assert registry.asked == 0


async def test_without_its_registry_the_local_image_is_used_and_the_registry_left_alone_for_a_while() -> None:
    registry, clock = Registry(is_local=True, error=Unavailable("no route")), HandClock()
    pulling = ImagePuller(registry, clock)
    for _ in range(3):
        assert await pulling.image("busybox:1", "") == IMAGE
    assert registry.asked == 1
    await pulling.image("example.org/x", "")  # another registry
    assert registry.asked == 2
    clock.time += RETRY_AFTER_S
    await pulling.image("busybox:1", "")
    assert registry.asked == 3


@pytest.mark.parametrize("error", [Unavailable("no route"), NotFound("no such tag"), None])
async def test_neither_here_nor_to_be_had_is_rejected(error: SkepError | None) -> None:
    registry = Registry(is_local=False, error=error or Unavailable("x"))
    with pytest.raises(Rejected, match=rf"^No such image: nosuch:1: {error or 'x'}$"):
        await ImagePuller(registry, HandClock()).image("nosuch:1", "")


async def test_what_is_no_reference_is_rejected() -> None:
    with pytest.raises(Rejected, match="invalid reference format"):
        await ImagePuller(Registry(is_local=False, error=None), HandClock()).image("UPPER", "")


async def test_tasks_that_come_together_share_a_fetch() -> None:
    registry, clock = Registry(is_local=False, error=None), HandClock()
    pulling = ImagePuller(registry, clock)
    registry.answered.clear()
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            clock.time += 0.001
            group.create_task(pulling.image("busybox:1", ""))
            await asyncio.sleep(0)
        clock.time += 1
        registry.answered.set()
    assert registry.asked == 1
