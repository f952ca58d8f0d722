"""A creation that fails, or whose caller leaves, leaves nothing behind; one that succeeds has its volumes filled."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from skep.engine.containers.request import CreateRequest
from skep.engine.engine import Engine
from skep.errors import SkepError
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.engine.runc_lab import IMAGE, TreeImages

REQUEST = CreateRequest(image=IMAGE, cmd=("true",), volumes={"/data": {}})
STAGES = ("create", "prepare", "pins", "fill")
"""Steps of a creation: create the plug-in volumes, prepare the bundle, release the layers, fill the volumes."""


class SlowImages(TreeImages):
    """``unpin``: what happens when a creation needs its layers no more."""

    unpin: Callable[[], Awaitable[None]]

    @asynccontextmanager
    async def pin(self, chain: Sequence[str]) -> AsyncIterator[None]:
        yield
        await self.unpin()


class Creating:
    """An engine whose creations stop at ``stage``, where ``reached`` is set, until ``open`` is called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        machine, images = Machine(), SlowImages(directory / "tree")
        images.unpin = partial(self.stop_at, "pins")
        self.engine: Engine = memory_engine(directory, machine, images=images)
        self.stage, self.error = "", SkepError("no")
        self.fails = False
        self.filled: list[str] = []
        self.reached = asyncio.Event()
        self._gate, self._thread_gate = asyncio.Event(), threading.Event()
        self._loop = asyncio.get_running_loop()
        machine.steps["volumes.create_of_plugins"] = partial(self.stop_at, "create")
        machine.steps["bundles.prepare"] = self._stop_preparing
        machine.steps["volumes.fill"] = self._fill

    def _stop_preparing(self) -> None:
        """Stop a thread."""
        if self.stage == "prepare":
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._thread_gate.wait(10)
            if self.fails:
                raise self.error

    async def _fill(self, id: str) -> None:
        await self.stop_at("fill")
        self.filled.append(id)

    async def stop_at(self, stage: str) -> None:
        if self.stage == stage:
            self.reached.set()
            await self._gate.wait()
            if self.fails:
                raise self.error

    def open(self) -> None:
        self._gate.set()
        self._thread_gate.set()

    def remains(self) -> list[str]:
        """Containers, volumes and directories."""
        left = [*(one.name for one in self.engine.list()), *self.engine.volumes.names()]
        for name in ("containers", "bundles"):
            left += [str(path) for path in (self.directory / name).iterdir()]
        return left


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Creating]:
    rig = Creating(tmp_path)
    async with asyncio.timeout(30), rig.engine.running():
        yield rig
        rig.open()


@pytest.mark.parametrize("stage", STAGES)
async def test_of_a_creation_whose_caller_leaves_nothing_stays(rig: Creating, stage: str) -> None:
    rig.stage = stage
    creating = asyncio.create_task(rig.engine.create(REQUEST, name="c1"))
    await rig.reached.wait()
    creating.cancel()
    rig.open()
    await asyncio.wait([creating])
    assert creating.cancelled()
    assert not rig.remains()
    rig.stage = ""
    container = await rig.engine.create(REQUEST, name="c1")
    assert rig.filled == [container.id]
    assert [one.name for one in container.config.mounts] == rig.engine.volumes.names()


@pytest.mark.parametrize("stage", STAGES)
async def test_of_a_creation_that_fails_nothing_stays(rig: Creating, stage: str) -> None:
    rig.stage, rig.fails = stage, True
    rig.open()
    with pytest.raises(SkepError, match=r"^no$"):
        await rig.engine.create(REQUEST, name="c1")
    assert not rig.remains()


async def test_a_creation_is_unfinished_until_its_volumes_are_filled(rig: Creating) -> None:
    rig.stage = "fill"
    creating = asyncio.create_task(rig.engine.create(REQUEST, name="c1"))
    await rig.reached.wait()
    id = rig.engine.get("c1").id
    assert [one.is_unfilled for one in rig.engine.bundles.load().known] == [True]
    rig.open()
    assert not (await creating).is_unfilled
    read = rig.engine.bundles.read(id)
    assert read is not None
    assert not read.is_unfilled


async def test_a_second_cancellation_cuts_no_removal_off(rig: Creating) -> None:
    rig.stage = "fill"
    creating = asyncio.create_task(rig.engine.create(REQUEST, name="c1"))
    await rig.reached.wait()
    creating.cancel()
    await asyncio.sleep(0)
    creating.cancel()
    await asyncio.wait([creating])
    assert not rig.remains()


async def test_a_creation_is_an_event_once_it_is_complete(rig: Creating) -> None:
    container = await rig.engine.create(REQUEST, name="c1")
    events = [
        (one.action, one.container_id) for one in rig.engine.events.recent(0) if one.type == "container"
    ]
    assert events == [("create", container.id)]
