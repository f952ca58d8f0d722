"""Garbage collection of images when their disk fills.

If the disk is fuller than the high mark, fetched images that nothing needs are removed, least recently used first,
until the disk is down to the low mark.  An image is needed if a container has it, or if the present or previous spec of
a service names it (for a rollback).  Images that were used a moment ago are kept.  Images that users have built, loaded
or tagged here are kept too, because they cannot be fetched again.

``to_collect`` decides.  ``ImageCollector`` measures the disk, asks the managers, and removes images.

Source: kubelet, pkg/kubelet/images/image_gc_manager.go (marks, minimum age, order).
"""

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.engine.images.digest import Digest
from skep.engine.images.image import Image
from skep.engine.images.removal import Users
from skep.engine.images.store import ImageStore

log = structlog.get_logger(__name__)

AGE_S_MIN = 600.0
"""Seconds for which a fetched or used image is kept, because its container may not have started yet."""
PERIOD_S = 60.0
"""Seconds between collections of unused images."""
LONGEST_S = 300.0
"""Longest pause in seconds between two attempts while no manager can be reached."""


class Marks(msgspec.Struct, frozen=True):
    """Marks of disk usage in percent.  If ``high`` is 0, no images are removed."""

    high: int = 85
    low: int = 80


class Disk(msgspec.Struct, frozen=True):
    """File system of the images, in bytes."""

    size: int
    used: int


class UnusedImage(msgspec.Struct, frozen=True):
    """Properties of an image that decide on its removal.

    Args:
        used_at_s: Unix time of the last use.
        layers: Chain ids of its layers.
        is_needed: Whether a container or a service needs it.
        is_fetched: Whether it came from a registry or another node, and no user has tagged it since.
    """

    id: Digest
    layers: Sequence[str]
    used_at_s: float
    is_needed: bool
    is_fetched: bool


def is_full(disk: Disk, marks: Marks) -> bool:
    """Return whether the disk is above the high mark."""
    return marks.high > 0 and disk.used * 100 >= marks.high * disk.size


def to_collect(
    candidates: Sequence[UnusedImage], layer_bytes: Mapping[str, int], disk: Disk, marks: Marks, now_s: float
) -> Sequence[Digest]:
    """Return the ids of the images to remove, in order.

    The space of a layer is freed only when the last image that has the layer is removed.
    """
    if not is_full(disk, marks):
        return ()
    # The default low mark is above a high mark that was set alone.
    excess = disk.used - min(marks.low, marks.high) * disk.size // 100
    users = Counter(chain_id for one in candidates for chain_id in one.layers)
    collected = []
    for one in sorted(candidates, key=lambda one: (one.used_at_s, one.id)):
        if excess <= 0:
            break
        if one.is_needed or not one.is_fetched or now_s - one.used_at_s < AGE_S_MIN:
            continue
        collected.append(one.id)
        users.subtract(one.layers)
        excess -= sum(layer_bytes.get(chain_id, 0) for chain_id in one.layers if not users[chain_id])
    return collected


def disk_of(directory: Path) -> Disk:
    """Return the size and usage of a directory's file system.  Raises: OSError."""
    space = os.statvfs(directory)
    # Blocks reserved for root count as used, as in ``df``.
    usable = space.f_blocks - space.f_bfree + space.f_bavail
    return Disk(size=usable * space.f_frsize, used=(usable - space.f_bavail) * space.f_frsize)


class ImageCollector:
    """Keeps the disk of the images between its marks.

    Args:
        needed: Returns which of the given names services of the cluster may need.  Raises: SkepError: that is not known
            at present, so nothing is removed.
        marks: Returns the present marks.
    """

    def __init__(
        self,
        images: ImageStore,
        users: Users,
        needed: Callable[[Sequence[str]], Awaitable[Collection[str]]],
        clock: Clock,
        marks: Callable[[], Marks],
    ) -> None:
        self._images = images
        self._users = users
        self._needed = needed
        self._clock = clock
        self._marks = marks

    async def run(self) -> None:
        """Collect every minute until cancelled."""
        while True:
            await retry(
                self.collect,
                "unused images not removed",
                clock=self._clock,
                first_s=PERIOD_S,
                longest_s=LONGEST_S,
            )
            await self._clock.sleep(PERIOD_S)

    async def collect(self) -> Sequence[Digest]:
        """Remove images if the disk is full, and return their ids.  Raises: SkepError, OSError."""
        images, in_use = self._images.images(), {user.image_id for user in self._users()}
        used_at = await asyncio.to_thread(self._used_at, images, in_use)
        disk, marks = await asyncio.to_thread(disk_of, self._images.scratch), self._marks()
        if not is_full(disk, marks):
            return ()
        named = await self._needed(sorted({name for image in images for name in image.spellings}))
        needed = in_use | {image.id for image in images if not image.spellings.isdisjoint(named)}
        candidates = [
            UnusedImage(
                id=image.id,
                layers=image.chain,
                used_at_s=used_at.get(image.id, 0.0),
                is_needed=image.id in needed or bool(self._images.children(image.id)),
                is_fetched=self._images.is_fetched(image),
            )
            for image in images
        ]
        layer_bytes = await asyncio.to_thread(self._images.layer_store.bytes_on_disk)
        now_s = self._clock.now_ns() / 1e9
        removed = []
        by_id = {image.id: image for image in images}
        for id in to_collect(candidates, layer_bytes, disk, marks, now_s):
            unchanged = partial(self._is_unchanged, by_id[id], used_at.get(id, 0.0))
            gone, _ = await self._images.prune(unchanged, users=self._users)
            if id in gone.deleted:
                removed.append(id)
                log.info(
                    "unused image removed",
                    image=id,
                    names=[reference.familiar for reference in by_id[id].references],
                    disk_percent=disk.used * 100 // disk.size,
                    high_mark=marks.high,
                    low_mark=marks.low,
                )
        return removed

    def _is_unchanged(self, before: Image, used_at_s: float, present: Image) -> bool:
        """Return whether ``present`` is the image ``before``, with the names and the last use that were decided on.

        A pull, a tag or a container may have come meanwhile, since an earlier removal can take minutes.
        """
        return (
            present.id == before.id
            and present.references == before.references
            and self._images.is_fetched(present)
            and self._used_at([present], ()).get(present.id, 0.0) == used_at_s
        )

    def _used_at(self, images: Sequence[Image], in_use: Collection[str]) -> Mapping[str, float]:
        """Return the time when each image was last used as far as known, or else when it arrived.

        The time is kept as the modification time of the configuration's file.
        """
        times: dict[str, float] = {}
        for image in images:
            path = self._images.config_file(image)
            with suppress(OSError):
                if image.id in in_use:
                    now_s = self._clock.now_ns() / 1e9
                    os.utime(path, (now_s, now_s))
                times[image.id] = path.stat().st_mtime
        return times
