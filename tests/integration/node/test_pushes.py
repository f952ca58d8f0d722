"""Pushing to Debian's docker-registry, and to one of our own which does what none should."""

import asyncio
import base64
import gzip
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import application, runner
from skep.engine.api.images import image_routes
from skep.engine.images.progress import ProgressMessage
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry import uploads
from skep.engine.images.registry.endpoints import RegistryPolicy, TransferLimits
from skep.engine.images.registry.registry import DOCKER_MANIFEST, OCI_MANIFEST, RegistryError
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, SkepError
from tests.conftest import SEARCHED
from tests.support.images.archives import a_file, a_tar, sha256
from tests.support.images.bent_registry import Registry, load_image
from tests.support.images.registry_rig import (
    BLOBS,
    CONFIG,
    LAYERS,
    a_manifest,
    docker_registry,
    guarded_registry,
)
from tests.support.machines.playground_rig import CLIS

needs_registry = pytest.mark.needs("docker-registry")


def auth(**fields: str) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


async def pushed(images: ImageStore, name: str, credentials: str = "") -> list[ProgressMessage]:
    reported: list[ProgressMessage] = []
    await images.push(parse_reference(name), credentials, reported.append)
    return reported


def steps(reported: list[ProgressMessage]) -> list[str]:
    """What was reported of layers, repetitions and figures left out."""
    found = [message.status for message in reported if message.id]
    return [one for one, before in zip(found, ["", *found], strict=False) if one != before]


@asynccontextmanager
async def another_node(tmp_path: Path, name: str = "another") -> AsyncIterator[ImageStore]:
    store = ImageStore(tmp_path / name)
    await store.open()
    yield store


async def asked(address: str, path: str) -> tuple[int, Mapping[str, str], bytes]:
    headers = {"Accept": f"{DOCKER_MANIFEST}, {OCI_MANIFEST}"}
    async with (
        aiohttp.ClientSession(f"http://{address}") as session,
        session.get(path, headers=headers) as got,
    ):
        return got.status, got.headers, await got.read()


# --- a real registry -----------------------------------------------------------------------------------------------


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[str]:
    async with docker_registry(tmp_path / "registry") as address:
        yield address


@needs_registry
async def test_what_is_pushed_is_pulled_elsewhere_with_the_same_id(
    images: ImageStore, registry: str, tmp_path: Path
):
    image = await load_image(images, f"{registry}/team/app:1")
    reported = await pushed(images, f"{registry}/team/app:1")
    _, headers, manifest = await asked(registry, "/v2/team/app/manifests/1")
    digest = headers["Docker-Content-Digest"]
    assert reported[0] == ProgressMessage(status=f"The push refers to repository [{registry}/team/app]")
    assert reported[-2:] == [
        ProgressMessage(status=f"1: digest: {digest} size: {len(manifest)}"),
        ProgressMessage(aux={"Tag": "1", "Digest": digest, "Size": len(manifest)}),
    ]
    assert {"Preparing", "Pushing", "Pushed"} <= set(steps(reported))
    assert [str(one.digest) for one in images.get(image.id).digests] == [digest]
    async with another_node(tmp_path) as other:
        assert (await other.pull(f"{registry}/team/app:1")).id == image.id


@needs_registry
async def test_a_layer_goes_up_once_and_is_mounted_from_another_repository(images: ImageStore, registry: str):
    image = await load_image(images, f"{registry}/team/app:1", f"{registry}/team/copy:2")
    await pushed(images, f"{registry}/team/app:1")
    first = images.get(image.id).digests[0].digest
    assert set(steps(await pushed(images, f"{registry}/team/app:1"))) == {"Preparing", "Layer already exists"}
    assert set(steps(await pushed(images, f"{registry}/team/copy:2"))) == {
        "Preparing",
        "Mounted from team/app",
    }
    assert (await asked(registry, "/v2/team/copy/manifests/2"))[1]["Docker-Content-Digest"] == first


@needs_registry
async def test_all_tags_are_pushed(images: ImageStore, registry: str):
    await load_image(images, f"{registry}/app:1", f"{registry}/app:2", f"{registry}/other:9")
    await load_image(images, f"{registry}/app:3", layers=(*LAYERS, a_tar(a_file("more", b"x"))))
    reported = await pushed(images, f"{registry}/app")
    tags = json.loads((await asked(registry, "/v2/app/tags/list"))[2])["tags"]
    assert sorted(tags) == ["1", "2", "3"]
    assert (await asked(registry, "/v2/other/tags/list"))[0] == 404
    assert len([message for message in reported if message.status == "Pushed"]) == 3


@needs_registry
@pytest.mark.parametrize("media_type", [DOCKER_MANIFEST, OCI_MANIFEST])
async def test_a_pulled_image_is_pushed_by_the_manifest_it_came_with(
    images: ImageStore, registry: str, tmp_path: Path, media_type: str
):
    """Its digest stays, here and on a node that has the image from there."""
    manifest = a_manifest(media_type=media_type)
    origin = Registry()
    origin.blobs = {sha256(content): content for content in (CONFIG, *BLOBS)}
    origin.manifests["1"] = (manifest, media_type)
    async with origin.serving():
        await images.pull(f"{origin.address}/app:1")
    await images.tag(f"{origin.address}/app:1", parse_reference(f"{registry}/mine:1"))
    await pushed(images, f"{registry}/mine:1")
    _, headers, content = await asked(registry, "/v2/mine/manifests/1")
    assert (content, headers["Content-Type"]) == (manifest, media_type)
    async with another_node(tmp_path) as other:
        assert (await other.pull(f"{registry}/mine@{sha256(manifest)}")).id == sha256(CONFIG)


@needs_registry
async def test_a_layer_that_is_kept_in_another_form_is_sent_as_gzip(images: ImageStore, registry: str):
    """Engines before 23.0 unpack nothing newer."""
    image = await load_image(images, f"{registry}/app:1")
    await pushed(images, f"{registry}/app:1")
    manifest = json.loads((await asked(registry, "/v2/app/manifests/1"))[2])
    for descriptor, layer, chain_id in zip(manifest["layers"], LAYERS, image.chain, strict=True):
        blob = (await asked(registry, f"/v2/app/blobs/{descriptor['digest']}"))[2]
        assert (gzip.decompress(blob), len(blob)) == (layer, descriptor["size"])
        assert images.layer_store.content(chain_id).read_bytes() == blob
    assert not list(images.scratch.iterdir())
    again = ImageStore(images.scratch.parent)
    await again.open()
    assert [again.layer_store.all()[chain_id].blob for chain_id in image.chain] == [
        one["digest"] for one in manifest["layers"]
    ]


@needs_registry
async def test_a_registry_with_passwords_is_logged_in_to_pushed_to_and_pulled_from(
    images: ImageStore, tmp_path: Path
):
    async with guarded_registry(tmp_path / "guarded") as address:
        known, wrong = auth(username="user", password="secret"), auth(username="user", password="wrong")
        await load_image(images, f"{address}/app:1")
        async with TestClient(TestServer(application(image_routes(images, lambda: ())))) as client:

            async def logged_in(password: str) -> tuple[int, Mapping[str, str]]:
                body = {"username": "user", "password": password, "serveraddress": address}
                async with client.post("/v1.41/auth", json=body) as response:
                    return response.status, await response.json()

            assert await logged_in("secret") == (200, {"Status": "Login Succeeded", "IdentityToken": ""})
            assert await logged_in("wrong") == (
                500,
                {"message": f"login attempt to http://{address}/v2/ failed with status: 401 Unauthorized"},
            )
        for given, refusal in (
            ("", "no basic auth credentials"),
            (wrong, "unauthorized: authentication required"),
        ):
            with pytest.raises(SkepError, match=f"^{refusal}$"):
                await pushed(images, f"{address}/app:1", given)
        await pushed(images, f"{address}/app:1", known)
        async with another_node(tmp_path) as other:
            assert (await other.pull(f"{address}/app:1", known)).id == sha256(CONFIG)


@needs_registry
@pytest.mark.parametrize("cli", CLIS)
async def test_docker_pushes_logs_in_and_out(images: ImageStore, cli: str, tmp_path: Path):
    server = runner(application(image_routes(images, lambda: ())))
    await server.setup()

    async def docker(*words: str, given: str = "") -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(cli, "--host", f"unix://{tmp_path / 'api.sock'}", *words),
            env={"DOCKER_API_VERSION": "1.41", "HOME": str(tmp_path), "PATH": SEARCHED},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(given.encode()), 60)
        return process.returncode, output.decode()

    try:
        await web.UnixSite(server, tmp_path / "api.sock").start()
        async with guarded_registry(tmp_path / "guarded") as address:
            await load_image(images, f"{address}/team/app:1", f"{address}/team/app:2")
            status, output = await docker("push", f"{address}/team/app:1")
            assert (status, output.splitlines()[-1]) == (1, "no basic auth credentials")
            words = ("login", "-u", "user", "--password-stdin", address)
            status, output = await docker(*words, given="wrong")
            refusal = f"login attempt to http://{address}/v2/ failed with status: 401 Unauthorized"
            assert (status, output.splitlines()[-1]) == (1, f"Error response from daemon: {refusal}")
            status, output = await docker(*words, given="secret")
            assert (status, output.splitlines()[-1]) == (0, "Login Succeeded")
            status, output = await docker("push", "-a", f"{address}/team/app")
            lines = output.splitlines()
            assert status == 0, lines
            assert lines[0] == f"The push refers to repository [{address}/team/app]"
            digest = images.get(f"{address}/team/app:1").digests[0].digest
            assert [line for line in lines if "digest:" in line] == [
                f"{tag}: digest: {digest} size: {len(await _manifest(address, digest))}" for tag in "12"
            ]
            status, output = await docker("logout", address)
            assert (status, output.splitlines()[-1]) == (0, f"Removing login credentials for {address}")
            assert (await docker("push", f"{address}/team/app:1"))[0] == 1
    finally:
        await server.cleanup()


async def _manifest(address: str, digest: str) -> bytes:
    headers = {"Accept": DOCKER_MANIFEST, "Authorization": aiohttp.encode_basic_auth("user", "secret")}
    async with (
        aiohttp.ClientSession(f"http://{address}", headers=headers) as session,
        session.get(f"/v2/team/app/manifests/{digest}") as response,
    ):
        assert response.status == 200
        return await response.read()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("127.0.0.1:1/none:1", "An image does not exist locally with the tag: 127.0.0.1:1/none"),
        ("127.0.0.1:1/app:2", "tag does not exist: 127.0.0.1:1/app:2"),
        ("127.0.0.1:1/app@sha256:" + "1" * 64, "cannot push a digest reference"),
        (
            "127.0.0.1:1/app:1",
            'Get "http://127.0.0.1:1/v2/": dial tcp 127.0.0.1:1: connect: connection refused',
        ),
    ],
)
async def test_what_cannot_be_pushed_has_dockers_words(images: ImageStore, name: str, error: str):
    await load_image(images, "127.0.0.1:1/app:1")
    with pytest.raises(SkepError) as refused:
        await pushed(images, name)
    assert str(refused.value) == error


# --- one of our own ------------------------------------------------------------------------------------------------


@pytest.fixture
async def bent() -> AsyncIterator[Registry]:
    async with Registry().serving() as registry:
        yield registry


@pytest.fixture
def is_impatient(images: ImageStore) -> None:
    """Deadlines and waits of a test's length."""
    images.policy = RegistryPolicy(
        transfers=TransferLimits(response_s=0.3, stalled_s=0.3, commit_s=0.3, attempts=2)
    )


DATA = os.urandom(3 << 20)


async def with_a_large_layer(images: ImageStore, name: str) -> bytes:
    """An image with one layer that compresses to three pieces; gives the layer's blob."""
    image = await load_image(images, name, layers=(a_tar(a_file("data", DATA)),))
    return (await images.layer_store.blob(image.chain[0])).path.read_bytes()


async def test_an_upload_that_breaks_off_goes_on_where_it_broke(images: ImageStore, bent: Registry):
    blob = await with_a_large_layer(images, f"{bent.address}/app:1")
    bent.cut_after = [1_000_000, 500_000]
    reported = await pushed(images, f"{bent.address}/app:1")
    sizes = bent.received[:3]
    assert sizes == [1_000_000, 500_000, len(blob) - 1_500_000]
    assert bent.blobs[sha256(blob)] == blob
    assert bent.uploads == {}
    assert "Retrying in 1 second" in steps(reported)


async def test_an_upload_that_the_registry_has_forgotten_is_begun_again(images: ImageStore, bent: Registry):
    blob = await with_a_large_layer(images, f"{bent.address}/app:1")
    bent.cut_after = [1_000_000]

    async def forget(request: web.Request) -> web.StreamResponse | None:
        if request.method == "GET" and "/uploads/" in request.path:
            bent.uploads.clear()
        return None

    bent.bend = forget
    await pushed(images, f"{bent.address}/app:1")
    assert bent.received[:2] == [1_000_000, len(blob)]
    assert bent.blobs[sha256(blob)] == blob


async def test_a_push_that_never_succeeds_leaves_no_tag_and_no_upload(images: ImageStore, bent: Registry):
    images.policy = RegistryPolicy(transfers=TransferLimits(attempts=2))
    await with_a_large_layer(images, f"{bent.address}/app:1")
    bent.cut_after = [1000] * 10
    with pytest.raises(RegistryError):
        await pushed(images, f"{bent.address}/app:1")
    assert (bent.uploads, bent.manifests, bent.blobs) == ({}, {}, {})
    assert images.get(f"{bent.address}/app:1").digests == ()
    assert not list(images.scratch.iterdir())


async def test_a_push_whose_client_goes_away_ends_and_leaves_no_tag_and_no_upload(
    images: ImageStore, bent: Registry
):
    await with_a_large_layer(images, f"{bent.address}/app:1")
    is_sending, goes_on = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PATCH":
            is_sending.set()
            await goes_on.wait()
        return None

    bent.bend = hold
    push = asyncio.create_task(pushed(images, f"{bent.address}/app:1"))
    await asyncio.wait_for(is_sending.wait(), 60)
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    goes_on.set()
    assert (bent.uploads, bent.manifests) == ({}, {})
    assert images.pins == {}


HANGING = {
    "ping": ("GET", "/v2/"),
    "blob": ("HEAD", "/v2/app/blobs/"),
    "start": ("POST", "/v2/app/blobs/uploads/"),
    "send": ("PATCH", "/v2/app/blobs/uploads/"),
    "commit": ("PUT", "/v2/app/blobs/uploads/"),
    "manifest": ("PUT", "/v2/app/manifests/"),
}


@pytest.mark.parametrize("step", HANGING)
async def test_a_registry_that_never_responds_ends_the_push(
    images: ImageStore, bent: Registry, is_impatient: None, step: str
):
    await with_a_large_layer(images, f"{bent.address}/app:1")
    method, path = HANGING[step]
    ended = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse | None:
        if request.method == method and request.path.startswith(path):
            await ended.wait()
        return None

    bent.bend = hang
    try:
        with pytest.raises(RegistryError, match="request canceled"):
            await asyncio.wait_for(pushed(images, f"{bent.address}/app:1"), 60)
        assert (bent.manifests, images.pins) == ({}, {})
    finally:
        ended.set()


@pytest.mark.parametrize("path", ["/blobs/uploads/", "/manifests/"])
async def test_a_registry_that_stores_something_else_is_an_error(
    images: ImageStore, bent: Registry, path: str
):
    await load_image(images, f"{bent.address}/app:1")

    async def lie(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PUT" and path in request.path:
            return web.Response(status=201, headers={"Docker-Content-Digest": "sha256:" + "0" * 64})
        return None

    bent.bend = lie
    with pytest.raises(InvalidArgument, match=f"^the registry stored sha256:{'0' * 64} instead of sha256:"):
        await pushed(images, f"{bent.address}/app:1")
    assert bent.manifests == {}
    assert images.get(f"{bent.address}/app:1").digests == ()


async def test_a_blob_that_the_registry_has_in_another_size_is_sent(images: ImageStore, bent: Registry):
    image = await load_image(images, f"{bent.address}/app:1")

    async def lie(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=b"short") if request.method == "HEAD" else None

    bent.bend = lie
    await pushed(images, f"{bent.address}/app:1")
    blobs = [(await images.layer_store.blob(chain_id)).digest for chain_id in image.chain]
    assert set(bent.blobs) == {*blobs, sha256(CONFIG)}


async def test_a_registry_that_wants_fewer_requests_is_left_alone_for_as_long_as_it_says(
    images: ImageStore, bent: Registry, monkeypatch: pytest.MonkeyPatch
):
    await load_image(images, f"{bent.address}/app:1", layers=LAYERS[:1])
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    refusals = 2

    async def refuse(request: web.Request) -> web.StreamResponse | None:
        nonlocal refusals
        if request.method == "POST" and refusals:
            refusals -= 1
            return web.Response(status=429, headers={"Retry-After": "30" if refusals else "999999"})
        return None

    bent.bend = refuse
    monkeypatch.setattr(asyncio, "sleep", noted)
    reported = await pushed(images, f"{bent.address}/app:1")
    assert [wait for wait in waits if wait >= 30] == [30.0, 60.0], "not for longer than a minute"
    assert "Retrying in 30 seconds" in steps(reported)
    assert "1" in bent.manifests


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "DENIED", "requested access to the resource is denied"),
        (405, "UNSUPPORTED", "The operation is unsupported."),
        (400, "NAME_INVALID", "invalid repository name"),
    ],
)
async def test_a_refusal_has_dockers_words_and_is_not_repeated(
    images: ImageStore, bent: Registry, status: int, code: str, message: str
):
    await load_image(images, f"{bent.address}/app:1", layers=LAYERS[:1])

    async def refuse(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST":
            return None
        return web.json_response({"errors": [{"code": code, "message": message}]}, status=status)

    bent.bend = refuse
    with pytest.raises(uploads.ContentRefused) as refused:
        await pushed(images, f"{bent.address}/app:1")
    assert str(refused.value) == f"{code.lower().replace('_', ' ')}: {message}"
    assert len([one for one in bent.requests if one.method == "POST"]) == 1
    assert bent.manifests == {}


async def test_uploads_are_followed_to_where_a_redirect_leads_with_their_content(
    images: ImageStore, bent: Registry
):
    await load_image(images, f"{bent.address}/app:1")

    async def redirect(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PATCH" and "moved" not in request.query:
            return web.Response(status=307, headers={"Location": f"{request.path_qs}&moved=1"})
        return None

    bent.bend = redirect
    await pushed(images, f"{bent.address}/app:1")
    assert len(bent.blobs) == 3


async def test_pushes_of_the_same_image_at_once_share_the_transfer(images: ImageStore, bent: Registry):
    image = await load_image(images, *(f"{bent.address}/app:{tag}" for tag in range(5)))
    await asyncio.gather(*(pushed(images, f"{bent.address}/app:{tag}") for tag in range(5)))
    assert len(bent.received) == len(image.chain) + 1
    assert sorted(bent.manifests) == ["0", "1", "2", "3", "4"]
