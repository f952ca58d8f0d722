"""An image as a registry keeps it: configuration, layers, manifest."""

import gzip
import json
import os

from skep.engine.images.registry import DOCKER_MANIFEST
from tests.support.archives import a_config, a_file, a_layer, a_tar, sha256

LAYERS = (a_layer(), a_tar(a_file("data", os.urandom(300_000))))
BLOBS = tuple(gzip.compress(layer, mtime=0) for layer in LAYERS)
CONFIG = a_config(*LAYERS)


def a_manifest(
    config: bytes = CONFIG, blobs: tuple[bytes, ...] = BLOBS, media_type: str = DOCKER_MANIFEST
) -> bytes:
    def descriptor(content: bytes) -> dict[str, object]:
        return {"mediaType": "application/octet-stream", "digest": sha256(content), "size": len(content)}

    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor(config),
        "layers": [descriptor(blob) for blob in blobs],
    }
    return json.dumps(document).encode()
