"""Membership of this node: ``/swarm/init``, ``join``, ``leave``, ``unlock``.  The manager serves the rest of /swarm.

Source: moby 20.10, api/server/router/swarm/cluster_routes.go.
"""

import base64

from aiohttp import web

from skep.api.backups import KEY_HEADER
from skep.api.http.server import flag, json_response, read_json
from skep.api.http.tables import RouteTable
from skep.errors import InvalidArgument
from skep.model.swarm import InitRequest, JoinRequest, UnlockRequest
from skep.node.cluster.membership import Membership

_table = RouteTable[Membership]()


def swarm_routes(membership: Membership) -> list[web.RouteDef]:
    """Return ``/swarm/init``, ``join``, ``leave``, ``unlock`` and ``/skep/restore``."""
    return _table.bound(membership)


@_table.post("/swarm/init")
async def init(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm init``."""
    return json_response(await membership.init(await read_json(request, InitRequest)))


@_table.post("/swarm/join")
async def join(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm join``."""
    await membership.join(await read_json(request, JoinRequest))
    return web.Response()


@_table.post("/swarm/leave")
async def leave(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm leave``."""
    await membership.leave(force=flag(request, "force"))
    return web.Response()


@_table.post("/swarm/unlock")
async def unlock(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm unlock``."""
    await membership.unlock(await read_json(request, UnlockRequest))
    return web.Response()


@_table.post("/skep/restore")
async def restore(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Restore the backup in the request's body on this node, which must be in no swarm.  Docker has no such route."""
    try:
        key = base64.b64decode(request.headers.get(KEY_HEADER, ""), validate=True)
    except ValueError as error:
        raise InvalidArgument(f"{KEY_HEADER} is not base64") from error
    plan = await membership.restore(
        request.content.iter_any(),
        key,
        request.query.get("advertiseAddr", ""),
        is_dry=flag(request, "dryRun"),
    )
    return json_response(plan)
