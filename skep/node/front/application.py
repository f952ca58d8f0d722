"""What the node answers itself, served on connections that the front gives it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from skep.api.server import runner
from skep.configuration.configuration import Configuration
from skep.node.front.users import ApiTls


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[web.Server]:
    """The protocol factory of ``app`` while the context is open."""
    here = runner(app)
    await here.setup()
    try:
        assert here.server is not None, "set up just now"
        yield here.server
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
