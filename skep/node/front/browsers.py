"""The dashboard for browsers without ``skep ui``, served if the configuration enables it."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from skep.aio.clock import Clock
from skep.configuration.configuration import Configuration
from skep.node.front.server import Front
from skep.node.front.users import KnownUsers


@asynccontextmanager
async def serving_dashboard(
    configuration: Configuration, users: KnownUsers, front: Front, clock: Clock
) -> AsyncIterator[None]:
    """Serve the dashboard to browsers during the block, if the configuration enables it.

    Raises: FailedPrecondition: cannot listen on its address, or its certificate is invalid.
    """
    if configuration.dashboard is None or configuration.tls_cert is None or configuration.tls_key is None:
        yield
        return
    from skep.dashboard.server import DashboardServer, Tls  # imported here: few nodes serve it

    server = DashboardServer(
        Tls.of(configuration.tls_cert, configuration.tls_key),
        users,
        front.serve,
        allows_public=configuration.dashboard_public,
        clock=clock,
        new_secret=lambda: secrets.token_hex(16),
    )
    async with server.listening(*configuration.dashboard):
        yield
