"""``docker create`` and ``docker run`` on a node whose machine has a Docker Engine.

Plain containers run in the Docker Engine, even if their images are in this node's store.  The exception is a container
on a network that only the cluster has: it runs in Skep, because the engine is not part of the cluster.

``docker pull`` and ``docker load`` fill this node's own store, because services run from there.  ``docker run`` finds
the same images: when a container is created, its image is copied to the engine if the engine lacks it or has an older
version (``node.docker.engine_images``).
"""

from collections.abc import Awaitable, Callable
from urllib.parse import quote

import msgspec
from aiohttp import web

from skep.api.http.server import Routes, read_body
from skep.engine.api.containers import create_container
from skep.engine.engine import Engine
from skep.errors import NotFound
from skep.node.docker.docker_engine import DockerEngine
from skep.node.docker.engine_images import EngineImages

_PASSED_ON = ("Content-Type", "User-Agent", "X-Registry-Auth", "X-Registry-Config")


NetworkKnown = Callable[[str], Awaitable[bool]]
"""Returns whether the cluster has, or may have, an attachable network of this name or id."""


class _HostConfig(msgspec.Struct):
    network_mode: str = msgspec.field(name="NetworkMode", default="")


class _Request(msgspec.Struct):
    """The fields of a create request that decide where the container runs."""

    image: str = msgspec.field(name="Image", default="")
    host: _HostConfig = msgspec.field(name="HostConfig", default_factory=_HostConfig)


def plain_container_routes(
    docker: DockerEngine, engine: Engine | None, images: EngineImages | None, in_cluster: NetworkKnown
) -> Routes:
    """Return ``POST /containers/create`` for a machine with a Docker Engine.

    ``engine`` is this node's own engine, or None.
    """
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
        """Return whether the cluster has the network and the Docker Engine does not."""
        if network in _NODE_NETWORKS or network.startswith("container:") or not await in_cluster(network):
            return False
        try:
            await docker.api.get(f"/networks/{quote(network, safe='')}")
        except NotFound:
            return True
        return False

    return table


_NODE_NETWORKS = frozenset({"", "default", "bridge", "host", "none"})


def _request_of(body: bytes) -> _Request:
    """Decode a create request.

    For an undecodable request, return an empty one, so that the Docker Engine refuses it.
    """
    try:
        return msgspec.json.decode(body, type=_Request)
    except (ValueError, RecursionError):
        return _Request()
