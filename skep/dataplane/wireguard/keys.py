"""Creates the node's own WireGuard key pairs and keeps them in one file on tmpfs.  Private keys never leave the node.

During a rotation there are two key pairs, each with its own WireGuard device (``slot`` 0 or 1) and UDP port
(``plan/rotation.py``).  Peers that have only the older key keep using it until they receive the newer one.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from skep.aio.failures import log_error
from skep.aio.trees import discard_tree_now
from skep.dataplane.plan.wireguard import WireGuardKey
from skep.linux.files import is_no_file, replace_file


def new_private_key() -> bytes:
    """Return 32 random bytes in the form that WireGuard shows (RFC 7748, section 5, clamped)."""
    key = bytearray(X25519PrivateKey.generate().private_bytes_raw())
    key[0] &= 248
    key[31] = key[31] & 127 | 64
    return bytes(key)


def load(path: Path, slots: Collection[int] = (0, 1)) -> tuple[WireGuardKey, ...]:
    """Return the key pairs that an earlier node process of this boot saved, or an empty tuple.

    Only pairs of ``slots`` are valid.  An invalid file counts as empty and is renamed to ``<name>.damaged``.
    Raises: OSError: it cannot be read at present.
    """
    try:
        pairs = msgspec.msgpack.decode(path.read_bytes(), type=tuple[WireGuardKey, ...])
        if len({pair.slot for pair in pairs}) < len(pairs) or not all(
            _is_valid(pair, slots) for pair in pairs
        ):
            raise msgspec.ValidationError("a key pair is invalid, or two have the same slot")
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise
        aside = path.with_name(path.name + ".damaged")
        log_error(error, "wireguard keys damaged, making new ones", file=str(path), kept_as=str(aside))
        with suppress(OSError):
            discard_tree_now(aside)
            path.rename(aside)
        return ()
    return pairs


def _is_valid(pair: WireGuardKey, slots: Collection[int]) -> bool:
    return len(pair.private) == 32 and pair.slot in slots


def save(path: Path, pairs: Sequence[WireGuardKey]) -> None:
    """Save ``pairs`` for the next node process, readable by root only.  Raises: OSError."""
    replace_file(path, msgspec.msgpack.encode(tuple(pairs)), mode=0o600, is_durable=False)
