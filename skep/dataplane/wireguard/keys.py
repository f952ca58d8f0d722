"""The node's own WireGuard key pairs: made here, kept in one file on tmpfs, never sent anywhere.

Two key pairs exist while the key rotates, each with a WireGuard device of its own (``slot`` 0 or 1) and a UDP port of
its own (``plan/rotation.py``).  Peers that have only the older key go on with it until they have got the newer one.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from skep.dataplane.plan.wireguard import KeyPair
from skep.linux.files import replace_file

log = structlog.get_logger()


def new_private_key() -> bytes:
    """32 bytes of the system's randomness, in the form that WireGuard shows (RFC 7748, section 5, clamped)."""
    key = bytearray(X25519PrivateKey.generate().private_bytes_raw())
    key[0] &= 248
    key[31] = key[31] & 127 | 64
    return bytes(key)


def load(path: Path) -> tuple[KeyPair, ...]:
    """What an earlier node process of this boot left; empty: there is none, or it cannot be read."""
    try:
        pairs = msgspec.msgpack.decode(path.read_bytes(), type=tuple[KeyPair, ...])
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("wireguard keys not read, new ones are made", error=str(error))
        return ()
    is_valid = len({pair.slot for pair in pairs}) == len(pairs) and all(
        len(pair.private) == 32 and pair.slot in (0, 1) for pair in pairs
    )
    return pairs if is_valid else ()


def save(path: Path, pairs: Sequence[KeyPair]) -> None:
    """Keep ``pairs`` for the next node process, readable by root alone.  Raises: OSError."""
    replace_file(path, msgspec.msgpack.encode(tuple(pairs)), mode=0o600, is_durable=False)
