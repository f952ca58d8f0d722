"""Blobs on their way to a registry: mounted from another repository there, or sent, and resumed where a cut left them.

An upload is a place at the registry that its responses name (``Location``) and that may be at another host; the user's
credentials are not for that one.  What does not come to its end is cancelled, so that the registry keeps nothing of it.

Source: OCI distribution-spec (Pushing blobs); moby 20.10, distribution/push_v2.go; distribution 2.8,
registry/client/blob_writer.go.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
import structlog
from yarl import URL

from skep.aio.backoff import Backoff
from skep.engine.images.digest import Digest
from skep.engine.images.refusals import refusal_of, retry_after
from skep.engine.images.registry import (
    SHORT_TIMEOUT,
    RegistryError,
    Repository,
)
from skep.errors import InvalidArgument, SkepError

log = structlog.get_logger()

_ATTEMPTS = 5
_PIECE_BYTES = 1 << 20
_PROGRESS_S = 60.0
"""Longest time in which a registry takes no byte, or gives no response to the last one."""
_CANCEL_S = 5.0
_SENDING = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
"""A blob may take as long as it likes while bytes keep going; ``_PROGRESS_S`` says how long not."""
_COMMITTING = aiohttp.ClientTimeout(total=300.0, sock_connect=10.0)
"""A registry computes a large blob's digest, or moves the blob, before it responds."""


class Refused(SkepError):
    """The registry refuses what is pushed.  ``str(error)`` is its reason; another attempt does not help."""


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent: a file, or bytes.  ``mounts``: repositories of the registry that may have it, too."""

    digest: Digest
    size: int
    path: Path | None = None
    content: bytes = b""
    mounts: Sequence[str] = ()


async def has_blob(repository: Repository, digest: str, size: int) -> bool:
    """Whether the repository has the blob, in this size.  Raises: RegistryError, Refused."""
    place = f"{repository.path}/blobs/{digest}"
    async with repository.request("HEAD", place, timeout=SHORT_TIMEOUT) as response:
        if response.status == 404:
            return False
        await check(response)
        return response.headers.get("Content-Length", str(size)) == str(size)


async def send(
    repository: Repository,
    upload: Upload,
    report: Callable[[int], None] = lambda _: None,
    waiting: Callable[[float], None] = lambda _: None,
) -> str:
    """Have the repository take the blob.  Gives the repository that it was mounted from; empty: it was sent.

    Args:
        report: gets the number of bytes that were sent.
        waiting: gets the seconds until another attempt after a failure of the network.

    Raises:
        Refused: the registry does not take it.
        InvalidArgument: what it stored is something else.
        RegistryError: it could not be sent, several times.
    """
    backoff = Backoff(0.5)
    session = _Session(repository, upload, report)
    try:
        for attempt in range(_ATTEMPTS):
            try:
                return await session.advance(tries_mounts=attempt == 0)
            except RegistryError as error:
                if attempt == _ATTEMPTS - 1:
                    raise
                delay_s = max(backoff.next_delay_s(), error.retry_after_s)
            waiting(delay_s)
            await asyncio.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")
    except BaseException:
        await asyncio.shield(session.cancel())
        raise


class _Session:
    """One blob's upload, over several attempts."""

    def __init__(self, repository: Repository, upload: Upload, report: Callable[[int], None]) -> None:
        self._repository = repository
        self._upload = upload
        self._report = report
        self._place: URL | None = None
        """Where the upload goes on; None: it has to be started."""

    async def advance(self, *, tries_mounts: bool) -> str:
        """Begin the upload, or go on with it, to its end.  Raises: as ``send``, without further attempts."""
        start = await self._position() if self._place is not None else 0
        if self._place is None:
            mounted = await self._begin(self._upload.mounts if tries_mounts else ())
            if mounted:
                return mounted
        if start < self._upload.size:
            await self._send_from(start)
        await self._commit()
        return ""

    async def _begin(self, mounts: Sequence[str]) -> str:
        """Start the upload, unless the blob can be mounted; gives where that was from."""
        for source in mounts:
            await self.cancel()
            if await self._start(source):
                return source
        if self._place is None:
            await self._start("")
        return ""

    async def _start(self, source: str) -> bool:
        """Ask for an upload, with ``source`` for a mount; whether the blob was mounted, which needs no upload."""
        repository, also = self._repository, ""
        place = f"{repository.path}/blobs/uploads/"
        if source:
            place += "?" + urlencode({"mount": self._upload.digest, "from": source})
            also = f"repository:{source}:pull"
        async with repository.request(
            "POST", place, content=b"", timeout=SHORT_TIMEOUT, also=also
        ) as response:
            if source and (response.status == 201 or 400 <= response.status < 500):
                return response.status == 201
            await check(response)
            self._place = repository.location(response)
        return False

    async def _position(self) -> int:
        """How much of the blob the registry has; it forgets uploads: then 0, and a new one is started."""
        assert self._place is not None, "it is asked of an upload that was started"
        async with self._repository.request("GET", self._place, timeout=SHORT_TIMEOUT) as response:
            last = response.headers.get("Range", "").partition("-")[2]
            if response.status == 204 and last.isdecimal() and len(last) < 20:
                if response.headers.get("Location"):
                    self._place = self._repository.location(response)
                # An empty upload has the range 0-0, as one of one byte has.
                position = int(last) + 1 if int(last) else 0
                if position <= self._upload.size:
                    return position
        await self.cancel()
        return 0

    async def _send_from(self, start: int) -> None:
        assert self._place is not None, "it was started"
        size = self._upload.size
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size - start),
            "Content-Range": f"{start}-{size - 1}",
        }
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_PROGRESS_S) as deadline:

                async def pieces() -> AsyncIterator[bytes]:
                    async for piece, sent in _pieces(self._upload, start):
                        yield piece
                        deadline.reschedule(loop.time() + _PROGRESS_S)
                        self._report(sent)

                async with self._repository.request(
                    "PATCH", self._place, headers=headers, content=pieces, timeout=_SENDING
                ) as response:
                    await check(response)
                    self._place = self._repository.location(response)
        except TimeoutError as error:
            url = self._place.with_query(None)
            raise RegistryError(f'Patch "{url}": net/http: request canceled (timeout)') from error

    async def _commit(self) -> None:
        """Give the blob its name.  Raises: InvalidArgument: the registry says that it has another."""
        assert self._place is not None, "it was started"
        text = str(self._place)
        # As it is but for the digest: what signed it may have spelled it otherwise than we do.
        place = URL(
            f"{text}{'&' if '?' in text else '?'}digest={quote(self._upload.digest, safe='')}", encoded=True
        )
        async with self._repository.request("PUT", place, content=b"", timeout=_COMMITTING) as response:
            await check(response)
            require_digest(response, self._upload.digest)
        self._place = None

    async def cancel(self) -> None:
        """Have the registry forget the upload, if there is one; within some seconds, whether it does or not."""
        place, self._place = self._place, None
        if place is None:
            return
        try:
            async with (
                asyncio.timeout(_CANCEL_S),
                self._repository.request("DELETE", place, timeout=SHORT_TIMEOUT),
            ):
                pass
        except (SkepError, TimeoutError) as error:
            log.info("upload not cancelled", reason=str(error) or "timed out")


async def _pieces(upload: Upload, start: int) -> AsyncIterator[tuple[bytes, int]]:
    """Pieces of the content from ``start`` on, each with the number of bytes up to its end."""
    if upload.path is None:
        yield upload.content[start:], upload.size
        return
    with upload.path.open("rb") as file:
        sent = file.seek(start, os.SEEK_SET)
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            sent += len(piece)
            yield piece, sent


async def check(response: aiohttp.ClientResponse) -> None:
    """Raise the error of a response that refuses, in Docker's words.  Raises: RegistryError, Refused."""
    if response.status < 300:
        return
    _, cause = await refusal_of(response)
    if response.status >= 500:
        status = f"{response.status} {response.reason or ''}".strip()
        raise RegistryError(f"received unexpected HTTP status: {status}", retry_after(response))
    if response.status == 429:
        raise RegistryError(cause, retry_after(response))
    if response.status in (404, 416) and "/blobs/uploads/" in response.url.path:
        raise RegistryError(cause)  # the registry lost the upload, or counts otherwise: a new one may do
    raise Refused(cause)


def require_digest(response: aiohttp.ClientResponse, digest: str) -> None:
    """Refuse a registry that stored something else than ``digest``.  Raises: InvalidArgument."""
    stored = response.headers.get("Docker-Content-Digest", digest)
    if stored != digest:
        raise InvalidArgument(f"the registry stored {stored[:200]} in place of {digest}")
