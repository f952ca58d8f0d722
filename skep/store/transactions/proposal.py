"""The effect of one transaction.  If all its compares hold, all its writes happen, and otherwise none.

Both stores execute the same proposals.  All compares of one raft entry are evaluated on the state *before* that
entry (etcd evaluates the compares of nested transactions first), so two proposals may share an entry only if
neither reads what the other writes: ``Footprint.is_compatible_with``.
"""

from typing import TypeAlias

import msgspec

from skep.store.keys import covering_prefix

MAX_OPERATIONS = 1000
"""Maximum compares or writes of one proposal.  A published port needs two compares, and a used secret one."""

MAX_BYTES = 1_500_000
"""Maximum ``Proposal.size_bytes``.  With its framing, it stays below etcd's 1.5 MiB per request."""

COMPARE_BYTES, WRITE_BYTES = 56, 80
"""Overhead in bytes of one compare and of one write, in addition to key and value."""


class Unchanged(msgspec.Struct, frozen=True, gc=False):
    """Compares that ``key`` was last written at this revision, or does not exist if the revision is 0."""

    key: str
    revision: int


class Exists(msgspec.Struct, frozen=True, gc=False):
    """Compares that ``key`` was created at this revision and not deleted since, whatever was written to it."""

    key: str
    create_revision: int


class NothingSince(msgspec.Struct, frozen=True, gc=False):
    """Compares that no key below ``prefix`` was written after ``revision``, at which the transaction has read the
    prefix.

    Keys that were deleted since do not count.
    """

    prefix: str
    revision: int


Compare: TypeAlias = Unchanged | Exists | NothingSince


class Proposal(msgspec.Struct, frozen=True, gc=False):
    """One transaction's compares and writes.  Keys are without the store's prefix, values in clear."""

    compares: tuple[Compare, ...] = ()
    puts: tuple[tuple[str, bytes], ...] = ()
    deletes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it writes nothing.  Such a proposal is not sent."""
        return not self.puts and not self.deletes

    @property
    def operations(self) -> int:
        """The number of compares or of writes, whichever is larger, because etcd limits both."""
        return max(len(self.compares), len(self.puts) + len(self.deletes))

    @property
    def size_bytes(self) -> int:
        """Upper bound of the bytes that it adds to a request: keys and values with etcd's prefix, encryption and
        framing.
        """
        size = COMPARE_BYTES * len(self.compares) + WRITE_BYTES * (len(self.puts) + len(self.deletes))
        for compare in self.compares:
            # A range has a second key, which is as long as the first one.
            size += 2 * len(compare.prefix) if isinstance(compare, NothingSince) else len(compare.key)
        for key, value in self.puts:
            size += len(key) + len(value)
        return size + sum(map(len, self.deletes))


class Committed(msgspec.Struct, frozen=True, gc=False):
    """The proposal was written at this revision."""

    revision: int


class WriteConflict(msgspec.Struct, frozen=True, gc=False):
    """A compare failed, because another write came first.  A view of at least this revision shows that write."""

    revision: int


Outcome: TypeAlias = Committed | WriteConflict


class Footprint:
    """The keys that one or more proposals read and write.

    ``invalidates`` has every key and prefix whose compare may fail because of these writes.
    """

    __slots__ = ("invalidates", "reads", "writes")

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.invalidates: set[str] = set()

    @classmethod
    def of(cls, proposal: Proposal) -> "Footprint":
        """Return the footprint of a single proposal."""
        footprint = cls()
        footprint.writes.update(proposal.deletes)
        footprint.writes.update(key for key, _ in proposal.puts)
        footprint.invalidates.update(footprint.writes)
        footprint.invalidates.update(filter(None, map(covering_prefix, footprint.writes)))
        footprint.reads.update(
            compare.prefix if isinstance(compare, NothingSince) else compare.key
            for compare in proposal.compares
        )
        return footprint

    def add(self, other: "Footprint") -> None:
        """Include ``other``."""
        self.reads |= other.reads
        self.writes |= other.writes
        self.invalidates |= other.invalidates

    def is_compatible_with(self, other: "Footprint") -> bool:
        """Return whether ``other`` has the same outcome if it is executed before, together with, or after these
        proposals.
        """
        return (
            self.writes.isdisjoint(other.writes)
            and self.invalidates.isdisjoint(other.reads)
            and self.reads.isdisjoint(other.invalidates)
        )
