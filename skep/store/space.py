"""The store's quota, and the steps with which the leader keeps the store below it.  Pure.

etcd's quota applies to the size of its file.  Writes make the file grow.  A compaction frees pages in it, which new
writes use, but only a defragmentation shrinks it.  So the space left for data is the quota less the space *in use*, and
a file near the quota that has free pages must be defragmented.
"""

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from skep.model.values.ids import NodeId

QUOTA_BYTES = 4 * 1024**3
"""Default of ``store-quota`` in bytes."""

COMPACT_AT, DEFRAGMENT_AT, WARN_AT, REFUSE_AT, REFUSE_ALL_AT = 0.5, 0.7, 0.7, 0.8, 0.95
"""Shares of the quota from which on, in this order, history is compacted, a file with free pages is defragmented,
warnings are shown, users cannot create objects, and users cannot update objects either.
"""

GAIN = 0.2
"""Share of the quota that a defragmentation must free to justify its pause."""
ALARM_GAIN = 0.02
"""Share that it must free while etcd's alarm is set."""
DISARM_BELOW = 0.9
"""Share of the quota below which all files must be before the alarm is cleared."""

KEPT_REVISIONS = ((0.7, 0), (0.6, 10), (0.0, 1000))
"""Pairs of a share in use and the number of revisions that a compaction keeps.  A replica that is further behind has to
reload everything.
"""


class MemberSpace(msgspec.Struct, frozen=True, kw_only=True):
    """The size of one member's file, in bytes.  While etcd's NOSPACE alarm is set (``has_alarm``), plain writes are
    refused.
    """

    size: int
    in_use: int
    quota: int
    has_alarm: bool = False

    @property
    def share(self) -> float:
        """The used share of the quota."""
        return self.in_use / self.quota

    @property
    def is_worth_defragmenting(self) -> bool:
        """Whether the file is large and much of it is free pages."""
        gain = (self.size - self.in_use) / self.quota
        if self.has_alarm and self.size >= DISARM_BELOW * self.quota:
            return gain >= ALARM_GAIN
        return self.size >= DEFRAGMENT_AT * self.quota and gain >= GAIN

    @property
    def summary(self) -> str:
        """A text such as ``83 % full (3.3 of 4.0 GiB)``."""
        unit, name = (1024**3, "GiB") if self.quota >= 1024**3 else (1024**2, "MiB")
        return f"{self.share:.0%} full ({self.in_use / unit:.1f} of {self.quota / unit:.1f} {name})".replace(
            "%", " %"
        )


class Compact(msgspec.Struct, frozen=True):
    """Compact the history to this number of revisions."""

    kept_revisions: int


class Defragment(msgspec.Struct, frozen=True):
    """Defragment the file of one manager's member."""

    node_id: NodeId


class HandOver(msgspec.Struct, frozen=True):
    """Transfer leadership, because the leader's own file is the next one to defragment."""

    to: NodeId


class Disarm(msgspec.Struct, frozen=True):
    """Clear etcd's NOSPACE alarm."""


Step: TypeAlias = Compact | Defragment | HandOver | Disarm


def next_step(own: NodeId, members: Mapping[NodeId, MemberSpace], *, can_compact: bool = True) -> Step | None:
    """Return the next step, or None.

    Args:
        own: The leader.
        members: The managers that responded, including the leader.
        can_compact: Whether history may be compacted.  False if this round has tried it already.
    """
    mine = members[own]
    if can_compact and mine.share >= COMPACT_AT:
        return Compact(next(kept for share, kept in KEPT_REVISIONS if mine.share >= share))
    others = sorted(id for id in members if id != own)
    for id in others:
        if members[id].is_worth_defragmenting:
            return Defragment(id)
    if mine.is_worth_defragmenting:
        return HandOver(others[0]) if others else Defragment(own)
    if mine.has_alarm and all(space.size < DISARM_BELOW * space.quota for space in members.values()):
        return Disarm()
    return None


def refusal(space: MemberSpace, *, creates: bool, adds: int = 0) -> str:
    """Return the error for a refused write of a user, or an empty string.

    Args:
        creates: whether it adds an object.
        adds: bytes that several writes add together.  Each but the last has to leave the store below the limit.
    """
    limit = REFUSE_AT if creates else REFUSE_ALL_AT
    if (space.in_use + adds) / space.quota < limit:
        return ""
    more = "" if space.share >= limit else f", too full for {max(adds / 1024**2, 0.1):.1f} MiB more"
    return (
        f"the cluster's store is {space.summary}{more}: remove configs, secrets or services that are not needed, or "
        "raise store-quota in skep.toml on every manager; it makes room by itself within a minute "
        "(skep status shows it)"
    )


def warning(space: MemberSpace) -> str:
    """Return the warning for users before writes are refused, or an empty string."""
    if space.has_alarm:
        return f"the cluster's store has reached its quota and is being compacted: {space.summary}"
    return f"the cluster's store is {space.summary}" if space.share >= WARN_AT else ""
