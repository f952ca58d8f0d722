"""A registry that stores pushed images, and whose responses a test can replace."""

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

from skep.engine.images.image import Image
from skep.engine.images.store import ImageStore
from tests.support.images.archives import a_config, a_file, a_tar, sha256
from tests.support.images.registry_rig import LAYERS

Respond = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


async def load_image(images: ImageStore, *names: str, layers: tuple[bytes, ...] = LAYERS) -> Image:
    """Add an image of ``layers`` with these names to ``images``."""
    members = [a_file(f"{number}.tar", layer) for number, layer in enumerate(layers)]
    item = {
        "Config": "config.json",
        "RepoTags": list(names),
        "Layers": [f"{number}.tar" for number in range(len(layers))],
    }
    archive = a_tar(
        *members,
        a_file("config.json", a_config(*layers)),
        a_file("manifest.json", json.dumps([item]).encode()),
    )

    async def pieces() -> AsyncIterator[bytes]:
        yield archive

    [image] = await images.load(pieces())
    return image


class Registry:
    """A registry whose responses a test can replace.  It stores pushed images, and records the requests."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[bytes, str]] = {}
        self.uploads: dict[str, bytearray] = {}
        self.requests: list[web.Request] = []
        self.received: list[int] = []
        """Number of bytes in each PATCH."""
        self.cut_after: list[int] = []
        """Number of bytes after which the connection of each of the next uploads is closed."""
        self.bend: Respond = self._not_at_all
        self.address = ""
        self.right = ""
        """The required password.  Empty if none is required."""

    async def _not_at_all(self, _request: web.Request) -> web.StreamResponse | None:
        return None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Registry"]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._respond)
        async with TestServer(app, host="127.0.0.1") as server:
            self.address = f"127.0.0.1:{server.port}"
            yield self

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        bent = await self.bend(request)
        if bent is not None:
            return bent
        before, _, last = request.path.rpartition("/")
        kind = before.rpartition("/")[2]
        if kind == "uploads":
            return await self.upload(request, last)
        if kind == "manifests" and request.method == "PUT":
            content = await request.read()
            self.manifests[last] = content, request.content_type
            return web.Response(status=201, headers={"Docker-Content-Digest": sha256(content)})
        if kind == "manifests" and last in self.manifests:
            content, media_type = self.manifests[last]
            return web.Response(body=content, content_type=media_type)
        if kind == "blobs" and last in self.blobs:
            return web.Response(body=self.blobs[last])
        return web.Response(status=200 if request.path == "/v2/" else 404)

    async def upload(self, request: web.Request, id: str) -> web.StreamResponse:
        if request.method == "POST":
            id = os.urandom(8).hex()
            self.uploads[id] = bytearray()
            return self._accepted(request, id, 202)
        if id not in self.uploads:
            return web.json_response(
                {"errors": [{"code": "BLOB_UPLOAD_UNKNOWN", "message": "blob upload unknown to registry"}]},
                status=404,
            )
        if request.method == "GET":
            return self._accepted(request, id, 204)
        if request.method == "DELETE":
            del self.uploads[id]
            return web.Response(status=204)
        content = self.uploads[id]
        if request.method == "PUT":
            digest = request.query["digest"]
            if sha256(bytes(content)) != digest:
                return web.json_response(
                    {"errors": [{"code": "DIGEST_INVALID", "message": "digest did not match"}]}, status=400
                )
            self.blobs[digest] = bytes(self.uploads.pop(id))
            return web.Response(status=201, headers={"Docker-Content-Digest": digest})
        start = int(request.headers["Content-Range"].partition("-")[0])
        assert start == len(content), "the upload goes on where it was cut"
        cut_after = self.cut_after.pop(0) if self.cut_after else None
        received = 0
        self.received.append(0)
        async for piece in request.content.iter_any():
            piece = piece if cut_after is None else piece[: cut_after - received]
            content += piece
            received += len(piece)
            self.received[-1] = received
            if received == cut_after:
                assert request.transport is not None
                request.transport.abort()
                break
        return self._accepted(request, id, 202)

    def _accepted(self, request: web.Request, id: str, status: int) -> web.Response:
        place = f"{request.path.rpartition('/')[0]}/{id}?state=a%2Fb"
        last = max(len(self.uploads[id]) - 1, 0)
        return web.Response(status=status, headers={"Location": place, "Range": f"0-{last}"})
