"""Keys of encrypted overlays: a ring of secrets in the store, and what follows from it for each pair of nodes.

Nothing but the ring is kept.  A pair's key is derived from an epoch's secret, the sender and the receiver, so every
manager tells both nodes the same, and knowing one pair's key says nothing of another's.  Epochs are numbered by the
time they began (in seconds): they grow over a restore from an old backup, too, and no node takes an epoch it has
dropped before.
"""

import hmac
from collections.abc import Callable
from hashlib import sha256

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from skep.model.ids import NodeId
from skep.model.pair_keys import EPOCHS_KEPT, KEY_BYTES, PairKey
from skep.model.times import SECOND_NS, Timestamp, unix_ns

ROTATION_S = 12 * 3600.0
"""As long as docker nodes keep theirs."""

_PAIR_LABEL = b"skep overlay pair 1"
_WIREGUARD_LABEL = b"skep overlay wireguard 1"
_EPOCH_MAX = 2**32 - 1


class EpochSecret(msgspec.Struct, frozen=True):
    """What one epoch's keys are derived from: 32 random bytes."""

    epoch: int
    secret: bytes

    def __repr__(self) -> str:
        return f"EpochSecret(epoch={self.epoch})"


class KeyRing(msgspec.Struct, frozen=True, kw_only=True):
    """As the store keeps it (``OVERLAY_KEYS_ID``).  Newest secret last."""

    secrets: tuple[EpochSecret, ...]
    rotated_at: Timestamp
    """By the clock of the leader that did it."""
    incarnation: int = 0
    """Of the cluster, when it was rotated last: a cluster that lives on from a backup begins a new epoch at once."""
    wireguard: bytes
    """What nodes' own WireGuard keys are derived from; never rotated, since WireGuard does that by itself."""

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    def __repr__(self) -> str:
        return f"KeyRing(epochs={[one.epoch for one in self.secrets]}, rotated_at={self.rotated_at!r})"


def decoded_ring(data: bytes) -> KeyRing:
    return msgspec.json.decode(data, type=KeyRing)


def first_ring(random_bytes: Callable[[int], bytes], now: Timestamp, incarnation: int) -> KeyRing:
    """What a cluster begins with."""
    empty = KeyRing(secrets=(), rotated_at=now, wireguard=random_bytes(KEY_BYTES))
    return rotated(empty, random_bytes, now, incarnation)


def rotated(ring: KeyRing, random_bytes: Callable[[int], bytes], now: Timestamp, incarnation: int) -> KeyRing:
    """A new epoch begins; of more than three the oldest goes.

    No key lies ready before its time, as docker nodes' do: two of ours send with a new one only after each has said
    that it has it.
    """
    last = max((one.epoch for one in ring.secrets), default=0)
    epoch = min(max(last + 1, unix_ns(now) // SECOND_NS), _EPOCH_MAX)
    fresh = EpochSecret(epoch, random_bytes(KEY_BYTES))
    return msgspec.structs.replace(
        ring,
        secrets=(*ring.secrets[-(EPOCHS_KEPT - 1) :], fresh),
        rotated_at=now,
        incarnation=incarnation,
    )


def seconds_to_rotation(
    ring: KeyRing, now: Timestamp, incarnation: int, period_s: float = ROTATION_S
) -> float:
    """Until the next rotation is due: never more than a whole period, whatever another leader's clock said."""
    if ring.incarnation != incarnation:
        return 0.0
    age_s = (unix_ns(now) - unix_ns(ring.rotated_at)) / SECOND_NS
    return min(max(period_s - age_s, 0.0), period_s)


def pair_keys(ring: KeyRing, own: NodeId, other: NodeId) -> tuple[PairKey, ...]:
    """What ``own`` is told for talking to ``other``, oldest epoch first."""
    return tuple(
        PairKey(one.epoch, _pair_key(one, own, other), _pair_key(one, other, own)) for one in ring.secrets
    )


def wireguard_private(ring: KeyRing, node: NodeId) -> bytes:
    """The node's own WireGuard key (X25519, 32 bytes)."""
    return _derived(ring.wireguard, _WIREGUARD_LABEL + b"\0" + node.encode())


def wireguard_public(ring: KeyRing, node: NodeId) -> bytes:
    """What its peers are told."""
    private = X25519PrivateKey.from_private_bytes(wireguard_private(ring, node))
    return private.public_key().public_bytes_raw()


def _pair_key(secret: EpochSecret, sender: NodeId, receiver: NodeId) -> bytes:
    parts = (_PAIR_LABEL, secret.epoch.to_bytes(4, "big"), sender.encode(), receiver.encode())
    return _derived(secret.secret, b"\0".join(parts))


def _derived(secret: bytes, information: bytes) -> bytes:
    """32 bytes.  Source: RFC 5869, HKDF-Expand with SHA-256, of which one block is enough; ``secret`` is uniform."""
    return hmac.digest(secret, information + b"\x01", sha256)
