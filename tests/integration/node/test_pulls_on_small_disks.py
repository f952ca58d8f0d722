"""What is pulled fits the disk, or is refused before it comes."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from skep.engine.images.archives.workers import ImageLimits
from skep.engine.images.registry.registry import DOCKER_MANIFEST
from skep.engine.images.store import ImageStore
from skep.errors import SkepError
from skep.linux.files import allocate
from tests.integration.node.test_image_pulls import Rogue
from tests.support.images.archives import sha256
from tests.support.images.registry_rig import BLOBS, CONFIG, a_manifest

DISK_BYTES = 64 << 20


@pytest.fixture
async def rogue() -> AsyncIterator[Rogue]:
    rogue = Rogue()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", rogue.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        rogue.address = f"127.0.0.1:{server.port}"
        yield rogue


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)), check=True)
    try:
        yield path
    finally:
        subprocess.run(("umount", "-l", str(path)), check=True)


@pytest.fixture
async def small(disk: Path) -> ImageStore:
    store = ImageStore(disk / "images")
    await store.open()
    return store


def asked_for_blobs(rogue: Rogue) -> list[str]:
    """Without the configuration, which is small by rule."""
    return [one.path for one in rogue.requests if "/blobs/" in one.path and sha256(CONFIG) not in one.path]


@pytest.mark.parametrize("size", [1 << 40, DISK_BYTES, -1])
async def test_an_image_that_says_it_does_not_fit_is_refused_before_its_first_byte(
    small: ImageStore, rogue: Rogue, size: int
) -> None:
    manifest = json.loads(a_manifest())
    manifest["layers"][0]["size"] = size
    rogue.manifests["1"] = (json.dumps(manifest).encode(), DOCKER_MANIFEST)
    with pytest.raises(SkepError, match=r"no space left on device|invalid manifest"):
        await small.pull(f"{rogue.address}/app:1")
    assert asked_for_blobs(rogue) == [] or size < 0
    assert small.images() == ()


async def test_what_comes_is_never_more_than_was_said(small: ImageStore, rogue: Rogue) -> None:
    blob = sha256(BLOBS[0])
    rogue.blobs[blob] = BLOBS[0] + os.urandom(2 << 20)
    with pytest.raises(SkepError, match="is larger than its"):
        await small.pull(f"{rogue.address}/app:1")


async def test_a_part_of_the_disk_stays_free(small: ImageStore, disk: Path, rogue: Rogue) -> None:
    """Of this one three megabytes, as etcd and others are on it, too."""
    assert ImageLimits().spare_on(disk) == round(0.05 * DISK_BYTES)
    assert ImageLimits().spare_on(Path("/")) <= 1 << 30
    filler = disk / "filler"
    with filler.open("wb") as file:
        allocate(file.fileno(), DISK_BYTES - (3 << 20))
    with pytest.raises(SkepError, match="no space left on device"):
        await small.pull(f"{rogue.address}/app:1")
    filler.unlink()
    assert await small.pull(f"{rogue.address}/app:1")


async def test_downloads_do_not_count_on_the_same_space(small: ImageStore, rogue: Rogue) -> None:
    """Two images at once, of which one fits: the other is refused, and the first one's bytes find their room."""
    layer = os.urandom(1 << 20)
    large = 40 << 20
    gate, begun = asyncio.Event(), asyncio.Event()
    for name in ("1", "2"):
        manifest = json.loads(a_manifest())
        manifest["layers"][1] |= {"size": large, "digest": sha256(layer + name.encode())}
        rogue.manifests[name] = (json.dumps(manifest).encode(), DOCKER_MANIFEST)

    async def held(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = large
        await response.prepare(request)
        begun.set()
        await gate.wait()
        return response

    original = rogue.answer

    async def answer(request: web.Request) -> web.StreamResponse:
        return await (
            held(request)
            if "/blobs/" in request.path
            and len(request.path)
            and any(sha256(layer + name.encode()) in request.path for name in ("1", "2"))
            else original(request)
        )

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app, host="127.0.0.1") as server:
        first = asyncio.create_task(small.pull(f"127.0.0.1:{server.port}/app:1"))
        await asyncio.wait_for(begun.wait(), 20)
        with pytest.raises(SkepError, match="no space left on device"):
            await small.pull(f"127.0.0.1:{server.port}/app:2")
        first.cancel()
        gate.set()
        await asyncio.wait([first])
