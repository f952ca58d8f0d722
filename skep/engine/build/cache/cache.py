"""Cache of build steps, and the directories of ``RUN --mount=type=cache``.

A step's key is made of the image before the step and of its container configuration.  The configuration has the history
and the digests of copied files, so equal files have equal keys even if their times differ.  The index has only images
that this node built, because a pulled image could claim to be the result of any step (CVE-2024-24557).
"""

import asyncio
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import structlog

from skep.aio.failures import log_error
from skep.aio.race import unless_done
from skep.aio.trees import discard_tree, walk_tree
from skep.engine.images.digest import Digest, is_digest
from skep.engine.images.image import Image
from skep.engine.images.store import ImageStore
from skep.linux.files import replace_file
from skep.linux.trees import walk

log = structlog.get_logger()

STEPS_MAX = 20_000
"""Number of step results in the index.  The oldest are dropped first."""


def keys_of(parents: Sequence[str], container_config: Mapping[str, Any], author: str) -> Sequence[str]:
    """Return the keys of a step, one for each of the parents.  A parent is an image id or the key of another step.

    A key is the hash of a JSON array of parent, configuration and author.  The latter two are encoded once.
    """
    try:
        config = msgspec.json.encode(container_config, order="deterministic")
        ends = b",%b,%b]" % (config, msgspec.json.encode(author))
        contents = [b"[%b%b" % (msgspec.json.encode(parent), ends) for parent in parents]
    except UnicodeEncodeError:  # a name is not UTF-8: escape it, as json does
        parts = ([parent, container_config, author] for parent in parents)
        contents = [json.dumps(one, sort_keys=True).encode() for one in parts]
    return [hashlib.sha256(content).hexdigest() for content in contents]


class StepCache:
    """Index of step results.  Losing it costs only time, so read and write errors are logged and ignored."""

    def __init__(self, file: Path, images: ImageStore) -> None:
        self._file = file
        self._images = images
        self._steps: dict[str, Digest] | None = None
        self._is_changed = False
        self._saving = asyncio.Lock()

    def find(self, key: str) -> Image | None:
        """Return the image that the step resulted in, or None if the step never ran or its image was removed."""
        id = self._read().get(key)
        return self._images.lookup(id) if id is not None else None

    def note(self, key: str, id: Digest) -> None:
        """Record the image that the step resulted in."""
        steps = self._read()
        self._is_changed = True
        steps.pop(key, None)
        steps[key] = id

    async def save(self) -> None:
        """Write the index without removed images, if a result was recorded since the last time."""
        if not self._is_changed:
            return
        steps = self._read()
        self._is_changed = False
        present = {image.id for image in self._images.images()}
        kept = {key: id for key, id in steps.items() if id in present}
        self._steps = dict(list(kept.items())[-STEPS_MAX:])
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with self._saving:  # builds may end at the same time, and the file has one writer
                await asyncio.to_thread(replace_file, self._file, msgspec.json.encode(self._steps))
        except OSError as error:
            log_error(error, "build cache index not written", file=str(self._file))

    def _read(self) -> dict[str, Digest]:
        if self._steps is None:
            try:
                found = msgspec.json.decode(self._file.read_bytes(), type=dict[str, Digest])
                self._steps = {key: id for key, id in found.items() if is_digest(id)}
            except FileNotFoundError:
                self._steps = {}
            except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                log_error(error, "build cache index not readable, starting empty", file=str(self._file))
                self._steps = {}
        return self._steps


class CacheKey(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of a directory of ``RUN --mount=type=cache``.

    The first step sets owner, mode and content of a directory.  Steps that request other values get another directory.

    Source: buildkit, solver/llbsolver/mounts/mount.go (getRefCacheDir): the id, and the base of the mount.
    """

    id: str
    namespace: str = ""
    """``BUILDKIT_CACHE_MOUNT_NS``."""
    base: str = ""
    """Digest of the initial files.  Empty if the directory starts empty."""
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None

    @property
    def name(self) -> str:
        """Name of the directory."""
        parts = [self.namespace and f"namespace={self.namespace}", self.id, self.base and f"base={self.base}"]
        if self.has_owner:
            parts.append(f"{self.mode} {self.uid} {self.gid}")
        text = "\0".join(filter(None, parts))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def has_owner(self) -> bool:
        """Whether owner or mode are set."""
        return (self.mode, self.uid, self.gid) != (None, None, None)


Fill = Callable[[Path], Awaitable[None]]
"""Puts the initial files into an empty directory."""


class CacheMounts:
    """Directories that RUN steps keep from build to build."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._used: dict[str, int] = {}
        self._exclusive: set[str] = set()
        """Directories of which a step is the only user."""
        self._released = asyncio.Event()
        """Set and replaced when a step has released a directory."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def hold(self, key: CacheKey, sharing: str, fill: Fill | None = None) -> AsyncIterator[Path]:
        """Provide the directory of ``key`` while the block runs.

        Args:
            sharing: ``shared``: several steps with this value use the directory at once.  ``locked``: the step waits
                until no other step uses the directory.  ``private``: a step that would have to wait gets another
                directory.  A step with ``shared`` also gets another directory while the other two kinds use this one.
            fill: Called for a directory that does not exist yet.
        """
        async with AsyncExitStack() as stack:
            if sharing == "locked":
                name = key.name
                await stack.enter_async_context(self._lock(name))
                while name in self._used:
                    await self._released.wait()
            else:
                name = self._free_name(key.name, is_shared=sharing == "shared")
            self._take(name, stack)
            if sharing != "shared":
                self._exclusive.add(name)
            async with self._lock(f"making {name}"):
                if not (self._root / name).is_dir():
                    await self._make(name, key, fill)
            yield self._root / name

    def _free_name(self, name: str, *, is_shared: bool) -> str:
        """Return the first directory of ``name`` that a step can use now.

        Source: buildkit, solver/llbsolver/mounts/mount.go (getRefCacheDirNoCache).
        """
        taken: Collection[str] = self._exclusive if is_shared else self._used
        others = (f"{name}-{number}" for number in itertools.count(1))
        return next(one for one in itertools.chain((name,), others) if one not in taken)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _take(self, name: str, stack: AsyncExitStack) -> None:
        self._used[name] = self._used.get(name, 0) + 1
        stack.callback(self._release, name)

    async def _make(self, name: str, key: CacheKey, fill: Fill | None) -> None:
        """Fill the directory under another name, then rename it, because the build may be cancelled in between."""
        async with AsyncExitStack() as stack:
            part = f"new-{secrets.token_hex(8)}"
            self._take(part, stack)
            directory = self._root / part
            directory.mkdir(mode=0o755, parents=True)
            async with unless_done(partial(discard_tree, directory)):
                if fill is not None:
                    await fill(directory)
                if key.has_owner:
                    os.chown(directory, key.uid or 0, key.gid or 0)
                    os.chmod(directory, 0o755 if key.mode is None else key.mode)
                directory.rename(self._root / name)

    def _release(self, name: str) -> None:
        self._used[name] -= 1
        if not self._used[name]:
            del self._used[name]
            self._exclusive.discard(name)
            self._released.set()
            self._released = asyncio.Event()
            with suppress(FileNotFoundError):  # a directory that was being filled has its final name now
                os.utime(self._root / name)  # the time of last use, which outlives this process

    def _used_ns(self, name: str) -> int:
        """Return the time of a directory's last use, or 0 if another prune removed it."""
        try:
            return os.stat(self._root / name).st_mtime_ns
        except FileNotFoundError:
            return 0

    def sizes(self) -> Mapping[str, int]:
        """Return the number of bytes in each directory, by name.  Blocks; call it in a thread."""
        if not self._root.is_dir():
            return {}
        return {
            one.name: sum(status.st_size for _, status in walk(one)) for one in sorted(self._root.iterdir())
        }

    def is_used(self, name: str) -> bool:
        """Return whether a step is using the directory."""
        return name in self._used

    async def prune(self, unused_since_ns: int | None = None) -> tuple[list[str], int]:
        """Remove the directories that no step uses, and return their names and the number of freed bytes.

        Args:
            unused_since_ns: Keep the directories that a step has used since then.  None keeps none.
        """
        sizes = await walk_tree(self.sizes)
        gone = []
        for name in sizes:
            if self.is_used(name) or (unused_since_ns is not None and self._used_ns(name) >= unused_since_ns):
                continue
            # A step may need the name before everything is removed.
            aside = self._root / f"gone-{secrets.token_hex(8)}"
            try:
                (self._root / name).rename(aside)
            except FileNotFoundError:  # another prune removed it
                continue
            gone.append(name)
            await discard_tree(aside)
        return gone, sum(sizes[name] for name in gone)
