"""Requests that the node itself makes to the machine's Docker Engine: for its version, containers, images and events.

Clients' requests are passed to the engine byte for byte (see ``front.splice``).  If the engine does not respond, a
request is delayed by a few seconds at most, and the response lacks the engine's part.
"""

from collections.abc import AsyncIterable, Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import quote

import msgspec
import structlog
from aiohttp import web

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.client.client import ApiClient
from skep.api.http.server import json_response
from skep.api.http.versions import NEWEST, ApiVersion
from skep.engine.containers.container import EngineCounts
from skep.errors import NotFound, SkepError

log = structlog.get_logger()

_TIMEOUT_S = 3.0
"""Time limit in seconds for a response, which normally takes milliseconds."""
_VERSION_PERIOD_S = 30.0
"""Seconds between two reads of the engine's version, which changes with an upgrade."""


class DockerHandler(Protocol):
    """A handler of an HTTP request, as aiohttp calls it."""

    async def __call__(self, request: web.Request) -> web.StreamResponse: ...


class DockerEngine:
    """The Docker Engine behind ``api``."""

    def __init__(self, api: ApiClient) -> None:
        self.api = api
        self.version: Mapping[str, str] = {}
        """``Version`` and ``ApiVersion`` of its last response.  Empty before the first."""

    async def follow(self, clock: Clock, rng: Callable[[], float]) -> None:
        """Keep ``version`` current until cancelled, because an engine may start after this node or be replaced."""
        backoff = Backoff(0.5, _VERSION_PERIOD_S, rng=rng)
        while True:
            if await self.read_version():
                backoff.reset()
                await clock.sleep(_VERSION_PERIOD_S)
            else:
                await backoff.sleep(clock)

    async def read_version(self) -> bool:
        """Read the version.  Return whether the engine responded within 3 s."""
        try:
            found = await self.api.get("/version", timeout_s=_TIMEOUT_S)
            version = {key: str(found[key]) for key in ("Version", "ApiVersion")}
            ApiVersion(version["ApiVersion"])
        except (SkepError, msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
            log.debug("docker engine", reason=str(error))
            return False
        if version != self.version:
            log.info("docker engine", version=version["Version"], api_version=version["ApiVersion"])
            self.version = version
        return True

    @property
    def api_version(self) -> ApiVersion:
        """The newest API version that both support."""
        theirs = self.version.get("ApiVersion", "")
        return min(NEWEST, ApiVersion(theirs)) if theirs else NEWEST

    async def counts(self, own_images: Collection[str] = ()) -> EngineCounts:
        """Return the number of its containers, and of its images except those in ``own_images``."""
        try:
            found = await self.api.get("/info", timeout_s=_TIMEOUT_S)
            images = {str(one["Id"]) for one in await self.images({"all": "1"})}
        except SkepError:
            return EngineCounts()
        return EngineCounts(
            running=found.get("ContainersRunning", 0),
            paused=found.get("ContainersPaused", 0),
            stopped=found.get("ContainersStopped", 0),
            images=len(images.difference(own_images)),
        )

    async def image_id(self, word: str) -> str:
        """Return the id of the image ``word``, or empty if it does not exist.

        Raises: Unavailable: it does not respond.
        """
        try:
            found = await self.api.get(f"/images/{quote(word)}/json")
        except NotFound:
            return ""
        return str(found.get("Id", "")) if isinstance(found, dict) else ""

    async def images(
        self, query: Mapping[str, str] = MappingProxyType({}), path: str = "/images/json"
    ) -> list[Any]:
        """Return its images as ``docker images`` lists them.

        Raises: Unavailable; SkepError: it refuses the ``query``.
        """
        return list(await self.api.request("GET", path, query=query, timeout_s=_TIMEOUT_S))

    async def load(self, archive: AsyncIterable[bytes]) -> None:
        """Load images into it, as ``docker load`` does.  Raises: Unavailable; SkepError: it refuses them."""
        response = await self.api.send(
            "POST", "/images/load?quiet=1", archive, {"Content-Type": "application/x-tar"}
        )
        if response.status >= 300:
            raise response.error()

    async def containers(self, request: web.Request) -> list[Any]:
        """Return the engine's containers for ``docker ps``, with the client's parameters."""
        try:
            return list(
                await self.api.request("GET", request.path, query=dict(request.query), timeout_s=_TIMEOUT_S)
            )
        except SkepError as error:
            log.info("containers of the engine are missing", reason=str(error))
            return []


def with_containers_of(
    engine: DockerEngine, routes: tuple[web.AbstractRouteDef, ...]
) -> tuple[web.AbstractRouteDef, ...]:
    """Return ``routes`` with the engine's containers added to the list of containers."""
    return tuple(
        web.get(route.path, _merged(engine, route.handler))
        if isinstance(route, web.RouteDef) and (route.method, route.path) == ("GET", "/containers/json")
        else route
        for route in routes
    )


def _merged(engine: DockerEngine, ours: Any) -> DockerHandler:
    async def list_containers(request: web.Request) -> web.StreamResponse:
        response: web.Response = await ours(request)
        if response.status != 200 or not isinstance(response.body, bytes):
            return response
        containers = msgspec.json.decode(response.body) + await engine.containers(request)
        return json_response(sorted(containers, key=lambda one: int(one.get("Created", 0)), reverse=True))

    return list_containers


def docker_engine_at(socket: Path | None) -> DockerEngine | None:
    """Return the machine's Docker Engine at the configured socket, or None without such a socket."""
    return (
        DockerEngine(ApiClient.local(socket, f"the Docker Engine at {socket}"))
        if socket is not None
        else None
    )
