"""When a task's image is fetched, and what happens when that fails.

As in Docker every task asks its registry, so that a tag that moved is noticed, and runs the local image if
the registry does not answer.  Tasks that come together share a fetch, and a registry that failed is not
asked again for a while as long as there is a local image: starting must not wait for a time-out again and
again.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.node.executor.interface import Rejected
from skep.node.oci.images.image import Image

log = structlog.get_logger()

RETRY_AFTER_S = 30.0


class Images(Protocol):
    """The node's images, as far as tasks need them (``node/oci/images/store.py``)."""

    def resolve(self, word: str) -> Image | None: ...

    def layers(self, image: Image) -> Sequence[Path]: ...

    def pinned(self, chain: Sequence[str]) -> AbstractAsyncContextManager[None]:
        """Keep the layers of ``chain`` for the block."""

    async def pull(self, word: str, auth: str = "") -> Image: ...


class Pulling:
    """Fetches images for tasks."""

    def __init__(self, images: Images, clock: Clock) -> None:
        self._images = images
        self._clock = clock
        self._locks: dict[str, asyncio.Lock] = {}
        self._started_at: dict[str, float] = {}
        self._failed_at: dict[str, float] = {}

    async def image(self, reference: str, auth: str) -> Image:
        """The image to run.  Raises: Rejected: ``No such image: x``, neither here nor to be had."""
        try:
            local = self._images.resolve(reference)
            if local is not None and self._needs_no_registry(reference, local):
                return local
            await self._pull(reference, auth)
        except SkepError as error:
            log.info("image not pulled", image=reference, reason=str(error))
            return self._local(reference, error)
        return self._local(reference, None)

    def _needs_no_registry(self, reference: str, local: Image) -> bool:
        """Named by content, or its registry failed a moment ago."""
        if "@sha256:" in reference or local.id.removeprefix("sha256:").startswith(
            reference.removeprefix("sha256:")
        ):
            return True
        failed_at = self._failed_at.get(_registry_of(reference))
        return failed_at is not None and self._clock.monotonic() - failed_at < RETRY_AFTER_S

    async def _pull(self, reference: str, auth: str) -> None:
        """Fetch, or share a fetch that began after this call."""
        asked_at = self._clock.monotonic()
        key = f"{reference} {auth}"
        async with self._locks.setdefault(key, asyncio.Lock()):
            started_at = self._started_at.get(key)
            if started_at is not None and started_at >= asked_at:
                return
            local = self._images.resolve(reference)
            if local is not None and self._needs_no_registry(reference, local):
                return
            started_at = self._clock.monotonic()
            try:
                await self._images.pull(reference, auth)
            except Unavailable:
                self._failed_at[_registry_of(reference)] = self._clock.monotonic()
                raise
            self._failed_at.pop(_registry_of(reference), None)
            self._started_at[key] = started_at

    def _local(self, reference: str, error: SkepError | None) -> Image:
        try:
            image = self._images.resolve(reference)
        except SkepError as invalid:
            raise Rejected(str(invalid)) from invalid
        if image is None:
            raise Rejected(f"No such image: {reference}") from error
        return image


def _registry_of(reference: str) -> str:
    """The host part of a reference; empty for the default registry."""
    first, separator, _ = reference.partition("/")
    is_host = separator and ("." in first or ":" in first or first == "localhost")
    return first if is_host else ""
