"""The file that ``skep backup`` writes and ``skep restore`` reads.

::

    SKEP-BACKUP-1\\n
    {"Kdf": "scrypt" | "hkdf", "Salt": ..., "Prefix": ...}\\n       in clear: how the key is made
    [length, 4 bytes, big endian][ciphertext]...                  pieces of at most 256 KiB

The pieces are AES-256-GCM, numbered in their nonces (prefix, number, whether it is the last: the STREAM
construction), with the two lines above as associated data; so nothing can be cut, moved or put together from two
files.  Their content is a manifest (length, JSON) and the snapshot of the store, which ends with its own SHA-256.

The file and its passphrase give access to the whole cluster: all secrets, and the key of its root CA.

The key is made on the caller's side: from a passphrase by scrypt, which is slow on purpose, or from a key file of at
least 32 random bytes by HKDF.

Source: Hoang, Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance
(STREAM); RFC 7914 (scrypt).
"""

import secrets
from collections.abc import Mapping
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from skep.errors import InvalidArgument
from skep.model.encoding import ApiObject
from skep.model.unknown import leniently

MAGIC = b"SKEP-BACKUP-1\n"
PIECE_BYTES = 256 * 1024
KEY_HEADER = "X-Skep-Backup-Key"
KEY_FILE_BYTES_MIN = 32

_KEY_BYTES = 32
_PREFIX_BYTES = 7
_SALT_BYTES = 16
_HEADER_BYTES_MAX = 1024
_FRAME_BYTES_MAX = PIECE_BYTES + 16
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**16, 8, 1

NOT_A_BACKUP = "this file is no backup of a swarm"
TORN = "the backup is damaged or not whole"
WRONG_KEY = "the backup does not open: the passphrase or key file is another one, or its beginning is damaged"


class Header(ApiObject):
    """How a file's key is made."""

    kdf: Literal["scrypt", "hkdf"]
    salt: bytes
    prefix: bytes


class BackupRequest(ApiObject):
    """Body of ``POST /skep/backup``.  ``key``: what the caller made of its passphrase and the header."""

    header: Header
    key: bytes


class Manifest(ApiObject):
    """What a backup is of.  The keys are never shown."""

    cluster_id: str
    node_id: str
    hostname: str
    listen_addr: str
    advertise_addr: str
    created_at: str
    incarnation: int
    skep_version: str
    counts: Mapping[str, int]
    root_pem: bytes
    root_key_pem: bytes
    wrapping_key: bytes


class RestorePlan(ApiObject):
    """Answer of ``POST /skep/restore``: what is in the backup, and what restoring it does or did."""

    cluster_id: str
    node_id: str
    hostname: str
    created_at: str
    incarnation: int
    skep_version: str
    counts: Mapping[str, int]
    advertise_addr: str
    is_done: bool


def new_header(kdf: Literal["scrypt", "hkdf"]) -> Header:
    """The header of a new file."""
    return Header(kdf=kdf, salt=secrets.token_bytes(_SALT_BYTES), prefix=secrets.token_bytes(_PREFIX_BYTES))


def key_of(secret: bytes, header: Header) -> bytes:
    """The key of a file, from its passphrase or the content of its key file.  Slow: half a second for a passphrase.

    Raises: InvalidArgument: the key file is too short.
    """
    if header.kdf == "scrypt":
        return Scrypt(header.salt, _KEY_BYTES, _SCRYPT_N, _SCRYPT_R, _SCRYPT_P).derive(secret)
    if len(secret) < KEY_FILE_BYTES_MIN:
        raise InvalidArgument(
            f"a key file has at least {KEY_FILE_BYTES_MIN} bytes: head -c 32 /dev/urandom > key"
        )
    return HKDF(hashes.SHA256(), _KEY_BYTES, header.salt, b"skep backup").derive(secret)


def opening(header: Header) -> bytes:
    """What a file begins with."""
    return MAGIC + msgspec.json.encode(header) + b"\n"


def parsed_opening(content: bytes) -> tuple[Header, int] | None:
    """The header in the beginning of a file, and where the pieces begin; None: more of it is needed.

    Raises: InvalidArgument: it is no backup.
    """
    if not MAGIC.startswith(content[: len(MAGIC)]):
        raise InvalidArgument(NOT_A_BACKUP)
    end = content.find(b"\n", len(MAGIC))
    if end < 0:
        if len(content) > _HEADER_BYTES_MAX:
            raise InvalidArgument(NOT_A_BACKUP)
        return None
    try:
        header = leniently(content[len(MAGIC) : end], Header)
    except msgspec.DecodeError as error:
        raise InvalidArgument(NOT_A_BACKUP) from error
    if len(header.prefix) != _PREFIX_BYTES or len(header.salt) != _SALT_BYTES:
        raise InvalidArgument(NOT_A_BACKUP)
    return header, end + 1


class Sealer:
    """Writes the pieces of one file, in order."""

    def __init__(self, header: Header, key: bytes) -> None:
        """Raises: InvalidArgument: no such key."""
        if len(key) != _KEY_BYTES or len(header.prefix) != _PREFIX_BYTES:
            raise InvalidArgument("the key of a backup has 32 bytes and its prefix 7")
        self._cipher = AESGCM(key)
        self._header = header
        self._about = opening(header)
        self._number = 0
        self._waiting = b""

    def manifest(self, manifest: Manifest) -> bytes:
        """The file's first bytes."""
        encoded = msgspec.json.encode(manifest)
        return self._about + self.add(len(encoded).to_bytes(4, "big") + encoded)

    def add(self, content: bytes) -> bytes:
        """The pieces that ``content`` fills."""
        self._waiting += content
        pieces: list[bytes] = []
        while len(self._waiting) > PIECE_BYTES:
            pieces.append(self._sealed(self._waiting[:PIECE_BYTES], is_last=False))
            self._waiting = self._waiting[PIECE_BYTES:]
        return b"".join(pieces)

    def end(self) -> bytes:
        """The last piece."""
        return self._sealed(self._waiting, is_last=True)

    def _sealed(self, content: bytes, *, is_last: bool) -> bytes:
        nonce = _nonce(self._header, self._number, is_last=is_last)
        self._number += 1
        frame = self._cipher.encrypt(nonce, content, self._about)
        return len(frame).to_bytes(4, "big") + frame


class Opener:
    """Reads one file, piece by piece, however it arrives."""

    def __init__(self, key: bytes) -> None:
        """``key``: of this file; see ``key_of`` and ``parsed_opening``."""
        self._key = key
        self._cipher: AESGCM | None = None
        self._header: Header | None = None
        self._about = b""
        self._waiting = b""
        self._content = b""
        self._number = 0
        self._is_ended = False
        self.manifest: Manifest | None = None

    def feed(self, content: bytes) -> bytes:
        """More of the file; gives what of the snapshot has become readable.

        Raises: InvalidArgument: it is no backup, is damaged, or is of another key.
        """
        self._waiting += content
        if self._header is None and not self._open():
            return b""
        while (frame := self._next_frame()) is not None:
            self._content += self._opened(frame)
        if self.manifest is None and not self._read_manifest():
            return b""
        readable, self._content = self._content, b""
        return readable

    def check_whole(self) -> Manifest:
        """The manifest, at the end of the file.  Raises: InvalidArgument: a part of the file is missing."""
        if self._header is None and not MAGIC.startswith(self._waiting[: len(MAGIC)] or b"?"):
            raise InvalidArgument(NOT_A_BACKUP)
        if not self._is_ended or self._waiting or self.manifest is None:
            raise InvalidArgument(TORN)
        return self.manifest

    def _open(self) -> bool:
        parsed = parsed_opening(self._waiting)
        if parsed is None:
            return False
        self._header, start = parsed
        self._about, self._waiting = self._waiting[:start], self._waiting[start:]
        try:
            self._cipher = AESGCM(self._key)
        except ValueError as error:
            raise InvalidArgument(WRONG_KEY) from error
        return True

    def _next_frame(self) -> bytes | None:
        if len(self._waiting) < 4:
            return None
        length = int.from_bytes(self._waiting[:4], "big")
        if self._is_ended or not 16 <= length <= _FRAME_BYTES_MAX:
            raise InvalidArgument(TORN)
        if len(self._waiting) < 4 + length:
            return None
        frame, self._waiting = self._waiting[4 : 4 + length], self._waiting[4 + length :]
        return frame

    def _opened(self, frame: bytes) -> bytes:
        assert self._cipher is not None, "opened before"
        assert self._header is not None, "opened before"
        for is_last in (False, True):
            nonce = _nonce(self._header, self._number, is_last=is_last)
            try:
                content = self._cipher.decrypt(nonce, frame, self._about)
            except InvalidTag:
                continue
            self._number += 1
            self._is_ended = is_last
            return content
        raise InvalidArgument(TORN if self._number else WRONG_KEY)

    def _read_manifest(self) -> bool:
        if len(self._content) < 4:
            return False
        end = 4 + int.from_bytes(self._content[:4], "big")
        if len(self._content) < end:
            return False
        try:
            self.manifest = leniently(self._content[4:end], Manifest)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"the backup is of another version of skep: {error}") from error
        self._content = self._content[end:]
        return True


def _nonce(header: Header, number: int, *, is_last: bool) -> bytes:
    return header.prefix + number.to_bytes(4, "big") + (b"\x01" if is_last else b"\x00")
