"""Exports a build's steps as a cache artifact: layers, a configuration with the records, and a manifest.

Source: buildkit, cache/remotecache/export.go (contentCacheExporter.Finalize).
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Protocol

import msgspec

from skep.engine.build.cache.step_records import CACHE_CONFIG_TYPE, CONFIG_BYTES_MAX, CacheLayer, cache_config
from skep.engine.build.interface import StepRecord
from skep.engine.images.digest import Digest, chain_ids, digest_of
from skep.engine.images.reference import Reference
from skep.engine.images.registry.pushing import layer_type, put_blob, put_manifest
from skep.engine.images.registry.registry import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Document,
    RegistryRepository,
)
from skep.engine.images.registry.uploads import BlobUpload
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument


class CacheDestination(Protocol):
    """Receiver of an artifact."""

    async def put(self, upload: BlobUpload) -> None:
        """Send a blob, unless the destination has it.  Raises: SkepError."""

    async def put_manifest(self, document: Document) -> None:
        """Send the manifest, after everything that it names.  Raises: SkepError."""


class RegistryDestination:
    """The tag of a repository that receives an artifact."""

    def __init__(self, repository: RegistryRepository, reference: Reference) -> None:
        self._repository = repository
        self._reference = reference

    async def put(self, upload: BlobUpload) -> None:
        """See ``CacheDestination``."""
        await put_blob(self._repository, self._reference.repository, upload)

    async def put_manifest(self, document: Document) -> None:
        """See ``CacheDestination``."""
        await put_manifest(self._repository, self._reference, document)


async def export_steps(
    images: ImageStore, records: Sequence[StepRecord], destination: CacheDestination, *, media_type: str
) -> str:
    """Send steps and their layers, and return the manifest's descriptor as JSON.  Empty without steps.

    Args:
        media_type: Media type of the manifest.  An index if the format is that of older BuildKit versions.

    Raises: NotFound: a layer was removed meanwhile; SkepError.
    """
    if not records:
        return ""
    kind = DOCKER_MANIFEST if media_type == DOCKER_LIST else OCI_MANIFEST
    layers: dict[Digest, CacheLayer] = {}
    async with AsyncExitStack() as stack:
        for record in records:
            chain = chain_ids(record.diff_ids)
            await stack.enter_async_context(images.pin(chain))
            for chain_id, diff_id in zip(chain, record.diff_ids, strict=True):
                if chain_id in layers:
                    continue
                blob = await images.layer_store.blob(chain_id)
                await destination.put(BlobUpload(digest=blob.digest, size=blob.size, path=blob.path))
                layers[chain_id] = CacheLayer(
                    blob=blob.digest, size=blob.size, diff_id=diff_id, media_type=layer_type(blob, kind)
                )
    config = cache_config(records, layers)
    if len(config) > CONFIG_BYTES_MAX:
        raise InvalidArgument(f"the records of a cache have more than {CONFIG_BYTES_MAX} bytes")
    await destination.put(BlobUpload(digest=digest_of(config), size=len(config), content=config))
    document = Document(_manifest(config, list(layers.values()), media_type), media_type)
    await destination.put_manifest(document)
    descriptor = {"mediaType": media_type, "digest": document.digest, "size": len(document.content)}
    return msgspec.json.encode(descriptor).decode()


def _manifest(config: bytes, layers: Sequence[CacheLayer], media_type: str) -> bytes:
    own = {"mediaType": CACHE_CONFIG_TYPE, "digest": digest_of(config), "size": len(config)}
    blobs = {
        layer.blob: {"mediaType": layer.media_type, "digest": layer.blob, "size": layer.size}
        for layer in layers
    }
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": media_type}
    if media_type in (OCI_INDEX, DOCKER_LIST):
        document["manifests"] = [*blobs.values(), own]
    else:
        document |= {"config": own, "layers": list(blobs.values())}
    return msgspec.json.encode(document)
