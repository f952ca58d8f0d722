"""Who makes a request is known by its connection, in whichever process it is served."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from skep.api.access.identity import IDENTITY_HEADER, identity_of
from skep.model.permissions.access import Identity, Origin
from tests.support.clients.front_rig import Rig

ROOT = '{"name":"root","origin":"socket","bindings":[{"role":3,"stack":"*"}]}'


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_the_identity_of_a_connection_goes_with_it_between_the_processes(rig: Rig) -> None:
    """On one connection in turn: the manager process and the node process, for a client by TCP and for root."""
    seen: list[tuple[str, Origin]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        who: Identity = identity_of(request)
        seen.append((request.path, who.origin))
        return web.json_response({})

    by_tcp = aiohttp.ClientSession(f"http://127.0.0.1:{rig.port}")
    async with rig.front(answer), rig.manager(answer), rig.client() as local, by_tcp as remote:
        for path in ("/services", "/tasks", "/version"):
            for session in (local, remote):
                async with asyncio.timeout(10), session.get(path) as response:
                    assert response.status == 200
    assert seen == [
        (path, origin)
        for path in ("/services", "/tasks", "/version")
        for origin in (Origin.SOCKET, Origin.MACHINE)
    ]


async def test_a_client_cannot_say_who_it_is(rig: Rig) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"origin": identity_of(request).origin.value})

    by_tcp = aiohttp.ClientSession(f"http://127.0.0.1:{rig.port}", headers={IDENTITY_HEADER: ROOT})
    async with rig.front(answer), rig.manager(answer), by_tcp as remote:
        for path in ("/services", "/version"):
            async with asyncio.timeout(10), remote.get(path) as response:
                assert await response.json() == {"origin": "machine"}
