"""Serves the node's own routes on connections from the front."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from skep.api.http.server import runner
from skep.configuration.configuration import Configuration
from skep.node.container_places import PLACES, AddPlace, add_no_place
from skep.node.front.users import ApiTls

Ping = Callable[[str, str | None], bytes | None]
"""Returns the complete response to a ``/_ping`` with the given method and API version.

The connection stays open after it.  None leaves the response to the application.
"""


def no_ping(_method: str, _version: str | None) -> None:
    """Leave the response to every ``/_ping`` to the application."""


class Application(msgspec.Struct, frozen=True):
    """The node's own application.

    ``server`` closes the connection after each response, because the next request may be for another process.
    ``named`` adds the place of a container to an error.
    """

    server: web.Server
    ping: Ping = no_ping
    add_place: AddPlace = add_no_place


@asynccontextmanager
async def serving(app: web.Application, ping: Ping) -> AsyncIterator[Application]:
    """Serve ``app`` during the block."""
    here = runner(app)
    await here.setup()
    try:
        assert here.server is not None, "set up just now"
        places = app.get(PLACES)
        yield Application(here.server, ping, places.add_place if places is not None else add_no_place)
    finally:
        await here.cleanup()


async def close_after_response(_request: web.Request, response: web.StreamResponse) -> None:
    """Close the connection, because the next request may be for the manager or the engine.

    Clients open another connection.
    """
    if response.status != 101:
        response.force_close()
        response.headers["Connection"] = "close"


def tls_of(configuration: Configuration) -> ApiTls | None:
    """Return the TLS settings of tcp:// hosts.  Raises: FailedPrecondition."""
    certificate, key, authority = configuration.tls_cert, configuration.tls_key, configuration.tls_ca
    if certificate is None or key is None or authority is None:
        return None
    return ApiTls(certificate, key, authority)
