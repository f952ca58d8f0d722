"""Archives of images for clients that take nothing."""

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from skep.api.http.server import application
from skep.engine.api.images import image_routes
from skep.engine.images.store import ImageStore
from tests.support.images.images_rig import APP, an_image, give
from tests.support.managers.wire_rig import until

pytestmark = pytest.mark.needs("root")


class Node:
    """What ``give`` needs of a node."""

    def __init__(self, images: ImageStore) -> None:
        self.images = images


async def test_a_client_that_takes_nothing_of_a_saved_image_is_given_up(tmp_path: Path) -> None:
    images = ImageStore(tmp_path / "images")
    await images.open()
    image = await give(Node(images), an_image(30_000_000))  # type: ignore[arg-type]
    routes = image_routes(images, lambda: (), taken_s=0.3)
    runner = web.AppRunner(application(routes), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "api")).start()
    try:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "api"), limit=1)
        writer.write(f"GET /v1.41/images/{APP}/get HTTP/1.1\r\nHost: d\r\n\r\n".encode())
        await until(lambda: images.pins[image.chain[0]])
        await until(lambda: not images.pins[image.chain[0]])
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(30_000_000)
        writer.close()
    finally:
        await runner.cleanup()
