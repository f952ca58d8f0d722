"""Credentials reach the registry that they were given for, and its token server, and nobody else."""

import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.images.store import ImageStore
from skep.errors import SkepError
from skep.security.authority import Authority
from tests.support.builders import an_auth
from tests.support.security.external_ca import server_certificate


class Server:
    """Responds with ``challenge``, ``location`` or a token; remembers which passwords it was sent."""

    def __init__(self) -> None:
        self.challenge = ""
        self.location = ""
        self.port = 0
        self.passwords: list[str] = []
        self.requests = 0

    async def respond(self, request: web.Request) -> web.Response:
        self.requests += 1
        sent = request.headers.get("Authorization", "")
        if sent.startswith("Basic "):
            self.passwords.append(base64.b64decode(sent.removeprefix("Basic ")).decode())
        if request.method == "POST":
            self.passwords.append(str((await request.post()).get("refresh_token")))
        if self.location:
            return web.Response(status=307, headers={"Location": self.location})
        if self.challenge:
            return web.Response(status=401, headers={"WWW-Authenticate": self.challenge})
        return web.json_response({"token": "t"})


class Servers:
    """Servers on loopback."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def add(self, context: ssl.SSLContext | None = None) -> Server:
        """A server of its own port; ``context``: with TLS."""
        server = Server()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.respond)
        served = TestServer(app, host="127.0.0.1", scheme="https" if context else "http")
        await served.start_server(ssl=context)
        self._stack.push_async_callback(served.close)
        server.port = served.port or 0
        return server


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        yield Servers(stack)


async def pulled(tmp_path: Path, image: str, auth: str, policy: RegistryPolicy | None = None) -> None:
    """Ask a registry for an image as often as a pull does; that fails, as the registry has none."""
    store = ImageStore(tmp_path / "images", policy=policy)
    await store.open()
    with pytest.raises(SkepError):
        await store.inspect_remote(parse_reference(image).with_default_tag(), auth)


@pytest.mark.parametrize("address", ["corp.example", "https://corp.example/v2/", "docker.io", "localhost"])
@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
async def test_another_registry_gets_none(tmp_path, servers, address, scheme):
    evil = await servers.add()
    evil.challenge = f'{scheme} realm="http://127.0.0.1:{evil.port}/token"'
    for auth in (an_auth(address=address), an_auth(username="", address=address, identitytoken="t")):
        await pulled(tmp_path, f"127.0.0.1:{evil.port}/x", auth)
    assert evil.requests
    assert evil.passwords == []


async def test_its_own_registry_gets_them_however_it_is_spelled(tmp_path, servers):
    corp = await servers.add()
    corp.challenge = 'Basic realm="x"'
    for form in ("127.0.0.1:{}", "http://127.0.0.1:{}", "https://127.0.0.1:{}/v2/"):
        await pulled(tmp_path, f"127.0.0.1:{corp.port}/x", an_auth(address=form.format(corp.port)))
    assert set(corp.passwords) == {"corp:s3cret"}


@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
async def test_a_registry_that_redirects_to_a_challenge_of_another_host_sends_none_there(
    tmp_path, servers, scheme
):
    corp, evil = await servers.add(), await servers.add()
    corp.location = f"http://127.0.0.1:{evil.port}/v2/"
    evil.challenge = f'{scheme} realm="http://127.0.0.1:{evil.port}/token"'
    await pulled(tmp_path, f"127.0.0.1:{corp.port}/x", an_auth())
    assert evil.requests
    assert evil.passwords == []


def untrusted_tls(directory: Path) -> ssl.SSLContext:
    """A server's certificate by an authority that nobody trusts."""
    certificate, key = server_certificate(Authority.create(), "127.0.0.1")
    (directory / "certificate").write_bytes(certificate)
    (directory / "key").write_bytes(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "certificate", directory / "key")
    return context


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("auth", [an_auth(), an_auth(username="", identitytoken="t")])
async def test_an_insecure_registry_does_not_make_its_token_server_insecure(tmp_path, servers, scheme, auth):
    """Anyone on the way to it can write its challenge.  Both have names of this machine that are not loopback's."""
    corp = await servers.add()
    evil = await servers.add(untrusted_tls(tmp_path) if scheme == "https" else None)
    corp.challenge = f'Bearer realm="{scheme}://[::ffff:0.0.0.0]:{evil.port}/token"'
    image = f"0.0.0.0:{corp.port}/x"
    await pulled(tmp_path, image, auth, RegistryPolicy(insecure=frozenset({"0.0.0.0"})))
    assert corp.requests
    assert (evil.requests, evil.passwords) == (0, [])
    await pulled(tmp_path, image, auth, RegistryPolicy(insecure=frozenset({"0.0.0.0", "::ffff:0.0.0.0"})))
    assert evil.passwords, "the administrator has named it"
