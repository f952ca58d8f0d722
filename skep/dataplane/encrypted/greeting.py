"""How two forwarders get to know each other: three messages, each sealed with a key that only the pair has.

A greeting carries its sender's public key (X25519, made anew by each forwarder), the epochs it has keys for, a
challenge, and the challenge last heard from the other.  A greeting is *believed* when it repeats the challenge that
is open: then it was made after that challenge, by who has the pair's key.  An old greeting that somebody sends again
repeats an old challenge, and changes nothing.

Layout, big-endian: ``version 1 | kind 1 | 0 0 | epoch 4 | nonce 12 | sealed``; the first 8 bytes are associated data.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from skep.dataplane.encrypted.frames import GREETING, VERSION
from skep.dataplane.encrypted.sealing import derived

CHALLENGE_BYTES = 8
NO_CHALLENGE = bytes(CHALLENGE_BYTES)
_EPOCHS_MAX = 8
_LABEL = b"skep overlay greeting 1"
_HEADER = struct.Struct("!BBHI")
_NONCE_BYTES = 12
_BODY = struct.Struct("!8s8s32sBB")


class Greeting(NamedTuple):
    """What one forwarder says to another."""

    challenge: bytes
    echo: bytes
    public: bytes
    wants_answer: bool
    epochs: tuple[int, ...]


def key_of(secret: bytes) -> AESGCM:
    """What greetings are sealed with.  ``secret``: the pair's key of an epoch in one direction."""
    return AESGCM(derived(secret, _LABEL))


def sealed(greeting: Greeting, epoch: int, key: AESGCM, random_bytes: Callable[[int], bytes]) -> bytes:
    """The datagram.  ``key``: of ``epoch`` in this direction.

    Its nonce is random: a pair says far fewer than 2^32 greetings in an epoch.
    """
    epochs = greeting.epochs[-_EPOCHS_MAX:]
    body = _BODY.pack(
        greeting.challenge, greeting.echo, greeting.public, greeting.wants_answer, len(epochs)
    ) + b"".join(struct.pack("!I", one) for one in epochs)
    header = _HEADER.pack(VERSION, GREETING, 0, epoch)
    nonce = random_bytes(_NONCE_BYTES)
    return header + nonce + key.encrypt(nonce, body, header)


def epoch_of(datagram: bytes | memoryview) -> int | None:
    """The epoch that a greeting is sealed under; None: it is no greeting of this version."""
    if len(datagram) < _HEADER.size + _NONCE_BYTES:
        return None
    version, kind, rest, epoch = _HEADER.unpack_from(datagram)
    return epoch if (version, kind, rest) == (VERSION, GREETING, 0) else None


def opened(datagram: bytes | memoryview, key: AESGCM) -> Greeting | None:
    """The greeting in ``datagram``; None: it was not made with the pair's key, or is malformed."""
    view = memoryview(datagram)
    header, nonce, rest = view[:8], view[8 : 8 + _NONCE_BYTES], view[8 + _NONCE_BYTES :]
    try:
        body = key.decrypt(nonce, rest, header)
    except InvalidTag:
        return None
    if len(body) < _BODY.size:
        return None
    challenge, echo, public, wants_answer, count = _BODY.unpack_from(body)
    if count > _EPOCHS_MAX or len(body) != _BODY.size + 4 * count:
        return None
    epochs = struct.unpack_from(f"!{count}I", body, _BODY.size)
    return Greeting(challenge, echo, public, bool(wants_answer), epochs)
