"""Uploads blobs to a registry.  A blob is mounted from another repository if possible.  Broken uploads are resumed.

The registry's responses name the URL of an upload (``Location``), which may be at another host.  The user's credentials
are not sent to that host.  An upload that is not completed is cancelled, so that the registry deletes its data.

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
from skep.aio.race import unless_done
from skep.engine.images.digest import Digest
from skep.engine.images.registry.refusals import refusal_of, retry_after
from skep.engine.images.registry.registry import (
    RegistryError,
    RegistryRepository,
)
from skep.errors import InvalidArgument, SkepError

log = structlog.get_logger()

_PIECE_BYTES = 1 << 20
"""Number of bytes that are sent at a time."""
_CANCEL_S = 5.0
"""Time limit in seconds for cancelling a failed upload.

Short, because registries also delete old uploads themselves.
"""
_CONNECT_S = 10.0
"""Time limit in seconds for a connection, as of other requests to registries."""


class ContentRefused(SkepError):
    """The registry refuses the content.  ``str(error)`` is its reason.  A retry does not help."""


class BlobUpload(msgspec.Struct, frozen=True, kw_only=True):
    """Content to send, a file or bytes.  ``mounts`` has other repositories of the registry that may have it."""

    digest: Digest
    size: int
    path: Path | None = None
    content: bytes = b""
    mounts: Sequence[str] = ()


async def has_blob(repository: RegistryRepository, digest: str, size: int) -> bool:
    """Return whether the repository has the blob, with this size.  Raises: RegistryError, ContentRefused."""
    place = f"{repository.path}/blobs/{digest}"
    async with repository.request("HEAD", place, timeout=repository.transfers.response_timeout) as response:
        if response.status == 404:
            return False
        await check(response)
        return response.headers.get("Content-Length", str(size)) == str(size)


async def send(
    repository: RegistryRepository,
    upload: BlobUpload,
    report: Callable[[int], None] = lambda _: None,
    waiting: Callable[[float], None] = lambda _: None,
) -> str:
    """Send a blob to the repository.

    Return the repository that it was mounted from, or an empty string if it was sent.

    Args:
        report: Called with the number of bytes sent.
        waiting: Called with the seconds until the next attempt after a network failure.

    Raises:
        ContentRefused: the registry does not accept it.
        InvalidArgument: the registry stored something else.
        RegistryError: several attempts failed.
    """
    transfers = repository.transfers
    backoff = Backoff(transfers.backoff_s)
    session = _Session(repository, upload, report)
    async with unless_done(session.cancel):
        for attempt in range(transfers.attempts):
            try:
                return await session.advance(tries_mounts=attempt == 0)
            except RegistryError as error:
                if attempt == transfers.attempts - 1:
                    raise
                delay_s = max(backoff.next_delay_s(), error.retry_after_s)
            waiting(delay_s)
            await asyncio.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")


class _Session:
    """One blob's upload, over several attempts."""

    def __init__(
        self, repository: RegistryRepository, upload: BlobUpload, report: Callable[[int], None]
    ) -> None:
        self._repository = repository
        self._upload = upload
        self._report = report
        self._place: URL | None = None
        """URL at which the upload continues.  None if it has to be started."""

    async def advance(self, *, tries_mounts: bool) -> str:
        """Start or resume the upload, and complete it.  Raises: as ``send``, without further attempts."""
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
        """Start the upload unless the blob can be mounted.  Return the repository that it was mounted from."""
        for source in mounts:
            await self.cancel()
            if await self._start(source):
                return source
        if self._place is None:
            await self._start("")
        return ""

    async def _start(self, source: str) -> bool:
        """Request an upload, or a mount from ``source``.  Return whether the blob was mounted."""
        repository, also = self._repository, ""
        place = f"{repository.path}/blobs/uploads/"
        if source:
            place += "?" + urlencode({"mount": self._upload.digest, "from": source})
            also = f"repository:{source}:pull"
        async with repository.request(
            "POST", place, content=b"", timeout=repository.transfers.response_timeout, also=also
        ) as response:
            if source and (response.status == 201 or 400 <= response.status < 500):
                return response.status == 201
            await check(response)
            self._place = repository.location(response)
        return False

    async def _position(self) -> int:
        """Return how many bytes of the blob the registry has.

        If it has lost the upload, return 0 to start a new one.
        """
        assert self._place is not None, "the upload was started"
        async with self._repository.request(
            "GET", self._place, timeout=self._repository.transfers.response_timeout
        ) as response:
            last = response.headers.get("Range", "").partition("-")[2]
            if response.status == 204 and last.isdecimal() and len(last) < 20:
                if response.headers.get("Location"):
                    self._place = self._repository.location(response)
                # The range 0-0 stands for an empty upload, and also for one byte.
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
        loop, stalled_s = asyncio.get_running_loop(), self._repository.transfers.stalled_s
        sending = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_S
        )  # it may take long while bytes flow
        try:
            async with asyncio.timeout(stalled_s) as deadline:

                async def pieces() -> AsyncIterator[bytes]:
                    async for piece, sent in _pieces(self._upload, start):
                        yield piece
                        deadline.reschedule(loop.time() + stalled_s)
                        self._report(sent)

                async with self._repository.request(
                    "PATCH", self._place, headers=headers, content=pieces, timeout=sending
                ) as response:
                    await check(response)
                    self._place = self._repository.location(response)
        except TimeoutError as error:
            url = self._place.with_query(None)
            raise RegistryError(f'Patch "{url}": net/http: request canceled (timeout)') from error

    async def _commit(self) -> None:
        """Complete the upload under the blob's digest.  Raises: InvalidArgument: the registry computed another one."""
        assert self._place is not None, "it was started"
        text = str(self._place)
        # Append the digest and keep the rest unchanged, because a signature in it may cover characters that we would
        # encode differently.
        place = URL(
            f"{text}{'&' if '?' in text else '?'}digest={quote(self._upload.digest, safe='')}", encoded=True
        )
        async with self._repository.request(
            "PUT", place, content=b"", timeout=self._repository.transfers.commit_timeout
        ) as response:
            await check(response)
            require_digest(response, self._upload.digest)
        self._place = None

    async def cancel(self) -> None:
        """Ask the registry to delete the upload, if there is one.  Gives up after some seconds."""
        place, self._place = self._place, None
        if place is None:
            return
        try:
            async with (
                asyncio.timeout(_CANCEL_S),
                self._repository.request(
                    "DELETE", place, timeout=self._repository.transfers.response_timeout
                ),
            ):
                pass
        except (SkepError, TimeoutError) as error:
            log.info("upload not cancelled", reason=str(error) or "timed out")


async def _pieces(upload: BlobUpload, start: int) -> AsyncIterator[tuple[bytes, int]]:
    """Yield pieces of the content from ``start`` on, each with the number of bytes up to its end."""
    if upload.path is None:
        yield upload.content[start:], upload.size
        return
    with upload.path.open("rb") as file:
        sent = file.seek(start, os.SEEK_SET)
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            sent += len(piece)
            yield piece, sent


async def check(response: "aiohttp.ClientResponse") -> None:
    """Raise the error of a failed response, in Docker's words.  Raises: RegistryError, ContentRefused."""
    if response.status < 300:
        return
    _, cause = await refusal_of(response)
    if response.status >= 500:
        status = f"{response.status} {response.reason or ''}".strip()
        raise RegistryError(f"received unexpected HTTP status: {status}", retry_after(response))
    if response.status == 429:
        raise RegistryError(cause, retry_after(response))
    if response.status in (404, 416) and "/blobs/uploads/" in response.url.path:
        # The registry lost the upload, or has another position.  A new upload may succeed.
        raise RegistryError(cause)
    raise ContentRefused(cause)


def require_digest(response: "aiohttp.ClientResponse", digest: str) -> None:
    """Check the stored digest.  Raises: InvalidArgument: the registry stored something else."""
    stored = response.headers.get("Docker-Content-Digest", digest)
    if stored != digest:
        raise InvalidArgument(f"the registry stored {stored[:200]} instead of {digest}")
