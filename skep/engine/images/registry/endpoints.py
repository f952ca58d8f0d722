"""Determines the endpoints of registries and how they may be reached.

Source: moby 20.10, registry/{config,service_v2}.go.
"""

import ipaddress
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
import msgspec
from yarl import URL

from skep.api.formats.gosyntax import parse_port
from skep.engine.images.reference import DEFAULT_DOMAIN
from skep.errors import SkepError

_DOCKER_IO_HOST = "registry-1.docker.io"
_CONNECT_S = 10.0
"""Time limit in seconds for a connection.  Docker has none, and waits for the kernel's two minutes."""


class TransferLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Times and attempts of requests to registries."""

    response_s: float = 30.0
    """Time limit in seconds for a request with a small response."""
    stalled_s: float = 60.0
    """Longest time in seconds in which a registry sends or accepts no byte of a blob.

    A blob may take any time as long as bytes keep flowing.
    """
    commit_s: float = 300.0
    """Time limit in seconds for the last request of an upload.

    Long, because the registry then computes a large blob's digest or moves the blob.
    """
    attempts: int = 5
    """moby's default of ``max-download-attempts`` and ``max-upload-attempts``."""
    backoff_s: float = 0.5
    """Seconds before a failed request is first repeated."""

    @property
    def response_timeout(self) -> "aiohttp.ClientTimeout":
        """Timeout of a request with a small response."""
        return aiohttp.ClientTimeout(total=self.response_s, sock_connect=_CONNECT_S)

    @property
    def blob_timeout(self) -> "aiohttp.ClientTimeout":
        """Timeout of a request for a blob."""
        return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=self.stalled_s)

    @property
    def commit_timeout(self) -> "aiohttp.ClientTimeout":
        """Timeout of the last request of an upload."""
        return aiohttp.ClientTimeout(total=self.commit_s, sock_connect=_CONNECT_S)


TRANSFERS = TransferLimits()


class RegistryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Rules for reaching registries.

    Args:
        insecure: Hosts (``name[:port]``) and networks (``10.0.0.0/8``) whose certificate is not checked, and that may
            be reached without TLS.  Loopback addresses always are.
        mirrors: Base URLs tried before Docker Hub.
        helpers: Names of the credential helper ``docker-credential-NAME``, by registry.
        transfers: Times and attempts of requests.
    """

    insecure: frozenset[str] = frozenset()
    mirrors: tuple[str, ...] = ()
    helpers: Mapping[str, str] = {}
    transfers: TransferLimits = TRANSFERS

    def is_insecure(self, domain: str) -> bool:
        """Return whether ``domain`` (``host[:port]``) may be reached without verified TLS."""
        host = urlsplit(f"//{domain}").hostname or ""
        if is_loopback(domain) or domain in self.insecure or host in self.insecure:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in map(_network, self.insecure) if network is not None)

    def endpoints(self, domain: str, *, to_push: bool = False) -> Sequence["RegistryEndpoint"]:
        """Return the base URLs for images of ``domain``, in order.  Pushes do not use mirrors.

        Raises: SkepError: the port is not valid.
        """
        if domain == DEFAULT_DOMAIN:
            mirrors = [
                RegistryEndpoint(
                    mirror.rstrip("/"),
                    verify=not self.is_insecure(urlsplit(mirror).netloc),
                    mirror=True,
                    policy=self,
                )
                for mirror in (() if to_push else self.mirrors)
            ]
            return (*mirrors, RegistryEndpoint(f"https://{_DOCKER_IO_HOST}", policy=self))
        port = domain.rpartition("]")[2].partition(":")[2]
        if port and parse_port(port) is None:
            raise SkepError(f'Get "https://{domain}/v2/": dial tcp: address {port}: invalid port')
        if self.is_insecure(domain):
            return tuple(
                RegistryEndpoint(f"{scheme}://{domain}", verify=False, policy=self)
                for scheme in ("https", "http")
            )
        return (RegistryEndpoint(f"https://{domain}", policy=self),)


def is_loopback(domain: str) -> bool:
    """Return whether ``domain`` (``host[:port]``) is a loopback address of this machine."""
    host = urlsplit(f"//{domain}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RegistryEndpoint(msgspec.Struct, frozen=True):
    """Base URL of a registry.

    Args:
        mirror: Whether it is a mirror, which must not get the user's credentials.
        policy: Further hosts that may be reached without TLS, and limits of requests.
    """

    url: str
    verify: bool = True
    mirror: bool = False
    policy: RegistryPolicy = RegistryPolicy()

    def may_be_plain(self, realm: str) -> bool:
        """Return whether credentials may be sent to the token server ``realm`` without verified TLS.

        Both the registry and the token server must be insecure.  Anyone on the network can forge the challenge of an
        insecure registry.  A forged challenge must not make this node send credentials to any other host without TLS.
        """
        if self.verify:
            return False
        url, own = urlsplit(realm), urlsplit(self.url)
        return url.hostname == own.hostname or self.policy.is_insecure(url.netloc)


@asynccontextmanager
async def session_for(endpoint: RegistryEndpoint) -> AsyncIterator["aiohttp.ClientSession"]:
    """Open a session for ``endpoint`` and the hosts to which it refers, with the endpoint's TLS rules."""
    context = client_context()
    if not endpoint.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    connector = aiohttp.TCPConnector(ssl=context, limit=16)
    # Transfers must not be compressed: digests and ranges apply to a blob's own bytes.
    headers = {"Accept-Encoding": "identity"}
    # trust_env stays off.  Otherwise aiohttp would also send root's ~/.netrc entry for a host.
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False, headers=headers) as session:
        yield session


def client_context() -> ssl.SSLContext:
    """Return the TLS context that verifies the certificates of registries."""
    context = ssl.create_default_context()
    # Python 3.13 also requires certificate extensions that Go does not require, so private registries often lack them.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def proxy_for(url: URL) -> str | None:
    """Return the proxy from the environment for ``url``.  As in Go, this machine itself is reached without one."""
    host = url.host or ""
    if is_loopback(f"[{host}]" if ":" in host else host):
        return None
    if proxy_bypass(f"{host}:{url.port}"):
        return None
    return getproxies_environment().get(url.scheme)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None
