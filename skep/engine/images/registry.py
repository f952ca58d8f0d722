"""A client of the distribution protocol: manifests and blobs of one repository.

A registry that requires authentication responds with 401 and a challenge at first; the response to that, a
token or a password, is kept for the rest of the conversation.  It is for the registry alone: redirects, mostly of
blobs to another party's store, are followed without it, and a challenge on the other side of one is not answered.
TLS is verified except for registries configured as insecure and those on loopback, and only these are reached without
TLS; no redirect leads out of it.

Source: OCI distribution-spec; moby 20.10, registry/{config,endpoint_v1,service_v2,auth}.go, distribution/errors.go;
CVE-2020-15157 (containerd), for what a redirect must not get.
"""

import base64
import binascii
import ipaddress
import os
import re
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
import msgspec
from yarl import URL

from skep.engine.images.digest import Digest, digest_of
from skep.engine.images.reference import DEFAULT_DOMAIN, Reference
from skep.errors import InvalidArgument, NotFound, PermissionDenied, SkepError

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

_ACCEPT = ", ".join((DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX))
_DOCKER_IO_HOST = "registry-1.docker.io"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_MAX = 10
"""As in Go."""
_TOKEN_BYTES_MAX = 1 << 20
_ERROR_BYTES_MAX = 64 << 10
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=60.0)
"""A blob may take as long as it likes while bytes keep coming."""
_SHORT_TIMEOUT = aiohttp.ClientTimeout(total=30.0, sock_connect=10.0)


class RegistryError(SkepError):
    """The registry could not be reached, or answered what it should not.  Worth another attempt."""


class Absent(NotFound):
    """The registry has no such image.  ``cause``: its message alone."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How registries are reached.

    ``insecure``: hosts (``name[:port]``) and networks (``10.0.0.0/8``) whose certificate is not checked and that may
    be reached without TLS; loopback always is one.  ``mirrors``: base URLs tried before Docker Hub.
    """

    insecure: frozenset[str] = frozenset()
    mirrors: tuple[str, ...] = ()

    def is_insecure(self, domain: str) -> bool:
        """Whether ``domain`` (``host[:port]``) may be reached without verified TLS."""
        host = urlsplit(f"//{domain}").hostname or ""
        if is_loopback(domain) or domain in self.insecure or host in self.insecure:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in map(_network, self.insecure) if network is not None)

    def endpoints(self, domain: str) -> Sequence["Endpoint"]:
        """Base URLs to try for images of ``domain``, in this order."""
        if domain == DEFAULT_DOMAIN:
            mirrors = [
                Endpoint(
                    mirror.rstrip("/"), verify=not self.is_insecure(urlsplit(mirror).netloc), mirror=True
                )
                for mirror in self.mirrors
            ]
            return (*mirrors, Endpoint(f"https://{_DOCKER_IO_HOST}"))
        if self.is_insecure(domain):
            return Endpoint(f"https://{domain}", verify=False), Endpoint(f"http://{domain}", verify=False)
        return (Endpoint(f"https://{domain}"),)


def is_loopback(domain: str) -> bool:
    """Whether ``domain`` (``host[:port]``) is this machine."""
    host = urlsplit(f"//{domain}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Endpoint(msgspec.Struct, frozen=True):
    """A base URL.  ``mirror``: the user's credentials are not for it."""

    url: str
    verify: bool = True
    mirror: bool = False


class Credentials(msgspec.Struct, frozen=True, rename="lower"):
    """What the client sent in ``X-Registry-Auth``.  Never stored, never logged."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r})"


class _Tags(msgspec.Struct, frozen=True):
    tags: tuple[str, ...] | None = None


class Document(msgspec.Struct, frozen=True):
    """A manifest or index as the registry sent it.

    ``is_of_registry``: false for one that a node of the cluster made of an image that came from no registry.
    """

    content: bytes
    media_type: str
    is_of_registry: bool = True

    @property
    def digest(self) -> Digest:
        """The digest of its bytes, by which a registry addresses it."""
        return digest_of(self.content)


def decode_credentials(header: str) -> Credentials:
    """The credentials in ``X-Registry-Auth``.  What cannot be read means none, as in Docker."""
    try:
        content = base64.urlsafe_b64decode(
            header.replace("+", "-").replace("/", "_") + "=" * (-len(header) % 4)
        )
        return msgspec.json.decode(content, type=Credentials) if content else Credentials()
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return Credentials()


class Repository:
    """One repository at one registry, as long as ``connected`` keeps it."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        reference: Reference,
        credentials: Credentials,
    ) -> None:
        self._session = session
        self._endpoint = endpoint
        self._reference = reference
        self._credentials = Credentials() if endpoint.mirror else credentials
        self._authorization = ""
        if self._credentials.registry_token:
            self._authorization = f"Bearer {self._credentials.registry_token}"

    async def ping(self) -> None:
        """Check that a registry responds there, and log in if it requires that.  Raises: RegistryError."""
        async with self._get("/v2/", timeout=_SHORT_TIMEOUT) as response:
            if response.status not in (200, 401, 404):
                raise RegistryError(f"{response.url}: unexpected status {response.status}")

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """The manifest or index that ``target`` (a tag or a digest) names.

        Raises:
            NotFound, PermissionDenied: with Docker's texts.
            InvalidArgument: its digest is not the requested one, or it is too large.
            RegistryError.
        """
        path = f"/v2/{self._reference.path}/manifests/{target}"
        async with self._get(path, headers={"Accept": _ACCEPT}, timeout=_SHORT_TIMEOUT) as response:
            await self._check(response)
            content = await _read(response, bytes_max)
            media_type = response.content_type
        if ":" in target and digest_of(content) != target:
            raise InvalidArgument(f"manifest verification failed for digest {target}")
        return Document(content, media_type)

    async def tags(self, bytes_max: int) -> Sequence[str]:
        """The repository's tags.  Raises: NotFound, PermissionDenied, RegistryError."""
        async with self._get(f"/v2/{self._reference.path}/tags/list", timeout=_SHORT_TIMEOUT) as response:
            await self._check(response)
            content = await _read(response, bytes_max)
        try:
            return msgspec.json.decode(content, type=_Tags).tags or ()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RegistryError(f"{response.url}: {error}") from error

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """A blob's bytes from ``start`` on: the offset they really begin at, and the pieces.

        A registry without ranges begins at 0.  Raises: NotFound, PermissionDenied, RegistryError.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        async with self._get(f"/v2/{self._reference.path}/blobs/{digest}", headers=headers) as response:
            await self._check(response)
            yield start if response.status == 206 else 0, _pieces(response)

    def mistrust(self, _digest: str) -> bool:
        """There is no other source of a blob that was not what its digest names."""
        return False

    @asynccontextmanager
    async def _get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout = _TIMEOUT,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self._endpoint.url + path
        sent = dict(headers or {})
        with _network_errors(url):
            for attempt in (1, 2):
                async with self._followed(url, sent, timeout) as response:
                    if response.status == 401 and attempt == 1 and self._is_own(response.url):
                        challenge = response.headers.get("WWW-Authenticate", "")
                        self._authorization = await self._answer(challenge)
                        if self._authorization:
                            continue
                    yield response
                    return

    @asynccontextmanager
    async def _followed(
        self, url: str, headers: Mapping[str, str], timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response of ``url``, redirects followed.  Raises: RegistryError: one leads out of TLS, or nowhere."""
        target = URL(url)
        for _ in range(_REDIRECTS_MAX + 1):
            sent = dict(headers)
            if self._authorization and self._is_own(target):
                sent["Authorization"] = self._authorization
            async with self._session.get(
                target, headers=sent, timeout=timeout, allow_redirects=False, proxy=_proxy_for(target)
            ) as response:
                location = response.headers.get("Location", "")
                if response.status not in _REDIRECTS or not location:
                    yield response
                    return
            target = self._redirected(target, location)
        raise RegistryError(f'Get "{url}": stopped after {_REDIRECTS_MAX} redirects')

    def _redirected(self, source: URL, location: str) -> URL:
        try:
            # As it is: what signed it may have spelled it otherwise than we do.
            target = source.join(URL(location, encoded=location.isascii() and " " not in location))
        except ValueError as error:
            raise RegistryError(f'Get "{source}": invalid redirect {location!r}') from error
        may_be_plain = source.scheme == "http" or not self._endpoint.verify
        if target.scheme not in ({"http", "https"} if may_be_plain else {"https"}) or not target.host:
            raise RegistryError(f'Get "{source}": refused a redirect to {target.with_query(None)}')
        # A name and password in it would be the registry's, for another.
        return target.with_user(None)

    def _is_own(self, url: URL) -> bool:
        return url.origin() == URL(self._endpoint.url).origin()

    async def _answer(self, challenge: str) -> str:
        """The ``Authorization`` that a challenge requires; empty without credentials."""
        scheme, _, rest = challenge.partition(" ")
        parameters = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        known = self._credentials
        if scheme.lower() == "basic" and known.username:
            return aiohttp.encode_basic_auth(known.username, known.password)
        if scheme.lower() == "bearer" and parameters.get("realm"):
            return f"Bearer {await self._token(parameters)}"
        return ""

    async def _token(self, challenge: Mapping[str, str]) -> str:
        realm = challenge["realm"]
        if urlsplit(realm).scheme != "https" and self._endpoint.verify:
            raise PermissionDenied(f"the registry wants credentials sent without TLS, to {realm}")
        scope = f"repository:{self._reference.path}:pull"
        fields = {"service": challenge.get("service", ""), "scope": scope}
        known = self._credentials
        with _network_errors(realm):
            if known.identity_token:
                form = fields | {
                    "grant_type": "refresh_token",
                    "refresh_token": known.identity_token,
                    "client_id": "docker",
                }
                request = self._session.post(
                    realm,
                    data=form,
                    timeout=_SHORT_TIMEOUT,
                    allow_redirects=False,
                    proxy=_proxy_for(URL(realm)),
                )
            else:
                headers = {}
                if known.username:
                    fields["account"] = known.username
                    headers["Authorization"] = aiohttp.encode_basic_auth(known.username, known.password)
                request = self._session.get(
                    realm,
                    params=fields,
                    headers=headers,
                    timeout=_SHORT_TIMEOUT,
                    allow_redirects=False,
                    proxy=_proxy_for(URL(realm)),
                )
            async with request as response:
                content = await _read(response, _TOKEN_BYTES_MAX)
                if response.status == 401:
                    raise PermissionDenied("unauthorized: incorrect username or password")
                if response.status != 200:
                    raise RegistryError(f"{realm}: unexpected status {response.status}")
        try:
            document = msgspec.json.decode(content, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RegistryError(f"{realm}: {error}") from error
        return str(document.get("token") or document.get("access_token") or "")

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise the error of a failed response, in Docker's words."""
        if response.status in (200, 206):
            return
        code, message = _first_error(await _read(response, _ERROR_BYTES_MAX), response.status)
        cause = f"{code.lower().replace('_', ' ')}: {message}"
        name, familiar = self._reference.familiar_name, self._reference.familiar
        if code == "MANIFEST_UNKNOWN" or (response.status == 404 and "/manifests/" in response.url.path):
            raise Absent(f"manifest for {familiar} not found: {cause}", cause)
        if code == "NAME_UNKNOWN":
            raise Absent(f"repository {name} not found: {cause}", cause)
        if code == "DENIED" or response.status in (401, 403):
            reason = "repository does not exist or may require 'docker login'"
            raise Absent(f"pull access denied for {name}, {reason}: {cause}", cause)
        if code == "TOOMANYREQUESTS" or response.status >= 500 or response.status == 429:
            raise RegistryError(cause)
        raise NotFound(cause)


@asynccontextmanager
async def connected(
    policy: Policy, reference: Reference, credentials: Credentials
) -> AsyncIterator[Repository]:
    """The repository of ``reference`` at the first endpoint that responds.

    Raises:
        RegistryError: none does; with the last one's reason, as Docker gives it.
    """
    problem: RegistryError | None = None
    for endpoint in policy.endpoints(reference.domain):
        context = ssl.create_default_context()
        # Python 3.13 also requires extensions that Go does not, so that private registries often lack them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if not endpoint.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        connector = aiohttp.TCPConnector(ssl=context, limit=16)
        # Without trust_env, by which aiohttp would send what root's ~/.netrc has for a host, too.
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            repository = Repository(session, endpoint, reference, credentials)
            try:
                await repository.ping()
            except RegistryError as error:
                problem = error
                continue
            yield repository
            return
    assert problem is not None, "there is at least one endpoint"
    raise problem


def _proxy_for(url: URL) -> str | None:
    """The proxy that the environment names for ``url``.  As in Go, none stands between this machine and itself."""
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


class _network_errors:  # noqa: N801 - reads as a verb phrase where it is used
    """Translate failures of the network into ``RegistryError``, worded as Go's HTTP client words them."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, TimeoutError):
            raise RegistryError(f'Get "{self._url}": net/http: request canceled (timeout)') from error
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            raise RegistryError(f'Get "{self._url}": dial tcp: lookup {error.host}: no such host') from error
        if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, ssl.SSLError):
            code = error.os_error.errno
            reason = (os.strerror(code) if code and code > 0 else str(error.os_error)).lower()
            where = f"{error.host}:{error.port}"
            raise RegistryError(f'Get "{self._url}": dial tcp {where}: connect: {reason}') from error
        if isinstance(error, aiohttp.ClientError | OSError):
            raise RegistryError(f'Get "{self._url}": {error}') from error


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > bytes_max:
            raise InvalidArgument(f"{response.url}: the answer is larger than {bytes_max} bytes")
    return bytes(content)


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for piece in response.content.iter_chunked(1 << 18):
        yield piece


def _first_error(content: bytes, status: int) -> tuple[str, str]:
    """Code and message of the registry's error document, or something in their place."""
    try:
        document = msgspec.json.decode(content, type=dict[str, Any])
        first = document["errors"][0]
        return str(first.get("code", "UNKNOWN")), str(first.get("message", ""))
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError):
        code = {401: "UNAUTHORIZED", 403: "DENIED", 404: "MANIFEST_UNKNOWN"}.get(status, "UNKNOWN")
        return code, f"unexpected status {status}"
