"""A machine with its executor, for tests of containers on real runc."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from skep.agent.executor.oci import OciExecutor
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    LogFilter,
    NewContainer,
    PlainOptions,
    StandardStream,
)
from skep.engine.engine import Engine
from skep.engine.images.store import ImageStore
from skep.engine.log_drivers.facts import with_attributes
from tests.support.engine.api_lab import Api, serving
from tests.support.engine.runc_lab import IMAGE, IMAGE_ID, Lab


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with Lab(tmp_path).running() as lab:
        yield lab


@pytest.fixture
async def executor(lab: Lab) -> AsyncIterator[OciExecutor]:
    executor = lab.executor()
    async with executor.running():
        yield executor


@pytest.fixture
def engine(executor: OciExecutor) -> Engine:
    return executor.engine


@pytest.fixture
def run(lab: Lab, engine: Engine) -> "Runner":
    return Runner(lab, engine)


@pytest.fixture
async def images(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    await store.open()
    return store


@pytest.fixture
async def lab_with_images(tmp_path: Path, images: ImageStore) -> AsyncIterator[Lab]:
    """For tests whose ``lab`` has the images that their ``images`` loads, instead of one made up."""
    lab = Lab(tmp_path)
    lab.images = images  # type: ignore[assignment]  # a store like the other
    async with lab.running():
        yield lab


@pytest.fixture
async def api(tmp_path: Path, executor: OciExecutor) -> AsyncIterator[Api]:
    async with serving(tmp_path, executor) as api:
        yield api


class Runner:
    """Makes containers of the lab's image."""

    def __init__(self, lab: Lab, engine: Engine) -> None:
        self.lab = lab
        self.engine = engine

    async def create(
        self,
        *command: str,
        name: str = "",
        labels: dict[str, str] | None = None,
        plain: PlainOptions | None = None,
        **config: Any,
    ) -> Container:
        made = ContainerConfig(path=command[0], args=command[1:], **config)
        return await self.engine.add(
            NewContainer(
                name=name or f"c-{secrets.token_hex(4)}",
                image=IMAGE,
                image_id=IMAGE_ID,
                layers=(str(self.lab.tree),),
                labels=labels or {},
                plain=plain,
                config=await with_attributes(made, labels or {}),
            )
        )

    async def start(self, *command: str, **config: Any) -> Container:
        """A running container."""
        return await self.engine.start((await self.create(*command, **config)).id)

    async def output(self, *command: str, **config: Any) -> str:
        """What a container that ends by itself prints on both streams."""
        container = await self.start(*command, **config)
        await self.engine.wait(container.id)
        text = await self.logs(container)
        await self.engine.remove(container.id)
        return text

    async def logs(self, container: Container, *streams: StandardStream) -> str:
        requested = LogFilter(streams=frozenset(streams or StandardStream))
        return "".join([entry.data.decode() async for entry in self.engine.logs(container.id, requested)])


async def eventually(condition: Callable[[], object], what: str, within_s: float = 10) -> None:
    """Poll until ``condition`` holds; fails the test after ``within_s``."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.01)
