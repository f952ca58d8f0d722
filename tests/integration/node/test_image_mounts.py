"""``--mount type=image`` of plain containers, on real runc: the files of an image in another one's container."""

import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from skep.engine.images.store import ImageStore
from skep.playground.images.busybox import busybox_archive
from tests.integration.node.conftest import eventually
from tests.support.engine.api_lab import Api
from tests.support.engine.runc_lab import Lab
from tests.support.images.archives import a_docker_archive, a_file, a_tar

IMAGE = "busybox:1"
DATA = "data:1"
LINKS = "links:1"


@pytest.fixture
async def images(tmp_path: Path) -> ImageStore:
    images = ImageStore(tmp_path / "images")
    await images.open()
    layers = (a_tar(a_file("file", b"one\n"), a_file("hidden", b"")), a_tar(a_file("sub/other", b"two\n")))
    links = a_tar(
        *(a_file(name, type=tarfile.SYMTYPE, linkname=to) for name, to in (("out", "/etc"), ("up", "../..")))
    )
    busybox = await busybox_archive()
    archives = (a_docker_archive(*layers, tags=[DATA]), a_docker_archive(links, tags=[LINKS]))
    for archive in (busybox.data, *archives):

        async def pieces(content: bytes = archive) -> AsyncIterator[bytes]:
            yield content

        await images.load(pieces())
    return images


@pytest.fixture
def lab(lab_with_images: Lab) -> Lab:
    return lab_with_images


def a_body(*command: str, **mount: Any) -> dict[str, Any]:
    mount = {"Type": "image", "Source": DATA, "Target": "/data", **mount}
    return {"Image": IMAGE, "Cmd": list(command), "HostConfig": {"NetworkMode": "none", "Mounts": [mount]}}


async def run(api: Api, body: dict[str, Any]) -> tuple[str, int, str]:
    """Id, exit code and output of a container that has ended."""
    status, created = await api.ask("POST", "/containers/create", body)
    assert status == 201, created
    return (created["Id"], *await run_again(api, created["Id"]))


async def run_again(api: Api, id: str) -> tuple[int, str]:
    status, error = await api.ask("POST", f"/containers/{id}/start")
    assert status == 204, error
    _, ended = await api.ask("POST", f"/containers/{id}/wait")
    code, output, _ = await api.docker("logs", "--tail", "1", id)
    assert code == 0
    return ended["StatusCode"], output.strip()


def mounts() -> list[str]:
    return [
        line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if "/images/0" in line
    ]


async def unmounted() -> None:
    """A container is shown as ended a moment before its images are unmounted."""
    await eventually(lambda: not mounts(), "its images are unmounted")


async def test_a_container_has_the_files_of_another_image_under_changes_of_its_own(
    api: Api, images: ImageStore
) -> None:
    id, code, _ = await run(
        api, a_body("sh", "-c", "cat /data/file /data/sub/other && rm /data/hidden && echo x > /data/new")
    )
    assert code == 0
    _, shown, _ = await api.docker("logs", id)
    assert shown == "one\ntwo\n"
    _, response = await api.ask("GET", f"/containers/{id}/json")
    (mount,) = response["Mounts"]
    image = images.get(DATA)
    assert (mount["Type"], mount["Destination"], mount["RW"], mount["Name"]) == (
        "image",
        "/data",
        True,
        image.id,
    )
    assert response["HostConfig"]["Mounts"] == [{"Type": "image", "Source": DATA, "Target": "/data"}]
    await unmounted()
    # What it wrote is there at its next start, and in no other container.
    status, created = await api.ask(
        "POST", "/containers/create", a_body("sh", "-c", "ls /data | tr '\\n' ' '", ReadOnly=True)
    )
    assert status == 201
    assert await run_again(api, created["Id"]) == (0, "file hidden sub")
    again = await api.ask("POST", f"/containers/{id}/start")
    assert again[0] == 204
    _, ended = await api.ask("POST", f"/containers/{id}/wait")
    assert ended["StatusCode"] != 0  # `rm` finds nothing any more


async def test_a_container_has_a_part_of_another_image(api: Api) -> None:
    id, code, output = await run(
        api, a_body("sh", "-c", "ls /data && echo x > /data/new", ImageOptions={"Subpath": "sub"})
    )
    assert (code, output) == (0, "other")
    await unmounted()
    assert await run_again(api, id) == (0, "other")
    assert (await api.docker("logs", id))[1] == "other\nnew\nother\n", "what it wrote is there again"
    _, code, output = await run(
        api, a_body("cat", "/data", ImageOptions={"Subpath": "sub/other"}, ReadOnly=True)
    )
    assert (code, output) == (0, "two")
    _, response = await api.ask("GET", f"/containers/{id}/json")
    assert response["HostConfig"]["Mounts"][0]["ImageOptions"] == {"Subpath": "sub"}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("nosuch", "no such file or directory"),
        ("out/passwd", "path concatenation escapes the base directory"),
        ("up", "path concatenation escapes the base directory"),
    ],
)
async def test_no_link_of_an_image_leads_out_of_it(api: Api, part: str, text: str) -> None:
    body = a_body("true", Source=LINKS, ImageOptions={"Subpath": part})
    status, error = await api.ask("POST", "/containers/create", body)
    assert status == 400
    assert text in error["message"]
    assert not mounts()
    assert (await api.ask("GET", "/containers/json?all=1"))[1] == []


async def test_a_read_only_image_is_not_written_to(api: Api) -> None:
    _, code, _ = await run(api, a_body("sh", "-c", "echo x > /data/file", ReadOnly=True))
    assert code != 0


async def test_an_image_that_a_container_mounts_is_kept_until_the_container_goes(
    api: Api, images: ImageStore
) -> None:
    id, _, _ = await run(api, a_body("true"))
    layers = images.layers(images.get(DATA))
    status, refused = await api.ask("DELETE", f"/images/{DATA}")
    assert (status, "container" in refused["message"]) == (409, True)
    status, _ = await api.ask("DELETE", f"/images/{DATA}?force=1")
    assert status == 200
    assert (await run_again(api, id))[0] == 0
    assert all(map(os.path.isdir, layers))
    status, _ = await api.ask("DELETE", f"/containers/{id}")
    assert status == 204
    assert not any(map(os.path.isdir, layers))
    assert not mounts()


@pytest.mark.parametrize(
    ("mount", "status", "text"),
    [
        ({"Source": "nosuch:1"}, 404, "No such image: nosuch:1"),
        ({"Source": ""}, 400, "field Source must not be empty"),
        ({"Target": "data"}, 400, "mount path must be absolute"),
        (
            {"BindOptions": {"Propagation": "private"}},
            400,
            "BindOptions must not be specified on mount type",
        ),
        (
            {"VolumeOptions": {"NoCopy": True}},
            400,
            "VolumeOptions must not be specified on mount type",
        ),
        ({"TmpfsOptions": {"SizeBytes": 1}}, 400, "TmpfsOptions must not be specified on mount type"),
        ({"Target": ""}, 400, "field Target must not be empty"),
        ({"Target": "/x/.."}, 400, "invalid specification: destination can't be '/'"),
        ({"ImageOptions": {"Subpath": "../sub"}}, 400, "subpath must be a relative path within the volume"),
        ({"ImageOptions": {"Subpath": "/sub"}}, 400, "subpath must be a relative path within the volume"),
        (
            {"Type": "tmpfs", "Source": "", "ImageOptions": {"Subpath": "sub"}},
            400,
            "field ImageOptions must not be specified",
        ),
    ],
)
async def test_a_mount_that_cannot_be_is_refused(
    api: Api, mount: dict[str, Any], status: int, text: str
) -> None:
    found, error = await api.ask("POST", "/containers/create", a_body("true", **mount))
    assert (found, text in json.dumps(error)) == (status, True), error
    assert (await api.ask("GET", "/containers/json?all=1"))[1] == []
