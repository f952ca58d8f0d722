"""``docker create`` and ``docker run`` beside a Docker Engine: the engine's containers, of images that may be ours.

``docker pull`` and ``docker load`` fill this node's own store, since services run from there.  So that ``docker run``
finds the same images, an image that the engine lacks is handed over to it, once, when a container of it is made.  An
image that the engine has stays as it is there: its users may have built it.
"""

import msgspec
import structlog
from aiohttp import web

from skep.api.server import Routes, read_body
from skep.errors import NotFound
from skep.node.engine import Engine
from skep.node.oci.images.store import ImageStore

log = structlog.get_logger()

_PASSED_ON = ("Content-Type", "User-Agent", "X-Registry-Auth", "X-Registry-Config")


class _Wish(msgspec.Struct):
    """Of a container's wish, what matters here."""

    image: str = msgspec.field(name="Image", default="")


def plain_container_routes(engine: Engine, images: ImageStore | None) -> Routes:
    """``POST /containers/create``; ``images``: this node's own, None where it has none."""
    table = Routes()

    @table.post("/containers/create")
    async def create_container(request: web.Request) -> web.StreamResponse:
        body = await read_body(request)
        word = _image_of(body)
        if images is not None and word:
            await _lend(engine, images, word)
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        answer = await engine.api.post(request.path_qs, body, headers)
        return web.Response(
            status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type}
        )

    return table


def _image_of(body: bytes) -> str:
    """The image's name; empty where there is none to be found, which the engine will say better."""
    try:
        return msgspec.json.decode(body, type=_Wish).image
    except msgspec.DecodeError:
        return ""


async def _lend(engine: Engine, images: ImageStore, word: str) -> None:
    """Have the engine get the image that ``word`` means, if it is ours and not the engine's.  Raises: Unavailable."""
    if images.resolve(word) is None or await engine.has_image(word):
        return
    log.info("image handed to the docker engine", image=word)
    try:
        await engine.load(images.save([word]))
    except NotFound:
        log.info("image went while it was handed over", image=word)
