"""A manager that leaves gives its vote back first: a dead vote would cost the others their quorum."""

from collections.abc import Sequence

import structlog

from skep.errors import SkepError
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, client_context
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.client import connected

log = structlog.get_logger()

RESIGN_S = 6.0
"""Longer than the manager that is asked waits for the vote to be gone."""


async def resign(managers: Sequence[str], pair: KeyPair) -> bool:
    """Ask one of the other managers (``ip:port``) for it; gives whether the vote is gone.

    They refuse when those that stay would have no quorum.
    """
    for manager in managers:
        try:
            async with connected(manager, client_context(pair), MANAGER_NAME) as channel:
                await channel.call(methods.RESIGN, pb.ResignRequest(), timeout_s=RESIGN_S)
        except SkepError as error:
            log.warning("the vote was not given back", manager=manager, reason=str(error))
        else:
            return True
    return False
