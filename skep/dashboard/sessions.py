"""Sessions of this node's dashboard, and the rate limit for logins.  Time is an argument."""

from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

import msgspec

from skep.aio.token_bucket import TokenBucket
from skep.dashboard.passing import LIMITS, BrowserLimits, RequestForwarder, same
from skep.model.networks.addresses import plain_address
from skep.model.permissions.access import Credential

LIFE_S: Final = 12 * 3600.0
"""Seconds until a session ends: the length of a working day."""
PER_TOKEN_MAX: Final = 8
"""Maximum number of sessions per token.  One more session ends the oldest."""
ATTEMPTS: Final = 10
"""Login attempts per minute from one address, which may come all at once."""
_SOURCES_MAX: Final = 4096
"""Maximum number of addresses whose login attempts are counted."""


class BrowserSession(msgspec.Struct, frozen=True, eq=False):
    """The session of one browser.

    ``key`` is the first path segment of all its pages, and the path of its cookie.  Browsers send a cookie to every
    port of its host, where a published service may listen, but only with requests under this unguessable path.
    ``forwarder`` has its active requests.
    """

    key: str
    cookie_name: str
    cookie: str
    credential: Credential
    ends_at: float
    forwarder: RequestForwarder


class BrowserSessions:
    """The sessions of one listener.  ``new_secret`` returns a new random word."""

    def __init__(self, new_secret: Callable[[], str], limits: BrowserLimits = LIMITS) -> None:
        self._new_secret = new_secret
        self._limits = limits
        self._by_key: dict[str, BrowserSession] = {}
        """Sessions by key, the oldest first."""

    def open(self, credential: Credential, now: float) -> tuple[BrowserSession, tuple[BrowserSession, ...]]:
        """Open a session.  Returns it, and the sessions that end because of it."""
        ended = self.end_expired(now)
        own = [one for one in self._by_key.values() if one.credential == credential]
        surplus = tuple(own[: max(0, len(own) + 1 - PER_TOKEN_MAX)])
        for one in surplus:
            self.end(one)
        key, cookie, name = self._new_secret(), self._new_secret(), self._new_secret()
        forwarder = RequestForwarder(self._limits)
        session = BrowserSession(
            key, f"__Secure-skep-{name[:8]}", cookie, credential, now + LIFE_S, forwarder
        )
        self._by_key[key] = session
        return session, ended + surplus

    def find(self, key: str, cookie_of: Callable[[str], str], now: float) -> BrowserSession | None:
        """Return the session of a path, if the browser has its cookie.  ``cookie_of`` returns a cookie's value, or
        empty.
        """
        session = self._by_key.get(key)
        if (
            session is None
            or session.ends_at <= now
            or not same(cookie_of(session.cookie_name), session.cookie)
        ):
            return None
        return session

    def end(self, session: BrowserSession) -> None:
        """End a session.  Its cookie is no longer valid."""
        self._by_key.pop(session.key, None)

    def end_expired(self, now: float) -> tuple[BrowserSession, ...]:
        """End the sessions that have expired, and return them."""
        ended = tuple(one for one in self._by_key.values() if one.ends_at <= now)
        for one in ended:
            self.end(one)
        return ended


class Attempts:
    """Limits login attempts per address.  Forgets the address whose last attempt is oldest when the table is full."""

    def __init__(self) -> None:
        self.buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def admit(self, source: str, now: float) -> bool:
        """Return whether ``source`` may try to log in."""
        bucket = self.buckets.pop(source, None) or TokenBucket(ATTEMPTS, ATTEMPTS / 60, now)
        self.buckets[source] = bucket
        if len(self.buckets) > _SOURCES_MAX:
            self.buckets.popitem(last=False)
        return bucket.take(now)


class CertificateNames(msgspec.Struct, frozen=True):
    """Names in the server's certificate, in lower case, including wildcards like ``*.example.com``, and addresses."""

    dns: frozenset[str]
    addresses: frozenset[str]

    def has(self, host: str, local: str) -> bool:
        """Return whether a request with the header ``Host: host`` is for this server.

        An attacker's name may resolve to this server (DNS rebinding).  Requests of such a page have that name as their
        host.

        Args:
            local: Address of this machine that received the request.
        """
        name = _name_of(host)
        try:
            address = str(ip_address(name))
        except ValueError:
            first, _, parent = name.partition(".")
            return name in self.dns or (bool(first and parent) and f"*.{parent}" in self.dns)
        return address in self.addresses or address == plain_address(local)

    def __str__(self) -> str:
        return ", ".join((*sorted(self.dns), *sorted(self.addresses))) or "no name"


def _name_of(host: str) -> str:
    """Return a host without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()
