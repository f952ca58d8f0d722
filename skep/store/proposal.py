"""What a transaction asks of the store: compares that must hold, and writes that then happen, all or nothing.

Both stores execute the same proposals.  All compares of one raft entry are judged on the state *before* that
entry (etcd evaluates the compares of nested transactions first), so two proposals may share an entry only if
neither reads what the other writes: ``Footprint.admits``.
"""

from typing import TypeAlias

import msgspec

from skep.store.keys import covering_prefix


class Unchanged(msgspec.Struct, frozen=True, gc=False):
    """``key`` still has this modification revision; 0: it does not exist."""

    key: str
    revision: int


class Exists(msgspec.Struct, frozen=True, gc=False):
    """``key`` is the one that was created at this revision, whatever was written to it since."""

    key: str
    create_revision: int


class NothingSince(msgspec.Struct, frozen=True, gc=False):
    """No key below ``prefix`` was written after ``revision``.

    The proposer has seen what stood there at that revision, and found nothing in the way.
    """

    prefix: str
    revision: int


Compare: TypeAlias = Unchanged | Exists | NothingSince


COMPARE_BYTES, WRITE_BYTES = 56, 80
"""Beside what a compare or write itself consists of."""


class Proposal(msgspec.Struct, frozen=True, gc=False):
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

    @property
    def size_bytes(self) -> int:
        """What it adds to a request, at most: keys and values with etcd's prefix, encryption and framing."""
        size = COMPARE_BYTES * len(self.compares) + WRITE_BYTES * (len(self.puts) + len(self.deletes))
        for compare in self.compares:
            # A range has a second key, as long as the first one.
            size += 2 * len(compare.prefix) if isinstance(compare, NothingSince) else len(compare.key)
        for key, value in self.puts:
            size += len(key) + len(value)
        return size + sum(map(len, self.deletes))


class Footprint:
    """What proposals read and write, to keep out of one raft entry what does not fit beside them.

    ``disturbs``: everything whose compare they may turn: their writes, and the prefixes that cover these.
    """

    __slots__ = ("disturbs", "reads", "writes")

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.disturbs: set[str] = set()

    @classmethod
    def of(cls, proposal: Proposal) -> "Footprint":
        """That of a single proposal."""
        footprint = cls()
        footprint.writes.update(proposal.deletes)
        footprint.writes.update(key for key, _ in proposal.puts)
        footprint.disturbs.update(footprint.writes)
        footprint.disturbs.update(filter(None, map(covering_prefix, footprint.writes)))
        footprint.reads.update(
            compare.prefix if isinstance(compare, NothingSince) else compare.key
            for compare in proposal.compares
        )
        return footprint

    def add(self, other: "Footprint") -> None:
        """Count ``other`` among them."""
        self.reads |= other.reads
        self.writes |= other.writes
        self.disturbs |= other.disturbs

    def admits(self, other: "Footprint") -> bool:
        """Whether ``other`` means the same beside them as before or after them."""
        return (
            self.writes.isdisjoint(other.writes)
            and self.disturbs.isdisjoint(other.reads)
            and self.reads.isdisjoint(other.disturbs)
        )
