"""Credentials and tokens for pushes to a registry, and for logins."""

import base64
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from skep.engine.images.progress import ProgressMessage
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry import uploads
from skep.engine.images.registry.credentials import RegistryCredentials
from skep.engine.images.registry.registry import login
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, PermissionDenied, SkepError
from tests.support.images.archives import a_layer
from tests.support.images.bent_registry import Registry, Respond, load_image
from tests.support.images.registry_rig import LAYERS


def auth(**fields: str) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


async def pushed(images: ImageStore, name: str, credentials: str = "") -> list[ProgressMessage]:
    reported: list[ProgressMessage] = []
    await images.push(parse_reference(name), credentials, reported.append)
    return reported


@pytest.fixture
async def bent() -> AsyncIterator[Registry]:
    async with Registry().serving() as registry:
        yield registry


async def test_a_token_without_the_right_to_push_is_a_denial(images: ImageStore, bent: Registry):
    await load_image(images, f"{bent.address}/app:1", layers=LAYERS[:1])

    async def refuse(request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token":
            return web.json_response({"token": "t"})
        if request.method != "POST":
            return None
        body = {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}
        challenge = f'Bearer realm="http://{bent.address}/token",error="insufficient_scope"'
        return web.json_response(body, status=401, headers={"WWW-Authenticate": challenge})

    bent.bend = refuse
    with pytest.raises(uploads.ContentRefused, match=r"^denied: requested access to the resource is denied$"):
        await pushed(images, f"{bent.address}/app:1")


def guarded_by_tokens(registry: Registry, scopes: list[list[str]]) -> Respond:
    """Wants a token from the registry's own server, for ``user`` and ``secret``; notes the scopes asked for."""

    async def guard(request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token":
            if request.headers.get("Authorization") != aiohttp.encode_basic_auth("user", "secret"):
                return web.Response(status=401)
            scopes.append(request.query.getall("scope", []))
            return web.json_response({"token": "t1", "refresh_token": "r1"})
        if request.headers.get("Authorization") != "Bearer t1":
            challenge = f'Bearer realm="http://{registry.address}/token",service="reg"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return None

    return guard


async def test_a_token_is_asked_for_with_the_right_to_push(images: ImageStore, bent: Registry):
    await load_image(images, f"{bent.address}/app:1")
    scopes: list[list[str]] = []
    bent.bend = guarded_by_tokens(bent, scopes)
    await pushed(images, f"{bent.address}/app:1", auth(username="user", password="secret"))
    assert scopes == [["repository:app:pull,push"]]
    with pytest.raises(PermissionDenied, match=r"^unauthorized: incorrect username or password$"):
        await pushed(images, f"{bent.address}/app:1", auth(username="user", password="wrong"))


async def test_a_login_gives_the_token_that_stands_for_the_password(images: ImageStore, bent: Registry):
    scopes: list[list[str]] = []
    bent.bend = guarded_by_tokens(bent, scopes)
    assert (
        await login(images.policy, bent.address, RegistryCredentials(username="user", password="secret"))
        == "r1"
    )
    assert scopes == [[]]
    with pytest.raises(SkepError) as refused:
        await login(images.policy, bent.address, RegistryCredentials(username="user", password="wrong"))
    assert str(refused.value) == (
        f'Get "http://{bent.address}/v2/": unauthorized: incorrect username or password'
    )


async def test_credentials_are_not_sent_where_a_registry_sends_its_uploads(
    images: ImageStore, bent: Registry
):
    await load_image(images, f"{bent.address}/app:1")
    known = aiohttp.encode_basic_auth("user", "secret")
    async with Registry().serving() as store:

        async def leads_away(request: web.Request) -> web.StreamResponse | None:
            if request.headers.get("Authorization") != known:
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            if request.method == "POST":
                response = await store.upload(request, "")
                place = f"http://{store.address}{response.headers['Location']}"
                return web.Response(status=202, headers={"Location": place})
            return None

        async def asks_for_more(request: web.Request) -> web.StreamResponse | None:
            assert "Authorization" not in request.headers
            return None

        bent.bend, store.bend = leads_away, asks_for_more
        await pushed(images, f"{bent.address}/app:1", auth(username="user", password="secret"))
        assert len(store.blobs) == 3
        assert {request.method for request in store.requests} == {"PATCH", "PUT"}
        assert not any("Authorization" in request.headers for request in store.requests)

        async def wants_to_know(_request: web.Request) -> web.StreamResponse | None:
            challenge = f'Bearer realm="http://{store.address}/token"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})

        store.bend = wants_to_know
        await load_image(images, f"{bent.address}/app:2", layers=(a_layer(),))
        with pytest.raises(SkepError, match="unauthorized"):
            await pushed(images, f"{bent.address}/app:2", auth(username="user", password="secret"))
        assert not any(request.path == "/token" for request in store.requests)
        assert not any("Authorization" in request.headers for request in store.requests)


async def test_a_token_server_that_never_ends_ends_the_login(images: ImageStore, bent: Registry):
    async def endless(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/token":
            challenge = f'Bearer realm="http://{bent.address}/token"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(1 << 16))
        except ConnectionError:
            return response

    bent.bend = endless
    with pytest.raises(InvalidArgument, match="the response is larger than 1048576 bytes"):
        await login(images.policy, bent.address, RegistryCredentials(username="user", password="secret"))
