"""Typed ids of cluster objects, and how they are made.

Object ids are 25 characters of lower-case base 36 (128 random bits), container ids 64 of hex.
Randomness is an argument: code that creates ids takes an ``IdSource``.
"""

import secrets
from collections.abc import Callable
from typing import NewType

ClusterId = NewType("ClusterId", str)
NodeId = NewType("NodeId", str)
ServiceId = NewType("ServiceId", str)
TaskId = NewType("TaskId", str)
NetworkId = NewType("NetworkId", str)
SecretId = NewType("SecretId", str)
ConfigId = NewType("ConfigId", str)
QuotaId = NewType("QuotaId", str)
UserId = NewType("UserId", str)
VolumeId = NewType("VolumeId", str)
SessionId = NewType("SessionId", str)
ContainerId = NewType("ContainerId", str)

IdSource = Callable[[], str]
"""Returns a new object id at each call."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_PAIRS = [first + second for first in _DIGITS for second in _DIGITS]
ID_LENGTH = 25
"""128 bits in base 36.  Source: swarmkit, identity/randomid.go."""


def base36(number: int, width: int) -> str:
    """Return ``number`` in lower-case base 36, left-padded with zeros to ``width`` characters."""
    pairs = []
    while number:
        number, rest = divmod(number, 36 * 36)
        pairs.append(_PAIRS[rest])
    return "".join(reversed(pairs)).lstrip("0").rjust(width, "0")


def new_id() -> str:
    """Return a new object id from the system's random source."""
    return base36(secrets.randbits(128), ID_LENGTH)


def new_container_id() -> ContainerId:
    """Return a new container id: 64 hexadecimal characters."""
    return ContainerId(secrets.token_hex(32))
