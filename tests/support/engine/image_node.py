"""The engine's routes of a node in memory that has one image, as a client of the API reaches them."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

from aiohttp.test_utils import TestClient, TestServer

from skep.aio.clock import SystemClock
from skep.api.http.server import application
from skep.engine.api.containers import container_routes, create_routes, image_users
from skep.engine.api.disk_usage import disk_usage_routes
from skep.engine.api.images import image_routes
from skep.engine.build.cache.cache import CacheMounts
from skep.engine.containers.request import CreateRequest, read_create
from skep.engine.engine import Engine
from skep.engine.images.platforms import this_platform
from skep.engine.images.store import ImageStore
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.images.archives import a_config, a_docker_archive, a_file, a_tar

Api: TypeAlias = TestClient[Any, Any]
HERE = {"os": "linux", "architecture": this_platform().architecture}
OTHER = {"os": "linux", "architecture": "s390x"}
LAYER = a_tar(a_file("hello", b"world"))


async def image_engine(directory: Path) -> Engine:
    """Return an engine in memory with a store of images in ``directory``."""
    engine = memory_engine(directory, Machine())
    engine.images = ImageStore(directory / "images")
    await engine.images.open()
    return engine


@asynccontextmanager
async def image_api(engine: Engine, directory: Path) -> AsyncIterator[Api]:
    """Serve the engine, which gets the image app:1."""
    clock = SystemClock()
    app = application(
        image_routes(engine.images, lambda: image_users(engine)),
        container_routes(engine, clock),
        create_routes(engine),
        disk_usage_routes(engine, CacheMounts(directory / "cache"), clock),
        is_private=lambda _: True,
    )
    async with TestClient(TestServer(app)) as api:
        await load_image(api, "/images/load", HERE)
        yield api


async def load_image(api: Api, path: str, platform: Mapping[str, str], name: str = "app:1") -> str:
    """Load an image for ``platform``, and return the messages."""
    archive = a_docker_archive(LAYER, tags=[name], config=a_config(LAYER, **platform))
    response = await api.post(path, data=archive)
    assert response.status == 200
    return await response.text()


async def answer(api: Api, path: str) -> tuple[int, Any]:
    response = await api.get(path)
    return response.status, await response.json()


def asking_for(endpoints: Mapping[str, Any], mode: str = "front", **host: Any) -> CreateRequest:
    """Return the request for a container of app:1 on these networks, with further options of ``HostConfig``."""
    body = {
        "Image": "app:1",
        "HostConfig": {"NetworkMode": mode, **host},
        "NetworkingConfig": {"EndpointsConfig": endpoints},
    }
    return read_create(json.dumps(body).encode())
