"""Finds the registry in an image name without parsing the name as a reference."""

_HUB = frozenset({"docker.io", "index.docker.io"})


def registry_of(image: str) -> str:
    """Return the registry in an image name (``registry:5000``), or an empty text for any spelling of Docker Hub.

    Source: distribution/reference, normalize.go (splitDockerDomain).
    """
    first, slash, _ = image.partition("/")
    is_host = slash and ("." in first or ":" in first or first == "localhost")
    return first if is_host and first not in _HUB else ""
