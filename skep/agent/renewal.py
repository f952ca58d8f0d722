"""A node's credentials and their renewal.

A certificate is renewed at a random point of 50 to 80 % of its life, when a manager requests it (the root is rotated),
and when the node's role has changed.  Sessions are not interrupted: a new certificate is used from the next connection
on.

Source: swarmkit, ca/renewer.go and certificates.go (calculateRandomExpiry).
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Protocol

import structlog

from skep.agent.certificates import renew, renew_expired
from skep.agent.session.managers import KnownManager
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error
from skep.aio.race import wait_first
from skep.errors import SkepError, Unavailable
from skep.model.node import NodeRole
from skep.model.values.meta import TLSInfo
from skep.model.values.times import moment
from skep.security import keypair
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock
from skep.security.tls import MANAGER_NAME, client_context
from skep.security.trust import tls_info_of
from skep.wire.client import ManagerChannel, open_channel

log = structlog.get_logger(__name__)

EARLIEST = 0.5
"""SwarmKit renews a certificate at a random time from 50 % to 80 % of its validity."""
LATEST = 0.8
"""A certificate is renewed between these two shares of its life, as in SwarmKit."""
FIRST_RETRY_S = 1.0
"""Seconds before a failed renewal is first repeated."""
LONGEST_RETRY_S = 300.0
"""Longest delay in seconds before a failed renewal is repeated.  Renewals begin long before the certificate expires."""
LOOK_AGAIN_S = 3600.0
"""Seconds between two checks whether a renewal is due.

Needed because the machine may sleep or change its clock during a long wait.
"""


def renewal_time(not_before: datetime, not_after: datetime, random: Random) -> datetime:
    """Return when to request the next certificate: at a random point of 50 to 80 % of the span.

    The time is random, so that nodes that joined together do not renew together.
    """
    return not_before + (not_after - not_before) * random.uniform(EARLIEST, LATEST)


class ChooseManager(Protocol):
    """Returns the manager to renew with, or None if none is known."""

    def __call__(self) -> KnownManager | None: ...


class KeyPairCredentials:
    """The key pair of this node, which ``run`` renews.  Implements ``agent.Credentials``."""

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        random: Random,
        *,
        on_change: Callable[[KeyPair], None] = lambda _: None,
        lock: KeyLock | None = None,
        changed: asyncio.Event | None = None,
    ) -> None:
        """Args: directory: Directory of the key pair.

        Renewed key pairs are written there. on_change: Called after a new certificate, or new roots, were written.
        lock: Lock of that key pair, already open.
        changed: Event to set with every change.

        Raises:
            NotFound, FailedPrecondition: The key pair is missing or unreadable.
        """
        self._directory = directory
        self._clock = clock
        self._random = random
        self._on_change = on_change
        self._lock = lock
        self._role: NodeRole | None = None
        self._unwritten_roots = b""
        self._wanted = asyncio.Event()
        self.pair = keypair.load(directory, lock)
        self.changed = changed if changed is not None else asyncio.Event()
        """Set with every change.  Cleared by the session, which sends the change to the manager."""

    @property
    def identity(self) -> NodeIdentity:
        """Node, cluster and role of the certificate."""
        return self.pair.identity

    @property
    def tls_info(self) -> TLSInfo:
        """Trusted roots, and the issuer of the certificate."""
        return tls_info_of(self.pair)

    def connect(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to the manager at ``address``.  Raises: Unavailable: it is not reachable, or not trusted."""
        return open_channel(address, client_context(self.pair), MANAGER_NAME, timeout_s=timeout_s)

    def want_renewal(self) -> None:
        """Renew the certificate as soon as possible."""
        self._wanted.set()

    def take_role(self, role: NodeRole) -> None:
        """Set the node's role in the cluster.  A certificate for another role is renewed until it matches."""
        self._role = role
        if role is not self.pair.identity.role:
            self._wanted.set()

    def take_roots(self, root_pem: bytes) -> None:
        """Trust the root certificates that a manager has sent.

        Unreadable ones are ignored, because with them no manager could be reached.

        Source: swarmkit, node/node.go (updateRootCA).
        """
        if not root_pem:
            return
        if root_pem == self.pair.root_pem:
            self._unwritten_roots = b""
            return
        pair = self.pair.with_root(root_pem)
        try:
            client_context(pair)
            tls_info_of(pair)
        except (SkepError, OSError, ValueError) as error:
            log.error("invalid root certificates from a manager", error=describe_error(error))
            return
        try:
            self._adopt(pair)
        except OSError as error:  # the next message, which contains them again, may come in days
            log_error(error, "the cluster's root certificates not written, will retry with a renewal")
            self._unwritten_roots = root_pem
            self._wanted.set()
            return
        log.info("the cluster's root certificates changed")

    @property
    def is_expired(self) -> bool:
        """Whether managers refuse the current certificate."""
        return self._now() >= self.pair.not_after

    async def run(self, choose: ChooseManager) -> None:
        """Renew whenever it is due, until cancelled.  ``choose`` returns the manager to renew with."""
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            await self._wait_due()
            self._wanted.clear()
            # A separate task, because a broken connection cancels the task that uses it, which must not be this loop.
            async with asyncio.TaskGroup() as group:
                attempt = group.create_task(self._renew(choose), name="certificate renewal")
            if attempt.result():
                backoff.reset()
                continue
            await wait_first(backoff.sleep(self._clock), self._wanted.wait())  # a request does not wait
            self._wanted.set()

    async def _wait_due(self) -> None:
        """Wait until the certificate is due, or its renewal was requested."""
        at = renewal_time(self.pair.not_before, self.pair.not_after, self._random)
        while not self._wanted.is_set():
            left_s = (at - self._now()).total_seconds()
            if left_s <= 0:
                return
            try:
                async with asyncio.timeout(min(left_s, LOOK_AGAIN_S)):
                    await self._wanted.wait()
            except TimeoutError:
                continue

    async def _renew(self, choose: ChooseManager) -> bool:
        """Try once to renew the certificate.  Returns whether it is now valid for the node's role."""
        try:
            if not (self.is_expired and self._is_renewed_beside()):
                before = self.pair
                renewed = await self._request_pair(choose())
                # A manager may have sent other roots during the request.
                is_same = self.pair.root_pem == before.root_pem
                roots = self._unwritten_roots or (renewed.root_pem if is_same else self.pair.root_pem)
                self._adopt(renewed.with_root(roots))
        except (SkepError, OSError) as error:
            log.warning(
                "certificate not renewed", error=describe_error(error), until=self.pair.not_after.isoformat()
            )
            return False
        log.info(
            "certificate renewed", until=self.pair.not_after.isoformat(), role=self.pair.identity.role.value
        )
        return self._role in (None, self.pair.identity.role)

    async def _request_pair(self, peer: KnownManager | None) -> KeyPair:
        """Request a new key pair from a manager.  Raises: SkepError."""
        if peer is None:
            raise Unavailable("no manager is known")
        if self.is_expired:
            return await renew_expired(peer.addr, self.pair)
        return await renew(peer.addr, self.pair, self._clock)

    def _is_renewed_beside(self) -> bool:
        """Adopt the key pair if the manager on this machine has renewed it in the meantime.  Returns whether it has."""
        self.pair = keypair.load(self._directory, self._lock)
        self.changed.set()
        return not self.is_expired

    def _now(self) -> datetime:
        return moment(self._clock.now_ns())

    def _adopt(self, pair: KeyPair) -> None:
        """Use ``pair`` from the next connection on.  Open connections stay."""
        keypair.save(pair, self._directory, self._lock)
        self.pair = pair
        self._unwritten_roots = b""
        self.changed.set()
        self._on_change(pair)
