"""Tracks running pulls: the blobs that they download, and the references that they pull."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from skep.engine.images.reference import Reference


class Arriving:
    """Configurations and layers that running pulls download, by their digests in the registry."""

    def __init__(self) -> None:
        self._references: dict[str, list[Reference]] = {}
        self._downloaded: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        """Return whether the blob is being downloaded or unpacked."""
        return digest in self._downloaded

    def add(self, digest: str) -> None:
        """Record that the download of a blob has started."""
        self._downloaded.add(digest)

    def discard(self, digest: str) -> None:
        """Record that a blob is stored, or that its download has failed."""
        self._downloaded.discard(digest)

    def references(self, digest: str) -> Sequence[Reference]:
        """Return the references whose pulls need the blob."""
        return tuple(self._references.get(digest, ()))

    @contextmanager
    def expecting(self, digests: Iterable[str], references: Sequence[Reference]) -> Iterator[None]:
        """Record within the context that a pull of ``references`` needs these blobs."""
        expected = tuple(digests)
        for digest in expected:
            self._references.setdefault(digest, []).extend(references)
        try:
            yield
        finally:
            for digest in expected:
                left = self._references[digest]
                for reference in references:
                    left.remove(reference)
                if not left:
                    del self._references[digest]
