"""What the node answers itself, served on connections that the front gives it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from skep.api.server import runner
from skep.configuration.configuration import Configuration
from skep.node.front.users import ApiTls

Ping = Callable[[str, str | None], bytes | None]
"""The whole response to a ``/_ping`` by its method and version, after which the connection stays open; None: the
application responds."""


def no_ping(_method: str, _version: str | None) -> None:
    """The application responds to every ``/_ping``."""


class Application(msgspec.Struct, frozen=True):
    """``server``: closes the connection after each response, since the next request on it may not be its own."""

    server: web.Server
    ping: Ping = no_ping


@asynccontextmanager
async def serving(app: web.Application, ping: Ping) -> AsyncIterator[Application]:
    """``app`` while the context is open."""
    here = runner(app)
    await here.setup()
    try:
        assert here.server is not None, "set up just now"
        yield Application(here.server, ping)
    finally:
        await here.cleanup()


async def close_after_response(_request: web.Request, response: web.StreamResponse) -> None:
    """The next request on a connection may be for the manager or the engine: clients open another one for it."""
    if response.status != 101:
        response.force_close()
        response.headers["Connection"] = "close"


def tls_of(configuration: Configuration) -> ApiTls | None:
    """TLS for tcp:// hosts.  Raises: FailedPrecondition."""
    certificate, key, authority = configuration.tls_cert, configuration.tls_key, configuration.tls_ca
    if certificate is None or key is None or authority is None:
        return None
    return ApiTls(certificate, key, authority)
