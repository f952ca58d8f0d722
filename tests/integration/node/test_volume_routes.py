"""Volumes that services made, and what a node never has, as ``docker volume`` and ``docker inspect`` ask for them."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.api.server import application
from skep.node.mounts.volumes import Volumes
from skep.node.oci.container import Container, ContainerConfig, MountPoint
from skep.node.routes import absent
from skep.node.routes.volumes import volume_routes

Api = TestClient[Any, Any]


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    volumes = Volumes(tmp_path / "volumes")
    for name in ("used", "free"):
        volumes.ensure(name)
    return volumes


@pytest.fixture
async def api(volumes: Volumes) -> AsyncIterator[Api]:
    mount = MountPoint(type="volume", destination="/v", name="used")
    config = ContainerConfig(path="sh", mounts=(mount,))
    user = Container(id="c" * 64, name="web.1", image="busybox:1", image_id="sha256:1", config=config)
    async with TestClient(
        TestServer(application(volume_routes(volumes, lambda: [user]), absent.routes))
    ) as api:
        yield api


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["free", "used"]),
        ('?filters={"name":["us"]}', ["used"]),
        ('?filters={"dangling":["true"]}', ["free"]),
        ('?filters={"driver":["other"]}', []),
        ('?filters={"label":["x"]}', []),
    ],
)
async def test_volumes_are_listed(api: Api, query: str, names: list[str]) -> None:
    answer = await (await api.get(f"/v1.41/volumes{query}")).json()
    assert [volume["Name"] for volume in answer["Volumes"]] == names


async def test_a_volume_is_inspected(api: Api, volumes: Volumes) -> None:
    answer = await (await api.get("/volumes/used")).json()
    assert (answer["Mountpoint"], answer["Driver"], answer["Scope"]) == (
        str(volumes.path("used")),
        "local",
        "local",
    )


async def test_a_volume_is_removed_unless_a_container_has_it(api: Api, volumes: Volumes) -> None:
    assert (await api.delete("/volumes/free")).status == 204
    assert volumes.names() == ["used"]
    refused = await api.delete("/volumes/used")
    assert refused.status == 409
    assert (await refused.json())["message"] == f"remove used: volume is in use - [{'c' * 64}]"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/volumes/nosuch", "get nosuch: no such volume"),
        ("/plugins/nosuch/json", 'plugin "nosuch" not found'),
    ],
)
async def test_what_is_not_there_is_said_so_and_docker_inspect_looks_further(
    api: Api, path: str, message: str
) -> None:
    answer = await api.get(path)
    assert (answer.status, (await answer.json())["message"]) == (404, message)


async def test_a_name_with_a_path_in_it_is_no_volume(api: Api) -> None:
    assert (await api.get("/volumes/..%2fused")).status == 404
    assert (await api.delete("/volumes/..%2f..")).status == 404
