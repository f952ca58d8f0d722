"""Decodes manifests and indexes, a registry's documents that list the parts of an image.

Source: OCI image-spec, manifest.md, image-index.md; moby, distribution/{registry,pull_v2}.go.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from skep.engine.images.registry.refusals import NOT_JSON
from skep.engine.images.registry.registry import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Document,
)
from skep.errors import InvalidArgument

_PLUGIN = "application/vnd.docker.plugin.v1+json"
_UNSPECIFIC = frozenset({"", "application/json", "application/octet-stream", "text/html"})
"""Unspecific media types that old registries sent for configurations and layers."""
_CONFIG_TYPES = _UNSPECIFIC | {
    "application/vnd.docker.container.image.v1+json",
    "application/vnd.oci.image.config.v1+json",
}
_PREFIXES = ("application/vnd.docker.", "application/vnd.oci.image.")


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A reference to content, by digest."""

    media_type: str = ""
    digest: str
    size: int
    platform: Mapping[str, Any] | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A manifest (``config``, ``layers``) or an index (``manifests``)."""

    media_type: str = ""
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    manifests: tuple[Descriptor, ...] | None = None


def decoded(document: Document) -> Manifest:
    """Decode the manifest or index in ``document``.  Raises: InvalidArgument."""
    try:
        manifest = msgspec.json.decode(document.content, type=Manifest)
    except NOT_JSON as error:
        raise InvalidArgument(f"invalid manifest: {error}") from error
    kind = manifest.media_type or document.media_type
    if kind not in (DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX):
        raise InvalidArgument(f"unsupported manifest format: {kind}")
    if (manifest.manifests is None) == (manifest.config is None):
        raise InvalidArgument("invalid manifest: it must have either a configuration or manifests")
    return manifest


def require_image(manifest: Manifest) -> None:
    """Refuse manifests that do not describe an image, such as manifests of plugins and charts.

    Raises: InvalidArgument: with Docker's texts.

    Source: moby, distribution/pull_v2.go (validateMediaType, checkSupportedMediaType).
    """
    assert manifest.config is not None, "it is not an index"
    config_type = manifest.config.media_type
    if manifest.media_type == DOCKER_MANIFEST and config_type not in _CONFIG_TYPES:
        kind = "plugin" if config_type == _PLUGIN else "unknown"
        raise InvalidArgument(f'Encountered remote "{config_type}"({kind}) when fetching')
    for media_type in (config_type, *(layer.media_type for layer in manifest.layers)):
        known = media_type.lower()
        if known.startswith("application/vnd.docker.ai."):
            raise InvalidArgument(
                'AI models are not yet supported by the Engine, please use "docker model pull/run" instead'
            )
        if known not in _UNSPECIFIC and not known.startswith(_PREFIXES):
            raise InvalidArgument(f"unsupported media type {media_type}")
