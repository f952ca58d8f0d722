"""What the name of an image says without being parsed as a reference."""

_HUB = frozenset({"docker.io", "index.docker.io"})


def registry_of(image: str) -> str:
    """The registry of an image's name (``registry:5000``); empty for Docker Hub, however it is spelled.

    Source: distribution/reference, normalize.go (splitDockerDomain).
    """
    first, slash, _ = image.partition("/")
    is_host = slash and ("." in first or ":" in first or first == "localhost")
    return first if is_host and first not in _HUB else ""
