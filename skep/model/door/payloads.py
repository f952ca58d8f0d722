"""Certificates and challenges of the front door, as managers send them to the nodes of its tasks.

They travel as secrets of these tasks do: with the assignments, only to nodes with such a task, and never to a disk of
the node.  Their ids are digests of their content, so a renewed certificate is another secret.  No API has these ids.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Final

import msgspec

from skep.model.assignment import SecretFile
from skep.model.values.ids import SecretId

_PREFIX: Final = "frontdoor"
_ID_LENGTH: Final = len(_PREFIX) + 40
"""Characters of an id.  Those of secrets have 25."""


class DoorPayload(msgspec.Struct, frozen=True, kw_only=True):
    """A part of what the proxies need.

    Args:
        certificates: Certificate chain and private key (PEM) by host name.
        issued_ns: Start of the certificates' validity.  Of two certificates for a name, the later one is used.
        challenges: Key authorizations by token.
    """

    certificates: Mapping[str, str] = {}
    issued_ns: int = 0
    challenges: Mapping[str, str] = {}

    def __repr__(self) -> str:
        return f"DoorPayload({sorted(self.certificates)}, {len(self.challenges)} challenges)"


NOTHING: Final = DoorPayload()


def door_file(payload: DoorPayload) -> SecretFile:
    """Return the secret that carries a payload."""
    data = msgspec.json.encode(payload, order="deterministic")
    id = SecretId(f"{_PREFIX}{sha256(data).hexdigest()[:40]}")
    return SecretFile(id=id, name=",".join(payload.certificates) or "challenges", data=data)


def is_door_file(id: str) -> bool:
    """Return whether a secret carries a payload."""
    return id.startswith(_PREFIX) and len(id) == _ID_LENGTH


def merged(payloads: Iterable[DoorPayload]) -> DoorPayload:
    """Return all payloads in one."""
    certificates: dict[str, str] = {}
    challenges: dict[str, str] = {}
    for one in sorted(payloads, key=lambda one: one.issued_ns):
        certificates |= one.certificates
        challenges |= one.challenges
    return DoorPayload(certificates=certificates, challenges=challenges)
