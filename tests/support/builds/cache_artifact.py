"""A cache of build steps whose records a test can falsify."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from skep.engine.images.digest import digest_of
from skep.engine.images.registry.endpoints import TRANSFERS
from skep.engine.images.registry.registry import OCI_MANIFEST, Document
from skep.engine.images.registry.uploads import BlobUpload
from skep.errors import NotFound


class Artifact:
    """A cache in memory, of which a test may change the configuration."""

    name = "a lie"

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifest_bytes = b""

    async def put(self, upload: BlobUpload) -> None:
        self.blobs[upload.digest] = upload.path.read_bytes() if upload.path else upload.content

    transfers = TRANSFERS

    async def put_manifest(self, document: Document) -> None:
        self.manifest_bytes = document.content

    async def at(self, action: Any) -> Any:
        return await action(self)

    async def manifest(self, _target: str, _bytes_max: int) -> Document:
        return Document(self.manifest_bytes, OCI_MANIFEST)

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield self.blobs[digest][start:]

        if digest not in self.blobs:
            raise NotFound("blob unknown to registry")
        yield start, pieces()

    def mistrust(self, _digest: str) -> bool:
        return False

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the records, with a manifest that fits."""
        manifest = json.loads(self.manifest_bytes)
        config = json.loads(self.blobs[manifest["config"]["digest"]])
        change(config)
        content = json.dumps(config).encode()
        manifest["config"] |= {"digest": digest_of(content), "size": len(content)}
        self.blobs[digest_of(content)] = content
        self.manifest_bytes = json.dumps(manifest).encode()
