"""The format of backup files, which ``skep backup`` writes and ``skep restore`` reads.

::

    SKEP-BACKUP-1\\n
    {"Kdf": "scrypt" | "hkdf", "Salt": ..., "Prefix": ...}\\n       in clear: derivation of the key
    [length, 4 bytes, big endian][ciphertext]...                  pieces of at most 256 KiB

Each piece is encrypted with AES-256-GCM.  Its nonce has the prefix, its number and whether it is the last piece (the
STREAM construction), and the two lines above are associated data.  So pieces cannot be cut off, moved, or combined
from two files.  Their content is a manifest (length, JSON) and the snapshot of the store, which ends with its SHA-256.

Anyone who has the file and its passphrase has access to the whole cluster: all secrets, and the key of its root CA.

The caller derives the key: from a passphrase by scrypt, which is slow on purpose, or from a key file of at least 32
random bytes by HKDF.

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
from skep.model.values.encoding import ApiObject
from skep.model.values.unknown import leniently

MAGIC = b"SKEP-BACKUP-1\n"
PIECE_BYTES = 256 * 1024
"""Plain bytes that are encrypted and authenticated at a time, so that a backup of any size needs little memory."""
KEY_HEADER = "X-Skep-Backup-Key"
KEY_FILE_BYTES_MIN = 32
"""Shortest key file, as long as the key itself.  The content of a shorter file would be easier to guess than the
key.
"""

_KEY_BYTES = 32
"""AES-256."""
_PREFIX_BYTES = 7
"""Length of the nonce's random part.  The other bytes are the piece's number and the mark of the last piece."""
_SALT_BYTES = 16
"""Source: RFC 9106, section 3.1, which recommends 128 bits for password hashing."""
_HEADER_BYTES_MAX = 1024
"""Longest header.  It is far longer than real headers, so a file with a longer one is not a backup."""
_FRAME_BYTES_MAX = PIECE_BYTES + 16
"""Longest encrypted piece, including the tag of AES-GCM."""
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**16, 8, 1
"""Each guess of a passphrase needs 64 MiB (128 x r x N bytes)."""

NOT_A_BACKUP = "this file is not a backup of a cluster"
TORN = "the backup is damaged or incomplete"
WRONG_KEY = "the backup cannot be decrypted: the passphrase or key file is wrong, or the file is damaged"


class BackupHeader(ApiObject):
    """Parameters from which a file's key is derived."""

    kdf: Literal["scrypt", "hkdf"]
    salt: bytes
    prefix: bytes


class BackupRequest(ApiObject):
    """Body of ``POST /skep/backup``.  ``key``: derived by the caller from its passphrase and the header."""

    header: BackupHeader
    key: bytes


class BackupManifest(ApiObject):
    """The cluster and time of a backup, with keys that are never shown."""

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
    """Response of ``POST /skep/restore``: the content of the backup, and the effects of restoring it."""

    cluster_id: str
    node_id: str
    hostname: str
    created_at: str
    incarnation: int
    skep_version: str
    counts: Mapping[str, int]
    advertise_addr: str
    is_done: bool


def new_header(kdf: Literal["scrypt", "hkdf"]) -> BackupHeader:
    """Return the header of a new file."""
    return BackupHeader(
        kdf=kdf, salt=secrets.token_bytes(_SALT_BYTES), prefix=secrets.token_bytes(_PREFIX_BYTES)
    )


def key_of(secret: bytes, header: BackupHeader) -> bytes:
    """Derive a file's key from its passphrase or the content of its key file.  A passphrase takes half a second.

    Raises: InvalidArgument: the key file is too short.
    """
    if header.kdf == "scrypt":
        return Scrypt(header.salt, _KEY_BYTES, _SCRYPT_N, _SCRYPT_R, _SCRYPT_P).derive(secret)
    if len(secret) < KEY_FILE_BYTES_MIN:
        raise InvalidArgument(
            f"a key file has at least {KEY_FILE_BYTES_MIN} bytes: head -c 32 /dev/urandom > key"
        )
    return HKDF(hashes.SHA256(), _KEY_BYTES, header.salt, b"skep backup").derive(secret)


def opening(header: BackupHeader) -> bytes:
    """Return the first two lines of a file."""
    return MAGIC + msgspec.json.encode(header) + b"\n"


def parsed_opening(content: bytes) -> tuple[BackupHeader, int] | None:
    """Return the header and the offset of the first piece, or None if more of the file is needed.

    Raises: InvalidArgument: the file is not a backup.
    """
    if not MAGIC.startswith(content[: len(MAGIC)]):
        raise InvalidArgument(NOT_A_BACKUP)
    end = content.find(b"\n", len(MAGIC))
    if end < 0:
        if len(content) > _HEADER_BYTES_MAX:
            raise InvalidArgument(NOT_A_BACKUP)
        return None
    try:
        header = leniently(content[len(MAGIC) : end], BackupHeader)
    except msgspec.DecodeError as error:
        raise InvalidArgument(NOT_A_BACKUP) from error
    if len(header.prefix) != _PREFIX_BYTES or len(header.salt) != _SALT_BYTES:
        raise InvalidArgument(NOT_A_BACKUP)
    return header, end + 1


class Sealer:
    """Writes the pieces of one file, in order."""

    def __init__(self, header: BackupHeader, key: bytes) -> None:
        """Raises: InvalidArgument: the key or the prefix has the wrong length."""
        if len(key) != _KEY_BYTES or len(header.prefix) != _PREFIX_BYTES:
            raise InvalidArgument("the key of a backup has 32 bytes and its prefix 7")
        self._cipher = AESGCM(key)
        self._header = header
        self._about = opening(header)
        self._number = 0
        self._waiting = b""

    def manifest(self, manifest: BackupManifest) -> bytes:
        """Return the file's first bytes: the header, and any full pieces of the manifest."""
        encoded = msgspec.json.encode(manifest)
        return self._about + self.add(len(encoded).to_bytes(4, "big") + encoded)

    def add(self, content: bytes) -> bytes:
        """Add ``content``, and return the pieces that are full."""
        self._waiting += content
        pieces: list[bytes] = []
        while len(self._waiting) > PIECE_BYTES:
            pieces.append(self._sealed(self._waiting[:PIECE_BYTES], is_last=False))
            self._waiting = self._waiting[PIECE_BYTES:]
        return b"".join(pieces)

    def end(self) -> bytes:
        """Return the last piece."""
        return self._sealed(self._waiting, is_last=True)

    def _sealed(self, content: bytes, *, is_last: bool) -> bytes:
        nonce = _nonce(self._header, self._number, is_last=is_last)
        self._number += 1
        frame = self._cipher.encrypt(nonce, content, self._about)
        return len(frame).to_bytes(4, "big") + frame


class Opener:
    """Decrypts one file, which may arrive in parts of any size."""

    def __init__(self, key: bytes) -> None:
        """``key``: the file's key, from ``key_of`` and ``parsed_opening``."""
        self._key = key
        self._cipher: AESGCM | None = None
        self._header: BackupHeader | None = None
        self._about = b""
        self._waiting = b""
        self._content = b""
        self._number = 0
        self._is_ended = False
        self.manifest: BackupManifest | None = None

    def feed(self, content: bytes) -> bytes:
        """Add a part of the file, and return the part of the snapshot that can be decrypted now.

        Raises: InvalidArgument: the file is not a backup, is damaged, or has another key.
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

    def check_whole(self) -> BackupManifest:
        """Return the manifest after the end of the file.  Raises: InvalidArgument: a part of the file is missing."""
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
            self.manifest = leniently(self._content[4:end], BackupManifest)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"the backup is of another version of skep: {error}") from error
        self._content = self._content[end:]
        return True


def _nonce(header: BackupHeader, number: int, *, is_last: bool) -> bytes:
    return header.prefix + number.to_bytes(4, "big") + (b"\x01" if is_last else b"\x00")
