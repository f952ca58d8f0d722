"""The node's own WireGuard key pairs: made here, kept in one file on tmpfs, rotated, never sent anywhere.

Two key pairs exist while the key rotates, each with a WireGuard device of its own (``slot`` 0 or 1) and a UDP port of
its own.  Peers that know only the older key go on with it until they have learned the newer one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from skep.dataplane.plan.wireguard import KeyPair
from skep.linux.files import replace_file

log = structlog.get_logger()

ROTATION_S = 24 * 3600.0
"""After which a key pair is replaced.  Session keys are WireGuard's own matter: it makes new ones every two minutes."""
OVERLAP_S_MIN = 300.0
"""For which both key pairs are used at least: tables reach peers, and packets under way arrive."""


def new_private_key() -> bytes:
    """32 bytes of the system's randomness, in the form that WireGuard shows (RFC 7748, section 5, clamped)."""
    key = bytearray(X25519PrivateKey.generate().private_bytes_raw())
    key[0] &= 248
    key[31] = key[31] & 127 | 64
    return bytes(key)


def rotated(
    pairs: Sequence[KeyPair],
    now: float,
    make: Callable[[], bytes],
    *,
    rotation_s: float = ROTATION_S,
) -> tuple[KeyPair, ...]:
    """The key pairs from ``now`` on, the oldest first: a newer one is added when the newest is due.

    The newer one takes the slot that the newest does not have, and replaces whatever had it: a peer that has not
    learned of a key for a whole rotation loses contact.
    """
    newest = pairs[-1] if pairs else None
    if newest is not None and 0 <= now - newest.made_at < rotation_s:
        return tuple(pairs)
    fresh = KeyPair(private=make(), slot=1 - newest.slot if newest is not None else 0, made_at=now)
    return (newest, fresh) if newest is not None else (fresh,)


def without_replaced(
    pairs: Sequence[KeyPair], now: float, *, is_needed: bool, overlap_s: float = OVERLAP_S_MIN
) -> tuple[KeyPair, ...]:
    """``pairs`` without the older one, once both were used for ``overlap_s`` and no peer needs it any more."""
    if len(pairs) > 1 and not is_needed and now - pairs[-1].made_at >= overlap_s:
        return tuple(pairs[-1:])
    return tuple(pairs)


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
