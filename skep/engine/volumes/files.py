"""Access to containers' files: status, and reading and writing as archives (``docker cp``, ``docker export``).

Files are accessed as the container sees them, with its volumes and bind mounts, whether it runs or not.  As in Docker,
files in memory (tmpfs, ``/proc``, secrets) are left out.  Separate processes (``files_worker``) do the work.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from skep.aio.race import afterwards
from skep.api.errors import Untranslated
from skep.engine.confinement.users import identity
from skep.engine.containers.container import Container
from skep.engine.events import Events
from skep.engine.images.store import ImageStore
from skep.engine.runtime.bundle import RootFiles
from skep.engine.volumes import files_worker
from skep.errors import NotFound, ResourceExhausted, Unavailable
from skep.linux.user_namespaces import mapping
from skep.model.values.ids import ContainerId
from skep.model.values.times import Timestamp, timestamp

log = structlog.get_logger()

_PIECE_BYTES = 1 << 18
"""Number of bytes of an archive that are read at a time."""
_LINE_BYTES_MAX = 1 << 20
"""Limit in bytes for one result of the worker."""
_COPIES_MAX = 16
"""Limit for concurrent copies, because each is a process."""
_LOOK_DEADLINE_S = 60.0
"""Time limit in seconds for the worker's next result."""
_IDLE_DEADLINE_S = 300.0
"""Time limit in seconds for one piece of an archive.  After that, an idle client is disconnected."""
_END_DEADLINE_S = 10.0
"""Seconds to wait for the end of a killed worker, which may hang in a file system that does not respond."""


MountRoot = Callable[[ContainerId], AbstractAsyncContextManager[RootFiles]]
"""Returns a context with a container's root file system, mounted for the block.  Raises: NotFound."""


class PathStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Status of a path in a container.  ``mode`` has the bits of Go's ``os.FileMode``."""

    name: str
    size: int
    mode: int
    mtime: Timestamp
    link_target: str


class ArchiveTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Target and options of an unpacked archive."""

    path: str
    keeps_kinds: bool = False
    """Whether to refuse replacing a directory by a file, or a file by a directory."""
    as_user: bool = False
    """Whether the unpacked files belong to the container's user and not to the owners in the archive."""


class ContainerFiles:
    """Files of all containers of a node."""

    def __init__(
        self, find: Callable[[str], Container], mount_root: MountRoot, events: Events, images: ImageStore
    ) -> None:
        """``find`` returns the container that a word names, or raises NotFound.

        ``images`` has the limits that apply to archives.
        """
        self._find = find
        self._events = events
        self._mount_root = mount_root
        self._images = images
        self.places = asyncio.Semaphore(_COPIES_MAX)

    async def status(self, word: str, path: str) -> PathStatus:
        """Return the status of ``path``.  Raises: NotFound; Untranslated: it is unreachable, in Docker's words."""
        async with self._worker(word, "stat", path) as worker, _deadline(_LOOK_DEADLINE_S):
            return _status(await worker.line())

    @asynccontextmanager
    async def read(self, word: str, path: str) -> AsyncIterator[tuple[PathStatus, AsyncIterator[bytes]]]:
        """Yield the status of ``path``, and its archive in pieces.

        Raises: the errors of ``status``.  If the archive is incomplete, the iterator of its pieces raises at the end.
        """
        container = self._find(word)
        async with self._worker(word, "read", path) as worker:
            async with _deadline(_LOOK_DEADLINE_S):
                status = _status(await worker.line())
            self._events.publish("archive-path", container)
            yield status, worker.pieces()

    @asynccontextmanager
    async def export(self, word: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield the whole root file system as an archive in pieces, without volumes."""
        container = self._find(word)
        async with self._worker(word, "export", "/") as worker:
            self._events.publish("export", container)
            yield worker.pieces()

    @asynccontextmanager
    async def archive(self, root: Path) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield a tree outside containers, such as a mounted image, as an archive in pieces."""
        async with (
            self.places,
            self._start_worker(self._settings(root, "export", "/"), "/", "the tree") as worker,
        ):
            yield worker.pieces()

    async def write(self, word: str, target: ArchiveTarget, archive: AsyncIterable[bytes]) -> None:
        """Unpack ``archive`` (compressed or not) in a directory of the container.

        Raises: NotFound: no such directory; ResourceExhausted; Untranslated: it fails, in Docker's words
        (read-only, not a directory, not an archive).
        """
        container = self._find(word)
        async with self._worker(word, "write", target.path, target) as worker:
            await worker.feed(archive)
            async with _deadline(self._images.limits.unpack_s):
                await worker.line()
            self._events.publish("extract-to-dir", container)

    @asynccontextmanager
    async def _worker(
        self, word: str, action: str, path: str, target: ArchiveTarget | None = None
    ) -> AsyncIterator["_Worker"]:
        container = self._find(word)
        async with self.places, self._mount_root(container.id) as (root, binds, users):
            settings = self._settings(root, action, path)
            if users is not None:
                settings.namespace = await asyncio.to_thread(mapping, users.kernel_text)
            if action != "export":
                settings.binds = list(binds)
            if target is not None:
                settings.keeps_kinds = target.keeps_kinds
                settings.volumes = [(one.target, one.read_only) for one in binds]
                settings.read_only = container.config.read_only
                if target.as_user and container.config.user:
                    user = await asyncio.to_thread(identity, root, container.config.user)
                    settings.owner = (user.uid, user.gid)
            async with self._start_worker(settings, path, f"container {word}") as worker:
                yield worker

    def _settings(self, root: Path, action: str, path: str) -> files_worker.FilesWorkerSettings:
        return files_worker.FilesWorkerSettings(
            root=str(root),
            action=action,
            path=path,
            bytes_max=self._images.limits.archive_bytes_max,
            entries_max=self._images.limits.entries_max,
            spare_bytes=self._images.limits.spare_on(root),
        )

    @asynccontextmanager
    async def _start_worker(
        self, settings: files_worker.FilesWorkerSettings, path: str, whose: str
    ) -> AsyncIterator["_Worker"]:
        """Start a worker and end it with the block.  ``whose`` names the files' owner in messages."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", files_worker.__name__, json.dumps(vars(settings))),
            stdin=asyncio.subprocess.PIPE if settings.action == "write" else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
            cwd="/",
            env={"LANG": "C.UTF-8"},
            pass_fds=() if settings.namespace is None else (settings.namespace,),
        )
        async with afterwards(partial(_end, process)):
            yield _Worker(process, path, whose)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        with suppress(TimeoutError):  # it may hang in a file system that does not respond
            async with asyncio.timeout(_END_DEADLINE_S):
                await process.wait()


class _Worker:
    """A running worker."""

    def __init__(self, process: asyncio.subprocess.Process, path: str, whose: str) -> None:
        self._process = process
        self._path = path
        self._whose = whose

    async def line(self) -> dict[str, Any]:
        """Return the worker's next result.  Raises: NotFound; ResourceExhausted; Untranslated: it has failed."""
        assert self._process.stderr is not None, "its results come in a pipe"
        text = await self._process.stderr.readline()
        try:
            result = msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            rest = text + await self._process.stderr.read(_LINE_BYTES_MAX)
            log.warning("unexpected output of the file worker", output=rest[-2000:].decode(errors="replace"))
            raise Unavailable("the process that copies files ended without a response") from error
        message = str(result.get("error", ""))
        match result.get("kind"):
            case "missing":
                raise NotFound(f"Could not find the file {self._path} in {self._whose}")
            case "limit":
                raise ResourceExhausted(message)
            case "refused":
                raise Untranslated(message)
            case _:
                return result

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the worker's output.  Raises an error at the end if the output is incomplete."""
        assert self._process.stdout is not None, "the archive comes in a pipe"
        while True:
            async with _deadline(_IDLE_DEADLINE_S):
                piece = await self._process.stdout.read(_PIECE_BYTES)
            if not piece:
                break
            yield piece
        async with _deadline(_LOOK_DEADLINE_S):
            await self.line()

    async def feed(self, archive: AsyncIterable[bytes]) -> None:
        """Send an archive to the worker.  If it stops reading, its result has the reason."""
        assert self._process.stdin is not None, "the archive goes through a pipe"
        pieces = aiter(archive)
        with suppress(ConnectionError, StopAsyncIteration):
            while True:
                async with _deadline(_IDLE_DEADLINE_S):
                    self._process.stdin.write(await anext(pieces))
                    await self._process.stdin.drain()
        self._process.stdin.close()


def _status(result: dict[str, Any]) -> PathStatus:
    fields = {**result, "mtime": timestamp(int(result["mtime_ns"]))}
    return msgspec.convert(fields, PathStatus)


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Unavailable(f"no file of the container was read or written for {seconds:g} s") from error
