"""Pulling from a registry on loopback: one of our own, which does what none should."""

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from skep.engine.images.digest import short
from skep.engine.images.local import ImageEvent
from skep.engine.images.progress import ProgressMessage
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.endpoints import RegistryPolicy, TransferLimits
from skep.engine.images.registry.registry import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    RegistryError,
)
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, NotFound, SkepError
from tests.support.images.archives import sha256
from tests.support.images.registry_rig import BLOBS, CONFIG, a_manifest

DEEP = b'{"a": ' * 20_000
"""No JSON decoder goes so deep."""


class Rogue:
    """A registry whose every answer a test may bend.  ``blobs`` and ``manifests`` are what it gives."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {sha256(content): content for content in (CONFIG, *BLOBS)}
        self.manifests: dict[str, tuple[bytes, str]] = {"1": (a_manifest(), DOCKER_MANIFEST)}
        self.requests: list[web.Request] = []
        self.cut_after: int | None = None
        self.received: dict[str, asyncio.Event] | None = None
        """Not None: transfers of these layers break without the end of their chunks once the event is set."""
        self.guard: Callable[[web.Request], web.Response | None] = lambda _: None
        self.address = ""
        self.silent_at = ""
        self.silent_after: int | None = None
        """The end of a path to which it sends nothing, or a head and so many bytes and nothing more."""
        self.ended = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if self.silent_at and request.path.endswith(self.silent_at):
            return await self._silence(request)
        refusal = self.guard(request)
        if refusal is not None:
            return refusal
        kind, _, name = (
            request.path.rpartition("/")[0].rpartition("/")[2],
            "",
            request.path.rpartition("/")[2],
        )
        if kind == "manifests" and name in self.manifests:
            content, media_type = self.manifests[name]
            return web.Response(body=content, content_type=media_type)
        if kind == "blobs" and name in self.blobs:
            return await self._blob(request, self.blobs[name])
        return web.Response(status=200 if request.path == "/v2/" else 404)

    async def _silence(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if self.silent_after is not None:
            response.content_length = 1 << 30
            await response.prepare(request)
            await response.write(bytes(self.silent_after))
        await self.ended.wait()
        return response

    async def _blob(self, request: web.Request, content: bytes) -> web.StreamResponse:
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        if self.received is not None and (id := short(sha256(content))) in self.received:
            return await self._all_but_the_end(request, content, self.received[id])
        if self.cut_after is None or len(content) < self.cut_after:
            return web.Response(body=content[start:], status=206 if start else 200)
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(content) - start
        await response.prepare(request)
        await response.write(content[start : start + self.cut_after])
        assert request.transport is not None
        request.transport.close()
        return response

    async def _all_but_the_end(
        self, request: web.Request, content: bytes, received: asyncio.Event
    ) -> web.StreamResponse:
        """Every byte, but not the end of the transfer in chunks.

        aiohttp drops bytes that nobody has read when a connection breaks, so it breaks after the last is read.
        """
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(content)
        await received.wait()
        assert request.transport is not None
        request.transport.close()
        return response


@pytest.fixture
async def rogue() -> AsyncIterator[Rogue]:
    rogue = Rogue()
    app = web.Application()
    app.router.add_get("/{path:.*}", rogue.answer)
    app.router.add_post("/{path:.*}", rogue.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        rogue.address = f"127.0.0.1:{server.port}"
        yield rogue
        rogue.ended.set()


async def test_an_image_is_pulled_layer_by_layer(images: ImageStore, rogue: Rogue):
    reported: list[ProgressMessage] = []
    image = await images.pull(f"{rogue.address}/team/app:1", report=reported.append)
    assert image.id == sha256(CONFIG)
    assert [tag.familiar for tag in image.tags] == [f"{rogue.address}/team/app:1"]
    assert [one.digest for one in image.digests] == [sha256(a_manifest())]
    assert (images.layers(image)[0] / "data").stat().st_size == 300_000
    assert reported[0] == ProgressMessage(id="1", status="Pulling from team/app")
    assert reported[-2:] == [
        ProgressMessage(status=f"Digest: {sha256(a_manifest())}"),
        ProgressMessage(status=f"Status: Downloaded newer image for {rogue.address}/team/app:1"),
    ]
    layer = sha256(BLOBS[1])[7:19]
    steps = [message.status for message in reported if message.id == layer]
    assert [step for step, after in zip(steps, [*steps[1:], None], strict=True) if step != after] == [
        "Pulling fs layer",
        "Downloading",
        "Verifying Checksum",
        "Download complete",
        "Extracting",
        "Pull complete",
    ]


async def test_what_is_here_is_not_fetched_again(images: ImageStore, rogue: Rogue):
    await images.pull(f"{rogue.address}/app:1")
    rogue.requests.clear()
    reported: list[ProgressMessage] = []
    await images.pull(f"{rogue.address}/app:1", report=reported.append)
    assert not [request.path for request in rogue.requests if "/blobs/" in request.path]
    assert reported[-1].status == f"Status: Image is up to date for {rogue.address}/app:1"


async def test_concurrent_pulls_share_the_transfer(images: ImageStore, rogue: Rogue):
    pulled = await asyncio.gather(*(images.pull(f"{rogue.address}/app:1") for _ in range(10)))
    assert {image.id for image in pulled} == {sha256(CONFIG)}
    assert len([request for request in rogue.requests if "/blobs/" in request.path]) == 3


async def test_a_transfer_that_breaks_goes_on_where_it_broke(images: ImageStore, rogue: Rogue):
    rogue.cut_after = 130_000
    await images.pull(f"{rogue.address}/app:1")
    ranges = [request.headers.get("Range") for request in rogue.requests if sha256(BLOBS[1]) in request.path]
    assert ranges[0] is None
    assert all(start is not None for start in ranges[1:])
    assert len(ranges) == 3


def at_ranges(
    rogue: Rogue, respond: Callable[[int], web.Response | None]
) -> Callable[[web.Request], web.Response | None]:
    """The first transfer of a layer breaks; from then on ``respond`` answers requests that begin at an offset."""
    rogue.cut_after = 130_000

    def guard(request: web.Request) -> web.Response | None:
        if "Range" not in request.headers:
            return None
        rogue.cut_after = None
        return respond(int(request.headers["Range"][6:-1]))

    return guard


async def test_a_transfer_may_go_on_earlier_than_where_it_broke(images: ImageStore, rogue: Rogue):
    layer = BLOBS[1]
    rogue.guard = at_ranges(
        rogue,
        lambda start: web.Response(
            status=206,
            body=layer[start - 1000 :],
            headers={"Content-Range": f"bytes {start - 1000}-{len(layer) - 1}/{len(layer)}"},
        ),
    )
    await images.pull(f"{rogue.address}/app:1")
    assert len([request for request in rogue.requests if sha256(layer) in request.path]) == 2


@pytest.mark.parametrize("length", [1, len(BLOBS[1])], ids=["a byte", "all"])
async def test_what_goes_on_with_something_else_is_fetched_once_more_from_its_begin(
    images: ImageStore, rogue: Rogue, length: int
):
    rogue.guard = at_ranges(
        rogue, lambda start: web.Response(status=206, body=bytes(len(BLOBS[1]) - start - 1 + length))
    )
    await images.pull(f"{rogue.address}/app:1")
    ranges = [request.headers.get("Range") for request in rogue.requests if sha256(BLOBS[1]) in request.path]
    assert [one is not None for one in ranges] == [False, True, False]


async def test_what_always_goes_on_with_something_else_is_given_up(images: ImageStore, rogue: Rogue):
    def wrong(start: int) -> web.Response:
        rogue.cut_after = 130_000
        return web.Response(status=206, body=bytes(len(BLOBS[1]) - start))

    rogue.guard = at_ranges(rogue, wrong)
    with pytest.raises(InvalidArgument, match="filesystem layer verification failed"):
        await images.pull(f"{rogue.address}/app:1")
    assert len([request for request in rogue.requests if sha256(BLOBS[1]) in request.path]) == 4


async def test_a_transfer_that_breaks_after_the_last_byte_is_complete(images: ImageStore, rogue: Rogue):
    rogue.received = {short(sha256(blob)): asyncio.Event() for blob in BLOBS}

    def report(message: ProgressMessage) -> None:
        detail = message.progress_detail
        if message.status == "Downloading" and detail and detail.current == detail.total > 0:
            rogue.received[message.id].set()

    image = await images.pull(f"{rogue.address}/app:1", report=report)
    assert all(event.is_set() for event in rogue.received.values())
    assert not [request for request in rogue.requests if "Range" in request.headers]
    assert image.id == sha256(CONFIG)


async def test_a_blob_that_is_not_what_its_digest_names_is_refused(images: ImageStore, rogue: Rogue):
    rogue.blobs[sha256(BLOBS[0])] = bytes(len(BLOBS[0]))
    with pytest.raises(
        InvalidArgument, match=f"filesystem layer verification failed for digest {sha256(BLOBS[0])}"
    ):
        await images.pull(f"{rogue.address}/app:1")
    assert not images.images()
    assert not images.layer_store.all()
    assert not list(images.scratch.iterdir())


async def test_a_blob_larger_than_promised_is_cut_off(images: ImageStore, rogue: Rogue):
    rogue.blobs[sha256(BLOBS[0])] = BLOBS[0] + bytes(1 << 20)
    with pytest.raises(InvalidArgument, match="is larger than its"):
        await images.pull(f"{rogue.address}/app:1")


async def test_layers_must_be_those_of_the_configuration(images: ImageStore, rogue: Rogue):
    rogue.manifests["1"] = (a_manifest(blobs=(BLOBS[1], BLOBS[0])), DOCKER_MANIFEST)
    with pytest.raises(InvalidArgument, match="layers from manifest don't match image configuration"):
        await images.pull(f"{rogue.address}/app:1")
    assert not images.images()
    rogue.manifests["1"] = (a_manifest(blobs=BLOBS[:1]), DOCKER_MANIFEST)
    with pytest.raises(InvalidArgument, match="layers from manifest don't match image configuration"):
        await images.pull(f"{rogue.address}/app:1")


@pytest.mark.parametrize(
    ("index_type", "media_type"), [(DOCKER_LIST, DOCKER_MANIFEST), (OCI_INDEX, OCI_MANIFEST)]
)
async def test_of_an_index_the_manifest_for_the_platform_is_taken(
    images: ImageStore, rogue: Rogue, index_type: str, media_type: str
):
    manifest = a_manifest(media_type=media_type)
    entries = [
        {"digest": "sha256:" + "0" * 64, "size": 1, "platform": {"os": "linux", "architecture": "s390x"}},
        {"digest": sha256(manifest), "size": 1, "platform": {"os": "linux", "architecture": "amd64"}},
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": index_type, "manifests": entries}).encode()
    rogue.manifests = {"1": (index, index_type), sha256(manifest): (manifest, media_type)}
    image = await images.pull(f"{rogue.address}/app:1", platform="linux/amd64")
    assert [one.digest for one in image.digests] == [sha256(index)]
    wanted = (
        "no matching manifest for linux/arm64 in the manifest list entries: it has linux/s390x, linux/amd64$"
    )
    with pytest.raises(NotFound, match=wanted):
        await images.pull(f"{rogue.address}/app:1", platform="linux/arm64")


async def test_a_manifest_asked_for_by_digest_must_have_it(images: ImageStore, rogue: Rogue):
    digest = "sha256:" + "1" * 64
    rogue.manifests[digest] = (a_manifest(), DOCKER_MANIFEST)
    with pytest.raises(InvalidArgument, match=f"manifest verification failed for digest {digest}"):
        await images.pull(f"{rogue.address}/app@{digest}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"config": 7}',
        b'{"manifests": [{"digest": "x", "size": -1}]}',
        b"\xff" * 100,
        pytest.param(DEEP, id="deep"),
        pytest.param(b'{"manifests": [{"digest": "x", "size": 1, "platform": ' + DEEP, id="deep inside"),
    ],
)
async def test_a_manifest_that_is_none_is_refused(images: ImageStore, rogue: Rogue, content: bytes):
    rogue.manifests["1"] = (content, DOCKER_MANIFEST)
    with pytest.raises(SkepError):
        await images.pull(f"{rogue.address}/app:1")


async def test_an_endless_manifest_is_cut_off(images: ImageStore, rogue: Rogue):
    rogue.manifests["1"] = (b" " * (5 << 20), DOCKER_MANIFEST)
    with pytest.raises(InvalidArgument, match="the response is larger than 4194304 bytes"):
        await images.pull(f"{rogue.address}/app:1")


SILENT = {
    "ping": "/v2/",
    "manifest": "/manifests/1",
    "configuration": f"/blobs/{sha256(CONFIG)}",
    "layer": f"/blobs/{sha256(BLOBS[1])}",
}


@pytest.mark.parametrize(
    ("step", "sent"),
    [*((step, None) for step in SILENT), *((step, 100) for step in SILENT if step != "ping")],
)
async def test_a_registry_that_sends_no_more_ends_the_pull(
    images: ImageStore, rogue: Rogue, step: str, sent: int | None
):
    images.policy = RegistryPolicy(transfers=TransferLimits(attempts=2, response_s=0.3, stalled_s=0.3))
    rogue.silent_at, rogue.silent_after = SILENT[step], sent
    with pytest.raises(RegistryError, match="request canceled"):
        await asyncio.wait_for(images.pull(f"{rogue.address}/app:1"), 60)
    assert not images.images()
    assert not images.layer_store.all()
    assert not list(images.scratch.iterdir())


async def test_a_registry_that_is_not_there_is_named(images: ImageStore):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(RegistryError) as refused:
            await images.pull(f"127.0.0.1:{port}/app:1")
    assert str(refused.value) == (
        f'Get "http://127.0.0.1:{port}/v2/": dial tcp 127.0.0.1:{port}: connect: connection refused'
    )


def wants_token(rogue: Rogue) -> Callable[[web.Request], web.Response | None]:
    def guard(request: web.Request) -> web.Response | None:
        if request.path == "/token":
            given = request.headers.get("Authorization", "")
            if given != aiohttp.encode_basic_auth("user", "secret"):
                return web.Response(status=401)
            assert request.query["scope"] == "repository:app:pull"
            return web.json_response({"token": "t1"})
        if request.headers.get("Authorization") != "Bearer t1":
            challenge = f'Bearer realm="http://{rogue.address}/token",service="reg"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return None

    return guard


def auth(**fields: str) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


async def test_a_registry_that_wants_a_token_gets_one(images: ImageStore, rogue: Rogue):
    rogue.guard = wants_token(rogue)
    image = await images.pull(f"{rogue.address}/app:1", auth(username="user", password="secret"))
    assert image.id == sha256(CONFIG)


async def test_a_wrong_password_is_reported(images: ImageStore, rogue: Rogue):
    rogue.guard = wants_token(rogue)
    with pytest.raises(SkepError, match="unauthorized: incorrect username or password"):
        await images.pull(f"{rogue.address}/app:1", auth(username="user", password="wrong"))


async def test_a_registry_that_wants_a_password_gets_it(images: ImageStore, rogue: Rogue):
    def guard(request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") == aiohttp.encode_basic_auth("user", "secret"):
            return None
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="reg"'})

    rogue.guard = guard
    assert await images.pull(f"{rogue.address}/app:1", auth(username="user", password="secret"))
    with pytest.raises(
        SkepError, match=r"^Get \"http://[^ ]*/v2/app/manifests/1\": no basic auth credentials$"
    ):
        await images.pull(f"{rogue.address}/app:1")
    with pytest.raises(
        NotFound, match=r"pull access denied for .*, repository does not exist or may require"
    ):
        await images.pull(f"{rogue.address}/app:1", auth(username="user", password="wrong"))


async def test_mirrors_are_asked_first_and_see_no_credentials(tmp_path: Path, rogue: Rogue):
    store = ImageStore(tmp_path / "mirrored", policy=RegistryPolicy(mirrors=(f"http://{rogue.address}",)))
    await store.open()
    image = await store.pull("app:1", auth(username="user", password="secret"))
    assert [tag.familiar for tag in image.tags] == ["app:1"]
    assert rogue.requests[-1].path.startswith("/v2/library/app/")
    assert not any("Authorization" in request.headers for request in rogue.requests)


def paged(
    rogue: Rogue, pages: dict[str, tuple[list[str], str]]
) -> Callable[[web.Request], web.Response | None]:
    """A registry whose list of tags comes in pages: query -> its tags, and the ``Link`` of the response."""

    def guard(request: web.Request) -> web.Response | None:
        if not request.path.endswith("/tags/list"):
            return None
        tags, link = pages[request.query_string]
        headers = {"Link": link.replace("HOST", rogue.address)} if link else {}
        return web.json_response({"name": "app", "tags": tags}, headers=headers)

    return guard


@pytest.mark.parametrize(
    "link",
    [
        '</v2/app/tags/list?last=1&n=1>; rel="next"',
        '<list?last=1&n=1>; rel="next"',
        '<http://HOST/v2/app/tags/list?last=1&n=1>; rel="next"',
        '</v2/app/tags/list>; rel="prev", </v2/app/tags/list?last=1&n=1>; title="2"; rel=next',
    ],
)
async def test_all_tags_are_those_of_all_pages(images: ImageStore, rogue: Rogue, link: str):
    rogue.manifests["2"] = rogue.manifests["1"]
    rogue.guard = paged(rogue, {"": (["1"], link), "last=1&n=1": (["2"], "")})
    pulled = await images.pull_all(parse_reference(f"{rogue.address}/app"), "")
    assert [image.id for image in pulled] == [sha256(CONFIG)] * 2
    tags = {tag.familiar for tag in images.get(sha256(CONFIG)).tags}
    assert tags == {f"{rogue.address}/app:1", f"{rogue.address}/app:2"}


async def test_pages_of_tags_are_asked_for_with_the_token(images: ImageStore, rogue: Rogue):
    wanted = wants_token(rogue)
    pages = paged(rogue, {"": ([], '<list?last=1>; rel="next"'), "last=1": (["1"], "")})
    rogue.guard = lambda request: wanted(request) or pages(request)
    known = auth(username="user", password="secret")
    assert await images.pull_all(parse_reference(f"{rogue.address}/app"), known)


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("</v2/app/tags/list>", "repeats a page"),
        ("<>", "repeats a page"),
        ("<http://127.0.0.2:1/v2/app/tags/list?last=1>", "refused a next page at http://127.0.0.2:1"),
        ("<file:///etc/passwd>", "refused a redirect"),
        ("<http://[::1>", "invalid redirect"),
    ],
)
async def test_a_list_of_tags_that_leads_in_a_circle_or_elsewhere_is_an_error(
    images: ImageStore, rogue: Rogue, link: str, problem: str
):
    rogue.guard = paged(rogue, {"": (["1"], f'{link}; rel="next"')})
    with pytest.raises(RegistryError, match=problem):
        await images.pull_all(parse_reference(f"{rogue.address}/app"), "")
    assert not images.images()


async def test_a_list_of_tags_has_an_end(images: ImageStore, rogue: Rogue):
    """By its pages as well as by its bytes, of all pages together."""

    def guard(request: web.Request) -> web.Response | None:
        if not request.path.endswith("/tags/list"):
            return None
        number = int(request.query.get("last", "0")) + 1
        return web.json_response(
            {"tags": ["a" * size]}, headers={"Link": f'</v2/app/tags/list?last={number}>; rel="next"'}
        )

    rogue.guard, size = guard, 1
    with pytest.raises(InvalidArgument, match="the list of tags has more than 1000 pages"):
        await images.pull_all(parse_reference(f"{rogue.address}/app"), "")
    assert len([request for request in rogue.requests if "/tags/" in request.path]) == 1000
    rogue.requests.clear()
    size = 1 << 20
    with pytest.raises(InvalidArgument, match="the response is larger than"):
        await images.pull_all(parse_reference(f"{rogue.address}/app"), "")
    assert len([request for request in rogue.requests if "/tags/" in request.path]) == 4


async def test_an_image_for_one_other_platform_is_pulled_with_a_warning(tmp_path: Path, rogue: Rogue):
    events: list[ImageEvent] = []
    store = ImageStore(tmp_path / "images", on_event=events.append)
    await store.open()
    name, reported = f"{rogue.address}/app:1", list[ProgressMessage]()
    image = await store.pull(name, report=reported.append, platform="linux/s390x")
    found = f"image with reference {name} was found but its platform (linux/amd64)"
    assert [message.status for message in reported[-3:]] == [
        f"Digest: {sha256(a_manifest())}",
        f"Status: Downloaded newer image for {name}",
        f"WARNING: {found} does not match the specified platform (linux/s390x)",
    ]
    assert store.documents(image) == [a_manifest()]
    assert [(event.action, event.attributes["name"]) for event in events] == [
        ("pull", f"{rogue.address}/app")
    ]
    reported.clear()
    await store.pull(name, report=reported.append, platform="linux/amd64")
    assert reported[-1].status == f"Status: Image is up to date for {name}"


async def test_nothing_is_asked_for_packed(images: ImageStore, rogue: Rogue):
    """Digests are of bytes as they are, and a token packed by a proxy is not read."""

    def packed(request: web.Request) -> web.Response | None:
        refusal = wanted(request)
        if refusal is None and "/manifests/" in request.path:
            refusal = web.Response(body=a_manifest(), content_type=DOCKER_MANIFEST)
        if refusal is not None:
            refusal.enable_compression()  # if the request accepts some
        return refusal

    wanted, rogue.guard = wants_token(rogue), packed
    image = await images.pull(f"{rogue.address}/app:1", auth(username="user", password="secret"))
    assert [one.digest for one in image.digests] == [sha256(a_manifest())]
    assert {request.headers["Accept-Encoding"] for request in rogue.requests} == {"identity"}


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, NotFound, r"manifest for .*/app:1 not found: manifest unknown: unexpected status 404"),
        (403, NotFound, r"pull access denied for .*/app, repository does not exist or may require"),
        (502, RegistryError, r"unknown: unexpected status 502"),
    ],
)
async def test_a_long_page_with_an_error_is_that_error(
    images: ImageStore,
    rogue: Rogue,
    status: int,
    error: type[SkepError],
    words: str,
):
    images.policy = RegistryPolicy(transfers=TransferLimits(attempts=1))
    page = b"<html>" + bytes(100_000)
    rogue.guard = lambda request: (
        web.Response(status=status, body=page) if "/manifests/" in request.path else None
    )
    with pytest.raises(error, match=words):
        await images.pull(f"{rogue.address}/app:1")


async def test_a_plugin_is_no_image(images: ImageStore, rogue: Rogue):
    plugin = json.loads(a_manifest())
    plugin["config"]["mediaType"] = "application/vnd.docker.plugin.v1+json"
    rogue.manifests["1"] = (json.dumps(plugin).encode(), DOCKER_MANIFEST)
    with pytest.raises(InvalidArgument, match=r"^Encountered remote .*\(plugin\) when fetching$"):
        await images.pull(f"{rogue.address}/app:1")
    assert not images.images()


async def test_what_is_too_deep_for_json_is_no_token_no_list_and_no_error(images: ImageStore, rogue: Rogue):
    images.policy = RegistryPolicy(transfers=TransferLimits(attempts=1))
    rogue.guard = lambda request: web.Response(body=DEEP) if "/tags/" in request.path else None
    with pytest.raises(RegistryError, match="/v2/app/tags/list: "):
        await images.pull_all(parse_reference(f"{rogue.address}/app"), "")
    rogue.guard = lambda request: (
        web.Response(status=502, body=DEEP) if "/manifests/" in request.path else None
    )
    with pytest.raises(RegistryError, match="unknown: unexpected status 502"):
        await images.pull(f"{rogue.address}/app:1")
    wanted = wants_token(rogue)
    rogue.guard = lambda request: web.Response(body=DEEP) if request.path == "/token" else wanted(request)
    with pytest.raises(RegistryError, match="/token: "):
        await images.pull(f"{rogue.address}/app:1", auth(username="user", password="secret"))
