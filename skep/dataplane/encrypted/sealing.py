"""Sealing and opening units: AES-256-GCM with a key per session, direction and epoch.

No nonce is ever used twice with one key.  Between two lives of a forwarder the keys differ, since each of them makes
a new X25519 key pair per peer and the session's key is derived of both ends' public keys.  Within one life no two
sealers share a counter: each begins in a range of its own (its serial number is the counter's upper 24 bits).
"""

import itertools
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from skep.dataplane.encrypted.frames import HEADER, NONCE, PIECE, PIECES_MAX, VERSION, count_of, cut
from skep.dataplane.encrypted.reassembly import Reassembly
from skep.dataplane.encrypted.replay import ReplayWindow
from skep.model.pair_keys import KEY_BYTES

_FRAMES_LABEL = b"skep overlay frames 1"
_SERIAL_BITS = 24
_COUNTER_BITS = 64 - _SERIAL_BITS
_serials = itertools.count()


class Exhausted(Exception):
    """A sealer has no counter left: its peer needs a new one."""


class Session(NamedTuple):
    """What two forwarders have agreed on.  ``secret``: of their Diffie-Hellman exchange."""

    number: int
    secret: bytes
    own_public: bytes
    peer_public: bytes


def agree(private: X25519PrivateKey, own_public: bytes, peer_public: bytes) -> Session:
    """The session of two ends that know each other's public key.  Both compute the same number and secret.

    Raises: ValueError: the other's key is none that may be used.
    """
    secret = private.exchange(X25519PublicKey.from_public_bytes(peer_public))
    digest = Hash(SHA256())
    digest.update(b"".join(sorted((own_public, peer_public))))
    return Session(int.from_bytes(digest.finalize()[:4], "big"), secret, own_public, peer_public)


def derived(secret: bytes, information: bytes) -> bytes:
    """A key of 32 bytes.  Source: RFC 5869 (HKDF) with SHA-256 and no salt: ``secret`` is uniform."""
    return HKDF(SHA256(), KEY_BYTES, None, information).derive(secret)


class Sealer:
    """Seals units for one peer under one epoch.  One thread's: a counter is taken, never given back."""

    def __init__(self, session: Session, epoch: int, sending: bytes) -> None:
        self.epoch = epoch
        self.session = session.number
        serial = next(_serials)
        if serial >> _SERIAL_BITS:
            raise Exhausted("no range of counters is left")
        self._counters = iter(range(serial << _COUNTER_BITS, (serial + 1) << _COUNTER_BITS))
        information = _FRAMES_LABEL + session.own_public + session.peer_public
        self._aead = AESGCM(derived(sending + session.secret, information))

    def seal(self, network: int, content: bytes | memoryview, piece: int) -> list[bytes]:
        """The pieces of ``piece`` bytes that carry ``content``.

        Raises: Exhausted; ValueError: it takes more pieces than there can be.
        """
        count = count_of(len(content), piece)
        if count > PIECES_MAX:
            raise ValueError(f"a unit of {len(content)} bytes takes {count} pieces")
        counter = next(self._counters, None)
        if counter is None:
            raise Exhausted("all counters of a session are used")
        header = HEADER.pack(VERSION, PIECE, 0, count, network, self.epoch, self.session, counter)
        return cut(header, self._aead.encrypt(NONCE.pack(0, counter), content, header), piece)


class Opener:
    """Opens units of one peer under one epoch, each once.  One thread's."""

    def __init__(self, session: Session, receiving: bytes) -> None:
        information = _FRAMES_LABEL + session.peer_public + session.own_public
        self._aead = AESGCM(derived(receiving + session.secret, information))
        self._window = ReplayWindow()
        self.reassembly = Reassembly()

    def may_open(self, counter: int) -> bool:
        """Whether this counter was not opened yet; asked before anything is kept or computed."""
        return self._window.may_open(counter)

    def open(self, counter: int, associated: bytes, sealed: bytes | memoryview) -> bytes | None:
        """The content of a unit; None: it is not the peer's, or not as the peer sent it."""
        try:
            content = self._aead.decrypt(NONCE.pack(0, counter), sealed, associated)
        except InvalidTag:
            return None
        self._window.mark(counter)
        return content
