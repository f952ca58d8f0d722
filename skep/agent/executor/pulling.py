"""Rules for fetching a task's image, and for failed fetches.

As in Docker, every task contacts its registry, so that a moved tag is noticed, and uses the local image if the registry
does not respond.  Concurrent tasks share a fetch and its failure.  A registry that failed is not contacted again for a
while if there is a local image, so that starts do not wait for a timeout repeatedly.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import structlog

from skep.agent.executor.interface import Rejected
from skep.aio.clock import Clock
from skep.engine.images.image import Image
from skep.engine.images.store import ImageStore
from skep.errors import SkepError, Unavailable
from skep.model.values.images import registry_of

log = structlog.get_logger()

RETRY_AFTER_S = 30.0
"""Seconds for which a failed registry is not contacted again if there is a local image."""


Bring: TypeAlias = Callable[[str], Awaitable[None]]


async def nothing_beside(_word: str) -> None:
    """Do nothing.  The default for ``bring``, on a machine without another image store."""


class ImagePuller:
    """Fetches images for tasks.

    Args:
        bring: Called with each image name before the registry is contacted.  Copies the image from another store of
            this machine (such as Docker's) if it is newer there.
    """

    def __init__(self, images: ImageStore, clock: Clock, bring: Bring = nothing_beside) -> None:
        self._images = images
        self._clock = clock
        self._bring = bring
        self._fetches: dict[tuple[str, str, bool], asyncio.Future[Image | SkepError | None]] = {}
        self._failed_at: dict[str, float] = {}

    async def image(self, reference: str, auth: str, *, uses_helper: bool = False) -> Image:
        """Return the image to run.  ``uses_helper`` allows the node's own credentials for it.

        Raises:
            Rejected: ``No such image: x: ...``.  The image is not local, and the registry refused it for the reason in
                the message.
        """
        try:
            await self._bring(reference)
            local = self._images.resolve(reference)
            if local is not None and self._needs_no_registry(reference, local):
                return local
            await self._pull(reference, auth, uses_helper)
        except SkepError as error:
            log.info("image not pulled", image=reference, reason=str(error))
            return self._local(reference, error)
        return self._local(reference, None)

    def _needs_no_registry(self, reference: str, local: Image) -> bool:
        """Return whether the local image can be used at once: it is named by digest, or its registry failed a moment
        ago.
        """
        if "@sha256:" in reference or local.id.removeprefix("sha256:").startswith(
            reference.removeprefix("sha256:")
        ):
            return True
        failed_at = self._failed_at.get(registry_of(reference))
        return failed_at is not None and self._clock.monotonic() - failed_at < RETRY_AFTER_S

    async def _pull(self, reference: str, auth: str, uses_helper: bool) -> None:
        """Fetch the image, or share the result of a running fetch."""
        key = reference, auth, uses_helper
        while (under_way := self._fetches.get(key)) is not None:
            if (outcome := await asyncio.shield(under_way)) is None:
                continue  # the fetch was cancelled, so this task starts another one
            if isinstance(outcome, SkepError):
                raise outcome
            return
        fetch = self._fetches[key] = asyncio.get_running_loop().create_future()
        try:
            outcome = await self._fetch(reference, auth, uses_helper)
            fetch.set_result(outcome)
        finally:
            del self._fetches[key]
            if not fetch.done():
                fetch.set_result(None)
        if isinstance(outcome, SkepError):
            raise outcome

    async def _fetch(self, reference: str, auth: str, uses_helper: bool) -> Image | SkepError:
        registry = registry_of(reference)
        try:
            image = await self._images.pull(reference, auth, uses_helper=uses_helper)
        except SkepError as error:
            if isinstance(error, Unavailable):
                self._failed_at[registry] = self._clock.monotonic()
            return error
        self._failed_at.pop(registry, None)
        return image

    def _local(self, reference: str, error: SkepError | None) -> Image:
        try:
            image = self._images.resolve(reference)
        except SkepError as invalid:
            raise Rejected(str(invalid)) from invalid
        if image is None:
            raise Rejected(_why_not(reference, error)) from error
        return image


def _why_not(reference: str, error: SkepError | None) -> str:
    words = f"No such image: {reference}"
    return f"{words}: {error}" if error is not None and str(error) != words else words
