"""The rows of a view, and the steps in which they changed.  Pure: no clock, no I/O.

Rows are kept as JSON, each encoded once for all viewers.  A *step* is a set of keys whose rows changed together.  The
only state of a viewer is the number of the last step that it has received.  It then gets the current rows of all keys
in later steps.  So a slow or disconnected viewer costs nothing, and gets each row once.

A *cursor* is ``INCARNATION-REVISION``, as in ``skep.manager.telemetry.events``.  It means that the viewer's rows show
at least that revision of the store.  Any manager can resume from it.  Rows are complete, so it does no harm to send
rows again that the viewer already has.  Only the row of the cluster differs between managers, so it is always sent.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from skep.manager.view.rows import Row

KINDS: Final = ("nodes", "services", "tasks", "networks", "stacks", "volumes", "secrets", "configs")
CLUSTER: Final = "cluster"
STEPS_MAX: Final = 1024
"""Number of steps that are kept for slow viewers."""
KEYS_MAX: Final = 5_000
"""Largest number of rows in one difference.  A viewer that lacks more rows gets a snapshot."""

_encoder = msgspec.json.Encoder()


class Key(NamedTuple):
    """The key of one row."""

    kind: str
    id: str


CLUSTER_KEY: Final = Key(CLUSTER, "")


class _Step(msgspec.Struct, frozen=True, gc=False):
    number: int
    revision: int
    keys: frozenset[Key]


class _Change(msgspec.Struct, frozen=True):
    cursor: str
    time: float
    set: Mapping[str, list[msgspec.Raw] | msgspec.Raw]
    removed: Mapping[str, list[str]]


class RowTableState:
    """Rows by kind and id.  ``incarnation`` is the incarnation of the cluster."""

    def __init__(self, incarnation: int) -> None:
        self._incarnation = incarnation
        self._rows: dict[str, dict[str, msgspec.Raw]] = {kind: {} for kind in (*KINDS, CLUSTER)}
        self._changed: set[Key] = set()
        """Keys that changed since the last step."""
        self._steps: deque[_Step] = deque()
        self._floor = (0, 0)
        """Number of the last dropped step, and the lowest revision of a cursor that can resume after it."""
        self._revision = 0
        self._time = 0.0
        self._encoded: dict[int, bytes | None] = {}
        """Differences from earlier steps to the current one, by step number."""
        self._snapshot: bytes | None = None
        self.number = 0
        """Number of the current step, or 0 before the first one."""

    @property
    def cursor(self) -> str:
        """The cursor of the current step."""
        return f"{self._incarnation}-{self._revision}"

    def put(self, key: Key, row: Row | None) -> None:
        """Set or remove one row, which is published with the next step."""
        rows, id = self._rows[key.kind], key.id
        if row is None:
            if rows.pop(id, None) is not None:
                self._changed.add(key)
            return
        encoded = msgspec.Raw(_encoder.encode(row))
        if rows.get(id) != encoded:
            rows[id] = encoded
            self._changed.add(key)

    def step(self, revision: int, time: float) -> bool:
        """Publish the rows that were put since the last step, at ``revision`` of the store.  Returns whether anything
        changed.
        """
        if not self._changed and self.number:
            return False
        self.number += 1
        self._revision = revision
        self._time = time
        self._encoded.clear()
        self._snapshot = None
        if self.number == 1:
            self._floor = (1, revision)  # all rows are new, so viewers need a snapshot
        else:
            self._steps.append(_Step(self.number, revision, frozenset(self._changed)))
            if len(self._steps) > STEPS_MAX:
                dropped = self._steps.popleft()
                self._floor = (dropped.number, dropped.revision + 1)
        self._changed.clear()
        return True

    def number_of(self, cursor: str) -> int | None:
        """Return the last step of which a viewer with ``cursor`` has all rows, or None if unknown."""
        incarnation, _, revision = cursor.partition("-")
        if not (incarnation.isdecimal() and revision.isdecimal() and cursor.isascii() and len(cursor) < 40):
            return None
        number, first = self._floor
        if int(incarnation) != self._incarnation or int(revision) < first:
            return None
        for step in self._steps:
            if step.revision >= int(revision):
                break
            number = step.number
        return number

    def snapshot(self) -> bytes:
        """Return all rows as one JSON object."""
        if self._snapshot is None:
            cluster = self._rows[CLUSTER].get("", msgspec.Raw(b"null"))
            lists = {kind: list(self._rows[kind].values()) for kind in KINDS}
            self._snapshot = _encoder.encode(
                {"cursor": self.cursor, "time": self._time, CLUSTER: cluster, **lists}
            )
        return self._snapshot

    def change_after(self, number: int) -> bytes | None:
        """Return the changes after step ``number`` as one JSON object, or None if the viewer needs a snapshot."""
        if number not in self._encoded:
            self._encoded[number] = self._encode(number, ())
        return self._encoded[number]

    def change_for_resumed(self, number: int) -> bytes | None:
        """Return ``change_after`` for a viewer that may come from another manager.

        It always has the row of the cluster, where each manager shows its own problems.
        """
        return self._encode(number, (CLUSTER_KEY,))

    def _encode(self, number: int, always: Iterable[Key]) -> bytes | None:
        if number < self._floor[0]:
            return None
        keys = set(always)
        for step in reversed(self._steps):
            if step.number <= number:
                break
            keys |= step.keys
            if len(keys) > KEYS_MAX:
                return None
        return self._encode_rows(keys)

    def _encode_rows(self, keys: Iterable[Key]) -> bytes:
        present: dict[str, list[msgspec.Raw] | msgspec.Raw] = {}
        removed: dict[str, list[str]] = {}
        for kind, id in sorted(keys):
            row = self._rows[kind].get(id)
            if row is None:
                removed.setdefault(kind, []).append(id)
            elif kind == CLUSTER:
                present[kind] = row
            else:
                rows = present.setdefault(kind, [])
                assert isinstance(rows, list), "only the cluster is a single row"
                rows.append(row)
        return _encoder.encode(_Change(self.cursor, self._time, present, removed))
