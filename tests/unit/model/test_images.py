"""The registry in the name of an image."""

import pytest

from skep.engine.images.reference import DEFAULT_DOMAIN, parse_reference
from skep.model.values.images import registry_of


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("app", ""),
        ("team/app:1", ""),
        ("docker.io/app", ""),
        ("docker.io/team/app:1", ""),
        ("index.docker.io/app", ""),
        ("localhost/app", "localhost"),
        ("localhost:5000/app", "localhost:5000"),
        ("r:5000/app", "r:5000"),
        ("r.io/a/b@sha256:" + "0" * 64, "r.io"),
    ],
)
def test_the_registry_of_an_image_is_the_host_it_begins_with_or_docker_hub(image: str, registry: str) -> None:
    assert registry_of(image) == registry
    assert parse_reference(image).domain == (registry or DEFAULT_DOMAIN)
