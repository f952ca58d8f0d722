"""A client of the distribution protocol: manifests and blobs of one repository.

A registry that requires authentication responds with 401 and a challenge at first; the response to that, a
token or a password, is kept for the following requests.  It is for the registry alone: redirects, mostly of
blobs to another party's store, are followed without it, and a challenge on the other side of one is not answered.
Credentials that were given for another registry are not used at all.  A challenge may name a token server at another
host, as Docker Hub's does; a host for which verified TLS is required gets no credentials without it.
TLS is verified except for registries configured as insecure and those on loopback, and only these are reached without
TLS; no redirect leads out of it.

Source: OCI distribution-spec; moby 20.10, registry/{config,endpoint_v1,service_v2,auth}.go, distribution/errors.go;
CVE-2020-15157 (containerd), for what a redirect must not get.
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
from skep.engine.images.endpoints import Endpoint, Policy, client_context, proxy_for, session_for
from skep.engine.images.reference import Reference
from skep.engine.images.refusals import NOT_JSON, read_bounded, refusal_of, retry_after, status_text
from skep.errors import InvalidArgument, NotFound, PermissionDenied, SkepError, Unauthenticated
from skep.model.registry_auth import decoded_auth, registry_at

T = TypeVar("T")

log = structlog.get_logger(__name__)

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

_ACCEPT = ", ".join((DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX))
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_WITH_BODY = frozenset({307, 308})
"""Those that mean the same method and content at another place; after the others Go would ask there with GET."""
_REDIRECTS_MAX = 10
"""As in Go."""
_TOKEN_BYTES_MAX = 1 << 20
_TAG_PAGES_MAX = 1000
BLOB_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=60.0)
"""A blob may take as long as it likes while bytes keep coming."""
SHORT_TIMEOUT = aiohttp.ClientTimeout(total=30.0, sock_connect=10.0)
"""Of requests whose response is small."""

Content = Callable[[], AsyncIterator[bytes]]
"""What a request sends, in pieces; called again for each attempt."""


class RegistryError(SkepError):
    """The registry could not be reached, or answered what it should not.  Worth another attempt.

    ``retry_after_s``: the shortest wait before that, where the registry says one.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoCredentials(SkepError):
    """The registry requires a name and a password, and there are none.  ``cause``: Docker's words for that alone."""

    def __init__(self, request: str) -> None:
        self.cause = "no basic auth credentials"
        super().__init__(f"{request}: {self.cause}")


class LoginFailed(SkepError):
    """The registry refuses a name and password."""


class Absent(NotFound):
    """The registry has no such image.  ``cause``: its message alone."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Denied(Absent):
    """The same text, also for an image that exists for other users: the registry does not distinguish the two."""


class Credentials(msgspec.Struct, frozen=True, rename=lambda name: name.replace("_", "")):
    """What the client sent in ``X-Registry-Auth``.  Never stored, never logged."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""
    server_address: str = ""
    """Address of the registry that they are for. Empty: the client gave them with the image's name."""

    def for_registry(self, domain: str) -> "Credentials":
        """Return these credentials if they may be sent to the registry ``domain``, else none."""
        if not self.server_address or registry_at(self.server_address) == registry_at(domain):
            return self
        return Credentials()

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r})"

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.username or self.identity_token or self.registry_token)


class _Tags(msgspec.Struct, frozen=True):
    tags: tuple[str, ...] | None = None


class Document(msgspec.Struct, frozen=True):
    """A manifest or index as the registry sent it.

    ``is_of_registry``: false for one that a node of the cluster made of an image of which it has none from a registry.
    ``is_own``: nor did the image come from the registry of the requested name: it was built, loaded or tagged there.
    """

    content: bytes
    media_type: str
    is_of_registry: bool = True
    is_own: bool = False

    @property
    def digest(self) -> Digest:
        """The digest of its bytes, by which a registry addresses it."""
        return digest_of(self.content)


def decode_credentials(header: str) -> Credentials:
    """The credentials in ``X-Registry-Auth``.  What cannot be read means none, as in Docker."""
    try:
        return msgspec.convert(decoded_auth(header), Credentials)
    except (ValueError, RecursionError):
        return Credentials()


class Connection:
    """Requests to one registry with one user's credentials, as long as its session."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        credentials: Credentials,
        scopes: Sequence[str] = (),
    ) -> None:
        """``scopes``: of tokens (``repository:name:actions``); none: a token shows the user's identity only."""
        self._session = session
        self._endpoint = endpoint
        self._credentials = Credentials() if endpoint.mirror else credentials
        self._scopes = scopes
        self._authorization = ""
        if self._credentials.registry_token:
            self._authorization = f"Bearer {self._credentials.registry_token}"
        self.identity_token = ""
        """What the registry's token server gave in place of the password; empty: nothing."""

    async def ping(self) -> None:
        """Check that a registry responds there, and log in if it requires that.

        Raises: RegistryError; PermissionDenied: it refuses the credentials.
        """
        try:
            async with self.request("GET", "/v2/", timeout=SHORT_TIMEOUT) as response:
                if response.status not in (200, 401, 404, 429):
                    # Below 500 it responds, but not to these credentials.
                    kind = PermissionDenied if self._credentials and response.status < 500 else RegistryError
                    raise kind(f"{response.url}: unexpected status {response.status}")
        except NoCredentials:
            pass  # it responds; what is asked of it next may need none

    async def login(self) -> None:
        """Check the credentials.

        Raises:
            Unauthenticated: the registry's token server refuses them; LoginFailed: the registry does.
            NoCredentials, RegistryError.

        Source: moby 20.10, registry/auth.go (loginV2).
        """
        url = f"{self._endpoint.url}/v2/"
        try:
            async with self.request("GET", "/v2/", timeout=SHORT_TIMEOUT) as response:
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
        timeout: aiohttp.ClientTimeout,
        also: str = "",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response of the registry at ``place`` (a path, or where it said), redirects followed, logged in.

        Args:
            also: a further scope that the token has to have.

        Raises:
            RegistryError: no response; a redirect leads out of TLS, or nowhere.
            PermissionDenied: the token server refuses the credentials.
            NoCredentials: a password is wanted, and there is none.
        """
        target = URL(self._endpoint.url + place) if isinstance(place, str) else place
        scopes = (*self._scopes, also) if also else self._scopes
        with _network_errors(str(target), method):
            for attempt in (1, 2):
                async with self._followed(method, target, headers or {}, content, timeout) as response:
                    if response.status == 401 and attempt == 1 and self._is_own(response.url):
                        challenge = response.headers.get("WWW-Authenticate", "")
                        self._authorization = await self._answer(challenge, scopes)
                        if self._authorization:
                            continue
                        if challenge.lower().startswith("basic"):
                            raise NoCredentials(f'{method.capitalize()} "{response.url}"')
                    yield response
                    return

    def location(self, response: aiohttp.ClientResponse) -> URL:
        """Where ``response`` says to go on.  Raises: RegistryError: nowhere, or out of TLS."""
        location = response.headers.get("Location", "")
        if not location:
            raise RegistryError(f"{response.url.with_query(None)}: the registry gives no Location")
        return self._redirected(response.url, location)

    @asynccontextmanager
    async def _followed(
        self,
        method: str,
        target: URL,
        headers: Mapping[str, str],
        content: Content | bytes | None,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response of ``target``, redirects followed.  Raises: RegistryError: one leads out of TLS, or nowhere."""
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
            target = self._redirected(target, location)
        raise RegistryError(f'{method.capitalize()} "{url}": stopped after {_REDIRECTS_MAX} redirects')

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

    async def _answer(self, challenge: str, scopes: Sequence[str]) -> str:
        """The ``Authorization`` that a challenge requires; empty without credentials."""
        scheme, _, rest = challenge.partition(" ")
        # From where a word begins: from within a long one the search would take its square.
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
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Asks the token server at ``realm``; without redirects, which would get the password, too."""
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
                realm, data=form, timeout=SHORT_TIMEOUT, allow_redirects=False, proxy=proxy, ssl=tls
            )
        fields += [("scope", scope) for scope in scopes]
        headers = {}
        if known.username:
            fields.append(("account", known.username))
            headers["Authorization"] = _basic(known)
            if not scopes:  # a login: the token that stands for the password is what the client keeps
                fields += [("offline_token", "true"), ("client_id", "docker")]
        return self._session.get(
            realm,
            params=fields,
            headers=headers,
            timeout=SHORT_TIMEOUT,
            allow_redirects=False,
            proxy=proxy,
            ssl=tls,
        )


class Repository(Connection):
    """One repository at one registry.  ``actions``: what is done there, ``pull`` or ``pull,push``."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        reference: Reference,
        credentials: Credentials,
        actions: str = "pull",
    ) -> None:
        credentials = credentials.for_registry(reference.domain)
        super().__init__(session, endpoint, credentials, (f"repository:{reference.path}:{actions}",))
        self._reference = reference

    @property
    def path(self) -> str:
        """Where its manifests and blobs are at the registry."""
        return f"/v2/{self._reference.path}"

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """The manifest or index that ``target`` (a tag or a digest) names.

        Raises:
            NotFound, PermissionDenied: with Docker's texts.
            InvalidArgument: its digest is not the requested one, or it is too large.
            RegistryError.
        """
        path, headers = f"{self.path}/manifests/{target}", {"Accept": _ACCEPT}
        try:
            async with self.request("GET", path, headers=headers, timeout=SHORT_TIMEOUT) as response:
                await self._check(response)
                content = await read_bounded(response, bytes_max)
                media_type = response.content_type
        except RegistryError as error:
            if self._endpoint.mirror:  # as in Docker, the next endpoint is the second attempt
                raise SkepError(str(error)) from error
            raise
        if ":" in target and digest_of(content) != target:
            raise InvalidArgument(f"manifest verification failed for digest {target}")
        return Document(content, media_type)

    async def tags(self, bytes_max: int) -> Sequence[str]:
        """The repository's tags, of all pages of the list.

        Args:
            bytes_max: of all pages together.

        Raises:
            NotFound, PermissionDenied: with Docker's texts.
            InvalidArgument: the list is larger, or has too many pages.
            RegistryError: a page cannot be read; the next one is elsewhere, or an earlier one.

        Source: distribution 2.8, registry/client/repository.go (tags.All).
        """
        found: list[str] = []
        pages: set[URL] = set()
        page: URL | None = URL(f"{self._endpoint.url}{self.path}/tags/list")
        while page is not None:
            if page in pages:
                raise RegistryError(f'Get "{page}": the list of tags goes on with a page that it has had')
            if len(pages) == _TAG_PAGES_MAX:
                raise InvalidArgument(f'Get "{page}": the list of tags has more than {_TAG_PAGES_MAX} pages')
            pages.add(page)
            async with self.request("GET", page, timeout=SHORT_TIMEOUT) as response:
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
        """What follows ``page`` by its ``Link`` headers.  Raises: RegistryError: it is at another host."""
        named = re.search(r'<([^<>]*)>[^<,]*\brel="?next\b', links, re.IGNORECASE)
        if named is None:
            return None
        target = self._redirected(page, named[1])
        if not self._is_own(target):
            raise RegistryError(f'Get "{page}": refused a next page at {target.origin()}')
        return target

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """A blob's bytes from ``start`` on: the offset they really begin at, and the pieces.

        A registry without ranges begins at 0.  Raises: NotFound, PermissionDenied, RegistryError.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        path = f"{self.path}/blobs/{digest}"
        async with self.request("GET", path, headers=headers, timeout=BLOB_TIMEOUT) as response:
            await self._check(response)
            yield _offset(response, start), _pieces(response)

    def mistrust(self, _digest: str) -> bool:
        """There is no other source of a blob that was not what its digest names."""
        return False

    async def _check(self, response: aiohttp.ClientResponse) -> None:
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
            # The next endpoint has limits of its own: a mirror's are not waited for.
            raise SkepError(cause) if self._endpoint.mirror else RegistryError(cause, retry_after(response))
        if response.status >= 500:
            raise RegistryError(cause, retry_after(response))
        raise NotFound(cause)


async def at_endpoints(
    policy: Policy,
    reference: Reference,
    credentials: Credentials,
    action: Callable[[Repository], Awaitable[T]],
    *,
    to_push: bool = False,
) -> T:
    """``action``'s result with the repository of ``reference`` at the first endpoint that responds.

    Whatever fails at a mirror is done again at the next endpoint.

    Raises: what ``action`` raised at the last endpoint; RegistryError: that one does not respond.

    Source: moby, distribution/pull.go (pullEndpoints), distribution/errors.go (continueOnError).
    """
    endpoints = policy.endpoints(reference.domain, to_push=to_push)
    actions = "pull,push" if to_push else "pull"
    for endpoint in endpoints:
        async with session_for(endpoint) as session:
            repository = Repository(session, endpoint, reference, credentials, actions)
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
    raise AssertionError("the last endpoint gives a result or an error")


async def login(policy: Policy, domain: str, credentials: Credentials) -> str:
    """Check ``credentials`` at the registry ``domain``; gives the token to keep in place of the password, or nothing.

    Raises: Unauthenticated, LoginFailed, RegistryError.
    """
    problem: RegistryError | None = None
    for endpoint in policy.endpoints(domain, to_push=True):
        async with session_for(endpoint) as session:
            connection = Connection(session, endpoint, credentials)
            try:
                await connection.login()
            except RegistryError as error:
                # The second endpoint of an insecure registry is without TLS: it counts if the first is none.
                problem = error
                continue
            return connection.identity_token
    assert problem is not None, "there is at least one endpoint"
    raise problem


def _basic(known: Credentials) -> str:
    """As Go: a name may have a colon."""
    return "Basic " + base64.b64encode(f"{known.username}:{known.password}".encode()).decode()


class _network_errors:  # noqa: N801 - reads as a verb phrase where it is used
    """Translate failures of the network into ``RegistryError``, worded as Go's HTTP client words them."""

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
        if isinstance(error, ValueError):  # of a header or a URL; its text may have a part of a secret
            raise PermissionDenied(
                f"{self._request}: the credentials, or the registry's challenge, cannot be used"
            ) from None


def _offset(response: aiohttp.ClientResponse, wanted: int) -> int:
    """Where in a blob the response begins.  Raises: RegistryError: after the ``wanted`` offset."""
    if response.status != 206:
        return 0
    named = re.match(r"bytes (\d{1,19})-", response.headers.get("Content-Range", ""))
    offset = int(named[1]) if named else wanted
    if offset > wanted:
        raise RegistryError(
            f"received Content-Range starting at offset {offset} instead of requested {wanted}"
        )
    return offset


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for piece in response.content.iter_chunked(1 << 18):
        yield piece
