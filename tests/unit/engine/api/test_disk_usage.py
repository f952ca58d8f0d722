"""``GET /system/df``: what it counts by the version, and what goes away while it counts."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.aio.clock import SystemClock
from skep.api.http.server import application
from skep.engine.api import disk_usage
from skep.engine.build.cache.cache import CacheMounts
from skep.engine.engine import Engine
from skep.engine.images.store import ImageStore
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.file_faults import file_faults

Api = TestClient[Any, Any]


@pytest.fixture
async def engine(tmp_path: Path) -> Engine:
    engine = memory_engine(tmp_path, Machine())
    engine.images = ImageStore(tmp_path / "images")
    await engine.images.open()
    return engine


@pytest.fixture
async def api(engine: Engine, tmp_path: Path) -> AsyncIterator[Api]:
    table = disk_usage.disk_usage_routes(engine, CacheMounts(tmp_path / "cache"), SystemClock())
    async with TestClient(TestServer(application(table))) as api:
        yield api


async def test_a_volume_that_is_removed_meanwhile_is_left_out(
    api: Api, engine: Engine, tmp_path: Path
) -> None:
    for name in ("going", "kept"):
        (engine.volumes.ensure(name) / "file").write_text("1234567")
    loop, going = asyncio.get_running_loop(), engine.volumes.path("going")
    walked: list[str] = []

    def remove_first(call: str, path: Path) -> None:
        if path == going and not walked:
            walked.append(call)
            asyncio.run_coroutine_threadsafe(engine.volumes.remove("going", engine.list), loop).result(60)

    with file_faults(tmp_path) as faults:
        faults.before_each = remove_first
        response = await (await api.get("/v1.47/system/df?type=volume")).json()
    assert walked
    shown = [(one["Name"], one["UsageData"]) for one in response["Volumes"]]
    assert shown == [("kept", {"RefCount": 0, "Size": 7})]
    assert response["Images"] is response["Containers"] is response["BuildCache"] is None


async def test_types_have_a_meaning_since_1_42(api: Api) -> None:
    refused = await api.get("/v1.42/system/df?type=volume&type=bogus")
    assert (refused.status, await refused.json()) == (400, {"message": "unknown object type: bogus"})
    everything = await (await api.get("/v1.41/system/df?type=bogus")).json()
    assert all(everything[name] == [] for name in ("Images", "Containers", "Volumes", "BuildCache"))
