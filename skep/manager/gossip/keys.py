"""Keys of Docker nodes' gossip and encrypted overlays, and their rotation.

An engine keeps three keys for each subsystem, sorts them by their logical time, and encrypts with the second one.  With
fewer than two keys it panics.  So the newest key is distributed before it is used, and the oldest still decrypts data
in transit.

Source: swarmkit, manager/keymanager/keymanager.go; moby, libnetwork/agent.go (getPrimaryKeyTag).
"""

from collections.abc import Callable

from skep.model.networks.gossip import GossipKey, GossipKeys
from skep.model.values.times import SECOND_NS, Timestamp, unix_ns

SUBSYSTEMS = ("networking:gossip", "networking:ipsec")
KEYS_PER_SUBSYSTEM = 3
"""SwarmKit's keyring: the next, the current and the previous key."""
KEY_BYTES = 16
"""Length of a key, as in SwarmKit."""
ROTATION_S = 12 * 3600.0
"""Seconds between two rotations, as in SwarmKit (12 hours)."""


def first_keys(random_bytes: Callable[[int], bytes], now: Timestamp) -> GossipKeys:
    """Return the keys of a new cluster."""
    subsystems = [subsystem for subsystem in SUBSYSTEMS for _ in range(KEYS_PER_SUBSYSTEM)]
    keys = (
        GossipKey(subsystem=subsystem, key=random_bytes(KEY_BYTES), lamport_time=number)
        for number, subsystem in enumerate(subsystems, 1)
    )
    return GossipKeys(keys=tuple(keys), rotated_at=now)


def rotated(keys: GossipKeys, random_bytes: Callable[[int], bytes], now: Timestamp) -> GossipKeys:
    """Return the keys with the oldest key of each subsystem replaced by a new one."""
    time = max(key.lamport_time for key in keys.keys)
    kept: list[GossipKey] = []
    for subsystem in SUBSYSTEMS:
        time += 1
        own = sorted(
            (key for key in keys.keys if key.subsystem == subsystem), key=lambda key: key.lamport_time
        )
        fresh = GossipKey(subsystem=subsystem, key=random_bytes(KEY_BYTES), lamport_time=time)
        kept += [*own[-(KEYS_PER_SUBSYSTEM - 1) :], fresh]
    return GossipKeys(keys=tuple(kept), rotated_at=now)


def seconds_to_rotation(keys: GossipKeys, now: Timestamp) -> float:
    """Return the seconds until the next rotation.  The result is at most a whole period, because another leader's clock
    may have been ahead.
    """
    age_s = (unix_ns(now) - unix_ns(keys.rotated_at)) / SECOND_NS
    return min(max(ROTATION_S - age_s, 0.0), ROTATION_S)
