"""Volumes that services made, and what a node never has, as ``docker volume`` and ``docker inspect`` ask for them."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import application
from skep.engine.api.routes import absent_routes
from skep.engine.api.volumes import volume_routes
from skep.engine.containers.container import Container, ContainerConfig, MountPoint
from skep.engine.volumes.volumes import Volumes
from tests.support.file_faults import file_faults

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
        TestServer(application(volume_routes(volumes, lambda: [user]), absent_routes()))
    ) as api:
        yield api


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["free", "used"]),
        ('?filters={"name":["us"]}', ["used"]),
        ('?filters={"dangling":["true"]}', ["free"]),
        ('?filters={"dangling":{"1":true}}', ["free"]),
        ('?filters={"dangling":["false"]}', ["used"]),
        ('?filters={"dangling":["0"]}', ["used"]),
        ('?filters={"driver":["other"]}', []),
        ('?filters={"label":["x"]}', []),
    ],
)
async def test_volumes_are_listed(api: Api, query: str, names: list[str]) -> None:
    response = await (await api.get(f"/v1.41/volumes{query}")).json()
    assert [volume["Name"] for volume in response["Volumes"]] == names


async def test_a_filter_that_is_neither_true_nor_false_is_refused(api: Api) -> None:
    response = await api.get('/v1.41/volumes?filters={"dangling":["x"]}')
    assert response.status == 400
    assert await response.json() == {"message": "invalid filter 'dangling=[x]'"}


async def test_a_volume_is_inspected(api: Api, volumes: Volumes) -> None:
    response = await (await api.get("/volumes/used")).json()
    assert (response["Mountpoint"], response["Driver"], response["Scope"]) == (
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
    response = await api.get(path)
    assert (response.status, (await response.json())["message"]) == (404, message)


async def test_a_volume_is_made_with_its_labels_and_another_time_is_what_it_is(
    api: Api, volumes: Volumes
) -> None:
    body = {"Name": "v1", "Driver": "local", "Labels": {"a": "b"}}
    for labels in ({"a": "b"}, {"a": "other"}):
        made = await api.post("/volumes/create", json={**body, "Labels": labels})
        assert made.status == 201
        assert await made.json() == await (await api.get("/volumes/v1")).json()
    assert (await (await api.get("/volumes/v1")).json())["Labels"] == {"a": "b"}
    listed = await (await api.get('/volumes?filters={"label":["a=b"]}')).json()
    assert [volume["Name"] for volume in listed["Volumes"]] == ["v1"]
    nameless = await (await api.post("/volumes/create", json={})).json()
    assert (len(nameless["Name"]), nameless["Labels"]) == (64, {"com.docker.volume.anonymous": ""})


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            {"Driver": "nosuch"},
            404,
            'create v1: error looking up volume plugin nosuch: plugin "nosuch" not found',
        ),
        ({"DriverOpts": {"bogus": "1"}}, 400, 'create v1: invalid option: "bogus"'),
        (
            {"DriverOpts": {"device": "/dev/x"}},
            400,
            'create v1: missing required option: "type"',
        ),
        ({"ClusterVolumeSpec": {}}, 400, "create v1: cluster volumes (CSI) need API version 1.42 or later"),
        ({"Name": "v"}, 400, "create v: volume name is too short"),
        ({"Name": "../v"}, 400, 'create ../v: "../v" includes invalid characters for a local volume name'),
    ],
)
async def test_volumes_that_cannot_be_are_refused_by_name(
    api: Api, volumes: Volumes, body: dict[str, Any], status: int, message: str
) -> None:
    response = await api.post("/volumes/create", json={"Name": "v1", **body})
    assert response.status == status
    assert (await response.json())["message"].startswith(message)
    assert volumes.names() == ["free", "used"]


NAMELESS = "0" * 64


@pytest.mark.parametrize(
    ("path", "pruned"),
    [
        ("/v1.42/volumes/prune", [NAMELESS]),
        ("/v1.41/volumes/prune", [NAMELESS, "free", "labeled"]),
        ('/v1.42/volumes/prune?filters={"all":["true"]}', [NAMELESS, "free", "labeled"]),
        ('/v1.42/volumes/prune?filters={"all":["1"],"label":["a=b"]}', ["labeled"]),
        ('/v1.42/volumes/prune?filters={"all":["1"],"label!":["a"]}', [NAMELESS, "free"]),
    ],
)
async def test_unused_volumes_are_pruned_as_the_filters_and_the_version_say(
    api: Api, volumes: Volumes, path: str, pruned: list[str]
) -> None:
    (volumes.ensure(NAMELESS) / "file").write_bytes(b"12345")
    volumes.ensure("labeled", {"a": "b"})
    report = await (await api.post(path)).json()
    assert report == {"VolumesDeleted": pruned, "SpaceReclaimed": 5 if NAMELESS in pruned else 0}
    assert "used" in volumes.names()
    assert not set(pruned) & set(volumes.names())


async def test_a_volume_with_options_shows_them_and_is_never_pruned(api: Api, volumes: Volumes) -> None:
    options = {"type": "nfs", "device": ":/export", "o": "addr=10.0.0.1"}
    made = await api.post("/volumes/create", json={"Name": "far", "DriverOpts": options})
    assert (made.status, (await made.json())["Options"]) == (201, options)
    again = await api.post("/volumes/create", json={"Name": "far", "DriverOpts": {}})
    assert (await again.json())["Options"] == options
    assert (await (await api.get("/volumes/free")).json())["Options"] is None
    report = await (await api.post('/v1.42/volumes/prune?filters={"all":["1"]}')).json()
    assert report["VolumesDeleted"] == ["free"]
    assert (await api.delete("/volumes/far")).status == 204
    assert volumes.names() == ["used"]


async def test_options_that_cannot_be_read_leave_the_other_volumes_in_the_list(
    api: Api, volumes: Volumes
) -> None:
    volumes.ensure("broken", None, {"type": "nfs", "device": ":/x"})
    (volumes.path("broken").parent / "options.json").write_text("{")
    listed = await (await api.get("/volumes")).json()
    assert [(one["Name"], one["Options"]) for one in listed["Volumes"]] == [
        ("broken", None),
        ("free", None),
        ("used", None),
    ]


async def test_a_volume_that_is_removed_meanwhile_is_not_listed(
    api: Api, volumes: Volumes, tmp_path: Path
) -> None:
    gone, removed = volumes.path("gone").parent, list[str]()

    def remove_first(call: str, path: Path) -> None:
        """Once its name was listed, before anything else of it is read."""
        if call != "listdir" and path.is_relative_to(gone) and not removed:
            removed.append(call)
            shutil.rmtree(gone)

    for method, url, key in (("GET", "/volumes", "Volumes"), ("POST", "/v1.41/volumes/prune", "")):
        volumes.ensure("gone")
        removed.clear()
        with file_faults(tmp_path) as faults:
            faults.before_each = remove_first
            response = await (await api.request(method, url)).json()
        assert removed
        if key:
            assert [one["Name"] for one in response[key]] == ["free", "used"]
    assert response == {"VolumesDeleted": ["free"], "SpaceReclaimed": 0}


async def test_pruning_refuses_filters_that_it_does_not_know(api: Api, volumes: Volumes) -> None:
    for filters, message in (
        ('{"all":["maybe"]}', "invalid filter 'all=[maybe]'"),
        ('{"until":["1h"]}', "Invalid filter 'until'"),
    ):
        refused = await api.post(f"/v1.43/volumes/prune?filters={filters}")
        assert (refused.status, (await refused.json())["message"]) == (400, message)
    assert volumes.names() == ["free", "used"]


async def test_a_name_with_a_path_in_it_is_no_volume(api: Api) -> None:
    assert (await api.get("/volumes/..%2fused")).status == 404
    assert (await api.delete("/volumes/..%2f..")).status == 404
