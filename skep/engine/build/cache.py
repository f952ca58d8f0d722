"""Which image a step gave when it was carried out before, and the directories of ``RUN --mount=type=cache``.

A step is known by the image before it and by its container configuration, in which history and the digests of copied
files are; so the same files give the same key whatever their times are.  Only images that were built here are in the
index: one that was pulled could say of itself that it is the result of any step (CVE-2024-24557).
"""

import asyncio
import hashlib
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import structlog

from skep.aio.failures import log_error
from skep.aio.trees import discard_tree, walk_tree
from skep.engine.images.digest import Digest, is_digest
from skep.engine.images.image import Image
from skep.engine.images.store import ImageStore
from skep.linux.files import replace_file
from skep.linux.trees import walk

log = structlog.get_logger()

STEPS_MAX = 20_000
"""Results of steps that are kept in mind; the oldest go first."""


def key_of(parent: str, container_config: Mapping[str, Any], author: str) -> str:
    """How the index names a step."""
    parts = [parent, container_config, author]
    try:
        content = msgspec.json.encode(parts, order="deterministic")
    except UnicodeEncodeError:  # a name is not UTF-8: each is another key
        content = json.dumps(parts, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


class StepCache:
    """The index of results.  Losing it costs time only, so it is read and written leniently."""

    def __init__(self, file: Path, images: ImageStore) -> None:
        self._file = file
        self._images = images
        self._steps: dict[str, Digest] | None = None
        self._is_changed = False
        self._saving = asyncio.Lock()

    def find(self, key: str) -> Image | None:
        """The image that the step gave; None: it was never carried out, or its image is gone."""
        id = self._read().get(key)
        return self._images.lookup(id) if id is not None else None

    def note(self, key: str, id: Digest) -> None:
        """The step gave this image."""
        steps = self._read()
        self._is_changed = True
        steps.pop(key, None)
        steps[key] = id

    async def save(self) -> None:
        """Write the index, without what is gone, if a result was noted."""
        if not self._is_changed:
            return
        steps = self._read()
        self._is_changed = False
        present = {image.id for image in self._images.images()}
        kept = {key: id for key, id in steps.items() if id in present}
        self._steps = dict(list(kept.items())[-STEPS_MAX:])
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with self._saving:  # builds end at the same time, and the file has one writer
                await asyncio.to_thread(replace_file, self._file, msgspec.json.encode(self._steps))
        except OSError as error:
            log_error(error, "results of build steps not noted", file=str(self._file))

    def _read(self) -> dict[str, Digest]:
        if self._steps is None:
            try:
                found = msgspec.json.decode(self._file.read_bytes(), type=dict[str, Digest])
                self._steps = {key: id for key, id in found.items() if is_digest(id)}
            except FileNotFoundError:
                self._steps = {}
            except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                log_error(error, "results of build steps are forgotten", file=str(self._file))
                self._steps = {}
        return self._steps


class CacheMounts:
    """Directories that RUN steps keep from build to build, by id."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._used: dict[str, int] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def used(self, id: str, sharing: str) -> AsyncIterator[Path]:
        """The directory with this id.

        ``sharing``: ``shared``: by several steps at once; ``locked``: steps wait for each other; ``private``: a step
        that would have to wait gets another directory, which no other step has meanwhile.
        """
        name = hashlib.sha256(id.encode("utf-8", "surrogateescape")).hexdigest()
        if sharing == "private" and name in self._used:
            names = (f"{name}-{number}" for number in itertools.count(1))
            name = next(one for one in names if one not in self._used)
        async with AsyncExitStack() as stack:
            if sharing == "locked":
                lock = self._locks.setdefault(name, asyncio.Lock())
                await stack.enter_async_context(lock)
            self._used[name] = self._used.get(name, 0) + 1
            stack.callback(self._release, name)
            directory = self._root / name
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            yield directory

    def _release(self, name: str) -> None:
        self._used[name] -= 1
        if not self._used[name]:
            del self._used[name]

    def sizes(self) -> Mapping[str, int]:
        """Bytes in each directory, by its name.  Blocks; call it in a thread."""
        if not self._root.is_dir():
            return {}
        return {
            one.name: sum(status.st_size for _, status in walk(one)) for one in sorted(self._root.iterdir())
        }

    def is_used(self, name: str) -> bool:
        """Whether a step has it now."""
        return name in self._used

    async def prune(self) -> tuple[list[str], int]:
        """Remove those that no step uses; gives their names and how many bytes that freed."""
        sizes = await walk_tree(self.sizes)
        gone = []
        for name in sizes:
            if self.is_used(name):
                continue
            aside = (
                self._root / f"gone-{secrets.token_hex(8)}"
            )  # a step may want the name before all is removed
            try:
                (self._root / name).rename(aside)
            except FileNotFoundError:  # by another prune
                continue
            gone.append(name)
            await discard_tree(aside)
        return gone, sum(sizes[name] for name in gone)
