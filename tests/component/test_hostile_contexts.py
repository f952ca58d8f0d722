"""Contexts of classic builds that are too large, or that are not what their headers say."""

from collections.abc import AsyncIterator
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
from skep.engine.images.archives.workers import ImageLimits
from skep.engine.images.store import ImageStore
from tests.support.images.archives import a_file, a_tar

pytestmark = pytest.mark.needs("root")

DOCKERFILE = a_file("Dockerfile", b"FROM scratch\nCOPY data /\n")
LARGE = 10 << 30
PIECE = 1 << 20
LIMIT = 8 << 20


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[ImageStore]:
    """The routes of builds at a socket beside the images of a node that takes 8 MiB; no engine runs steps."""
    images = ImageStore(
        tmp_path / "images", limits=ImageLimits(archive_bytes_max=LIMIT, layer_bytes_max=LIMIT)
    )
    await images.open()
    engine: Any = SimpleNamespace(images=images)
    builder = Builder(engine, tmp_path / "builds", SystemClock())
    runner = web.AppRunner(application(builds.build_routes(builder)), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "api")).start()
    yield images
    await runner.cleanup()


async def built(socket: Path, body: bytes | AsyncIterator[bytes]) -> str:
    connector = aiohttp.UnixConnector(str(socket))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://d/v1.41/build?t=made:1", data=body) as response,
    ):
        return await response.text()


def assert_nothing_is_left(images: ImageStore) -> None:
    assert not list(images.scratch.iterdir())
    assert not [path for path in images.contexts.rglob("*") if path.is_file()]
    assert not images.images()


async def test_a_context_of_ten_gigabytes_is_refused_where_it_does_not_fit(
    node: ImageStore, tmp_path: Path
) -> None:
    info, _ = a_file("data")
    info.size = LARGE
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield a_tar(DOCKERFILE)[: 2 * 512] + info.tobuf()  # without the end of the archive
        while sent < LARGE:
            sent += PIECE
            yield bytes(PIECE)

    try:
        said = await built(tmp_path / "api", body())
    except aiohttp.ClientError:  # the node does not read the rest
        said = f"unpacks to more than {LIMIT} bytes"
    assert f"unpacks to more than {LIMIT} bytes" in said
    assert sent < LARGE // 8, "the node reads no more than it has to"
    assert_nothing_is_left(node)


@pytest.mark.parametrize("missing", [1, 512, 50_000])
async def test_a_file_that_shrinks_while_it_is_sent_fails_the_build(
    node: ImageStore, tmp_path: Path, missing: int
) -> None:
    """Its header has the size that it had before; what follows it is taken for its content."""
    whole = a_tar(DOCKERFILE, a_file("data", b"x" * 100_000), a_file("later", b"y" * 100))
    start = whole.index(b"x" * 100)
    said = await built(tmp_path / "api", whole[:start] + whole[start + missing :])
    assert '"error"' in said or '"message"' in said, said
    assert_nothing_is_left(node)


@pytest.mark.parametrize("added", [1, 512, 50_000])
async def test_a_file_that_grows_while_it_is_sent_fails_the_build(
    node: ImageStore, tmp_path: Path, added: int
) -> None:
    """What is beyond the size in its header is taken for the next entry."""
    whole = a_tar(DOCKERFILE, a_file("data", b"x" * 102_400), a_file("later", b"y" * 100))
    end = whole.index(b"x" * 100) + 102_400  # a multiple of a block: nothing pads it
    said = await built(tmp_path / "api", whole[:end] + b"x" * added + whole[end:])
    assert "archive/tar: invalid tar header" in said, said
    assert_nothing_is_left(node)


@pytest.mark.parametrize("length", [300, 1500, 60_000])
async def test_an_archive_that_ends_early_fails_the_build(
    node: ImageStore, tmp_path: Path, length: int
) -> None:
    whole = a_tar(DOCKERFILE, a_file("data", bytes(100_000)))
    said = await built(tmp_path / "api", whole[:length])
    assert "unexpected EOF" in said, said
    assert_nothing_is_left(node)


async def test_a_context_that_fits_is_built(node: ImageStore, tmp_path: Path) -> None:
    said = await built(tmp_path / "api", a_tar(DOCKERFILE, a_file("data", bytes(100_000))))
    assert "Successfully tagged made:1" in said
