"""What a registry may keep that is no image."""

import pytest

from skep.engine.images.registry.manifests import Descriptor, Manifest, require_image
from skep.engine.images.registry.registry import DOCKER_MANIFEST, OCI_MANIFEST
from skep.errors import InvalidArgument


def a_manifest(media_type: str, config: str, *layers: str) -> Manifest:
    def descriptor(kind: str) -> Descriptor:
        return Descriptor(media_type=kind, digest="sha256:" + "0" * 64, size=1)

    return Manifest(
        media_type=media_type,
        config=descriptor(config),
        layers=tuple(descriptor(layer) for layer in layers),
    )


@pytest.mark.parametrize(
    "manifest",
    [
        a_manifest(
            DOCKER_MANIFEST,
            "application/vnd.docker.container.image.v1+json",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ),
        a_manifest(
            OCI_MANIFEST,
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.oci.image.layer.v1.tar+zstd",
        ),
        a_manifest("", "application/vnd.oci.image.config.v1+json"),
        a_manifest(DOCKER_MANIFEST, "application/octet-stream", "application/octet-stream"),
        a_manifest(DOCKER_MANIFEST, "", ""),
    ],
)
def test_an_image_is_one(manifest: Manifest) -> None:
    require_image(manifest)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (
            a_manifest(DOCKER_MANIFEST, "application/vnd.docker.plugin.v1+json"),
            'Encountered remote "application/vnd.docker.plugin.v1+json"(plugin) when fetching',
        ),
        (
            a_manifest(DOCKER_MANIFEST, "application/vnd.made.up"),
            'Encountered remote "application/vnd.made.up"(unknown) when fetching',
        ),
        (
            a_manifest(OCI_MANIFEST, "application/vnd.cncf.helm.config.v1+json"),
            "unsupported media type application/vnd.cncf.helm.config.v1+json",
        ),
        (
            a_manifest(
                OCI_MANIFEST,
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.dev.cosign.simplesigning.v1+json",
            ),
            "unsupported media type application/vnd.dev.cosign.simplesigning.v1+json",
        ),
        (
            a_manifest(OCI_MANIFEST, "application/vnd.docker.ai.model.config.v0.1+json"),
            'AI models are not yet supported by the Engine, please use "docker model pull/run" instead',
        ),
    ],
)
def test_what_is_no_image_is_refused_in_dockers_words(manifest: Manifest, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        require_image(manifest)
    assert str(refused.value) == words
