"""Files of containers: copied in and out, exported, committed; hostile links and archives."""

import asyncio
import base64
import gzip
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
from aiohttp import web

from skep.agent.executor.oci import OciExecutor
from skep.api.http.server import application, runner
from skep.engine.api.files import file_routes
from skep.engine.images.store import ImageStore
from skep.playground.images.busybox import busybox_archive
from tests.support.engine.api_lab import Api
from tests.support.engine.runc_lab import Lab
from tests.support.images.archives import a_file, a_tar, an_entry

IMAGE = "busybox:1"


@pytest.fixture
async def images(tmp_path: Path) -> ImageStore:
    images = ImageStore(tmp_path / "images")
    await images.open()
    archive = await busybox_archive()

    async def pieces() -> AsyncIterator[bytes]:
        yield archive.data

    await images.load(pieces())
    return images


@pytest.fixture
def lab(lab_with_images: Lab) -> Lab:
    return lab_with_images


async def create(api: Api, *command: str, **host: Any) -> str:
    """A container without a network, which is not started; gives its id."""
    options = {key: host.pop(key) for key in ("User", "Env", "Labels") if key in host}
    body = {"Image": IMAGE, "Cmd": list(command), "HostConfig": {"NetworkMode": "none", **host}, **options}
    status, created = await api.ask("POST", "/containers/create", body)
    assert status == 201, created
    return str(created["Id"])


async def start(api: Api, *command: str, **host: Any) -> str:
    id = await create(api, *command, **host)
    status, content = await api.ask("POST", f"/containers/{id}/start")
    assert status == 204, content
    return id


async def run(api: Api, command: str, **host: Any) -> str:
    """A container that has ended."""
    id = await start(api, "sh", "-c", command, **host)
    await api.ask("POST", f"/containers/{id}/wait")
    return id


async def put(api: Api, id: str, path: str, archive: bytes, **query: str) -> str:
    """Unpack an archive in a container; gives the error's message."""
    words = "&".join(f"{name}={value}" for name, value in {"path": path, **query}.items())
    status, content, _ = await api.send("PUT", f"/containers/{id}/archive?{words}", archive)
    return "" if status == 200 else f"{status} {json.loads(content)['message']}"


async def got(api: Api, id: str, path: str) -> dict[str, tarfile.TarInfo]:
    """The members of the archive of a path, with their content as ``pax_headers['content']``."""
    status, content, _ = await api.send("GET", f"/containers/{id}/archive?path={path}")
    assert status == 200, content
    return members(content)


def members(content: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = {}
        for member in archive:
            source = archive.extractfile(member) if member.isreg() else None
            member.pax_headers = {"content": source.read().decode(errors="replace") if source else ""}
            found[member.name] = member
        return found


def content_of(member: tarfile.TarInfo) -> str:
    return str(member.pax_headers["content"])


def status_in(headers: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(headers["X-Docker-Container-Path-Stat"]))
    return found


async def in_container(api: Api, id: str, command: str) -> str:
    """What a shell in a running container prints."""
    _, output, errors = await api.docker("exec", id, "sh", "-c", command)
    return output + errors


@pytest.mark.parametrize("state", ["created", "running", "exited"])
async def test_files_go_in_and_come_out_of_a_container_in_any_state(
    api: Api, lab: Lab, tmp_path: Path, state: str
) -> None:
    volume = f"{tmp_path}/bound"
    os.mkdir(volume)
    binds = [f"{volume}:/data/inner"]
    if state == "created":
        id = await create(api, "true", Binds=binds)
    else:
        id = await start(api, "sh", "-c", "true" if state == "exited" else "sleep 1000", Binds=binds)
        if state == "exited":
            await api.ask("POST", f"/containers/{id}/wait")
    archive = a_tar(
        an_entry("d", tarfile.DIRTYPE, mode=0o750),
        a_file("d/file", b"content", mode=0o4711, uid=7, gid=8),
        an_entry("d/link", tarfile.SYMTYPE, "file"),
        an_entry("d/hard", tarfile.LNKTYPE, "d/file"),
    )
    assert await put(api, id, "/tmp", archive) == ""
    assert await put(api, id, "/data/inner", a_tar(a_file("in-volume", b"x"))) == ""
    assert (tmp_path / "bound/in-volume").read_bytes() == b"x"
    found = await got(api, id, "/tmp/d")
    assert list(found) == ["d", "d/file", "d/hard", "d/link"]
    assert (found["d/file"].mode, found["d/file"].uid, found["d/file"].gid) == (0o4711, 7, 8)
    assert (content_of(found["d/file"]), found["d/hard"].linkname) == ("content", "d/file")
    assert set(await got(api, id, "/data")) == {"data", "data/inner", "data/inner/in-volume"}
    if state == "running":
        assert await in_container(api, id, "cat /tmp/d/link /data/inner/in-volume") == "contentx"
    await api.ask("DELETE", f"/containers/{id}?force=1")
    assert (tmp_path / "bound/in-volume").exists()
    assert not lab.remains()


async def test_what_is_at_a_path_is_in_a_header(api: Api) -> None:
    id = await run(
        api, "mkdir /d && ln -s /d/f /l && echo -n hello > /d/f && chmod 2640 /d/f && chmod 1777 /d"
    )
    cases = {
        "/d/f": ("f", 5, 0o640 | 1 << 22, ""),
        "/d": ("d", None, 0o777 | 1 << 31 | 1 << 20, ""),
        "/l": ("l", 4, 0o777 | 1 << 27, "/d/f"),
        "d/./../d/f": ("f", 5, 0o640 | 1 << 22, ""),
        "/": ("/", None, 0o755 | 1 << 31, ""),
        "../../..": ("/", None, 0o755 | 1 << 31, ""),
    }
    for path, (name, size, mode, target) in cases.items():
        status, _, headers = await api.send("HEAD", f"/containers/{id}/archive?path={path}")
        assert status == 200
        found = status_in(headers)
        assert (found["name"], found["mode"], found["linkTarget"]) == (name, mode, target), path
        assert size in (None, found["size"])
    status, content, _ = await api.send("GET", f"/containers/{id}/archive?path=/nosuch")
    assert (status, json.loads(content)["message"]) == (
        404,
        f"Could not find the file /nosuch in container {id}",
    )
    status, content, _ = await api.send("GET", f"/containers/{id}/archive")
    assert (status, json.loads(content)["message"]) == (400, "bad parameter: pathcannot be empty")


async def test_a_copy_into_the_container_follows_dockers_rules(api: Api, tmp_path: Path) -> None:
    os.mkdir(tmp_path / "fixed")
    id = await run(
        api,
        "mkdir -p /d/x && echo old > /d/y && ln -s /d /l",
        Binds=[f"{tmp_path}/fixed:/fixed:ro"],
        User="0:0",
    )
    failed = "500 Error processing tar file(exit status 1): "
    cases = {
        ("/d/y", b"", ""): "500 extraction point is not a directory",
        ("/nosuch", b"", ""): f"404 Could not find the file /nosuch in container {id}",
        ("/fixed", a_tar(a_file("f", b"x")), ""): "500 mounted volume is marked read-only",
        ("/d", a_tar(a_file("x", b"x")), "true"): (
            f'{failed}cannot overwrite directory "/d/x" with non-directory "/d"'
        ),
        ("/d", a_tar(an_entry("y", tarfile.DIRTYPE)), "true"): (
            f'{failed}cannot overwrite non-directory "/d/y" with directory "/d"'
        ),
        ("/d", a_tar(a_file("../out", b"x")), ""): f'{failed}"../out" is outside of "/d"',
        ("/d", a_tar(an_entry("s", tarfile.SYMTYPE, "../../x")), ""): (
            f'{failed}invalid symlink "/d/s" -> "../../x"'
        ),
        ("/d", a_tar(an_entry("h", tarfile.LNKTYPE, "../etc/passwd")), ""): (
            f'{failed}invalid hardlink "/etc/passwd" -> "../etc/passwd"'
        ),
        ("/d", b"rubbish" * 200, ""): f"{failed}archive/tar: invalid tar header",
        ("/l", a_tar(a_file("x", b"a file now")), ""): "",
    }
    for (path, archive, keeps_kinds), expected in cases.items():
        query = {"noOverwriteDirNonDir": keeps_kinds} if keeps_kinds else {}
        assert await put(api, id, path, archive, **query) == expected
    assert content_of((await got(api, id, "/d/x"))["x"]) == "a file now"
    fixed = await create(api, "true", ReadonlyRootfs=True, Binds=[f"{tmp_path}/fixed:/rw"])
    assert await put(api, fixed, "/tmp", a_tar(a_file("f"))) == "500 container rootfs is marked read-only"
    assert await put(api, fixed, "/rw", a_tar(a_file("f"))) == ""


async def test_files_that_are_copied_as_the_user_belong_to_it(api: Api) -> None:
    id = await create(api, "true", User="65534:5")
    archive = a_tar(a_file("as-user", b"x", uid=7, gid=8))
    assert await put(api, id, "/tmp", archive, copyUIDGID="true") == ""
    (member,) = (await got(api, id, "/tmp/as-user")).values()
    assert (member.uid, member.gid) == (65534, 5)


async def test_links_of_a_container_lead_to_its_own_files(api: Api, tmp_path: Path) -> None:
    """Wherever a link stands, in a path, in a volume or in an archive, nothing of the machine is read or written."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("of the machine")
    volume = tmp_path / "volume"
    volume.mkdir()
    id = await run(
        api,
        f"ln -s {secret} /out; ln -s ../../../../../../..{secret} /up; ln -s {secret}/key /file;"
        f" ln -s {secret} /volume/out; ln -s /proc/1/root /proc-root",
        Binds=[f"{volume}:/volume"],
    )
    for path in ("/out/key", "/up/key", "/out/", "/volume/out/key", "/proc-root/etc/shadow"):
        status, _, _ = await api.send("GET", f"/containers/{id}/archive?path={path}")
        assert status == 404, path
    assert (await got(api, id, "/file"))["file"].issym()
    for path in ("/out", "/up", "/volume/out"):
        assert await put(api, id, path, a_tar(a_file("planted"))) == (
            f"404 Could not find the file {path} in container {id}"
        )
    assert os.listdir(secret) == ["key"]


async def test_a_hostile_archive_stays_in_the_container(api: Api, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    id = await run(api, f"mkdir -p /d{outside}; ln -s {outside} /d/link")
    archives = [
        a_tar(a_file("link/planted", b"x")),
        a_tar(an_entry("s", tarfile.SYMTYPE, str(outside)), a_file("s/planted", b"x")),
        a_tar(an_entry("h", tarfile.LNKTYPE, f"link/../../../../../..{outside}")),
        a_tar(a_file(f"/../../../../../../..{outside}/planted", b"x")),
    ]
    for archive in archives:
        await put(api, id, "/d", archive)
    assert os.listdir(outside) == []


@pytest.mark.slow
async def test_a_directory_that_is_swapped_for_a_link_during_a_copy_leads_to_the_containers_own_files(
    api: Api, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text("of the machine")
    id = await start(
        api,
        "sh",
        "-c",
        f"mkdir /real; echo -n mine > /real/key; mkdir -p /d; ln -s {outside} /to; cp -r /real /d/x;"
        " while :; do mv /d/x /d/y; ln -s /to /d/x; rm /d/x; mv /d/y /d/x; done",
    )
    seen = set()
    for _ in range(60):
        try:
            status, content, _ = await api.send("GET", f"/containers/{id}/archive?path=/d/x/key")
        except aiohttp.ClientPayloadError:
            continue  # it was swapped between the look and the copy: the archive has no end
        if status == 200:
            seen |= {content_of(member) for member in members(content).values()}
        await put(api, id, "/d/x", a_tar(a_file("planted", b"x")))
    assert seen <= {"mine"}
    assert os.listdir(outside) == ["key"]


async def test_an_export_has_the_whole_root(api: Api, tmp_path: Path) -> None:
    os.mkdir(tmp_path / "bound")
    (tmp_path / "bound/of-the-volume").write_text("x")
    id = await run(
        api, "echo -n new > /new; rm /etc/group; mknod /null c 1 3", Binds=[f"{tmp_path}/bound:/v"]
    )
    status, content, _ = await api.send("GET", f"/containers/{id}/export")
    assert status == 200
    found = members(content)
    assert content_of(found["new"]) == "new"
    assert {"bin/busybox", "etc/passwd", "v", "tmp"} <= set(found)
    assert not {"etc/group", "v/of-the-volume", ".", ""} & set(found)
    assert found["null"].ischr()


async def test_a_client_that_vanishes_ends_its_copy(api: Api, lab: Lab) -> None:
    id = await run(api, "dd if=/dev/zero of=/large bs=1M count=1 seek=5000")
    reader, writer = await asyncio.open_unix_connection(api.socket)
    writer.write(f"GET /v1.41/containers/{id}/archive?path=/large HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
    status, _ = await api.ask("DELETE", f"/containers/{id}")
    assert status == 204
    async with asyncio.timeout(60):
        while lab.remains():  # noqa: ASYNC110  # nothing announces the end of a process
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("path", ["archive?path=/large", "export"])
async def test_a_client_that_takes_nothing_of_an_archive_gives_its_place_to_others(
    api: Api, executor: OciExecutor, tmp_path: Path, path: str
) -> None:
    executor.engine.files.places = asyncio.Semaphore(1)
    id = await run(api, "dd if=/dev/zero of=/large bs=1M count=1 seek=500")
    server = runner(application(file_routes(executor.engine, taken_s=0.3)))
    await server.setup()
    await web.UnixSite(server, tmp_path / "files.sock").start()
    try:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "files.sock", limit=1024)
        writer.write(f"GET /v1.41/containers/{id}/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        status, _ = await api.ask("GET", f"/containers/{id}/archive?path=/etc/passwd")
        assert status == 200
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(500 << 20)
        writer.close()
    finally:
        await server.cleanup()


# --- commit, import ------------------------------------------------------------------------------------------------


async def made(api: Api, container: str, body: Any = None, **query: str) -> tuple[int, Any]:
    return await api.ask("POST", f"/commit?{urlencode({'container': container, **query}, doseq=True)}", body)


async def test_a_commit_is_an_image_with_the_containers_changes(
    api: Api, images: ImageStore, executor: OciExecutor
) -> None:
    changes = "echo -n new > /new; rm /etc/group; rm -r /var/tmp; mkdir /var/tmp; touch /var/tmp/x; chmod 4755 /bin/ls"
    id = await run(api, changes, Env=["A=1"], Labels={"x": "y"})
    status, response = await made(
        api, id, repo="made", tag="1", author="me", comment="mine", changes=["ENV B=2", 'CMD ["cat","/new"]']
    )
    assert status == 201
    image = images.get("made:1")
    assert response == {"Id": image.id}
    assert (image.config.author, image.config.defaults.cmd) == ("me", ("cat", "/new"))
    assert {"A=1", "B=2"} < set(image.config.defaults.env or ())
    assert (image.config.history or ())[-1].comment == "mine"
    assert len(image.config.diff_ids) == len(images.get(IMAGE).config.diff_ids) + 1
    assert image.parent == images.get(IMAGE).id
    body = {"Image": "made:1", "HostConfig": {"NetworkMode": "none"}}
    _, created = await api.ask("POST", "/containers/create", body)
    await api.ask("POST", f"/containers/{created['Id']}/start")
    await api.ask("POST", f"/containers/{created['Id']}/wait")
    _, output, _ = await api.docker("logs", created["Id"])
    assert output.strip() == "new"
    assert "var/tmp/x" in await got(api, created["Id"], "/var/tmp") or "tmp/x" in await got(
        api, created["Id"], "/var/tmp"
    )
    assert await executor.engine.wait(created["Id"])
    assert not list(images.scratch.iterdir())


async def test_a_container_is_frozen_while_it_is_committed_and_runs_on(
    api: Api, executor: OciExecutor
) -> None:
    id = await start(api, "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > /a; echo $i > /b; done")
    for _ in range(3):
        status, response = await made(api, id)
        assert status == 201
        layer = executor.engine.images.layers(executor.engine.images.get(response["Id"]))[0]
        texts = [(layer / name).read_text() for name in ("a", "b")]
        numbers = [int(text) for text in texts if text]  # a file is empty between its opening and its content
        assert len(numbers) < 2 or numbers[0] - numbers[1] in (0, 1)
    _, shown = await api.ask("GET", f"/containers/{id}/json")
    assert shown["State"]["Status"] == "running"
    await api.ask("POST", f"/containers/{id}/pause")
    assert (await made(api, id))[0] == 201
    _, shown = await api.ask("GET", f"/containers/{id}/json")
    assert shown["State"]["Status"] == "paused", "it was paused by its user"


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ({"changes": "FROM x"}, 400, "from is not a valid change command"),
        ({"changes": "rubbish"}, 400, "rubbish is not a valid change command"),
        ({"repo": "BAD"}, 400, "invalid reference format: repository name must be lowercase"),
        ({"container": "nosuch"}, 404, "No such container: nosuch"),
    ],
)
async def test_a_commit_that_cannot_be_made_leaves_nothing(
    api: Api, images: ImageStore, query: dict[str, str], status: int, message: str
) -> None:
    id = await create(api, "true")
    response_status, response = await made(api, **{"container": id, **query})
    assert (response_status, response["message"].lower()) == (status, message.lower())
    assert [image.tags for image in images.images()] == [images.get(IMAGE).tags]


async def test_an_imported_tree_is_an_image_with_its_changes(api: Api, images: ImageStore) -> None:
    id = await run(api, "echo -n new > /new")
    _, archive, _ = await api.send("GET", f"/containers/{id}/export")
    query = urlencode(
        {"fromSrc": "-", "repo": "imported", "tag": "1", "message": "mine", "changes": 'CMD ["cat","/new"]'}
    )
    status, content, _ = await api.send("POST", f"/images/create?{query}", gzip.compress(archive))
    image = images.get("imported:1")
    assert (status, json.loads(content)) == (200, {"status": image.id})
    assert (image.config.os, len(image.config.diff_ids)) == ("linux", 1)
    body = {"Image": "imported:1", "HostConfig": {"NetworkMode": "none"}}
    _, created = await api.ask("POST", "/containers/create", body)
    await api.ask("POST", f"/containers/{created['Id']}/start")
    await api.ask("POST", f"/containers/{created['Id']}/wait")
    assert (await api.docker("logs", created["Id"]))[1].strip() == "new"


@pytest.mark.parametrize(
    ("query", "archive", "message"),
    [
        ({"fromSrc": "-"}, b"rubbish" * 200, "archive/tar: invalid tar header"),
        ({"fromSrc": "-", "repo": "BAD"}, b"", "repository name must be lowercase"),
        ({"fromSrc": "-", "changes": "FROM x"}, b"", "is not a valid change command"),
        ({"fromSrc": "-", "platform": "windows/amd64"}, b"", "operating system is not supported"),
        ({"fromSrc": "http://127.0.0.1/x"}, b"", 'does not download file systems from "http://127.0.0.1/x"'),
    ],
)
async def test_an_import_that_cannot_be_made_says_why_and_leaves_nothing(
    api: Api, images: ImageStore, query: dict[str, str], archive: bytes, message: str
) -> None:
    before = images.images()
    _, content, _ = await api.send("POST", f"/images/create?{urlencode(query)}", archive)
    assert message in json.loads(content)["message"]
    assert images.images() == before
    assert not list(images.scratch.iterdir())
