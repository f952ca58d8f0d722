"""``/volumes`` on a manager: the node's own volumes, followed by cluster volumes.

If both have a volume of a name, the name means the node's volume.  Docker cannot distinguish the two either.

Source: moby, daemon/server/router/volume/volume_routes.go.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import quote

import msgspec
from aiohttp import web

from skep.api.client.client import Response
from skep.api.http.server import api_version, flag, json_response, read_body
from skep.api.http.versions import ApiVersion
from skep.errors import NotFound, SkepError, Unavailable
from skep.node.docker.docker_engine import DockerHandler
from skep.node.routes.cluster_networks import ClusterNetworks, forwarded_headers

_SINCE = ApiVersion("1.42")
_PATH = "/skep/cluster/volumes"


def with_cluster_volumes(
    cluster: ClusterNetworks, routes: tuple[web.AbstractRouteDef, ...]
) -> tuple[web.AbstractRouteDef, ...]:
    """Return this node's ``routes`` with the cluster's volumes included."""
    both = _Both(cluster)
    wraps: Mapping[tuple[str, str], Callable[[DockerHandler], DockerHandler]] = {
        ("GET", "/volumes"): both.list_all,
        ("GET", "/volumes/{name}"): both.inspect,
        ("DELETE", "/volumes/{name}"): both.remove,
        ("POST", "/volumes/create"): both.create,
    }

    def wrapped(route: web.AbstractRouteDef) -> web.AbstractRouteDef:
        if not isinstance(route, web.RouteDef) or (wrap := wraps.get((route.method, route.path))) is None:
            return route
        return web.RouteDef(
            route.method, route.path, wrap(cast("DockerHandler", route.handler)), route.kwargs
        )

    return (*(wrapped(route) for route in routes), web.put("/volumes/{name}", both.update))


class _Both:
    """Handlers that query this node first, then the manager."""

    def __init__(self, cluster: ClusterNetworks) -> None:
        self._cluster = cluster

    def list_all(self, ours: DockerHandler) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            response = await ours(request)
            if (
                not self._is_asked(request)
                or not isinstance(response, web.Response)
                or response.status != 200
            ):
                return response
            listed: dict[str, Any] = msgspec.json.decode(response.body or b"{}")  # type: ignore[arg-type]
            try:
                theirs = await self._manager(request, "GET", f"{_PATH}?{request.query_string}")
                if theirs.status != 200:
                    raise theirs.error()
                listed["Volumes"] = [*(listed.get("Volumes") or ()), *msgspec.json.decode(theirs.body)]
            except SkepError as error:  # as in Docker, a failure does not hide the node's own list
                listed["Warnings"] = [*(listed.get("Warnings") or ()), str(error)]
            return json_response(listed)

        return handle

    def inspect(self, ours: DockerHandler) -> DockerHandler:
        return self._ours_or_theirs(ours)

    def remove(self, ours: DockerHandler) -> DockerHandler:
        """Handle the removal of a volume.

        With ``force``, remove it from the node and from the cluster, as Docker does, because the node does not tell
        whether it had the volume.
        """
        either = self._ours_or_theirs(ours)

        async def handle(request: web.Request) -> web.StreamResponse:
            if not flag(request, "force") or not self._is_asked(request):
                return await either(request)
            response = await ours(request)
            theirs = await self._request_by_name(request) if response.status < 300 else None
            return response if theirs is None or theirs.status in (204, 404) else _passed_back(theirs)

        return handle

    def create(self, ours: DockerHandler) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if api_version(request) < _SINCE or not await _is_for_cluster(request):
                return await ours(request)
            self._check_manager()
            return _passed_back(await self._manager(request, "POST", f"{_PATH}/create"))

        return handle

    async def update(self, request: web.Request) -> web.StreamResponse:
        """Handle ``docker volume update``, which only cluster volumes support."""
        if not self._cluster.member.is_manager:
            raise Unavailable("volume update only valid for cluster volumes, but swarm is unavailable")
        return _passed_back(await self._request_by_name(request))

    def _ours_or_theirs(self, ours: DockerHandler) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                response = await ours(request)
            except NotFound:
                if not self._is_asked(request):
                    raise
            else:
                if response.status != 404 or not self._is_asked(request):
                    return response
            return _passed_back(await self._request_by_name(request))

        return handle

    def _is_asked(self, request: web.Request) -> bool:
        return self._cluster.member.is_manager and api_version(request) >= _SINCE

    def _check_manager(self) -> None:
        """Check that this node is a manager.  Raises: Unavailable, in Docker's words."""
        if not self._cluster.member.is_manager:
            raise Unavailable(self._cluster.member.manager_refusal() or "This node is not a swarm manager.")

    async def _request_by_name(self, request: web.Request) -> Response:
        """Return the manager's response to the same request for a volume by name."""
        path = f"{_PATH}/{quote(request.match_info['name'], safe='')}"
        return await self._manager(request, request.method, f"{path}?{request.query_string}")

    async def _manager(self, request: web.Request, method: str, path: str) -> Response:
        """Send a request to the manager.  Raises: Unavailable."""
        return await self._cluster.request_manager(
            method, path, await read_body(request), forwarded_headers(request)
        )


class _Asked(msgspec.Struct):
    ClusterVolumeSpec: Any = None


async def _is_for_cluster(request: web.Request) -> bool:
    """Return whether a request creates a cluster volume.

    False for an undecodable request, which the node's own handler refuses.
    """
    try:
        asked = msgspec.json.decode(await read_body(request) or b"{}", type=_Asked).ClusterVolumeSpec
    except (ValueError, RecursionError):
        return False
    return asked is not None


def _passed_back(response: Response) -> web.Response:
    return web.Response(
        status=response.status,
        body=response.body,
        headers={"Content-Type": response.content_type or "application/json"},
    )
