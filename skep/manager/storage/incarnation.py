"""Prevents two clusters with the same identity.  A manager of an earlier incarnation stops when it meets a later one.

Managers send their incarnation in every ping.  A manager without a quorum has no links, so it polls the other managers
itself.  If it finds a later incarnation, it stores that and stops.  It then refuses to start, even if it cannot reach
the others.
"""

import asyncio
import ssl
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import log_error
from skep.errors import FailedPrecondition, SkepError
from skep.linux.files import is_no_file, replace_file
from skep.model.node import NodeRole
from skep.model.values.ids import NodeId
from skep.paths import Paths
from skep.security.identity import ROLE_NAMES
from skep.store.etcd.peers import EtcdPeer
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import open_channel

log = structlog.get_logger(__name__)

RESPONSE_S = 1.0
"""Seconds to wait for the incarnation of another manager."""
POLL_EVERY_S = 5.0
"""Longest pause in seconds between two polls of the other managers."""


class Superseded(FailedPrecondition):
    """The cluster continues in a later incarnation, without this manager."""


class Incarnations(msgspec.Struct, frozen=True, kw_only=True):
    """The incarnation that this manager served last, and the latest that it has seen.  0 if unknown."""

    served: int = 0
    later: int = 0


def superseded(served: int, later: int) -> Superseded:
    """Return the error with which a manager stops."""
    return Superseded(
        f"this manager belongs to incarnation {served} of the cluster, and the others now serve incarnation {later}, "
        "which was restored or forced without it: run docker swarm leave --force here, docker node demote and docker "
        "node rm for this node there, then join again"
    )


def read_incarnations(paths: Paths) -> Incarnations:
    """Return the stored incarnations, or empty ones if the file is missing or damaged.  Raises: OSError: a
    failed read.
    """
    try:
        return msgspec.json.decode(paths.incarnation.read_bytes(), type=Incarnations)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise
        return Incarnations()


def check_incarnations(paths: Paths) -> Incarnations:
    """Return the stored incarnations.  Raises: Superseded: a later one is stored."""
    incarnations = read_incarnations(paths)
    if 0 < incarnations.served < incarnations.later:
        raise superseded(incarnations.served, incarnations.later)
    return incarnations


class Incarnation:
    """The incarnation that this manager serves, compared with every other manager's."""

    def __init__(self, served: int) -> None:
        self.served = served
        self._later = 0
        self._superseded = asyncio.Event()

    def observe(self, manager: NodeId, incarnation: int) -> bool:
        """Record the incarnation that another manager serves, and return whether it is the one served here."""
        if incarnation > max(self.served, self._later):
            log.error(
                "another manager serves a later incarnation of the cluster",
                manager=manager,
                own=self.served,
                observed=incarnation,
            )
            self._later = incarnation
            self._superseded.set()
        return incarnation == self.served

    async def run(self, paths: Paths) -> None:
        """Store the incarnation and wait until a later one is observed.  Raises: Superseded; OSError."""
        if not self._later:
            write_incarnations(paths, Incarnations(served=self.served))
        await self._superseded.wait()
        _stop(paths, self.served, self._later)


def write_incarnations(paths: Paths, incarnations: Incarnations) -> None:
    """Store the incarnations."""
    if read_incarnations(paths) != incarnations:
        replace_file(paths.incarnation, msgspec.json.encode(incarnations) + b"\n")


def _stop(paths: Paths, served: int, later: int) -> NoReturn:
    """Store the later incarnation if the disk permits.  The other managers will send it again.  Raises: Superseded."""
    try:
        write_incarnations(paths, Incarnations(served=served, later=later))
    except OSError as error:
        log_error(error, "later incarnation of the cluster not stored")
    raise superseded(served, later)


async def poll_other_managers(
    paths: Paths, served: int, peers: Iterable[EtcdPeer], context: ssl.SSLContext, own: NodeId, clock: Clock
) -> None:
    """Poll the incarnation of the other managers until cancelled.  Used while this manager has no quorum.

    Raises:
        Superseded: Another manager serves a later incarnation.
    """
    others = [addr for peer in peers if peer.name != own and (addr := peer.manager_addr)]
    backoff = Backoff(POLL_EVERY_S / 2, POLL_EVERY_S)
    while others and served:
        polls = (_incarnation_at(addr, context, own) for addr in others)
        responses = await asyncio.gather(*polls, return_exceptions=True)
        later = max(response if isinstance(response, int) else 0 for response in responses)
        if later > served:
            _stop(paths, served, later)
        await backoff.sleep(clock)


async def _incarnation_at(addr: str, context: ssl.SSLContext, own: NodeId) -> int:
    """Return the incarnation of the manager at ``addr``, or 0 without a response."""
    with suppress(SkepError, TimeoutError, OSError):
        async with (
            asyncio.timeout(RESPONSE_S),
            open_channel(addr, context, ROLE_NAMES[NodeRole.MANAGER]) as channel,
            channel.stream(methods.PINGS) as call,
        ):
            await call.send(
                skep.Ping(incarnation=0, node_id=own)
            )  # incarnation 0 marks a query, which does not count as a ping
            response = await call.receive()
            return int(response.incarnation) if response is not None else 0
    return 0
