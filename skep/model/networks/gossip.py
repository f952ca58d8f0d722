"""The keys with which docker nodes encrypt their gossip and their encrypted overlays."""

import msgspec

from skep.model.values.times import Timestamp


class GossipKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key (AES-128-GCM).  ``lamport_time`` is unique among all of a cluster's keys."""

    subsystem: str
    key: bytes
    lamport_time: int

    def __repr__(self) -> str:
        return f"GossipKey(subsystem={self.subsystem!r}, lamport_time={self.lamport_time})"


class GossipKeys(msgspec.Struct, frozen=True, kw_only=True):
    """All keys of the cluster, oldest first within each subsystem."""

    keys: tuple[GossipKey, ...] = ()
    rotated_at: Timestamp
    """Time of the last rotation by the clock of the leader at that time."""

    def encode(self) -> bytes:
        """Return the stored form."""
        return msgspec.json.encode(self)


def decoded_keys(data: bytes) -> GossipKeys:
    """Decode keys, the inverse of ``encode``.  Raises: msgspec.DecodeError."""
    return msgspec.json.decode(data, type=GossipKeys)
