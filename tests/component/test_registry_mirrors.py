"""Mirrors of Docker Hub that lack an image, refuse it or send something else: the next endpoint has it."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from skep.engine.images.progress import ProgressMessage
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.endpoints import RegistryEndpoint, RegistryPolicy, TransferLimits
from skep.engine.images.registry.registry import DOCKER_LIST, DOCKER_MANIFEST, RegistryError
from skep.engine.images.store import ImageStore
from skep.errors import NotFound
from tests.support.images.archives import sha256
from tests.support.images.bent_registry import Registry, Respond
from tests.support.images.registry_rig import BLOBS, CONFIG, a_manifest

AUTH = base64.urlsafe_b64encode(json.dumps({"username": "user", "password": "secret"}).encode()).decode()


def a_registry() -> Registry:
    """One that has ``app:1``."""
    registry = Registry()
    registry.blobs = {sha256(content): content for content in (CONFIG, *BLOBS)}
    registry.manifests["1"] = (a_manifest(), DOCKER_MANIFEST)
    return registry


class NearHub(RegistryPolicy, frozen=True, kw_only=True):
    """All images come from ``hub``, with ``mirror`` before it."""

    hub: str
    mirror: str

    def endpoints(self, domain: str, *, to_push: bool = False) -> Sequence[RegistryEndpoint]:
        own = RegistryEndpoint(f"http://{self.hub}", policy=self)
        mirror = RegistryEndpoint(f"http://{self.mirror}", mirror=True, policy=self)
        return (own,) if to_push else (mirror, own)


@pytest.fixture
async def mirror() -> AsyncIterator[Registry]:
    async with a_registry().serving() as registry:
        yield registry


@pytest.fixture
async def hub() -> AsyncIterator[Registry]:
    async with a_registry().serving() as registry:
        yield registry


@pytest.fixture
async def images(tmp_path: Path, mirror: Registry, hub: Registry) -> ImageStore:
    """With ``hub`` in the place of Docker Hub, and ``mirror`` before it."""
    transfers = TransferLimits(backoff_s=0.001)
    store = ImageStore(
        tmp_path / "images", policy=NearHub(hub=hub.address, mirror=mirror.address, transfers=transfers)
    )
    await store.open()
    return store


def responding(
    part: str, status: int, body: bytes = b"", *, headers: dict[str, str] | None = None
) -> Respond:
    """What has ``part`` in its path gets this response."""

    async def bend(request: web.Request) -> web.StreamResponse | None:
        if part not in request.path:
            return None
        return web.Response(status=status, body=body, headers=headers)

    return bend


def an_error(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": "of the mirror"}]}).encode()


def an_index(architecture: str) -> bytes:
    entry = {"digest": sha256(b""), "size": 1, "platform": {"os": "linux", "architecture": architecture}}
    return json.dumps({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [entry]}).encode()


FAILURES: dict[str, Respond] = {
    "it does not have the image": responding("/manifests/", 404, an_error("MANIFEST_UNKNOWN")),
    "it does not have the repository": responding("/manifests/", 404, an_error("NAME_UNKNOWN")),
    "it wants a password": responding("/", 401, headers={"WWW-Authenticate": 'Basic realm="mirror"'}),
    "it wants a password for the image": responding("/manifests/", 401, an_error("UNAUTHORIZED")),
    "it refuses": responding("/manifests/", 403, an_error("DENIED")),
    "it refuses whatever it is asked": responding("/", 403),
    "it is rate limited": responding("/manifests/", 429, headers={"Retry-After": "60"}),
    "it is rate limited at blobs": responding("/blobs/", 429, headers={"Retry-After": "60"}),
    "its upstream fails": responding("/manifests/", 502),
    "its upstream fails at blobs": responding("/blobs/", 502),
    "its manifest is none": responding("/manifests/", 200, b"<html>"),
    "its manifest is endless": responding("/manifests/", 200, b" " * (5 << 20)),
    "it has another platform": responding("/manifests/", 200, an_index("made-up")),
    "its manifest names other layers": responding(
        "/manifests/", 200, a_manifest(blobs=BLOBS[:1]), headers={"Content-Type": DOCKER_MANIFEST}
    ),
    "it has no configuration": responding(sha256(CONFIG), 404),
    "its configuration is another": responding(sha256(CONFIG), 200, bytes(len(CONFIG))),
    "a layer is missing": responding(sha256(BLOBS[1]), 404, an_error("BLOB_UNKNOWN")),
    "a layer is another": responding(sha256(BLOBS[1]), 200, bytes(len(BLOBS[1]))),
    "a layer is larger": responding(sha256(BLOBS[1]), 200, bytes(1 << 20)),
    "a layer is cut": responding(sha256(BLOBS[1]), 200, BLOBS[1][:1000]),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_what_a_mirror_does_not_give_comes_from_docker_hub(
    images: ImageStore, mirror: Registry, hub: Registry, case: str
):
    mirror.bend = FAILURES[case]
    reported: list[ProgressMessage] = []
    image = await images.pull("app:1", report=reported.append)
    assert image.id == sha256(CONFIG)
    assert [tag.familiar for tag in image.tags] == ["app:1"]
    assert [one.digest for one in image.digests] == [sha256(a_manifest())]
    assert len(images.layers(image)) == len(BLOBS)
    assert mirror.requests
    assert hub.requests
    assert reported[-1].status == "Status: Downloaded newer image for app:1"


async def test_docker_hub_is_not_asked_for_what_a_mirror_has(
    images: ImageStore, mirror: Registry, hub: Registry
):
    await images.pull("app:1")
    assert mirror.requests
    assert not hub.requests


async def test_what_fails_at_a_mirror_is_asked_there_once(images: ImageStore, mirror: Registry):
    mirror.bend = FAILURES["its upstream fails"]
    await images.pull("app:1")
    assert [request.path for request in mirror.requests] == ["/v2/", "/v2/library/app/manifests/1"]


async def test_a_mirror_may_send_another_image_than_its_digest_names_and_it_is_not_taken(
    images: ImageStore, mirror: Registry, hub: Registry
):
    digest = sha256(a_manifest())
    mirror.manifests[digest] = (a_manifest(blobs=BLOBS[:1]), DOCKER_MANIFEST)
    hub.manifests[digest] = (a_manifest(), DOCKER_MANIFEST)
    image = await images.pull(f"app@{digest}")
    assert [str(one) for one in image.references] == [f"docker.io/library/app@{digest}"]


async def test_the_error_is_docker_hubs(images: ImageStore, mirror: Registry, hub: Registry):
    mirror.bend = FAILURES["it refuses"]
    hub.bend = responding("/manifests/", 404, an_error("MANIFEST_UNKNOWN").replace(b"mirror", b"hub"))
    with pytest.raises(NotFound, match=r"^manifest for app:1 not found: manifest unknown: of the hub$"):
        await images.pull("app:1")
    assert not images.images()
    hub.bend = responding("/", 503)
    with pytest.raises(RegistryError, match=f"^http://{hub.address}/v2/: unexpected status 503$"):
        await images.pull("app:1")


async def test_a_password_is_for_docker_hub_alone(images: ImageStore, mirror: Registry, hub: Registry):
    mirror.bend = FAILURES["it wants a password"]

    async def guard(request: web.Request) -> web.StreamResponse | None:
        if request.headers.get("Authorization") == aiohttp.encode_basic_auth("user", "secret"):
            return None
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="hub"'})

    hub.bend = guard
    assert (await images.pull("app:1", AUTH)).id == sha256(CONFIG)
    assert not any("Authorization" in request.headers for request in mirror.requests)


async def test_a_pull_that_is_cancelled_does_not_go_on_at_docker_hub(
    images: ImageStore, mirror: Registry, hub: Registry
):
    asked, ended = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse | None:
        if "/manifests/" in request.path:
            asked.set()
            await ended.wait()
        return None

    mirror.bend = hang
    pull = asyncio.ensure_future(images.pull("app:1"))
    await asked.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    ended.set()
    assert not hub.requests


async def test_the_digest_of_a_tag_is_docker_hubs_where_a_mirror_lacks_it(
    images: ImageStore, mirror: Registry
):
    mirror.bend = FAILURES["it does not have the image"]
    found = await images.inspect_remote(parse_reference("app:1"), "")
    assert found["Descriptor"]["digest"] == sha256(a_manifest())


async def test_the_tags_are_docker_hubs_where_a_mirror_has_no_list(
    images: ImageStore, mirror: Registry, hub: Registry
):
    mirror.bend = responding("/tags/list", 404, an_error("NAME_UNKNOWN"))
    hub.bend = responding("/tags/list", 200, b'{"name": "library/app", "tags": ["1"]}')
    [image] = await images.pull_all(parse_reference("app"), "")
    assert [tag.familiar for tag in image.tags] == ["app:1"]
