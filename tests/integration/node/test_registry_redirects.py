"""A registry that leads elsewhere: credentials are for the registry alone."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.credentials import RegistryCredentials
from skep.engine.images.registry.endpoints import RegistryEndpoint, RegistryPolicy
from skep.engine.images.registry.registry import RegistryError, RegistryRepository
from skep.engine.images.store import ImageStore
from skep.errors import SkepError
from tests.integration.node.test_image_pulls import Rogue, auth, wants_token
from tests.support.images.archives import sha256
from tests.support.images.registry_rig import CONFIG


@pytest.fixture
async def rogue() -> AsyncIterator[Rogue]:
    rogue = Rogue()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", rogue.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        rogue.address = f"127.0.0.1:{server.port}"
        yield rogue


class Store:
    """Where a registry's blobs lie: another server, whose answers a test says.  Remembers what it is asked."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.address = ""
        self.respond: Callable[[web.Request], web.Response] = lambda _: web.Response(status=404)

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        return self.respond(request)


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    made = Store()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        made.address = f"127.0.0.1:{server.port}"
        yield made


def led_to(store: Store, rogue: Rogue) -> Callable[[web.Request], web.Response | None]:
    """A registry that wants a token, and whose blobs are at ``store``."""
    wanted = wants_token(rogue)

    def guard(request: web.Request) -> web.Response | None:
        refusal = wanted(request)
        if refusal is None and "/blobs/" in request.path:
            return web.Response(status=307, headers={"Location": f"http://{store.address}{request.path}"})
        return refusal

    return guard


async def test_blobs_at_another_server_are_fetched_without_credentials(
    images: ImageStore, rogue: Rogue, store: Store
):
    rogue.guard = led_to(store, rogue)
    store.respond = lambda request: web.Response(body=rogue.blobs[request.path.rpartition("/")[2]])
    image = await images.pull(f"{rogue.address}/app:1", auth(username="user", password="secret"))
    assert image.id == sha256(CONFIG)
    assert store.requests
    assert not any("Authorization" in request.headers for request in store.requests)


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
async def test_a_challenge_behind_a_redirect_is_not_answered(
    images: ImageStore, rogue: Rogue, store: Store, scheme: str
):
    """Neither with a password nor with a refresh token, nor by asking where it says."""
    rogue.guard = led_to(store, rogue)
    challenge = f'{scheme} realm="http://{store.address}/token",service="x"'
    store.respond = lambda _: web.Response(status=401, headers={"WWW-Authenticate": challenge})
    with pytest.raises(SkepError):
        await images.pull(f"{rogue.address}/app:1", auth(username="user", password="secret"))
    assert store.requests
    assert not any(request.path == "/token" for request in store.requests)
    assert not any("Authorization" in request.headers for request in store.requests)


async def test_a_token_server_leads_the_password_nowhere_else(images: ImageStore, rogue: Rogue, store: Store):
    def guard(request: web.Request) -> web.Response | None:
        if request.path == "/token":
            return web.Response(status=307, headers={"Location": f"http://{store.address}/token"})
        challenge = f'Bearer realm="http://{rogue.address}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    rogue.guard = guard
    for known in (auth(username="user", password="secret"), auth(identityToken="t"), auth(identitytoken="t")):
        with pytest.raises(SkepError, match="unexpected status 307"):
            await images.pull(f"{rogue.address}/app:1", known)
    assert store.requests == []


async def test_the_netrc_of_root_is_not_used(
    images: ImageStore, rogue: Rogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "netrc").write_text("default login root password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # By an address that is not one of loopback: what is asked there may go through a proxy.
    address = rogue.address.replace("127.0.0.1", "0.0.0.0")
    insecure = ImageStore(tmp_path / "insecure", policy=RegistryPolicy(insecure=frozenset({address})))
    await insecure.open()
    await insecure.pull(f"{address}/app:1")
    assert rogue.requests
    assert not any("Authorization" in request.headers for request in rogue.requests)


def a_repository(endpoint: RegistryEndpoint) -> RegistryRepository:
    return RegistryRepository(
        cast("aiohttp.ClientSession", None), endpoint, parse_reference("app:1"), RegistryCredentials()
    )


@pytest.mark.parametrize(
    ("endpoint", "source", "location", "target"),
    [
        (RegistryEndpoint("https://r"), "https://r/v2/x", "/y?z=%2F1", "https://r/y?z=%2F1"),
        (RegistryEndpoint("https://r"), "https://r/v2/x", "https://cdn/y", "https://cdn/y"),
        (RegistryEndpoint("https://r"), "https://r/v2/x", "https://u:p@cdn/y", "https://cdn/y"),
        (RegistryEndpoint("https://r"), "https://r/v2/x", "http://r/y", None),
        (RegistryEndpoint("https://r"), "https://r/v2/x", "file:///etc/shadow", None),
        (RegistryEndpoint("https://r"), "https://r/v2/x", "https://[::1", None),
        (RegistryEndpoint("https://r", verify=False), "https://r/v2/x", "http://r/y", "http://r/y"),
        (
            RegistryEndpoint("http://mirror", mirror=True),
            "http://mirror/v2/x",
            "http://cdn/y",
            "http://cdn/y",
        ),
        (RegistryEndpoint("http://mirror", mirror=True), "https://cdn/x", "http://cdn/y", None),
    ],
)
def test_a_redirect_never_leaves_tls(
    endpoint: RegistryEndpoint, source: str, location: str, target: str | None
) -> None:
    repository = a_repository(endpoint)
    if target is None:
        with pytest.raises(RegistryError, match="redirect"):
            repository.redirected(URL(source), location)
    else:
        assert str(repository.redirected(URL(source), location)) == target


async def test_a_circle_of_redirects_ends(images: ImageStore, rogue: Rogue):
    rogue.guard = lambda request: web.Response(status=302, headers={"Location": str(request.url)})
    with pytest.raises(RegistryError, match="stopped after 10 redirects"):
        await images.pull(f"{rogue.address}/app:1")
