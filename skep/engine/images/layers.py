"""Layers as directories for overlayfs: one per chain id, shared by all images with this layer.

``layers/<chain>/`` has ``diff`` (the files, with whiteouts in overlay form), ``content`` (the layer's compressed tar,
kept so that a push sends the same bytes that a pull received) and ``layer.json``.  A layer is written in ``tmp`` and
renamed once it is synced to the disk, so a layer that exists is complete.
"""

import asyncio
import ctypes
import gzip
import hashlib
import os
import tempfile
import threading
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec
import structlog

from skep.aio.failures import describe_error, log_error
from skep.aio.race import afterwards, thread_to_end
from skep.aio.trees import discard_tree, discard_tree_now
from skep.engine.images.archives.slots import UnpackSlots
from skep.engine.images.archives.streams import plain_chunks
from skep.engine.images.archives.workers import ImageLimits, Unpacked, UnpackFailed, pack_changes, unpack
from skep.engine.images.digest import Digest, chain_id_above, hex_of
from skep.errors import InvalidArgument, NotFound
from skep.linux.files import is_no_file, replace_file, sync_directory

log = structlog.get_logger()

NO_BLOB = Digest("")
_COMPRESSED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_UNPACKERS_MAX = 3
"""Number of workers that unpack at the same time.  Each uses one core to decompress."""
_PATIENCE_S = 60.0
"""Seconds after which a slow layer gives its slot to another layer, and continues."""
_SLOW_UNPACKERS_MAX = 6
"""Limit for slow layers that continue without a slot, in addition to ``_UNPACKERS_MAX``."""


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """Layer on this node.

    Args:
        size_bytes: Size of its files.
        plain_bytes: Size of its tar.
    """

    chain_id: Digest
    diff_id: Digest
    size_bytes: int
    plain_bytes: int
    blob: Digest = NO_BLOB
    """Digest of ``content``, by which registries name it.  Empty for a layer from this node that was not pushed yet."""


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """Compressed tar of a layer, with its digest and size in a registry."""

    digest: Digest
    size: int
    path: Path


class Layers:
    """All layers below one directory."""

    def __init__(self, root: Path, scratch: Path, limits: ImageLimits) -> None:
        """``scratch`` is a directory on the same file system for unfinished work.

        The caller empties it at each start.
        """
        self._root = root
        self._scratch = scratch
        self._limits = limits
        self.layers: dict[str, Layer] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slots = UnpackSlots(_UNPACKERS_MAX, patience_s=_PATIENCE_S, slow_max=_SLOW_UNPACKERS_MAX)

    def open(self) -> None:
        """Read the existing layers.  Blocks; call it in a thread.

        Raises: OSError: some layers cannot be read now.  The others were read.
        """
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        unread: OSError | None = None
        for directory in sorted(self._root.iterdir()):
            try:
                layer = msgspec.json.decode((directory / "layer.json").read_bytes(), type=Layer)
            except Exception as error:  # any error affects only one layer
                log_error(error, "layer not read", directory=str(directory))
                if isinstance(error, OSError) and not is_no_file(error):
                    unread = error
            else:
                self.layers[layer.chain_id] = layer
        if unread is not None:
            raise unread

    def get(self, chain_id: str) -> Layer | None:
        """Return the layer with this chain id, or None if it is not on this node."""
        return self.layers.get(chain_id)

    def all(self) -> Mapping[str, Layer]:
        """Return every layer by chain id."""
        return self.layers

    def directory(self, chain_id: str) -> Path:
        """Return the directory with a layer's files, a lower directory for overlayfs.  Raises: NotFound."""
        if chain_id not in self.layers:
            raise NotFound(f"layer {chain_id} is not on this node")
        return self._root / hex_of(chain_id) / "diff"

    def content(self, chain_id: str) -> Path:
        """Return the file with the layer's tar."""
        return self._root / hex_of(chain_id) / "content"

    def bytes_on_disk(self) -> Mapping[str, int]:
        """Return the size of each layer: its files and its tar.  Blocks; call it in a thread."""
        sizes = {}
        for chain_id, layer in tuple(self.layers.items()):
            with suppress(OSError):
                sizes[chain_id] = layer.size_bytes + self.content(chain_id).stat().st_size
        return sizes

    async def add(self, content: Path, *, chain_id: Digest, diff_id: Digest, blob: Digest = NO_BLOB) -> Layer:
        """Unpack the tar at ``content`` (compressed or not) into a layer, and take over the file.

        Of two simultaneous calls for the same layer, the second waits for the first.

        Raises:
            InvalidArgument: it is not an archive, or does not match ``diff_id``.
            ResourceExhausted: it is larger than the limits allow.
            UnpackFailed: a file system call failed.
        """
        async with self._lock(chain_id):
            present = self.layers.get(chain_id)
            if present is not None:
                return present
            # Not in a thread, because a cancelled caller would leave the directory behind.
            workspace = Path(tempfile.mkdtemp(prefix="layer-", dir=self._scratch))
            async with afterwards(partial(discard_tree, workspace)):
                layer = await self._unpack(content, workspace, chain_id, diff_id, blob)
                await asyncio.to_thread(_publish, workspace, self._root / hex_of(chain_id), layer)
            self.layers[chain_id] = layer
            return layer

    async def add_changes(
        self,
        changes: Path,
        *,
        below: Digest | None,
        pin: Callable[[Digest], None],
        without: Collection[str] = (),
        take: bool = False,
    ) -> Layer:
        """Make a layer from an overlay's upper directory, on top of the layer ``below``.

        The same changes on top of the same layer always result in the same layer.

        Args:
            below: Chain id of the layer below.  None if there is none.
            pin: Called with the layer's chain id before the layer is visible, so that it is not deleted as unused.
            without: Paths below ``changes`` to leave out.
            take: Whether to move ``changes`` into the layer instead of copying it.  It must not be mounted or written
                to, and must be on this file system.

        Raises:
            InvalidArgument: an entry cannot be represented in an image.
            ResourceExhausted: it is larger than the limits allow.
            UnpackFailed: a file system call failed.
        """
        # Not in a thread, because a cancelled caller would leave the directory behind.
        workspace = Path(tempfile.mkdtemp(prefix="layer-", dir=self._scratch))
        async with afterwards(partial(discard_tree, workspace)):
            try:
                content = workspace / "content"
                async with self._slots.of(str(changes)):
                    packed = await pack_changes(
                        changes, content, limits=self._limits, without=without, removes=take
                    )
                chain_id = chain_id_above(below, packed.digest)
                pin(chain_id)
                async with self._lock(chain_id):
                    present = self.layers.get(chain_id)
                    if present is not None:
                        return present
                    files = workspace / "diff"
                    if take:
                        changes.rename(files)
                    else:
                        files.mkdir(mode=0o755)
                        await self._copy(content, files, packed.digest)
                    return await self._publish(workspace, chain_id, packed)
            except OSError as error:
                raise UnpackFailed(describe_error(error)) from error

    async def add_archive(self, archive: AsyncIterable[bytes], *, pin: Callable[[Digest], None]) -> Layer:
        """Make a bottom layer from a tar, compressed or not, whose digest is not known.

        For ``pin`` see ``add_changes``.  Raises: as ``add``.
        """
        # Not in a thread, because a cancelled caller would leave the directory behind.
        workspace = Path(tempfile.mkdtemp(prefix="layer-", dir=self._scratch))
        async with afterwards(partial(discard_tree, workspace)):
            try:
                files = workspace / "diff"
                files.mkdir(mode=0o755)
                async with self._slots.of(str(workspace)):
                    unpacked = await unpack(
                        archive, files, limits=self._limits, is_layer=True, copy_to=workspace / "content"
                    )
                pin(unpacked.digest)
                async with self._lock(unpacked.digest):
                    present = self.layers.get(unpacked.digest)
                    return present or await self._publish(workspace, unpacked.digest, unpacked)
            except OSError as error:
                raise UnpackFailed(describe_error(error)) from error

    async def _publish(self, workspace: Path, chain_id: Digest, found: Unpacked) -> Layer:
        """Make a finished layer visible.  ``workspace`` has its files and its content."""
        layer = Layer(
            chain_id=chain_id,
            diff_id=found.digest,
            size_bytes=found.size_bytes,
            plain_bytes=found.plain_bytes,
        )
        await asyncio.to_thread(_publish, workspace, self._root / hex_of(chain_id), layer)
        self.layers[chain_id] = layer
        return layer

    async def _copy(self, content: Path, files: Path, diff_id: Digest) -> None:
        """Fill ``files`` from the tar at ``content``, and keep the tar."""
        async with self._slots.of(str(content)):
            with content.open("rb") as source:
                unpacked = await unpack(source.fileno(), files, limits=self._limits, is_layer=True)
        assert unpacked.digest == diff_id, "the unpacked tar is the packed one"

    async def blob(self, chain_id: str) -> Blob:
        """Return the layer's blob for a registry.

        It has the bytes that came from a registry.  Without them, it is compressed with gzip, which every engine can
        unpack.

        The compressed tar replaces ``content``, so that the next push finds the same bytes.

        Raises:
            NotFound: there is no such layer.
            UnpackFailed: there is no space for it.
        """
        async with self._lock(chain_id):
            layer = self.layers.get(chain_id)
            if layer is None:
                raise NotFound(f"layer {chain_id} is not on this node")
            path = self.content(chain_id)
            if not layer.blob:
                async with self._slots.of(chain_id):
                    blob = await self._compress(path, layer)
                self.layers[chain_id] = layer = msgspec.structs.replace(layer, blob=blob)
            size = (await asyncio.to_thread(path.stat)).st_size
            return Blob(digest=layer.blob, size=size, path=path)

    async def _compress(self, path: Path, layer: Layer) -> Digest:
        room_bytes = self._limits.room_on(self._scratch)
        is_cancelled = threading.Event()
        # Nothing else may write to the layer as long as the lock is held.
        work = partial(_as_gzip, path, layer, self._scratch, room_bytes, is_cancelled)
        return await thread_to_end(work, is_cancelled.set)

    def detach(self, chain_ids: Iterable[str]) -> Sequence[Path]:
        """Remove unused layers from the store at once.  The caller deletes the returned directories.

        A layer whose directory cannot be renamed stays in the store.
        """
        detached = []
        for chain_id in chain_ids:
            if chain_id not in self.layers:
                continue
            try:
                detached.append(Path(tempfile.mkdtemp(prefix="gone-", dir=self._scratch)))
                (self._root / hex_of(chain_id)).rename(detached[-1] / "layer")
            except OSError as error:
                log_error(error, "layer not removed", chain_id=chain_id)
            else:
                del self.layers[chain_id]
        return detached

    async def _unpack(
        self, content: Path, workspace: Path, chain_id: Digest, diff_id: Digest, blob: Digest
    ) -> Layer:
        files, kept = workspace / "diff", workspace / "content"
        files.mkdir(mode=0o755)
        is_compressed = await asyncio.to_thread(_is_compressed, content)
        async with self._slots.of(str(content.parent)):  # each image's download has its own directory
            with content.open("rb") as source:
                unpacked = await unpack(
                    source.fileno(),
                    files,
                    limits=self._limits,
                    is_layer=True,
                    copy_to=None if is_compressed else kept,
                )
        if unpacked.digest != diff_id:
            raise DigestMismatch(diff_id, unpacked.digest)
        if is_compressed:
            content.rename(kept)
        else:
            content.unlink()
        return Layer(
            chain_id=chain_id,
            diff_id=diff_id,
            size_bytes=unpacked.size_bytes,
            plain_bytes=unpacked.plain_bytes,
            blob=blob if is_compressed else NO_BLOB,
        )

    def _lock(self, chain_id: str) -> asyncio.Lock:
        lock = self._locks.get(chain_id)
        if lock is None:
            lock = self._locks[chain_id] = asyncio.Lock()
        return lock


class DigestMismatch(InvalidArgument):
    """The layer differs from the digest in the image's configuration."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"layer has digest {found}, expected {expected}")
        self.expected = expected
        self.found = found


def _as_gzip(
    content: Path, layer: Layer, scratch: Path, room_bytes: int, is_cancelled: threading.Event
) -> Digest:
    """Compress ``content`` with gzip, and record its digest in ``layer.json``.  Raises: UnpackFailed.

    If the process dies halfway, the layer's digest is computed again.
    """
    workspace = Path(tempfile.mkdtemp(prefix="blob-", dir=scratch))
    try:
        if not _is_gzip(content):
            made = workspace / "content"
            with content.open("rb") as source, made.open("wb") as target:
                # No name and no time in the header, so that the same layer results in the same bytes on every node.
                with gzip.GzipFile("", "wb", 6, target, mtime=0) as compressed:
                    for piece in plain_chunks(source):
                        compressed.write(piece)
                        if is_cancelled.is_set():
                            raise UnpackFailed("cancelled")
                        if target.tell() > room_bytes:
                            raise UnpackFailed(f"{scratch}: no space left on device")
                target.flush()
                os.fsync(target.fileno())
            made.rename(content)
        with content.open("rb") as file:
            blob = Digest(f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
        document = msgspec.json.encode(msgspec.structs.replace(layer, blob=blob))
        replace_file(content.with_name("layer.json"), document)
        return blob
    except OSError as error:
        raise UnpackFailed(f"{scratch}: {describe_error(error)}") from error
    finally:
        discard_tree_now(workspace)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == _COMPRESSED[0]


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith(_COMPRESSED)


def _publish(workspace: Path, final: Path, layer: Layer) -> None:
    """Sync a finished layer to the disk, then rename it to its final name."""
    (workspace / "layer.json").write_bytes(msgspec.json.encode(layer))
    directory = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # syncfs(2), for which Python has no wrapper, instead of an fsync per file.  It reports earlier write errors.
        if ctypes.CDLL(None, use_errno=True).syncfs(directory) != 0:
            raise UnpackFailed(f"{workspace}: {os.strerror(ctypes.get_errno()).lower()}")
    finally:
        os.close(directory)
    if final.exists():  # the existing layer could not be read, but a container may still use it
        final.rename(workspace.with_name(f"{workspace.name}-replaced"))
    workspace.rename(final)
    sync_directory(final.parent)
