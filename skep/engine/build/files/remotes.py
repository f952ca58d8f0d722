"""Files that ADD fetches from http(s) addresses and git repositories.

A source is first resolved to a digest of its content, from the server's response or the commit.  It is fetched only if
the step is not in the cache.

Source: buildkit, source/http/source.go, frontend/dockerfile/dfgitutil/git_ref.go; moby 20.10, builder/remotecontext.
"""

import asyncio
import hashlib
import os
import posixpath
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

import aiohttp
import msgspec
from yarl import URL

from skep.aio.failures import describe_error
from skep.engine.build.addresses import ambiguity, check_address, parts_of, redacted, redacted_address
from skep.engine.build.files.sources import CopySource
from skep.engine.build.interface import Provider
from skep.engine.images.registry.endpoints import client_context, proxy_for
from skep.errors import InvalidArgument, ResourceExhausted, Unavailable

_HTTP = re.compile(r"https?://")
_GIT_ADDRESS = re.compile(r"(?:git|ssh)://|[a-zA-Z0-9_.-]+@[^/:\s]+:")
_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")
_REDIRECTS = (301, 302, 303, 307, 308)
"""Responses that Go's HTTP client follows, as in BuildKit."""
_REDIRECTS_MAX = 10
"""Same limit as in Go."""
_TIMEOUT = aiohttp.ClientTimeout(total=3600, sock_connect=30, sock_read=60)
"""In an hour, the largest context that a node accepts arrives at 36 MB/s."""
_PIECE_BYTES = 1 << 20
"""Bytes written in one call of a thread, so that its cost does not count."""
_KNOWN_MAX = 256
"""Addresses whose ETag is remembered.  The least recently used one is downloaded again."""
_UNNAMED = "__unnamed__"


class Remote(Protocol):
    """Source that is not yet on this node."""

    async def resolve(self) -> str:
        """Return a digest of the source's content and name.  Raises: SkepError."""

    async def fetch(self) -> CopySource:
        """Return the source as files.  Raises: SkepError: it cannot be fetched, or differs from the resolved one."""


def repository_address(address: str) -> str:
    """Return the address of a context that is a repository, with its scheme.  Empty if it is not a repository."""
    if address.startswith("github.com/"):
        return f"https://{address}"
    return address if is_git(address) else ""


def is_git(source: str) -> bool:
    """Return whether a source is a git repository: a git or ssh address, or a web address that ends with ``.git``."""
    if _HTTP.match(source):
        return re.split(r"[?#]", source, maxsplit=1)[0].endswith(".git")
    return _GIT_ADDRESS.match(source) is not None


def is_remote(source: str) -> bool:
    """Return whether ADD fetches a source."""
    return _HTTP.match(source) is not None or is_git(source)


class Answer(msgspec.Struct, frozen=True):
    """A server's response for an address: the entity tag and the digest of the content."""

    etag: str
    digest: str


class KnownAnswers:
    """Responses of servers in the latest builds, so that unchanged files are not fetched again.  In memory only."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}

    def of(self, url: str) -> Answer | None:
        """Return the last response for an address."""
        return self._answers.get(url)

    def note(self, url: str, answer: Answer) -> None:
        """Remember a response, and drop the oldest if there are too many."""
        self._answers.pop(url, None)
        self._answers[url] = answer
        while len(self._answers) > _KNOWN_MAX:
            del self._answers[next(iter(self._answers))]


class Download(Remote):
    """File at an http(s) address."""

    def __init__(
        self,
        url: str,
        checksum: str,
        directory: Path,
        bytes_max: int,
        known: KnownAnswers,
        provider: Provider | None,
    ) -> None:
        """Args:
            checksum: Value of ``--checksum``.  Empty without one.
            directory: An empty directory for the file.

        Raises: InvalidArgument: the checksum or the address is not valid.
        """
        found = _SHA256.fullmatch(checksum)
        if checksum and found is None:
            is_sha256 = checksum.startswith("sha256:")
            raise InvalidArgument(
                "invalid checksum digest length" if is_sha256 else "unsupported digest algorithm"
            )
        check_address(url)
        self._expected = found[1] if found else ""
        self._url = url
        self._directory = directory
        self._bytes_max = bytes_max
        self._known = known
        self._provider = provider
        self._digest = self._expected
        self._is_here = False
        try:
            name = posixpath.basename(unquote(URL(url).raw_path).rstrip("/"))
        except ValueError as error:
            reason = "" if parts_of(url).userinfo else f": {error}"  # a reason may name the user and password
            raise InvalidArgument(f"invalid URL {self._shown}{reason}") from error
        self._name = _UNNAMED if name in ("", ".", "..") or "\0" in name else name

    async def resolve(self) -> str:
        """Return a digest of the file's content and name.  Raises: Unavailable, InvalidArgument, ResourceExhausted."""
        if not self._digest:
            await self._download(self._known.of(self._url))
        named = hashlib.sha256(f"{self._name}\0{self._digest}".encode("utf-8", "surrogateescape"))
        return f"file:{named.hexdigest()}"

    async def fetch(self) -> CopySource:
        """Return the file.  Raises: Unavailable, InvalidArgument, ResourceExhausted."""
        if not self._is_here:
            await self._download(None)
        return CopySource(self._directory, self._name, self._name, False, await self.resolve())

    async def _download(self, known: Answer | None) -> None:
        """Fetch the file, unless the server says that it has not changed since ``known``."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "skep"}
        if known is not None:
            headers["If-None-Match"] = known.etag
        try:
            async with self._response(headers) as response:
                if known is not None and response.status == 304:
                    self._digest = known.digest
                    return
                if not 200 <= response.status < 300:
                    raise InvalidArgument(
                        f"failed to load {self._shown}: invalid response status {response.status}"
                    )
                digest = await self._keep(response)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            reason = ambiguity(self._url) or redacted(describe_error(error))
            raise Unavailable(f"failed to load {self._shown}: {reason}") from error
        if digest != (self._digest or digest):
            raise InvalidArgument(
                f"digest mismatch for {self._shown}: sha256:{digest} (expected: sha256:{self._digest})"
            )
        self._digest, self._is_here = digest, True
        if etag := response.headers.get("ETag"):
            self._known.note(self._url, Answer(etag, digest))

    @asynccontextmanager
    async def _response(self, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield the response after all redirects.

        Credentials are sent to the first origin (scheme, host and port) only.
        """
        target = URL(self._url)
        first = target.origin()
        credentials = await self._credentials(target.host or "")
        connector = aiohttp.TCPConnector(ssl=client_context(), limit=4)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, timeout=_TIMEOUT
        ) as session:
            for _ in range(_REDIRECTS_MAX + 1):
                sent = {**headers, **(credentials if target.origin() == first else {})}
                async with session.get(
                    target, headers=sent, allow_redirects=False, proxy=proxy_for(target)
                ) as response:
                    location = response.headers.get("Location", "")
                    if response.status not in _REDIRECTS or not location:
                        yield response
                        return
                target = target.join(URL(location))
                if target.scheme not in ("http", "https"):
                    raise InvalidArgument(
                        f"failed to load {self._shown}: unsupported protocol scheme in a redirect"
                    )
        raise InvalidArgument(f"failed to load {self._shown}: stopped after {_REDIRECTS_MAX} redirects")

    async def _credentials(self, host: str) -> dict[str, str]:
        """Return the header of the secret HTTP_AUTH_HEADER_<host> or HTTP_AUTH_TOKEN_<host>, if the client has one."""
        for name, prefix in (("HTTP_AUTH_TOKEN_", "Bearer "), ("HTTP_AUTH_HEADER_", "")):
            value = await self._provider.secret(name + host) if self._provider is not None else None
            if value is not None:
                return {"Authorization": prefix + value.decode("latin-1").strip()}
        return {}

    async def _keep(self, response: aiohttp.ClientResponse) -> str:
        """Write the content to the file and return its SHA-256.  Raises: ResourceExhausted."""
        target, hashed, size = self._directory / self._name, hashlib.sha256(), 0
        with target.open("wb") as file:
            async for piece in response.content.iter_chunked(_PIECE_BYTES):
                size += len(piece)
                if size > self._bytes_max:
                    raise ResourceExhausted(f"{self._shown} has more than {self._bytes_max} bytes")
                await asyncio.to_thread(_write, file.fileno(), piece, hashed)
        target.chmod(0o600)
        _set_time(target, response.headers.get("Last-Modified", ""))
        return hashed.hexdigest()

    @property
    def _shown(self) -> str:
        """Address without user and password."""
        return redacted_address(self._url)


def _write(descriptor: int, piece: bytes, hashed: "hashlib._Hash") -> None:
    hashed.update(piece)
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def _set_time(path: Path, text: str) -> None:
    """Set a file's time to the server's, or to 1970 without one."""
    try:
        at = int(parsedate_to_datetime(text).timestamp()) if text else 0
        os.utime(path, (at, at))
    except (ValueError, OverflowError, OSError):
        os.utime(path, (0, 0))
