"""Transactions that write the journal and keep it within its bounds."""

from collections.abc import Sequence

from skep.manager.cluster import known_cluster
from skep.manager.journal import chunks
from skep.manager.journal.changes import folded, folded_requests
from skep.model.history import JournalEntry
from skep.model.options.labels import history_entries
from skep.model.values.ids import NodeId
from skep.store.interface import Transaction, View
from skep.store.kinds import JournalChunk
from skep.store.level import JOURNAL


def history_limit(view: View) -> int:
    """Return how many entries the cluster keeps.  0 if none, or while a manager has no journal yet."""
    if view.level < JOURNAL:
        return 0
    swarm = known_cluster(view)
    return history_entries(swarm.spec.labels) if swarm is not None else 0


def journaled(view: View) -> int:
    """Return the revision up to which the journal has every change."""
    last = chunks.last_of_changes(view)
    return last.revision if last is not None else 0


def write_changes(tx: Transaction, taken: Sequence[JournalEntry], marks: Sequence[chunks.Mark]) -> None:
    """Write the entries of ``taken``, which are in order of revision, that no leader has written yet."""
    last = chunks.last_of_changes(tx)
    fresh = [entry for entry in taken if last is None or entry.revision > last.revision]
    if fresh:
        for chunk in chunks.with_changes(last, folded(fresh), fresh[-1].revision, marks):
            tx.put(chunk)


def write_requests(tx: Transaction, taken: Sequence[JournalEntry], own: NodeId) -> None:
    """Write ``taken``, except for entries of an earlier attempt with an unknown outcome that are stored already."""
    last = chunks.last_of_requests(tx, own)
    known = {entry.id for entry in chunks.entries_in(last)} if last is not None else set()
    # Only the last of equal entries was written, so it stands for the entries before it.
    done = max((place for place, entry in enumerate(taken, 1) if entry.id in known), default=0)
    fresh = taken[done:]
    if fresh:
        for chunk in chunks.with_requests(last, folded_requests(fresh), own):
            tx.put(chunk)


def delete_chunks(tx: Transaction, ids: Sequence[str]) -> None:
    """Delete chunks that still exist."""
    for id in ids:
        if tx.lookup(JournalChunk, id) is not None:
            tx.delete(JournalChunk, id)
