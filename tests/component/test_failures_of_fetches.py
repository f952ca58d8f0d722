"""Whichever call on a file fails while an image is fetched from a node, loaded or built: it is whole or not there.

Nothing is left of one that is not, and the next attempt works.

What the confined workers call is not walked here: they are processes of their own, and end with an error.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from skep.aio.clock import SystemClock
from skep.api.http.server import application
from skep.engine.api import builds
from skep.engine.build.builder import Builder
from skep.engine.images.progress import quiet
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry import pulling
from skep.engine.images.sharing.spreading import NodeFetcher
from skep.engine.images.store import ImageStore
from skep.errors import SkepError
from tests.support.file_faults import Faults, walk
from tests.support.images.archives import a_docker_archive, a_file, a_tar
from tests.support.images.images_rig import APP, CLOCK, ImageCluster, an_image, give

pytestmark = [pytest.mark.needs("root"), pytest.mark.timeout(300)]

SLOW = pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(600)])
SIZE = 300_000
Attempt = Callable[[ImageStore], Awaitable[object]]


async def _lived(
    directory: Path, faults: Faults, name: str, attempt: Attempt, *, has_steps: bool = False
) -> None:
    """``attempt`` to get the image ``name``, under faults and again without.

    ``has_steps``: the steps before it are images without a name.
    """
    is_done = False
    try:
        store = ImageStore(directory / "images")
        await store.open()
        await attempt(store)
        is_done = True
    except (SkepError, OSError):
        pass
    faults.end()
    whole = ImageStore(directory / "images")  # what the next process finds
    await whole.open()
    await whole.settle()
    assert not is_done or whole.resolve(name) is not None, "it was acknowledged"
    if not has_steps:
        assert all(image.tags for image in whole.images()), "an image without its name is left"
    assert len(whole.layer_store.all()) == len({id for image in whole.images() for id in image.chain})
    await attempt(whole)
    top, *_ = whole.layers(whole.get(name))
    assert (top / "data-0").stat().st_size == SIZE
    assert not list(whole.scratch.iterdir())


@pytest.mark.parametrize("step", [7, SLOW])
async def test_whatever_call_fails_an_image_of_another_node_is_whole_or_not_there(
    tmp_path: Path, step: int
) -> None:
    async with ImageCluster(tmp_path / "cluster").running() as cluster:
        made = an_image(SIZE)
        await give(cluster.manager, made)
        worker = await cluster.add()

        async def fetched(store: ImageStore) -> None:
            fetcher = NodeFetcher(worker.sources, CLOCK)
            await pulling.pull_from_nodes(store, fetcher, parse_reference(APP), quiet)

        async def life(directory: Path, faults: Faults) -> None:
            await _lived(directory, faults, APP, fetched)

        assert await walk(tmp_path / "lives", life, step=step) > 30


@pytest.mark.parametrize("step", [31, SLOW])
async def test_whatever_call_fails_a_loaded_image_is_whole_or_not_there(tmp_path: Path, step: int) -> None:
    archive = a_docker_archive(a_tar(a_file("data-0", bytes(SIZE))), tags=["loaded:1"])

    async def loaded(store: ImageStore) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            yield archive

        await store.load(pieces())

    async def life(directory: Path, faults: Faults) -> None:
        await _lived(directory, faults, "loaded:1", loaded)

    assert await walk(tmp_path, life, step=step) > 20


@pytest.mark.parametrize("step", [31, SLOW])
async def test_whatever_call_fails_a_built_image_is_whole_or_not_there(tmp_path: Path, step: int) -> None:
    dockerfile = b"FROM scratch\nCOPY data-0 /\nENV A=1\n"
    context = a_tar(a_file("Dockerfile", dockerfile), a_file("data-0", bytes(SIZE)))

    async def life(directory: Path, faults: Faults) -> None:
        async def built(store: ImageStore) -> None:
            engine: Any = SimpleNamespace(images=store)
            builder = Builder(engine, directory / "builds", SystemClock())
            runner = web.AppRunner(application(builds.build_routes(builder)), handler_cancellation=True)
            socket = tmp_path / "api"
            await runner.setup()
            try:
                await web.UnixSite(runner, str(socket)).start()
                connector = aiohttp.UnixConnector(str(socket))
                async with (
                    aiohttp.ClientSession(connector=connector) as session,
                    session.post("http://d/v1.41/build?t=built:1", data=context) as response,
                ):
                    said = await response.text()
            finally:
                await runner.cleanup()
            if "Successfully tagged" not in said:
                raise SkepError(said)

        await _lived(directory, faults, "built:1", built, has_steps=True)

    assert await walk(tmp_path / "lives", life, step=step) > 30
