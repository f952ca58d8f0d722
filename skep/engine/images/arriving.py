"""Blobs of pulls under way: which of them are on their way, and what is pulled."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from skep.engine.images.reference import Reference


class Arriving:
    """The configurations and layers of pulls under way, by their digests as the registry names them."""

    def __init__(self) -> None:
        self._references: dict[str, list[Reference]] = {}
        self._downloaded: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        """Whether the blob is being downloaded or unpacked."""
        return digest in self._downloaded

    def add(self, digest: str) -> None:
        """Note that the download of a blob has begun."""
        self._downloaded.add(digest)

    def discard(self, digest: str) -> None:
        """Note that a blob is here, or that its download has failed."""
        self._downloaded.discard(digest)

    def references(self, digest: str) -> Sequence[Reference]:
        """Return the references that are pulled, and need the blob."""
        return tuple(self._references.get(digest, ()))

    @contextmanager
    def expecting(self, digests: Iterable[str], references: Sequence[Reference]) -> Iterator[None]:
        """While a pull is under way: its blobs belong to ``references``, although there is no image yet."""
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
