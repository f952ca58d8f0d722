"""The arithmetic of a quorum: more than half of the voters.  Pure.

====== ====== =========
voters quorum tolerated
====== ====== =========
1      1      0
2      2      0
3      2      1
4      3      1
5      3      2
6      4      2
7      4      3
====== ====== =========

An even number of voters tolerates no more failures than the next smaller odd number.
"""

from collections.abc import Collection


def quorum(voters: int) -> int:
    """Return how many of ``voters`` must agree."""
    return voters // 2 + 1


def keeps_quorum(voters: Collection[str], reachable: Collection[str], leaving: str) -> bool:
    """Whether the remaining voters still have a quorum once ``leaving`` has no vote.

    Source: swarmkit, manager/state/raft/raft.go (CanRemoveMember).
    """
    staying = set(voters) - {leaving}
    return bool(staying) and len(staying & set(reachable)) >= quorum(len(staying))
