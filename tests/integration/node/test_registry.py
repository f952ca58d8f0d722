"""Pulling over the API from Debian's docker-registry, by requests and by the docker command."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import application, runner
from skep.engine.api.images import image_routes
from skep.engine.images.registry.registry import DOCKER_MANIFEST
from skep.engine.images.store import ImageStore
from tests.conftest import SEARCHED
from tests.support.images.archives import sha256
from tests.support.images.registry_rig import BLOBS, CONFIG, a_manifest, docker_registry
from tests.support.machines.playground_rig import CLIS

pytestmark = pytest.mark.needs("docker-registry")


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[str]:
    """Debian's docker-registry with one image, ``team/app:1``; gives its address."""
    async with docker_registry(tmp_path / "registry") as address:
        async with aiohttp.ClientSession(f"http://{address}") as session:
            await _push(session)
        yield address


async def _push(session: aiohttp.ClientSession) -> None:
    for content in (CONFIG, *BLOBS):
        async with session.post("/v2/team/app/blobs/uploads/") as response:
            location = response.headers["Location"]
        async with session.put(f"{location}&digest={sha256(content)}", data=content) as response:
            assert response.status == 201
    headers = {"Content-Type": DOCKER_MANIFEST}
    async with session.put("/v2/team/app/manifests/1", data=a_manifest(), headers=headers) as response:
        assert response.status == 201


async def asked(
    client: TestClient, method: str, path: str, **query: str
) -> tuple[int, list[Mapping[str, object]]]:
    response = await client.request(method, f"/v1.41{path}", params=query)
    lines = [msgspec.json.decode(line) for line in (await response.read()).splitlines() if line]
    return response.status, lines


async def test_a_real_registry_is_pulled_from_over_the_api(images: ImageStore, registry: str):
    async with TestClient(TestServer(application(image_routes(images, lambda: ())))) as client:
        status, lines = await asked(
            client, "POST", "/images/create", fromImage=f"{registry}/team/app", tag="1"
        )
        assert status == 200
        assert lines[-1] == {"status": f"Status: Downloaded newer image for {registry}/team/app:1"}
        _, [found] = await asked(client, "GET", f"/distribution/{registry}/team/app:1/json")
        assert found["Descriptor"] == {
            "mediaType": DOCKER_MANIFEST,
            "digest": sha256(a_manifest()),
            "size": len(a_manifest()),
        }
        assert found["Platforms"] == [{"architecture": "amd64", "os": "linux"}]
        _, [listed] = await asked(client, "GET", "/images/json")
        assert listed[0]["RepoDigests"] == [f"{registry}/team/app@{sha256(a_manifest())}"]


async def test_an_unknown_tag_is_a_404_in_dockers_words(images: ImageStore, registry: str):
    async with TestClient(TestServer(application(image_routes(images, lambda: ())))) as client:
        unknown = "manifest unknown: manifest unknown"
        assert await asked(client, "POST", "/images/create", fromImage=f"{registry}/team/app", tag="9") == (
            404,
            [{"message": f"manifest for {registry}/team/app:9 not found: {unknown}"}],
        )
        assert await asked(client, "GET", f"/distribution/{registry}/team/app:9/json") == (
            404,
            [{"message": unknown}],
        )


async def test_a_name_without_a_tag_pulls_every_tag(images: ImageStore, registry: str):
    async with TestClient(TestServer(application(image_routes(images, lambda: ())))) as client:
        status, _ = await asked(client, "POST", "/images/create", fromImage=f"{registry}/team/app")
        assert status == 200
        assert images.get(f"{registry}/team/app:1").id == sha256(CONFIG)


@pytest.mark.parametrize("cli", CLIS)
async def test_docker_pulls_and_shows_the_progress(
    images: ImageStore, registry: str, cli: str, tmp_path: Path
):
    server = runner(application(image_routes(images, lambda: ())))
    await server.setup()
    try:
        await web.UnixSite(server, tmp_path / "api.sock").start()
        process = await asyncio.create_subprocess_exec(
            *(cli, "--host", f"unix://{tmp_path / 'api.sock'}", "pull", f"{registry}/team/app:1"),
            env={"DOCKER_API_VERSION": "1.41", "HOME": "/nonexistent", "PATH": SEARCHED},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
    finally:
        await server.cleanup()
    lines = output.decode().splitlines()
    assert process.returncode == 0, lines
    assert lines[0] == "1: Pulling from team/app"
    assert [line for line in lines if line.endswith("Pull complete")]
    assert lines[-2:] == [
        f"Status: Downloaded newer image for {registry}/team/app:1",
        f"{registry}/team/app:1",
    ]
    assert images.get(f"{registry}/team/app:1").id == sha256(CONFIG)
