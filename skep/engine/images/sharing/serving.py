"""Serves this node's images to other nodes like a registry: manifests, configurations and layers.

A layer is sent with its original bytes, so that it matches the digest in its registry's manifest.  For an image that
came from no registry, a manifest is created here.  A node sends only few layers at once, and only few copies of one
layer within some minutes, because the nodes that have received the layer then send it on.

``upload_decision`` is the rule.  ``ServedImages`` reads the files.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from enum import Enum
from functools import partial
from pathlib import Path

import msgspec

from skep.aio.clock import Clock
from skep.engine.images.digest import Digest, parse_digest
from skep.engine.images.image import Image
from skep.engine.images.local import LocalImages
from skep.engine.images.reference import Reference, parse_any
from skep.engine.images.registry.registry import DOCKER_MANIFEST, Document
from skep.errors import NotFound, ResourceExhausted, RetryLater, Unavailable

_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
_LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"

COPIES_MAX = 3
"""Limit for the copies of one layer within ``COPIES_S``.

More are sent only to a node that found the layer nowhere else.
"""
COPIES_S = 600.0
"""Seconds without another copy after which earlier ones no longer count."""
COPIES_KEPT_MAX = 4096
"""Limit for the number of layers whose copies are counted."""
UPLOADS_MAX = 6
"""Limit for simultaneous uploads."""
UPLOADS_OF_LAYER_MAX = 3
"""Limit for simultaneous uploads of one layer."""
UPLOADS_PER_NODE_MAX = 3
"""Limit for simultaneous uploads to one node.  It equals the number of layers that a node fetches at once."""
PIECE_BYTES = 512 << 10
"""Bytes of one message to another node."""
ARRIVING_AFTER_S = 0.5
"""Seconds after which another node asks again for a layer that is still arriving here."""


class PaceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Slowest pace at which another node keeps its slot for a blob."""

    stalled_s: float = 60.0
    """Seconds after which a node that receives nothing loses its slot."""
    bytes_per_s: int = 32 << 10
    """Slowest rate, checked after a first minute.  Half the rate that receivers demand of senders."""


PACE = PaceLimits()


def longest_s(pace: PaceLimits, taken: int) -> float:
    """Return the seconds for which another node may receive ``taken`` bytes."""
    return pace.stalled_s + taken / pace.bytes_per_s


class BlobResponse(Enum):
    """The decision about a node's request for a blob."""

    SENT = "sent"
    BUSY = "busy"
    ARRIVING = "arriving"
    ABSENT = "absent"


class Load(msgspec.Struct, frozen=True):
    """Numbers of present and recent uploads.

    Args:
        uploads: All uploads.
        of_layer: Uploads of this blob.
        of_node: Uploads to this node.
        copies: Copies of this blob within ``COPIES_S``.
    """

    uploads: int = 0
    of_layer: int = 0
    of_node: int = 0
    copies: int = 0


def upload_decision(load: Load, *, is_present: bool, is_arriving: bool, last_resort: bool) -> BlobResponse:
    """Decide whether to send a blob.  ``last_resort`` tells that the requesting node found it on no other node."""
    if not is_present:
        return BlobResponse.ARRIVING if is_arriving else BlobResponse.ABSENT
    if load.uploads >= UPLOADS_MAX or load.of_layer >= UPLOADS_OF_LAYER_MAX:
        return BlobResponse.BUSY
    if load.of_node >= UPLOADS_PER_NODE_MAX:
        return BlobResponse.BUSY
    if load.copies >= COPIES_MAX and not last_resort:
        return BlobResponse.BUSY
    return BlobResponse.SENT


class Copies:
    """Recent copies of each layer."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sent: dict[str, tuple[int, float]] = {}
        """Number of copies and start of the last one, by digest.  The oldest come first."""

    def of(self, digest: str) -> int:
        """Return the number of recent copies of a layer."""
        count, at = self._sent.get(digest, (0, 0.0))
        return count if self._clock.monotonic() - at < COPIES_S else 0

    def add(self, digest: str, change: int = 1) -> None:
        """Count a copy.  ``change`` is -1 to undo this for an interrupted copy."""
        count = self.of(digest) + change
        self._sent.pop(digest, None)
        self._sent[digest] = max(count, 0), self._clock.monotonic()
        while len(self._sent) > COPIES_KEPT_MAX:
            del self._sent[next(iter(self._sent))]


class ServedBlob(msgspec.Struct, frozen=True):
    """Blob during an upload: its length in bytes, and its pieces."""

    size: int
    pieces: AsyncIterator[bytes]


class ServedImages:
    """Serves this node's images to other nodes."""

    def __init__(self, images: LocalImages, clock: Clock, pace: PaceLimits = PACE) -> None:
        self._images = images
        self._clock = clock
        self.pace = pace
        self._uploads: Counter[str] = Counter()
        self._uploads_of_node: Counter[str] = Counter()
        self._copies = Copies(clock)
        self._digests: dict[str, Digest] = {}
        """Digests of compressed layers that came from no registry, by chain id."""
        self._reading: dict[Digest, asyncio.Future[Digest]] = {}

    @property
    def uploads(self) -> int:
        """Number of blobs that are being sent."""
        return self._uploads.total()

    def copies(self, digest: str) -> int:
        """Return the number of recent copies of a blob."""
        return self._copies.of(digest)

    async def manifest(self, target: str) -> Document:
        """Return the manifest or index for ``target``, which is a reference, a manifest's digest or an image's id.

        Raises: NotFound: it is not on this node; InvalidArgument: it is none of these.
        """
        named = parse_any(target)
        digest = named.digest if isinstance(named, Reference) else named
        if digest:
            name = named.name if isinstance(named, Reference) else ""
            content = await asyncio.to_thread(self._images.document, digest, name)
            if content is not None:
                return _document(content)
        image = self._images.resolve(target) if not isinstance(named, Reference) or not digest else None
        if image is None:
            raise NotFound(f"No such image: {target}")
        for reference in image.digests:
            content = await asyncio.to_thread(self._images.document, reference.digest)
            if content is not None and isinstance(named, Reference) and reference.name == named.name:
                return _document(content)
        is_own = isinstance(named, Reference) and all(one.name != named.name for one in image.digests)
        return Document(
            await self._make_manifest(image), DOCKER_MANIFEST, is_of_registry=False, is_own=is_own
        )

    async def names_of(self, target: str) -> frozenset[str]:
        """Return the names by which services may refer to the images for which ``manifest(target)`` is sent.

        May be empty.

        Raises:
            InvalidArgument: ``target`` is neither a reference nor a digest.
        """
        named = parse_any(target)
        if isinstance(named, Reference) and not named.digest:
            image = self._images.resolve(target)
            return _names([image] if image is not None else ())
        digest, name = (named.digest, named.name) if isinstance(named, Reference) else (named, "")
        found = [
            image
            for image in self._images.images()
            if image.id == digest or any(one.digest == digest for one in image.digests)
        ]
        # A manifest below an index has no reference of its own.
        if not found:
            files = await asyncio.to_thread(lambda: list(self._images.with_document(digest, name)))
            found = [image for _, image in files if image is not None]
        return _names(found)

    def names_with(self, digest: str) -> frozenset[str]:
        """Return the names of the images that have this configuration or layer, or are being pulled with it."""
        digest = parse_digest(digest)
        layers = self._images.layer_store
        chain_ids = {
            chain_id
            for chain_id, layer in layers.all().items()
            if digest == (layer.blob or self._digests.get(chain_id))
        }
        found = [
            image
            for image in self._images.images()
            if image.id == digest or not chain_ids.isdisjoint(image.chain)
        ]
        coming = (name for one in self._images.arriving.references(digest) for name in one.spellings)
        return _names(found).union(coming)

    @asynccontextmanager
    async def blob(self, digest: str, to: str, *, last_resort: bool = False) -> AsyncIterator[ServedBlob]:
        """Provide a configuration or layer for the node ``to``.

        Its pieces raise Unavailable if they are consumed too slowly.

        Raises: NotFound: it is not on this node; RetryLater: it will be soon; ResourceExhausted: request it from other
        nodes.
        """
        digest = parse_digest(digest)
        path = self._path(digest)
        load = Load(
            self._uploads.total(), self._uploads[digest], self._uploads_of_node[to], self._copies.of(digest)
        )
        is_arriving = digest in self._images.arriving
        match upload_decision(
            load, is_present=path is not None, is_arriving=is_arriving, last_resort=last_resort
        ):
            case BlobResponse.ABSENT:
                raise NotFound(f"blob {digest} is not on this node")
            case BlobResponse.ARRIVING:
                raise RetryLater(f"blob {digest} is being fetched", ARRIVING_AFTER_S)
            case BlobResponse.BUSY:
                raise ResourceExhausted(f"this node already sends blob {digest} to other nodes")
        assert path is not None, "it is present"
        self._uploads[digest] += 1
        self._uploads_of_node[to] += 1
        self._copies.add(digest)
        is_sent, taken, began = False, 0, self._clock.monotonic()
        try:
            with path.open("rb") as file:  # a concurrent removal does no harm to an open file

                async def pieces() -> AsyncIterator[bytes]:
                    nonlocal is_sent, taken
                    while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                        yield piece
                        taken += len(piece)
                        if self._clock.monotonic() - began > longest_s(self.pace, taken):
                            raise Unavailable(f"blob {digest} is received too slowly")
                    is_sent = True

                yield ServedBlob(path.stat().st_size, pieces())
        except FileNotFoundError as error:
            raise NotFound(f"blob {digest} is not on this node") from error
        finally:
            self._uploads[digest] -= 1
            self._uploads_of_node[to] -= 1
            self._uploads += Counter()  # removes entries that are zero
            self._uploads_of_node += Counter()
            if not is_sent:
                self._copies.add(digest, -1)

    def _path(self, digest: Digest) -> Path | None:
        layers = self._images.layer_store
        for chain_id, layer in layers.all().items():
            if digest == (layer.blob or self._digests.get(chain_id)):  # a push may have compressed it again
                return layers.content(chain_id)
        image = next((one for one in self._images.images() if one.id == digest), None)
        return self._images.config_file(image) if image is not None else None

    async def _make_manifest(self, image: Image) -> bytes:
        """Return a manifest for an image that came without one.  Raises: NotFound: the image was removed."""
        try:
            config = await asyncio.to_thread(self._images.config_file(image).read_bytes)
            layers = [await self._descriptor(chain_id) for chain_id in image.chain]
        except OSError as error:
            raise NotFound(f"No such image: {image.id}") from error
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": _CONFIG_TYPE, "size": len(config), "digest": image.id},
            "layers": layers,
        }
        return msgspec.json.encode(document)

    async def _descriptor(self, chain_id: Digest) -> dict[str, str | int]:
        layers = self._images.layer_store
        layer = layers.get(chain_id)
        if layer is None:
            raise NotFound(f"layer {chain_id} is not on this node")
        path = layers.content(chain_id)
        digest = layer.blob or self._digests.get(chain_id)
        if not digest:
            digest = await self._digest(chain_id, path)
            if (present := layers.get(chain_id)) is not None and present.blob:
                digest = present.blob  # a push has compressed the layer meanwhile
            for gone in self._digests.keys() - layers.all().keys():
                del self._digests[gone]
        return {"mediaType": _LAYER_TYPE, "size": path.stat().st_size, "digest": digest}

    async def _digest(self, chain_id: Digest, path: Path) -> Digest:
        """Return the digest of a layer's file, read once for all requests.

        Reading continues after a request has ended, because a large file may take longer than a request.
        """
        reading = self._reading.get(chain_id)
        if reading is None:
            loop = asyncio.get_running_loop()
            reading = self._reading[chain_id] = loop.run_in_executor(None, digest_of_file, path)
            reading.add_done_callback(partial(self._have_read, chain_id))
        return await asyncio.shield(reading)

    def _have_read(self, chain_id: Digest, reading: asyncio.Future[Digest]) -> None:
        del self._reading[chain_id]
        if not reading.cancelled() and reading.exception() is None:
            self._digests[chain_id] = reading.result()


def _names(images: Iterable[Image]) -> frozenset[str]:
    return frozenset(name for image in images for name in image.spellings)


def _document(content: bytes) -> Document:
    """Return a document as its registry sent it.  Its reader finds the media type in the content."""
    return Document(content, DOCKER_MANIFEST)


def digest_of_file(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest(f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
