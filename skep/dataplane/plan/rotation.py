"""Decides when this node replaces its key pairs, from the handshakes that its devices completed.  Pure.

A rotation has three steps:

1. When the only pair is ``KeyLifetimes.period_s`` old, a second pair is created.  It has a separate device, and both
public
   keys are published.
2. Traffic with a peer moves to the newer pair once a handshake with this pair was completed
   (``plan.wireguard.chosen``).
3. The older pair is removed ``KeyLifetimes.overlap_s`` after the last peer has moved (``next_pairs``).  The next
rotation
   waits for that, so a device that carries traffic never changes its key.

Times: ``now`` is monotonic and stands still while the machine is suspended.  ``boot_s`` and ``WireGuardKey.made_at``
are seconds since boot.  Wall-clock times of handshakes are compared for equality only, so clock steps have no effect.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum

import msgspec

from skep.dataplane.plan.wireguard import FoundDevice, Session, WireGuardKey, WireGuardPeer
from skep.model.values.ids import NodeId

ALIVE_S = 300.0
"""Seconds since the latest handshake after which a key pair no longer reaches the peer.

With a keepalive every 25 s, WireGuard renews a session every two minutes, and stops using it after three.
Source: wireguard.com/papers/wireguard.pdf, section 6.1.
"""


class KeyLifetimes(msgspec.Struct, frozen=True, kw_only=True):
    """Lifetimes of key pairs, in seconds."""

    period_s: float = 24 * 3600.0
    """Age at which a key pair is replaced.  (WireGuard itself replaces session keys every two minutes.)"""
    overlap_s: float = 300.0
    """Seconds for which the older pair is kept after the last peer has moved.

    The peer may still send packets to the older key for a while: it checks its handshakes every second, and a lost
    confirmation is repeated after 25 s.
    """
    bound_s: float = 7 * 24 * 3600.0
    """Age of the newer pair at which the older pair is removed even if peers still use it.

    A peer that refuses the newer key must not prevent rotation forever.  Managers may be unreachable for this long
    without a loss of traffic.
    """


class Handshake(msgspec.Struct, frozen=True, kw_only=True):
    """The latest handshake of a session.

    ``stamp`` is the device's wall-clock time.  ``changed_at`` is when this process first saw that stamp.
    """

    stamp: float
    changed_at: float


class KeyUsage(IntEnum):
    """Use of the older key pair by peers that have not moved to the newest pair."""

    UNUSED = 0
    """Every peer that was ever reached has moved."""
    SILENT = 1
    """Some peers have not moved, and have sent nothing for ``ALIVE_S``.

    When they come back, they may know only the older key.
    """
    ALIVE = 2
    """Some peers exchange packets only with the older pair."""


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """The use of the older key pair at the last check.

    Args:
        newest: The public key of the newest pair at that check.
        unused_since: When the older pair was first seen unused, or None while it is used.
    """

    newest: bytes = b""
    usage: KeyUsage = KeyUsage.ALIVE
    unused_since: float | None = None


def noted(
    before: Mapping[Session, Handshake], found: Mapping[Session, float], now: float
) -> Mapping[Session, Handshake]:
    """Return the handshakes of ``found`` (``handshakes_of``), with the time when each was first seen."""
    return {
        session: known
        if (known := before.get(session)) is not None and known.stamp == stamp
        else Handshake(stamp=stamp, changed_at=now)
        for session, stamp in found.items()
    }


def handshakes_of(found: Iterable[FoundDevice], pairs: Iterable[WireGuardKey]) -> Mapping[Session, float]:
    """Return the completed handshakes of all devices, with their stamps.

    A handshake is counted for the key that the device actually has, not for the key that it should have.  A device with
    an unknown key is left out.
    """
    own = {pair.private: pair.public for pair in pairs}
    return {
        (own[device.private], public): peer.handshake_at
        for device in found
        if device.private in own
        for public, peer in device.peers.items()
        if peer.handshake_at
    }


def usage_of_older(
    pairs: Sequence[WireGuardKey],
    peers: Mapping[NodeId, Sequence[WireGuardPeer]],
    handshakes: Mapping[Session, Handshake],
    now: float,
) -> KeyUsage:
    """Return how peers use the older key pair.  ``peers`` are each node's keys, the oldest first (``Plan.peers``).

    A peer has moved when the newest pair has a session with the key that this node sends to (``chosen``).  A session
    with any of its keys is not enough: if each side counted on the other's older key, both could be removed at once.
    """
    usage = KeyUsage.UNUSED
    own = [pair.public for pair in pairs]
    for theirs in peers.values():
        by_key = ([key for key in own if (key, peer.public) in handshakes] for peer in theirs)
        working = [(peer, keys) for peer, keys in zip(theirs, by_key, strict=True) if keys]
        if working and own[-1] not in working[-1][1]:
            peer, keys = working[-1]
            latest = max(handshakes[key, peer.public].changed_at for key in keys)
            usage = max(usage, KeyUsage.ALIVE if now - latest < ALIVE_S else KeyUsage.SILENT)
    return usage


def observed(
    before: Overlap,
    pairs: Sequence[WireGuardKey],
    peers: Mapping[NodeId, Sequence[WireGuardPeer]],
    handshakes: Mapping[Session, Handshake],
    now: float,
) -> Overlap:
    """Return the state after another check.

    The time without use starts again after a rotation, or when a peer returns to the older key.
    """
    newest = pairs[-1].public if pairs else b""
    usage = usage_of_older(pairs, peers, handshakes, now)
    if usage is not KeyUsage.UNUSED:
        return Overlap(newest=newest, usage=usage)
    since = before.unused_since if before.newest == newest else None
    return Overlap(newest=newest, usage=usage, unused_since=now if since is None else since)


def next_pairs(
    pairs: Sequence[WireGuardKey],
    overlap: Overlap,
    make: Callable[[], bytes],
    *,
    boot_s: float,
    now: float,
    limits: KeyLifetimes,
) -> tuple[WireGuardKey, ...]:
    """Return the key pairs to use from now on, the oldest first.  Adds a pair, removes the older one, or does neither.

    A new pair takes the slot that the newest pair does not have.
    """
    if not pairs:
        return (WireGuardKey(private=make(), slot=0, made_at=boot_s),)
    newest = pairs[-1]
    age = boot_s - newest.made_at
    # a negative age means that the pair was created in an earlier boot
    if age < 0 or (len(pairs) == 1 and age >= limits.period_s):
        return (newest, WireGuardKey(private=make(), slot=1 - newest.slot, made_at=boot_s))
    if len(pairs) > 1 and overlap.newest == newest.public and _is_over(overlap, age, now, limits):
        return (newest,)
    return tuple(pairs)


def _is_over(overlap: Overlap, age: float, now: float, limits: KeyLifetimes) -> bool:
    """Return whether the older of two pairs must be removed.  ``age`` is the age of the newer pair."""
    match overlap.usage:
        case KeyUsage.UNUSED:
            return overlap.unused_since is not None and now - overlap.unused_since >= limits.overlap_s
        case KeyUsage.SILENT:
            return age >= limits.period_s
        case KeyUsage.ALIVE:
            return age >= limits.bound_s
