"""Calls to external certificate authorities, over mutual TLS with this manager's certificate.

Source: swarmkit, ca/external.go (one after another, 5 s each), manager/controlapi/ca_rotation.go.
"""

import asyncio
from collections.abc import Callable, Iterable
from datetime import datetime
from random import Random
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import structlog
from cryptography import x509

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import InvalidArgument, Unavailable, reason_of
from skep.model.swarm import CAConfig, Swarm
from skep.model.values.times import moment
from skep.security.authority import Authority, pem
from skep.security.external import (
    RESPONSE_BYTES_MAX,
    certificate_in,
    check_external_authorities,
    checked_cross_signed,
    cross_sign_request,
    root_with_a_name_of_its_own,
    shown_url,
    urls_of,
)
from skep.security.keypair import KeyPair
from skep.security.rotation import NextRoot, PreparedRoots, Roots, is_about_roots, needed, prepared_root
from skep.security.tls import external_context

log = structlog.get_logger(__name__)

T = TypeVar("T")

ALL_S = 15.0
"""Timeout in seconds for calling all authorities.  It is shorter than a node waits."""
CALLS_MAX = 8
"""Largest number of concurrent requests.  Further requests wait, but not longer than their timeout."""


class CallLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Times for calls of external authorities, in seconds."""

    call_s: float = 5.0
    """Timeout of one authority, as in SwarmKit."""
    first_retry_s: float = 0.5
    """First delay before an unreachable authority is called again."""
    longest_retry_s: float = 30.0


LIMITS = CallLimits()


class ExternalAuthorities:
    """Calls authorities one after another until one returns the requested certificate.

    An unreachable authority is skipped for a while, so that requests of many nodes do not wait for it in turn.  A
    response that ``accept`` refuses affects only its request.

    Args:
        pair: Returns this manager's key pair at the time of each call.
    """

    def __init__(
        self, pair: Callable[[], KeyPair], clock: Clock, random: Random, limits: CallLimits = LIMITS
    ) -> None:
        self._pair = pair
        self._clock = clock
        self._random = random
        self._limits = limits
        self._left_out: dict[str, _LeftOut] = {}
        self._calls = asyncio.Semaphore(CALLS_MAX)

    async def sign(
        self, urls: Iterable[str], body: bytes, roots_pem: bytes, accept: Callable[[x509.Certificate], T]
    ) -> T:
        """Return the result of ``accept`` for the first certificate that ``accept`` does not refuse.

        Args:
            roots_pem: Accepted roots of the authorities' own certificates.
            accept: Raises Unavailable to refuse a certificate.

        Raises:
            Unavailable: No authority returned an accepted certificate.  The error has the reason of each.
        """
        reasons = []
        try:
            async with asyncio.timeout(ALL_S), self._calls:
                for url in urls:
                    try:
                        return accept(certificate_in(await self._response(url, body, roots_pem)))
                    except Unavailable as error:
                        log.warning(
                            "external CA returned no certificate", url=shown_url(url), reason=str(error)
                        )
                        reasons.append(f"{shown_url(url)}: {error}")
        except TimeoutError:
            reasons.append(f"no response within {ALL_S:g} s")
        raise Unavailable(f"no external CA has signed the certificate: {'; '.join(reasons)}")

    async def _response(self, url: str, body: bytes, roots_pem: bytes) -> bytes:
        """Return the body of a response.  Raises: Unavailable: the call failed, or this authority is skipped now."""
        left_out = self._left_out.get(url)
        if left_out is not None and self._clock.monotonic() < left_out.until:
            raise Unavailable(f"skipped after a failure: {left_out.reason}")
        try:
            status, content = await self._post(url, body, roots_pem)
        except Unavailable as error:
            self._leave_out(url, str(error))
            raise
        self._left_out.pop(url, None)
        if status != 200:
            shown = content[:300].decode(errors="replace")
            raise Unavailable(f"unexpected status code in CSR response: {status} - {shown}")
        return content

    async def _post(self, url: str, body: bytes, roots_pem: bytes) -> tuple[int, bytes]:
        context = external_context(self._pair(), roots_pem)
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(self._limits.call_s),
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
                session.post(url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                content = bytearray()
                async for piece in response.content.iter_any():
                    content += piece
                    if len(content) > RESPONSE_BYTES_MAX:
                        raise Unavailable(f"its response is longer than {RESPONSE_BYTES_MAX} bytes")
        except TimeoutError as error:
            raise Unavailable(f"no response within {self._limits.call_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = str(error).replace(url, shown_url(url))
            raise Unavailable(f"unable to perform certificate signing request: {reason}") from error
        if response.status >= 500:
            raise Unavailable(f"unexpected status code in CSR response: {response.status}")
        return response.status, bytes(content)

    def _leave_out(self, url: str, reason: str) -> None:
        left_out = self._left_out.get(url) or _LeftOut(self._random, self._limits)
        left_out.reason = reason
        left_out.until = self._clock.monotonic() + left_out.backoff.next_delay_s()
        self._left_out[url] = left_out
        while len(self._left_out) > 64:
            del self._left_out[next(iter(self._left_out))]

    async def is_reachable(self, urls: Iterable[str], root_pem: bytes) -> bool:
        """Return whether one of the URLs accepts a TLS connection with a certificate of this root."""
        # The calls are concurrent, because an API request waits for the result.
        async with asyncio.TaskGroup() as group:
            tries = [group.create_task(self._connects(url, root_pem), name="external CA") for url in urls]
            for ended in asyncio.as_completed(tries):
                if await ended:
                    for other in tries:
                        other.cancel()
                    return True
        return False

    async def _connects(self, url: str, root_pem: bytes) -> bool:
        try:
            async with asyncio.timeout(self._limits.call_s):
                await self._connect(url, root_pem)
        except (TimeoutError, OSError, ValueError) as error:
            reason = reason_of(error)
            log.warning("external CA is unreachable or invalid", url=shown_url(url), reason=reason)
            return False
        return True

    async def _connect(self, url: str, root_pem: bytes) -> None:
        where = urlsplit(url)
        _, writer = await asyncio.open_connection(
            where.hostname, where.port or 443, ssl=external_context(self._pair(), root_pem)
        )
        writer.transport.abort()

    async def prepare(
        self,
        swarm: Swarm,
        roots: Roots,
        config: CAConfig,
        create: Callable[[], Authority] = root_with_a_name_of_its_own,
    ) -> PreparedRoots:
        """Request from external authorities what a change of the roots needs (``security.rotation``).

        Raises:
            InvalidArgument: The config is invalid.
            Unavailable: The next root was not signed.
        """
        check_external_authorities(config)
        if not is_about_roots(swarm.spec.ca_config, config):
            return PreparedRoots()
        is_forced = config.force_rotate != swarm.spec.ca_config.force_rotate
        needs = needed(roots, config, is_forced=is_forced)
        reachable = frozenset(
            [
                root
                for root in needs.reachable
                if await self.is_reachable(urls_of(config, root, roots.root_pem), root)
            ]
        )
        if not needs.cross_sign or roots.root_pem not in reachable:
            return PreparedRoots(reachable=reachable)
        now = moment(self._clock.now_ns())
        wanted = prepared_root(config, now, create)
        return PreparedRoots(reachable=reachable, next=await self._cross_signed(wanted, roots, config, now))

    async def _cross_signed(
        self, wanted: Authority, roots: Roots, config: CAConfig, now: datetime
    ) -> NextRoot:
        present = x509.load_pem_x509_certificate(roots.root_pem)
        try:
            signed = await self.sign(
                urls_of(config, roots.root_pem, roots.root_pem),
                cross_sign_request(wanted),
                roots.root_pem,
                lambda certificate: checked_cross_signed(certificate, wanted.certificate, present, now),
            )
        except x509.ExtensionNotFound as error:
            raise InvalidArgument(f"the desired CA certificate lacks an extension: {error}") from error
        except Unavailable as error:
            raise Unavailable(
                f"unable to generate a cross-signed certificate for root rotation: {error}"
            ) from error
        return NextRoot(root_pem=wanted.root_pem, key_pem=wanted.key_pem, cross_signed_pem=pem(signed))


class _LeftOut:
    """An unreachable authority, with the reason and the monotonic time in seconds until which it is skipped."""

    def __init__(self, random: Random, limits: CallLimits) -> None:
        self.backoff = Backoff(limits.first_retry_s, limits.longest_retry_s, rng=random.random)
        self.until = 0.0
        self.reason = ""
