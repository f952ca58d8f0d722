"""The mapping of a container's users to users of the machine (``userns-remap``).  Pure.

Source: user_namespaces(7); moby, pkg/idtools/idtools.go (createIDMap).
"""

from collections.abc import Iterable
from typing import Final

import msgspec

USERS_LABEL: Final = "skep.userns"
"""Engine label of a node that maps the users of its containers."""
MAPPED: Final = "remap"
"""Value of the label."""


class IdRange(msgspec.Struct, frozen=True):
    """Consecutive ids: ``inside``, ``inside + 1``, ... of a container are ``outside``, ... of the machine."""

    inside: int
    outside: int
    size: int

    @property
    def oci(self) -> dict[str, int]:
        """The range as the runtime specification has it."""
        return {"containerID": self.inside, "hostID": self.outside, "size": self.size}


class UserMap(msgspec.Struct, frozen=True, kw_only=True):
    """The users and groups that a container has.  Its other ids do not exist in the container."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]

    @property
    def root(self) -> tuple[int, int]:
        """The machine's user and group that are root in the container."""
        return self.uid(0), self.gid(0)

    @property
    def kernel_text(self) -> tuple[str, str]:
        """The contents of ``/proc/PID/uid_map`` and ``gid_map``."""
        return _text(self.uids), _text(self.gids)

    @property
    def groups_count(self) -> int:
        """Number of groups from 0 on without a gap."""
        return next_id(self.gids)

    def uid(self, inside: int) -> int:
        """Return the machine's id of a user, or of the container's root if the container has no such user."""
        return _outside(self.uids, inside)

    def gid(self, inside: int) -> int:
        """Return the machine's id of a group, or of the container's root group if the container has no such group."""
        return _outside(self.gids, inside)


def mapping_of(ranges: Iterable[tuple[int, int]]) -> tuple[IdRange, ...]:
    """Return subordinate ids (start, count) as a container's ids from 0 on, in the order of the machine's ids."""
    found: list[IdRange] = []
    for start, count in sorted(ranges):
        found.append(IdRange(next_id(found), start, count))
    return tuple(found)


def next_id(ranges: Iterable[IdRange]) -> int:
    """Return the first id that a container does not have."""
    return max((one.inside + one.size for one in ranges), default=0)


def _outside(ranges: Iterable[IdRange], inside: int) -> int:
    first = 0
    for one in ranges:
        if one.inside <= inside < one.inside + one.size:
            return one.outside + inside - one.inside
        if one.inside == 0:
            first = one.outside
    return first


def _text(ranges: Iterable[IdRange]) -> str:
    return "".join(f"{one.inside} {one.outside} {one.size}\n" for one in ranges)
