"""Shared parts of build steps: images, mounted file systems, work in threads."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from skep.aio.failures import describe_error
from skep.aio.race import afterwards, thread_to_end
from skep.engine.build.dockerfile.config import StageState
from skep.engine.build.files.trees import CopyLimits, Work
from skep.engine.images.archives.workers import UnpackFailed
from skep.engine.images.digest import Digest
from skep.engine.images.image import ImageConfig
from skep.engine.images.store import ImageStore
from skep.engine.runtime import overlay
from skep.linux import syscalls
from skep.model.values.user_map import UserMap

T = TypeVar("T")


class StepImage(msgspec.Struct, frozen=True, kw_only=True):
    """The image that a step produced.  ``content``: Its configuration, kept here because the image may be removed."""

    id: Digest
    content: bytes
    config: ImageConfig
    chain: tuple[Digest, ...]
    link: str = ""
    """Shared key of the step that produced it, or the image's id if no step of this build did."""


class StagePosition(msgspec.Struct, frozen=True, kw_only=True):
    """Position of a stage.  ``image``: None if the stage started from scratch and has nothing yet."""

    state: StageState
    image: StepImage | None

    @property
    def image_id(self) -> Digest:
        """Id of the image, or empty without one."""
        return self.image.id if self.image is not None else Digest("")


def lower_directories(images: ImageStore, image: StepImage | None) -> list[Path]:
    """Return the layers of an image for an overlay, top first.  Raises: NotFound."""
    chain = image.chain if image is not None else ()
    return [images.layer_store.directory(chain_id) for chain_id in reversed(chain)]


class MountedTree(NamedTuple):
    """A file system for steps.  ``layers``: Its directories, top first.  Empty if it is a plain directory."""

    root: Path
    layers: Sequence[Path] = ()


class Changes:
    """Overlay of one step on top of an image's layers.  ``root``: Mounted within ``mounted``."""

    def __init__(
        self,
        directory: Path,
        layers: Sequence[Path],
        *,
        is_detached: bool = False,
        users: UserMap | None = None,
    ) -> None:
        """``directory``: An empty directory for this overlay only.  ``users``: See ``overlay.mount_layers``.

        ``is_detached``: Use an empty directory as ``root`` instead of an overlay.  Its files are the layer.  An overlay
        with ``redirect_dir`` or ``index`` would mark new directories as opaque, so that they hide the directories
        below.
        """
        self.layers = list(layers) or [directory / "empty"]
        self._directory = directory
        self._users = users
        self._is_detached = is_detached
        self.upper = directory / "upper"
        self.root = self.upper if is_detached else directory / "root"

    def mount(self) -> None:
        """Mount the overlay.  Raises: OSError; FailedPrecondition: more layers than this kernel supports."""
        if self._is_detached:
            self.upper.mkdir(mode=0o755, exist_ok=True)
            self.upper.chmod(0o755)
            return
        work = self._directory / "work"
        for path in (self.root, self.upper, work, self._directory / "empty"):
            path.mkdir(mode=0o755, exist_ok=True)
            path.chmod(0o755)
        overlay.mount_layers(self.layers, self.upper, work, self.root, self._users)

    def unmount(self) -> None:
        """Unmount the overlay, if it is mounted."""
        syscalls.unmount_if_mounted(self.root)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mount the overlay while the block runs.  Blocks; call it in a thread."""
        self.mount()
        try:
            yield self.root
        finally:
            self.unmount()


def new_work(images: ImageStore, place: Path) -> Work:
    """Return the bounds of a copy to ``place``: the node's limits, and the free space of the disk."""
    limits = images.limits
    room = max(limits.room_on(place), 0)
    return Work(CopyLimits(bytes_max=min(limits.layer_bytes_max, room), entries_max=limits.entries_max))


async def in_thread(work: Work, act: Callable[[], T]) -> T:
    """Return the result of ``act`` in a thread.  On cancellation, stop ``work`` and wait for the thread to end.

    Raises: Any error of ``act``; UnpackFailed: a call on a file failed.
    """
    try:
        return await thread_to_end(act, work.stop)
    except OSError as error:
        raise UnpackFailed(f"failed to copy files: {_words(error)}") from error


@asynccontextmanager
async def mounted_image(changes: Changes, work: Work) -> AsyncIterator[Path]:
    """Mount the overlay like ``Changes.mounted``, while an async block runs."""
    async with afterwards(partial(asyncio.to_thread, changes.unmount)):
        await in_thread(work, changes.mount)
        yield changes.root


def _words(error: OSError) -> str:
    if error.errno is None:
        return describe_error(error)
    name = os.path.basename(os.fsdecode(error.filename)) + ": " if error.filename else ""
    return name + os.strerror(error.errno).lower()
