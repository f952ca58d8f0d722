"""This node's own membership: ``/swarm/init``, ``join``, ``leave``, ``unlock``.  All else below ``/swarm`` is the
manager's.

Source: moby 20.10, api/server/router/swarm/cluster_routes.go.
"""

from typing import Protocol

from aiohttp import web

from skep.api.server import Routes, flag, json_answer, read_json
from skep.model.ids import NodeId
from skep.model.swarm import InitRequest, JoinRequest, UnlockRequest


class SwarmMember(Protocol):
    """The node's membership, as these routes ask it."""

    async def init(self, request: InitRequest) -> NodeId: ...

    async def join(self, request: JoinRequest) -> None: ...

    async def leave(self, *, force: bool) -> None: ...

    async def unlock(self, request: UnlockRequest) -> None: ...


MEMBER: web.AppKey[SwarmMember] = web.AppKey("member", SwarmMember)

routes = Routes()


@routes.post("/swarm/init")
async def init(request: web.Request) -> web.StreamResponse:
    return json_answer(await request.app[MEMBER].init(await read_json(request, InitRequest)))


@routes.post("/swarm/join")
async def join(request: web.Request) -> web.StreamResponse:
    await request.app[MEMBER].join(await read_json(request, JoinRequest))
    return web.Response()


@routes.post("/swarm/leave")
async def leave(request: web.Request) -> web.StreamResponse:
    await request.app[MEMBER].leave(force=flag(request, "force"))
    return web.Response()


@routes.post("/swarm/unlock")
async def unlock(request: web.Request) -> web.StreamResponse:
    await request.app[MEMBER].unlock(await read_json(request, UnlockRequest))
    return web.Response()
