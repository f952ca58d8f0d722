"""``docker create`` and ``docker run`` on a node with a Docker Engine beside it.

Plain containers are the Docker Engine's, of images that may be this node's; but it takes no part in the cluster, so a
container on a network that only the cluster has is Skep's.

``docker pull`` and ``docker load`` fill this node's own store, since services run from there.  So that ``docker run``
finds the same images, an image that the engine lacks, or has an older one of, is handed over to it when a container of
it is made (``node.engine_images``).
"""

from collections.abc import Awaitable, Callable
from urllib.parse import quote

import msgspec
from aiohttp import web

from skep.api.server import Routes, read_body
from skep.engine.api.containers import create_container
from skep.engine.engine import Engine
from skep.errors import NotFound
from skep.node.docker_engine import DockerEngine
from skep.node.engine_images import EngineImages

_PASSED_ON = ("Content-Type", "User-Agent", "X-Registry-Auth", "X-Registry-Config")


NetworkKnown = Callable[[str], Awaitable[bool]]
"""Whether the cluster has an attachable network of this name or id, or may have one."""


class _HostConfig(msgspec.Struct):
    network_mode: str = msgspec.field(name="NetworkMode", default="")


class _Request(msgspec.Struct):
    """The fields of a create request that decide where the container runs."""

    image: str = msgspec.field(name="Image", default="")
    host: _HostConfig = msgspec.field(name="HostConfig", default_factory=_HostConfig)


def plain_container_routes(
    docker: DockerEngine, engine: Engine | None, images: EngineImages | None, in_cluster: NetworkKnown
) -> Routes:
    """``POST /containers/create`` beside a Docker Engine.  ``engine``: this node's own; None: it runs no containers."""
    table = Routes()

    @table.post("/containers/create")
    async def create(request: web.Request) -> web.StreamResponse:
        body = await read_body(request)
        wanted = _request_of(body)
        word = wanted.image
        if engine is not None and await _is_of_cluster(wanted.host.network_mode):
            if images is not None and word:
                await images.bring(word)
            return await create_container(engine, request)
        if images is not None and word:
            await images.hand_over(word)
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        response = await docker.api.send("POST", request.path_qs, body, headers)
        return web.Response(
            status=response.status,
            body=response.body,
            headers={"Content-Type": response.content_type or "application/json"},
        )

    async def _is_of_cluster(network: str) -> bool:
        """Whether the network is one that only the cluster has."""
        if network in _OF_EVERY_NODE or network.startswith("container:") or not await in_cluster(network):
            return False
        try:
            await docker.api.get(f"/networks/{quote(network, safe='')}")
        except NotFound:
            return True
        return False

    return table


_OF_EVERY_NODE = frozenset({"", "default", "bridge", "host", "none"})


def _request_of(body: bytes) -> _Request:
    """Empty where it cannot be decoded: the Docker Engine refuses it then."""
    try:
        return msgspec.json.decode(body, type=_Request)
    except (ValueError, RecursionError):
        return _Request()
