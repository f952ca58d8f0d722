"""The arithmetic of a quorum: more than half of those that vote.  Pure.

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

An even number tolerates no more than the odd one below it.
"""

from collections.abc import Collection


def quorum(voters: int) -> int:
    """How many of ``voters`` must agree."""
    return voters // 2 + 1


def keeps_quorum(voters: Collection[str], reachable: Collection[str], leaving: str) -> bool:
    """Whether those that stay still decide once ``leaving`` has no vote any more.

    Source: swarmkit, manager/state/raft/raft.go (CanRemoveMember).
    """
    staying = set(voters) - {leaving}
    return bool(staying) and len(staying & set(reachable)) >= quorum(len(staying))
