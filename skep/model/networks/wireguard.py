"""The public keys by which nodes encrypt overlay networks to each other with WireGuard.

A node makes its key pairs itself and publishes the public keys in its description, which it sends over its
authenticated session; no private key ever leaves the node.  While a node rotates its key it publishes two.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final

import msgspec

from skep.model.networks.addresses import PORT_MAX

KEY_BYTES: Final = 32
"""Size of a Curve25519 key."""
KEYS_MAX: Final = 2
"""Maximum number of keys per node: the present key and, during a rotation, the previous one."""

ENCRYPTION_LABEL: Final = "skep.encryption"
"""Engine label with the ``EncryptionMethod`` of a node.  Without the label, the node does not encrypt."""
PUBLIC_KEYS_LABEL: Final = "skep.wireguard"
"""Engine label with the node's public keys: ``KEY@PORT`` in base64, the oldest first, separated by commas.

Managers and nodes of older versions ignore it: they exchange nothing on encrypted networks with nodes of this version.
"""


class EncryptionMethod(Enum):
    """Encryption of traffic to other nodes.  ``docker info`` and ``docker node inspect`` show the values."""

    KERNEL = "kernel"
    """WireGuard in the Linux kernel."""
    USER_SPACE = "wireguard-go"
    """wireguard-go from the distribution, which runs as a process."""


class PublicKey(msgspec.Struct, frozen=True, order=True):
    """A node's public key (X25519, 32 bytes) and the UDP port where packets for it are received."""

    key: bytes
    port: int

    @property
    def is_valid(self) -> bool:
        """Return whether the key has 32 bytes and the port number is valid."""
        return len(self.key) == KEY_BYTES and 0 < self.port <= PORT_MAX


def public_keys_label(keys: Iterable[PublicKey]) -> str:
    """Return the value of ``PUBLIC_KEYS_LABEL`` for ``keys``."""
    return ",".join(f"{b64encode(one.key).decode()}@{one.port}" for one in keys)


def published_keys(labels: Mapping[str, str]) -> tuple[PublicKey, ...]:
    """Return the keys that a node's engine labels publish, oldest first; malformed keys are ignored."""
    words = labels.get(PUBLIC_KEYS_LABEL, "").split(",")
    parsed = (parsed_key(word) for word in words[:KEYS_MAX])
    return tuple(one for one in parsed if one is not None)


def parsed_key(word: str) -> PublicKey | None:
    """Return the key that ``KEY@PORT`` names, or None if it is malformed."""
    text, _, port = word.partition("@")
    try:
        found = PublicKey(b64decode(text, validate=True), int(port))
    except ValueError:
        return None
    return found if found.is_valid else None
