"""Runs confined processes that unpack archives and pack changes, within the limits of this node.

The processes run ``untar`` and ``pack``.  If a worker is not done in time, or its caller is cancelled, it is killed.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from skep.aio.race import afterwards
from skep.engine.images.archives import pack, untar
from skep.engine.images.digest import Digest
from skep.errors import InvalidArgument, ResourceExhausted, SkepError

log = structlog.get_logger()


class ImageLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the data that this node accepts from registries and clients.

    Args:
        layer_bytes_max: Limit for the unpacked size of one layer.
        archive_bytes_max: Limit for the unpacked size of an uploaded archive.
        spare_bytes: Bytes to keep free on the file system.
        spare_share: Share (0 to 1) to keep free on a small file system, where it is less than ``spare_bytes``.
        unpack_s: Longest time for one layer, in seconds.
    """

    layer_bytes_max: int = 64 << 30
    archive_bytes_max: int = 128 << 30
    entries_max: int = 2_000_000
    spare_bytes: int = 1 << 30
    spare_share: float = 0.05
    unpack_s: float = 1800.0
    manifest_bytes_max: int = 4 << 20

    def spare_on(self, directory: Path) -> int:
        """Return the number of bytes to keep free on the file system of ``directory``."""
        space = os.statvfs(directory)
        return min(self.spare_bytes, round(self.spare_share * space.f_blocks * space.f_frsize))

    def room_on(self, directory: Path) -> int:
        """Return the number of bytes that may still be written there."""
        space = os.statvfs(directory)
        return space.f_bavail * space.f_frsize - self.spare_on(directory)


class UnpackFailed(SkepError):
    """The archive could not be unpacked here: no space, or a file system call failed."""


class Unpacked(msgspec.Struct, frozen=True):
    """Result of a worker: digest and length of the plain tar, and the size of its files."""

    digest: Digest
    plain_bytes: int
    size_bytes: int


async def unpack(
    source: int | AsyncIterable[bytes],
    target: Path,
    *,
    limits: ImageLimits,
    is_layer: bool,
    has_whiteouts: bool = True,
    copy_to: Path | None = None,
) -> Unpacked:
    """Unpack a tar into the empty directory ``target``.

    Args:
        source: Descriptor of an open file, or the tar's pieces as they arrive.  Compressed or not.
        is_layer: Whether owners, devices and whiteouts have an effect.  Otherwise only plain files are written, which
            only this user can read.
        has_whiteouts: Whether names of a layer that start with ``.wh.`` mark removed files.
        copy_to: File for the plain tar, compressed.

    Raises:
        InvalidArgument, ResourceExhausted, UnpackFailed.
    """
    _require_room(limits, target)
    settings = untar.UntarSettings(
        root=str(target),
        is_layer=is_layer,
        bytes_max=limits.layer_bytes_max if is_layer else limits.archive_bytes_max,
        entries_max=limits.entries_max,
        spare_bytes=limits.spare_on(target),
        copy_to=str(copy_to or ""),
        has_whiteouts=has_whiteouts,
    )
    pipe = asyncio.subprocess.PIPE
    stdin = source if isinstance(source, int) else pipe
    async with _run_worker(untar.__name__, vars(settings), limits, stdin=stdin, stdout=pipe) as worker:
        if not isinstance(source, int):
            await _feed(worker, source)
        response = await _response(worker, worker.stdout)
    return _result(response, "the archive", "Error processing tar file(")


async def pack_changes(
    changes: Path, content: Path, *, limits: ImageLimits, without: Collection[str] = (), removes: bool = False
) -> Unpacked:
    """Write an overlay's upper directory as a layer's compressed tar to ``content``.

    Args:
        without: Paths below ``changes`` to leave out.
        removes: Whether to remove these paths from ``changes``.

    Raises:
        InvalidArgument, ResourceExhausted, UnpackFailed.
    """
    _require_room(limits, content.parent)
    settings = pack.PackSettings(
        root=str(changes),
        content=str(content),
        bytes_max=limits.layer_bytes_max,
        entries_max=limits.entries_max,
        without=tuple(without),
        removes=removes,
    )
    null, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    async with _run_worker(pack.__name__, vars(settings), limits, stdin=null, stderr=pipe) as worker:
        response = await _response(worker, worker.stderr)
    return _result(response, "the tree")


def _require_room(limits: ImageLimits, directory: Path) -> None:
    if limits.room_on(directory) < 0:
        raise UnpackFailed(f"{directory}: no space left on device")


@asynccontextmanager
async def _run_worker(
    module: str,
    settings: Mapping[str, Any],
    limits: ImageLimits,
    *,
    stdin: int,
    stdout: int | None = None,
    stderr: int | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a worker with ``module`` until the end of the block, or until its time is over."""
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", module, json.dumps(settings)),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd="/",
        env={"LANG": "C.UTF-8"},
    )
    async with afterwards(partial(_end, worker)):
        try:
            async with asyncio.timeout(limits.unpack_s):
                yield worker
        except TimeoutError as error:
            raise ResourceExhausted(f"an archive took longer than {limits.unpack_s:.0f} s") from error


async def _end(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is None:
        worker.kill()
        await worker.wait()


async def _feed(worker: asyncio.subprocess.Process, pieces: AsyncIterable[bytes]) -> None:
    assert worker.stdin is not None, "its input is a pipe"
    with suppress(ConnectionError):  # the worker has failed, and its response has the reason
        async for piece in pieces:
            worker.stdin.write(piece)
            await worker.stdin.drain()
    worker.stdin.close()


async def _response(worker: asyncio.subprocess.Process, pipe: asyncio.StreamReader | None) -> bytes:
    """Return a worker's output once it has ended."""
    assert pipe is not None, "its response comes in a pipe"
    response = await pipe.read()
    await worker.wait()
    return response


def _result(response: bytes, of: str, prefix: str = "") -> Unpacked:
    """Return the result in a worker's line of JSON, or raise the error that it reports.

    ``of`` is the subject of an error about a limit.  ``prefix`` is the start of the texts of other errors, as in
    Docker.
    """
    try:
        result = msgspec.json.decode(response, type=dict[str, str | int])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning(
            "unexpected output of an archive worker", output=response[-2000:].decode(errors="replace")
        )
        raise UnpackFailed("the archive worker ended without a response") from error
    message = str(result.get("error", ""))
    match result.get("kind"):
        case None:
            return msgspec.convert(result, Unpacked)
        case "malformed":
            raise InvalidArgument(f"{prefix}{message}")
        case "limit":
            raise ResourceExhausted(f"{of} {message}, the limit of this node")
        case _:
            raise UnpackFailed(f"{prefix}{message}")
