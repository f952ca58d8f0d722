"""Content addresses: ``sha256:`` and 64 hexadecimal digits."""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NewType

from skep.errors import InvalidArgument

Digest = NewType("Digest", str)

_FORMAT = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[a-zA-Z0-9=_-]+", re.ASCII)
_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}
_SHORT_LENGTH = 12
"""Number of characters of the ids that docker shows."""


def parse_digest(text: str) -> Digest:
    """Return ``text`` as a digest.

    Raises:
        InvalidArgument: it is not a digest, with the texts of Docker's digest library.

    Source: opencontainers/go-digest, digest.go (Validate).
    """
    algorithm, colon, digits = text.partition(":")
    if not colon or not digits or not _FORMAT.fullmatch(text):
        raise InvalidArgument("invalid checksum digest format")
    if algorithm not in _LENGTHS:
        raise InvalidArgument("unsupported digest algorithm")
    if len(digits) != _LENGTHS[algorithm]:
        raise InvalidArgument("invalid checksum digest length")
    if not re.fullmatch(r"[a-f0-9]+", digits):
        raise InvalidArgument("invalid checksum digest format")
    return Digest(text)


def is_digest(text: str) -> bool:
    """Return whether ``text`` is a well-formed digest."""
    try:
        parse_digest(text)
    except InvalidArgument:
        return False
    return True


def digest_of(content: bytes) -> Digest:
    """Return the SHA-256 address of ``content``."""
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


def hex_of(digest: str) -> str:
    """Return the digits without the algorithm, which name files in the store."""
    return digest.partition(":")[2]


def short(digest: str) -> str:
    """Return the first twelve digits, as Docker shows ids and progress."""
    return digest.rpartition(":")[2][:_SHORT_LENGTH]


def chain_ids(diff_ids: Iterable[str]) -> tuple[Digest, ...]:
    """Return the chain id of each layer, bottom first.  It identifies the layer together with all layers below it.

    Source: OCI image-spec, config.md (Layer ChainID).
    """
    chain: list[Digest] = []
    for diff_id in diff_ids:
        chain.append(chain_id_above(chain[-1] if chain else None, diff_id))
    return tuple(chain)


@lru_cache(
    maxsize=16_384
)  # cached (some 5 MB), because the store needs the chains of all images whenever a layer may be removed
def chain_id_above(below: str | None, diff_id: str) -> Digest:
    """Return the id of the layer ``diff_id`` on top of the chain ``below``.  None for the lowest layer."""
    return Digest(diff_id) if below is None else digest_of(f"{below} {diff_id}".encode())
