"""What a transaction asks of the store: compares that must hold, and writes that then happen, all or nothing.

Both stores execute the same proposals.  All compares of one raft entry are judged on the state *before* that
entry (etcd evaluates the compares of nested transactions first), so two proposals may share an entry only if
neither reads what the other writes: ``Footprint.admits``.
"""

from functools import cached_property
from typing import TypeAlias

import msgspec

from skep.store.keys import covering_prefix


class Unchanged(msgspec.Struct, frozen=True):
    """``key`` still has this modification revision; 0: it does not exist."""

    key: str
    revision: int


class Exists(msgspec.Struct, frozen=True):
    """``key`` is the one that was created at this revision, whatever was written to it since."""

    key: str
    create_revision: int


class NothingSince(msgspec.Struct, frozen=True):
    """No key below ``prefix`` was written after ``revision``.

    The proposer has seen what stood there at that revision, and found nothing in the way.
    """

    prefix: str
    revision: int


Compare: TypeAlias = Unchanged | Exists | NothingSince


class Proposal(msgspec.Struct, frozen=True, dict=True):
    """One transaction's effect.  Keys are without the store's prefix, values in clear."""

    compares: tuple[Compare, ...] = ()
    puts: tuple[tuple[str, bytes], ...] = ()
    deletes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it writes nothing (then it is not proposed at all)."""
        return not self.puts and not self.deletes

    @property
    def operations(self) -> int:
        """The larger of compares and writes: what etcd counts against its limit."""
        return max(len(self.compares), len(self.puts) + len(self.deletes))

    @cached_property
    def size_bytes(self) -> int:
        """Roughly what it adds to a request."""
        keys = sum(len(key) for key, _ in self.puts) + sum(map(len, self.deletes)) + 80 * len(self.compares)
        return keys + sum(len(value) for _, value in self.puts) + 64 * (len(self.puts) + len(self.deletes))

    @cached_property
    def writes(self) -> frozenset[str]:
        """The keys it puts or deletes."""
        return frozenset(self.deletes).union(key for key, _ in self.puts)

    @cached_property
    def disturbs(self) -> frozenset[str]:
        """Everything whose compare it may turn: its writes, and the prefixes that cover them."""
        return self.writes.union(filter(None, map(covering_prefix, self.writes)))

    @cached_property
    def reads(self) -> frozenset[str]:
        """The keys and prefixes it compares."""
        return frozenset(
            compare.prefix if isinstance(compare, NothingSince) else compare.key for compare in self.compares
        )


class Footprint:
    """What the proposals of one raft entry read and write, to keep out what does not fit beside them."""

    def __init__(self) -> None:
        self._reads: set[str] = set()
        self._writes: set[str] = set()
        self._disturbs: set[str] = set()

    def add(self, proposal: Proposal) -> None:
        """Count ``proposal`` among them."""
        self._reads |= proposal.reads
        self._writes |= proposal.writes
        self._disturbs |= proposal.disturbs

    def admits(self, proposal: Proposal) -> bool:
        """Whether ``proposal`` means the same beside them as before or after them."""
        return (
            self._writes.isdisjoint(proposal.writes)
            and self._disturbs.isdisjoint(proposal.reads)
            and self._reads.isdisjoint(proposal.disturbs)
        )
