"""This node's own membership: ``/swarm/init``, ``join``, ``leave``, ``unlock``.  All else below ``/swarm`` is the
manager's.

Source: moby 20.10, api/server/router/swarm/cluster_routes.go.
"""

import base64
from collections.abc import AsyncIterator
from typing import Protocol

from aiohttp import web

from skep.api.backups import KEY_HEADER, RestorePlan
from skep.api.server import Routes, flag, json_answer, read_json
from skep.errors import InvalidArgument
from skep.model.ids import NodeId
from skep.model.swarm import InitRequest, JoinRequest, UnlockRequest


class SwarmMember(Protocol):
    """The node's membership, as these routes ask it."""

    async def init(self, request: InitRequest) -> NodeId:
        """Create a cluster; gives this node's id."""

    async def join(self, request: JoinRequest) -> None:
        """Join a cluster."""

    async def leave(self, *, force: bool) -> None:
        """Leave the cluster."""

    async def unlock(self, request: UnlockRequest) -> None:
        """Decrypt what autolock has locked."""

    async def restore(
        self, pieces: AsyncIterator[bytes], key: bytes, advertise_addr: str, *, is_dry: bool
    ) -> RestorePlan:
        """Become the manager that made the backup in ``pieces``; ``is_dry``: only read it."""


MEMBER: web.AppKey[SwarmMember] = web.AppKey("member", SwarmMember)

routes = Routes()


@routes.post("/swarm/init")
async def init(request: web.Request) -> web.StreamResponse:
    """``docker swarm init``."""
    return json_answer(await request.app[MEMBER].init(await read_json(request, InitRequest)))


@routes.post("/swarm/join")
async def join(request: web.Request) -> web.StreamResponse:
    """``docker swarm join``."""
    await request.app[MEMBER].join(await read_json(request, JoinRequest))
    return web.Response()


@routes.post("/swarm/leave")
async def leave(request: web.Request) -> web.StreamResponse:
    """``docker swarm leave``."""
    await request.app[MEMBER].leave(force=flag(request, "force"))
    return web.Response()


@routes.post("/swarm/unlock")
async def unlock(request: web.Request) -> web.StreamResponse:
    """``docker swarm unlock``."""
    await request.app[MEMBER].unlock(await read_json(request, UnlockRequest))
    return web.Response()


@routes.post("/skep/restore")
async def restore(request: web.Request) -> web.StreamResponse:
    """Restore the backup in the body on this node, which is in no swarm.  Ours, not Docker's."""
    try:
        key = base64.b64decode(request.headers.get(KEY_HEADER, ""), validate=True)
    except ValueError as error:
        raise InvalidArgument(f"{KEY_HEADER} is no base64") from error
    plan = await request.app[MEMBER].restore(
        request.content.iter_any(),
        key,
        request.query.get("advertiseAddr", ""),
        is_dry=flag(request, "dryRun"),
    )
    return json_answer(plan)
