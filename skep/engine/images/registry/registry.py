"""Client of the distribution protocol: manifests and blobs of one repository.

A registry that requires authentication first responds with 401 and a challenge.  The resulting token or password is
kept for the following requests.  It is for the registry alone.  Redirects, mostly of blobs to another party's store,
are followed without it, and a challenge from a redirect's target is not answered.  Credentials for another registry are
not used at all.  A challenge may name a token server at another host, as Docker Hub's does.  A host that requires
verified TLS gets no credentials without it.

TLS is verified except for registries configured as insecure and those on loopback.  Only these may be reached without
TLS.  A redirect from TLS to plain HTTP is refused.

Source: OCI distribution-spec; moby 20.10, registry/{config,endpoint_v1,service_v2,auth}.go, distribution/errors.go;
CVE-2020-15157 (containerd), for the credentials that a redirect must not get.
"""

import base64
import os
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import structlog
from yarl import URL

from skep.engine.images.digest import Digest, digest_of
from skep.engine.images.reference import Reference
from skep.engine.images.registry.credentials import RegistryCredentials
from skep.engine.images.registry.endpoints import (
    RegistryEndpoint,
    RegistryPolicy,
    client_context,
    proxy_for,
    session_for,
)
from skep.engine.images.registry.refusals import NOT_JSON, read_bounded, refusal_of, retry_after, status_text
from skep.errors import InvalidArgument, NotFound, PermissionDenied, SkepError, Unauthenticated

T = TypeVar("T")

log = structlog.get_logger(__name__)

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

_ACCEPT = ", ".join((DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX))
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_WITH_BODY = frozenset({307, 308})
"""Redirects that keep method and content.  After the others, Go would send a GET."""
_REDIRECTS_MAX = 10
"""Limit for the redirects of one request, as in Go."""
_TOKEN_BYTES_MAX = 1 << 20  # of a token server's response
_TAG_PAGES_MAX = 1000
"""Limit for the pages of a list of tags, because a registry could name a next page forever."""

Content = Callable[[], AsyncIterator[bytes]]
"""Returns the content of a request in pieces.  Called for each attempt."""


class RegistryError(SkepError):
    """The registry could not be reached, or sent an invalid response.  A retry makes sense after ``retry_after_s``."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoCredentials(SkepError):
    """The registry requires a name and a password, but none are known.  ``cause`` has Docker's words for this alone."""

    def __init__(self, request: str) -> None:
        self.cause = "no basic auth credentials"
        super().__init__(f"{request}: {self.cause}")


class LoginFailed(SkepError):
    """The registry refuses a name and password."""


class Absent(NotFound):
    """The registry has no such image.  ``cause`` has only the registry's message."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Denied(Absent):
    """The registry denies access, or has no such image: its message is the same in both cases."""


class _Tags(msgspec.Struct, frozen=True):
    tags: tuple[str, ...] | None = None


class Document(msgspec.Struct, frozen=True):
    """Manifest or index as the registry sent it.

    Args:
        is_of_registry: False if a node made it for an image without a registry's manifest.
        is_own: Whether the image was built, loaded or tagged on that node, and came from no registry of its name.
    """

    content: bytes
    media_type: str
    is_of_registry: bool = True
    is_own: bool = False

    @property
    def digest(self) -> Digest:
        """Digest of its bytes, by which the registry addresses it."""
        return digest_of(self.content)


class RegistryConnection:
    """Requests to one registry with one user's credentials, as long as its session lives."""

    def __init__(
        self,
        session: "aiohttp.ClientSession",
        endpoint: RegistryEndpoint,
        credentials: RegistryCredentials,
        scopes: Sequence[str] = (),
    ) -> None:
        """``scopes``: Scopes of tokens (``repository:name:actions``).

        Without any, a token only shows the user's identity.
        """
        self._session = session
        self._endpoint = endpoint
        self.transfers = endpoint.policy.transfers
        self._credentials = RegistryCredentials() if endpoint.mirror else credentials
        self._scopes = scopes
        self._authorization = ""
        if self._credentials.registry_token:
            self._authorization = f"Bearer {self._credentials.registry_token}"
        self.identity_token = ""
        """Token from the registry's token server that replaces the password.  Empty without one."""

    async def ping(self) -> None:
        """Check that a registry responds, and log in if needed.  Raises: RegistryError; PermissionDenied."""
        try:
            async with self.request("GET", "/v2/", timeout=self.transfers.response_timeout) as response:
                if response.status not in (200, 401, 404, 429):
                    # Below 500 the registry responds, but refuses these credentials.
                    kind = PermissionDenied if self._credentials and response.status < 500 else RegistryError
                    raise kind(f"{response.url}: unexpected status {response.status}")
        except NoCredentials:
            pass  # the registry responds, and the next request may need no credentials

    async def login(self) -> None:
        """Check the credentials.

        Raises: Unauthenticated: the token server refuses them; LoginFailed: the registry does; NoCredentials;
        RegistryError.

        Source: moby 20.10, registry/auth.go (loginV2).
        """
        url = f"{self._endpoint.url}/v2/"
        try:
            async with self.request("GET", "/v2/", timeout=self.transfers.response_timeout) as response:
                status = response.status
        except PermissionDenied as error:
            raise Unauthenticated(f'Get "{url}": {error}') from error
        if status != 200:
            raise LoginFailed(f"login attempt to {url} failed with status: {status_text(status)}")

    @asynccontextmanager
    async def request(
        self,
        method: str,
        place: str | URL,
        *,
        headers: Mapping[str, str] | None = None,
        content: Content | bytes | None = None,
        timeout: "aiohttp.ClientTimeout",
        also: str = "",
    ) -> AsyncIterator["aiohttp.ClientResponse"]:
        """Send a request to ``place`` (a path or URL), log in, follow redirects, and yield the response.

        ``also``: Additional scope of the token.

        Raises:
            RegistryError: no response; a redirect leaves TLS, or has no target.
            PermissionDenied: the token server refuses the credentials.
            NoCredentials: a password is required, and there is none.
        """
        target = URL(self._endpoint.url + place) if isinstance(place, str) else place
        scopes = (*self._scopes, also) if also else self._scopes
        with _network_errors(str(target), method):
            for attempt in (1, 2):
                async with self._follow(method, target, headers or {}, content, timeout) as response:
                    if response.status == 401 and attempt == 1 and self._is_own(response.url):
                        challenge = response.headers.get("WWW-Authenticate", "")
                        self._authorization = await self._answer(challenge, scopes)
                        if self._authorization:
                            continue
                        if challenge.lower().startswith("basic"):
                            raise NoCredentials(f'{method.capitalize()} "{response.url}"')
                    yield response
                    return

    def location(self, response: "aiohttp.ClientResponse") -> URL:
        """Return the URL at which ``response`` says to continue.  Raises: RegistryError: it has none, or leaves TLS."""
        location = response.headers.get("Location", "")
        if not location:
            raise RegistryError(f"{response.url.with_query(None)}: the registry sent no Location header")
        return self.redirected(response.url, location)

    @asynccontextmanager
    async def _follow(
        self,
        method: str,
        target: URL,
        headers: Mapping[str, str],
        content: Content | bytes | None,
        timeout: "aiohttp.ClientTimeout",
    ) -> AsyncIterator["aiohttp.ClientResponse"]:
        """Follow redirects from ``target`` and yield the response.

        Raises: RegistryError: one leaves TLS, or is invalid.
        """
        url = target
        redirects = _REDIRECTS if method in ("GET", "HEAD") else _REDIRECTS_WITH_BODY
        for _ in range(_REDIRECTS_MAX + 1):
            sent = dict(headers)
            if self._authorization and self._is_own(target):
                sent["Authorization"] = self._authorization
            async with self._session.request(
                method,
                target,
                headers=sent,
                data=content() if callable(content) else content,
                timeout=timeout,
                allow_redirects=False,
                proxy=proxy_for(target),
            ) as response:
                location = response.headers.get("Location", "")
                if response.status not in redirects or not location:
                    yield response
                    return
            target = self.redirected(target, location)
        raise RegistryError(f'{method.capitalize()} "{url}": stopped after {_REDIRECTS_MAX} redirects')

    def redirected(self, source: URL, location: str) -> URL:
        try:
            # Keep its spelling: the signature in it may cover characters that we would encode differently.
            target = source.join(URL(location, encoded=location.isascii() and " " not in location))
        except ValueError as error:
            raise RegistryError(f'Get "{source}": invalid redirect {location!r}') from error
        may_be_plain = source.scheme == "http" or not self._endpoint.verify
        if target.scheme not in ({"http", "https"} if may_be_plain else {"https"}) or not target.host:
            raise RegistryError(f'Get "{source}": refused a redirect to {target.with_query(None)}')
        # Credentials in the URL would be the registry's, for another host.
        return target.with_user(None)

    def _is_own(self, url: URL) -> bool:
        return url.origin() == URL(self._endpoint.url).origin()

    async def _answer(self, challenge: str, scopes: Sequence[str]) -> str:
        """Return the ``Authorization`` header for a challenge.  Empty without credentials."""
        scheme, _, rest = challenge.partition(" ")
        # The word boundary keeps the search linear: without it, a long word takes quadratic time.
        parameters = dict(re.findall(r'\b(\w+)="([^"]*)"', rest))
        known = self._credentials
        if scheme.lower() == "basic" and known.username:
            return _basic(known)
        if scheme.lower() == "bearer" and parameters.get("realm"):
            return f"Bearer {await self._token(parameters, scopes)}"
        return ""

    async def _token(self, challenge: Mapping[str, str], scopes: Sequence[str]) -> str:
        realm = challenge["realm"]
        if urlsplit(realm).scheme != "https" and not self._endpoint.may_be_plain(realm):
            raise PermissionDenied(f"the registry requires credentials to be sent without TLS, to {realm}")
        fields = [("service", challenge.get("service", ""))]
        known = self._credentials
        with _network_errors(realm):
            async with self._token_request(realm, fields, scopes) as response:
                content = await read_bounded(response, _TOKEN_BYTES_MAX)
                if response.status == 401:
                    raise PermissionDenied("unauthorized: incorrect username or password")
                if 400 <= response.status < 500 and response.status not in (408, 429):
                    raise PermissionDenied(f"{realm}: unexpected status {response.status}")
                if response.status != 200:
                    raise RegistryError(
                        f"{realm}: unexpected status {response.status}", retry_after(response)
                    )
        try:
            document = msgspec.json.decode(content, type=dict[str, Any])
        except NOT_JSON as error:
            raise RegistryError(f"{realm}: {error}") from error
        if known.username and not scopes:
            self.identity_token = str(document.get("refresh_token") or "")
        return str(document.get("token") or document.get("access_token") or "")

    def _token_request(
        self, realm: str, fields: list[tuple[str, str]], scopes: Sequence[str]
    ) -> AbstractAsyncContextManager["aiohttp.ClientResponse"]:
        """Send a request to the token server at ``realm``, without redirects, which would also get the password."""
        known = self._credentials
        proxy = proxy_for(URL(realm))
        is_other = not self._endpoint.verify and not self._endpoint.may_be_plain(realm)
        tls = client_context() if is_other else True  # the session of an insecure registry verifies nothing
        if known.identity_token:
            form = [
                *fields,
                ("scope", " ".join(scopes)),
                ("grant_type", "refresh_token"),
                ("refresh_token", known.identity_token),
                ("client_id", "docker"),
            ]
            return self._session.post(
                realm,
                data=form,
                timeout=self.transfers.response_timeout,
                allow_redirects=False,
                proxy=proxy,
                ssl=tls,
            )
        fields += [("scope", scope) for scope in scopes]
        headers = {}
        if known.username:
            fields.append(("account", known.username))
            headers["Authorization"] = _basic(known)
            if not scopes:  # at a login, the client keeps the token in place of the password
                fields += [("offline_token", "true"), ("client_id", "docker")]
        return self._session.get(
            realm,
            params=fields,
            headers=headers,
            timeout=self.transfers.response_timeout,
            allow_redirects=False,
            proxy=proxy,
            ssl=tls,
        )


class RegistryRepository(RegistryConnection):
    """One repository at one registry.  ``actions``: Requested access, ``pull`` or ``pull,push``."""

    def __init__(
        self,
        session: "aiohttp.ClientSession",
        endpoint: RegistryEndpoint,
        reference: Reference,
        credentials: RegistryCredentials,
        actions: str = "pull",
    ) -> None:
        credentials = credentials.for_registry(reference.domain)
        super().__init__(session, endpoint, credentials, (f"repository:{reference.path}:{actions}",))
        self._reference = reference

    @property
    def path(self) -> str:
        """Path of the repository's manifests and blobs at the registry."""
        return f"/v2/{self._reference.path}"

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """Return the manifest or index for ``target``, a tag or a digest.

        Raises:
            NotFound, PermissionDenied: with Docker's texts.
            InvalidArgument: its digest is not the requested one, or it is too large.
            RegistryError.
        """
        path, headers = f"{self.path}/manifests/{target}", {"Accept": _ACCEPT}
        try:
            async with self.request(
                "GET", path, headers=headers, timeout=self.transfers.response_timeout
            ) as response:
                await self._check(response)
                content = await read_bounded(response, bytes_max)
                media_type = response.content_type
        except RegistryError as error:
            if self._endpoint.mirror:  # as in Docker, the second attempt is at the next endpoint
                raise SkepError(str(error)) from error
            raise
        if ":" in target and digest_of(content) != target:
            raise InvalidArgument(f"manifest verification failed for digest {target}")
        return Document(content, media_type)

    async def tags(self, bytes_max: int) -> Sequence[str]:
        """Return the repository's tags from all pages of the list.

        ``bytes_max``: Size of all pages together.

        Raises:
            NotFound, PermissionDenied: with Docker's texts.
            InvalidArgument: the list is larger, or has too many pages.
            RegistryError: a page cannot be read, or the next one is at another host or an earlier one.

        Source: distribution 2.8, registry/client/repository.go (tags.All).
        """
        found: list[str] = []
        pages: set[URL] = set()
        page: URL | None = URL(f"{self._endpoint.url}{self.path}/tags/list")
        while page is not None:
            if page in pages:
                raise RegistryError(f'Get "{page}": the list of tags repeats a page')
            if len(pages) == _TAG_PAGES_MAX:
                raise InvalidArgument(f'Get "{page}": the list of tags has more than {_TAG_PAGES_MAX} pages')
            pages.add(page)
            async with self.request("GET", page, timeout=self.transfers.response_timeout) as response:
                await self._check(response)
                content = await read_bounded(response, bytes_max)
                links = ", ".join(response.headers.getall("Link", ()))
            bytes_max -= len(content)
            try:
                found += msgspec.json.decode(content, type=_Tags).tags or ()
            except NOT_JSON as error:
                raise RegistryError(f"{page}: {error}") from error
            page = self._next_page(page, links)
        return found

    def _next_page(self, page: URL, links: str) -> URL | None:
        """Return the page after ``page`` by its ``Link`` headers.  Raises: RegistryError: it is at another host."""
        named = re.search(r'<([^<>]*)>[^<,]*\brel="?next\b', links, re.IGNORECASE)
        if named is None:
            return None
        target = self.redirected(page, named[1])
        if not self._is_own(target):
            raise RegistryError(f'Get "{page}": refused a next page at {target.origin()}')
        return target

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Stream a blob's bytes from ``start`` on: yields the actual start offset, and the pieces.

        A registry without ranges starts at 0.  Raises: NotFound, PermissionDenied, RegistryError.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        path = f"{self.path}/blobs/{digest}"
        async with self.request(
            "GET", path, headers=headers, timeout=self.transfers.blob_timeout
        ) as response:
            await self._check(response)
            yield _offset(response, start), _pieces(response)

    def mistrust(self, _digest: str) -> bool:
        """Return False, because a registry is the only source of its blobs."""
        return False

    async def _check(self, response: "aiohttp.ClientResponse") -> None:
        """Raise the error of a failed response, in Docker's words."""
        if response.status in (200, 206):
            return
        code, cause = await refusal_of(response)
        name, familiar = self._reference.familiar_name, self._reference.familiar
        if code == "MANIFEST_UNKNOWN" or (response.status == 404 and "/manifests/" in response.url.path):
            raise Absent(f"manifest for {familiar} not found: {cause}", cause)
        if code == "NAME_UNKNOWN":
            raise Absent(f"repository {name} not found: {cause}", cause)
        if code == "DENIED" or response.status in (401, 403):
            reason = "repository does not exist or may require 'docker login'"
            raise Denied(f"pull access denied for {name}, {reason}: {cause}", cause)
        if code == "TOOMANYREQUESTS" or response.status == 429:
            # Do not wait for a mirror's limits, since the next endpoint has its own.
            raise SkepError(cause) if self._endpoint.mirror else RegistryError(cause, retry_after(response))
        if response.status >= 500:
            raise RegistryError(cause, retry_after(response))
        raise NotFound(cause)


async def at_endpoints(
    policy: RegistryPolicy,
    reference: Reference,
    credentials: RegistryCredentials,
    action: Callable[[RegistryRepository], Awaitable[T]],
    *,
    to_push: bool = False,
) -> T:
    """Return the result of ``action`` with the repository at the first endpoint that responds.

    After any failure at a mirror, the next endpoint is tried.

    Raises: The error of ``action`` at the last endpoint; RegistryError: that one does not respond.

    Source: moby, distribution/pull.go (pullEndpoints), distribution/errors.go (continueOnError).
    """
    endpoints = policy.endpoints(reference.domain, to_push=to_push)
    actions = "pull,push" if to_push else "pull"
    for endpoint in endpoints:
        async with session_for(endpoint) as session:
            repository = RegistryRepository(session, endpoint, reference, credentials, actions)
            responds = False
            try:
                await repository.ping()
                responds = True
                return await action(repository)
            except SkepError as error:
                goes_on = endpoint.mirror or (isinstance(error, RegistryError) and not responds)
                if not goes_on or endpoint is endpoints[-1]:
                    raise
                if endpoint.mirror:
                    log.info(
                        "image not fetched from a mirror",
                        image=reference.familiar,
                        mirror=endpoint.url,
                        reason=str(error),
                    )
    raise AssertionError("the last endpoint returns or raises")


async def login(policy: RegistryPolicy, domain: str, credentials: RegistryCredentials) -> str:
    """Check ``credentials`` at a registry.  Return the token to keep in place of the password, or an empty string.

    Raises: Unauthenticated, LoginFailed, RegistryError.
    """
    problem: RegistryError | None = None
    for endpoint in policy.endpoints(domain, to_push=True):
        async with session_for(endpoint) as session:
            connection = RegistryConnection(session, endpoint, credentials)
            try:
                await connection.login()
            except RegistryError as error:
                # The second endpoint of an insecure registry is without TLS, and is used if the first does not respond.
                problem = error
                continue
            return connection.identity_token
    assert problem is not None, "there is at least one endpoint"
    raise problem


def _basic(known: RegistryCredentials) -> str:
    """Return a basic ``Authorization``.  As in Go, a name with a colon is not refused."""
    return "Basic " + base64.b64encode(f"{known.username}:{known.password}".encode()).decode()


class _network_errors:  # noqa: N801 - reads as a verb phrase where it is used
    """Translates network failures into ``RegistryError``, with the words of Go's HTTP client."""

    def __init__(self, url: str, method: str = "GET") -> None:
        self._request = f'{method.capitalize()} "{url}"'

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, TimeoutError):
            raise RegistryError(f"{self._request}: net/http: request canceled (timeout)") from error
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            raise RegistryError(f"{self._request}: dial tcp: lookup {error.host}: no such host") from error
        if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, ssl.SSLError):
            code = error.os_error.errno
            reason = (os.strerror(code) if code and code > 0 else str(error.os_error)).lower()
            where = f"{error.host}:{error.port}"
            raise RegistryError(f"{self._request}: dial tcp {where}: connect: {reason}") from error
        if isinstance(error, aiohttp.ClientError | OSError):
            raise RegistryError(f"{self._request}: {error}") from error
        if isinstance(error, ValueError):  # an invalid header or URL; the text may contain part of a secret
            raise PermissionDenied(
                f"{self._request}: the credentials, or the registry's challenge, cannot be used"
            ) from None


def _offset(response: "aiohttp.ClientResponse", wanted: int) -> int:
    """Return the offset in the blob at which the response starts.  Raises: RegistryError: it is after ``wanted``."""
    if response.status != 206:
        return 0
    named = re.match(r"bytes (\d{1,19})-", response.headers.get("Content-Range", ""))
    offset = int(named[1]) if named else wanted
    if offset > wanted:
        raise RegistryError(
            f"received Content-Range starting at offset {offset} instead of requested {wanted}"
        )
    return offset


async def _pieces(response: "aiohttp.ClientResponse") -> AsyncIterator[bytes]:
    async for piece in response.content.iter_chunked(1 << 18):
        yield piece
