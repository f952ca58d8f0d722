"""Encryption of stored values: AES-256-GCM with the cluster's data key.

A stored value consists of one byte for the layout version, four for the key id, twelve for the nonce, and the
ciphertext with its tag.  The name of the store key is the associated data, so a value cannot be moved to another key.
Names are not encrypted.

The data keys are in the store.  A wrapping key, which each manager has in its key directory, encrypts them (RFC 3394).
While the wrapping key is being replaced, a manager keeps several: all that may wrap the ring at its next start.
``meta/...`` is not encrypted, because it is read before any key is known.
"""

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from skep.errors import FailedPrecondition, SkepError

_LAYOUT = b"\x01"
_NONCE_BYTES = 12
"""A nonce of AES-GCM."""
_HEADER_BYTES = 1 + 4 + _NONCE_BYTES
"""Version, number of the key, and nonce."""
KEY_BYTES = 32
"""AES-256."""
WRAPPING_KEYS_MAX = 16
"""Maximum wrapping keys that a manager keeps.  Older ones, which failed replacements left, are dropped."""


class Undecryptable(SkepError):
    """A stored value cannot be decrypted: it is damaged, was moved, or has an unknown key."""


class WrappedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A wrapped data key.  ``id`` is 1 or more."""

    id: int
    wrapped: bytes


class KeyRing(msgspec.Struct, frozen=True, kw_only=True):
    """All data keys that values may be encrypted with.  ``current`` is the id of the key for new values."""

    current: int
    keys: tuple[WrappedKey, ...]

    def with_new_key(self, wrapping_key: bytes) -> "KeyRing":
        """Return the ring with one more data key, which is the current one."""
        id = self.current + 1
        return KeyRing(current=id, keys=(*self.keys, _new_key(id, wrapping_key)))

    def without_old_keys(self) -> "KeyRing":
        """Return the ring with its current key only.  Call it once no value is encrypted with another key."""
        return KeyRing(current=self.current, keys=tuple(key for key in self.keys if key.id == self.current))

    def rewrapped(self, old: bytes, new: bytes) -> "KeyRing":
        """Return the same data keys, wrapped with another key.  Raises FailedPrecondition."""
        return KeyRing(
            current=self.current,
            keys=tuple(
                WrappedKey(id=key.id, wrapped=aes_key_wrap(new, _unwrapped(key, old))) for key in self.keys
            ),
        )


def split_keys(keys: bytes) -> tuple[bytes, ...]:
    """Split concatenated wrapping keys of 32 bytes each.  Raises FailedPrecondition."""
    if not keys or len(keys) % KEY_BYTES:
        raise FailedPrecondition(
            f"{len(keys)} bytes are not a whole number of wrapping keys of {KEY_BYTES} bytes"
        )
    return tuple(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))


def decoded_ring(stored: bytes) -> KeyRing:
    """Decode the stored ring.  Raises FailedPrecondition if it is damaged."""
    try:
        return msgspec.json.decode(stored, type=KeyRing)
    except msgspec.DecodeError as error:
        raise FailedPrecondition(f"the cluster's key ring is damaged: {error}") from error


def new_key_ring(wrapping_key: bytes) -> KeyRing:
    """Return a ring with one new data key."""
    return KeyRing(current=1, keys=(_new_key(1, wrapping_key),))


def new_wrapping_key() -> bytes:
    """Return a new wrapping key."""
    return secrets.token_bytes(KEY_BYTES)


class Cipher:
    """Encrypts and decrypts values with the keys of a ring.

    Attributes:
        ring_revision: Revision of the stored ring.  Every write compares it, so that nothing is encrypted with an older
            data key once the store has a new one.
        changed: Set whenever the ring changes.
        rewrapped: Set when its wrapping key changes.
    """

    def __init__(self, ring: KeyRing, wrapping_keys: bytes, ring_revision: int = 0) -> None:
        """Open ``ring`` with ``wrapping_keys`` (see ``split_keys``).  Raises FailedPrecondition if none unwraps it."""
        self.wrapping_keys = split_keys(wrapping_keys)
        self.wrapping_key = self.wrapping_keys[0]
        """The key that wraps the ring."""
        self.rewrapped = asyncio.Event()
        self._keys: dict[bytes, AESGCM] = {}
        self._current = b""
        self.ring = ring
        self.ring_revision = 0
        self.changed = asyncio.Event()
        self.use(ring, ring_revision)

    def use(self, ring: KeyRing, revision: int) -> None:
        """Use a changed ring, unless it is older than the current one.  Raises FailedPrecondition.

        Removed keys are kept until the process ends, because the watch may still deliver older values.
        """
        if revision < self.ring_revision:
            return
        wrapping_key, opened = _unwrapped_ring(ring, self.wrapping_keys)
        keys = {id.to_bytes(4, "big"): AESGCM(key) for id, key in opened.items()}
        current = ring.current.to_bytes(4, "big")
        if current not in keys:
            raise FailedPrecondition(f"the key ring lacks its current key {ring.current}")
        self._keys |= keys
        self._current, self.ring, self.ring_revision = current, ring, revision
        if wrapping_key != self.wrapping_key:
            self.wrapping_key = wrapping_key
            self.rewrapped.set()
        self.changed.set()

    def learn(self, wrapping_key: bytes) -> None:
        """Also accept rings with this wrapping key."""
        if wrapping_key not in self.wrapping_keys:
            others = [key for key in self.wrapping_keys if key != self.wrapping_key]
            kept = others[-(WRAPPING_KEYS_MAX - 2) :]
            self.wrapping_keys = (self.wrapping_key, *kept, *split_keys(wrapping_key))

    def new_ring(self) -> KeyRing:
        """Return the ring with one more data key, which is the new current key."""
        return self.ring.with_new_key(self.wrapping_key)

    def rewrapped_ring(self, wrapping_key: bytes) -> KeyRing:
        """Return the ring with another wrapping key, and a new data key that the old one never wrapped."""
        return self.ring.rewrapped(self.wrapping_key, wrapping_key).with_new_key(wrapping_key)

    def is_current(self, stored: bytes) -> bool:
        """Return whether a stored value is encrypted with the current data key."""
        return stored[1:5] == self._current

    def encrypt(self, key: bytes, value: bytes) -> bytes:
        """Return ``value`` in the form in which ``key`` stores it.  No two results are equal."""
        # Random nonces are safe for 2**32 values per data key; `rotation` makes a new key before that.
        nonce = os.urandom(_NONCE_BYTES)
        return b"".join((_LAYOUT, self._current, nonce, self._keys[self._current].encrypt(nonce, value, key)))

    def decrypt(self, key: bytes, stored: bytes) -> bytes:
        """Return the value that was encrypted for ``key``.  Raises Undecryptable."""
        if stored[:1] != _LAYOUT:
            raise Undecryptable("unknown layout of an encrypted value")
        opener = self._keys.get(stored[1:5])
        if opener is None:
            raise Undecryptable(f"unknown data key {int.from_bytes(stored[1:5], 'big')}")
        try:
            return opener.decrypt(stored[5:_HEADER_BYTES], stored[_HEADER_BYTES:], key)
        except (InvalidTag, ValueError) as error:
            raise Undecryptable("a stored value is damaged, or was moved from another key") from error


def _unwrapped_ring(ring: KeyRing, wrapping_keys: Sequence[bytes]) -> tuple[bytes, dict[int, bytes]]:
    """Return the wrapping key of the ring, and its data keys by id.  Raises FailedPrecondition if no key unwraps it."""
    *others, last = wrapping_keys
    for wrapping_key in others:
        with suppress(FailedPrecondition):
            return wrapping_key, {key.id: _unwrapped(key, wrapping_key) for key in ring.keys}
    return last, {key.id: _unwrapped(key, last) for key in ring.keys}


def _new_key(id: int, wrapping_key: bytes) -> WrappedKey:
    return WrappedKey(id=id, wrapped=aes_key_wrap(wrapping_key, secrets.token_bytes(KEY_BYTES)))


def _unwrapped(key: WrappedKey, wrapping_key: bytes) -> bytes:
    try:
        return aes_key_unwrap(wrapping_key, key.wrapped)
    except (InvalidUnwrap, ValueError) as error:
        raise FailedPrecondition(
            "this manager's wrapping key does not open the cluster's keys: is it from another cluster?"
        ) from error
