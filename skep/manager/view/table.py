"""The rows of a view, and which of them changed when.  Pure: no clock, no I/O.

Rows are kept as JSON, each encoded once for all viewers.  A *step* is a set of keys whose rows changed together.  A
viewer is nothing but the number of the last step it has: what it lacks is the union of the later steps' keys, with
the rows as they are now.  So a viewer that is slow, or was away, costs nothing and gets each row once.

A *cursor* is ``INCARNATION-REVISION``, as of ``skep.manager.events``: the rows show at least that revision of the
store.  Any manager may go on from it: rows are whole, so rows that the viewer may already have are sent again.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from skep.manager.view.rows import Row

KINDS: Final = ("nodes", "services", "tasks", "networks", "stacks", "volumes", "secrets", "configs")
CLUSTER: Final = "cluster"
STEPS_MAX: Final = 1024
"""Steps that are kept for viewers behind."""
KEYS_MAX: Final = 5_000
"""Rows of one difference; a viewer that lacks more is given a snapshot."""

_encoder = msgspec.json.Encoder()


class Key(NamedTuple):
    """Of one row."""

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


class Table:
    """Rows by kind and id.  ``incarnation``: of the cluster."""

    def __init__(self, incarnation: int) -> None:
        self._incarnation = incarnation
        self._rows: dict[str, dict[str, msgspec.Raw]] = {kind: {} for kind in (*KINDS, CLUSTER)}
        self._changed: set[Key] = set()
        """Since the last step."""
        self._steps: deque[_Step] = deque()
        self._floor = (0, 0)
        """Number of the last step that is not kept, and the least revision of a cursor that goes on after it."""
        self._revision = 0
        self._time = 0.0
        self._encoded: dict[int, bytes | None] = {}
        """Differences after a step, of the present one."""
        self._snapshot: bytes | None = None
        self.number = 0
        """Of the present step; 0: there is none yet."""

    @property
    def cursor(self) -> str:
        """Of the present step."""
        return f"{self._incarnation}-{self._revision}"

    def put(self, key: Key, row: Row | None) -> None:
        """Set or remove one row; it is shown with the next step."""
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
        """Show what was put since the last step, at ``revision`` of the store; whether there is anything new."""
        if not self._changed and self.number:
            return False
        self.number += 1
        self._revision = revision
        self._time = time
        self._encoded.clear()
        self._snapshot = None
        if self.number == 1:
            self._floor = (1, revision)  # everything is new: a snapshot
        else:
            self._steps.append(_Step(self.number, revision, frozenset(self._changed)))
            if len(self._steps) > STEPS_MAX:
                dropped = self._steps.popleft()
                self._floor = (dropped.number, dropped.revision + 1)
        self._changed.clear()
        return True

    def number_of(self, cursor: str) -> int | None:
        """The last step that a viewer with ``cursor`` has all rows of; None: unknown."""
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
        """All rows, as one JSON object."""
        if self._snapshot is None:
            cluster = self._rows[CLUSTER].get("", msgspec.Raw(b"null"))
            lists = {kind: list(self._rows[kind].values()) for kind in KINDS}
            self._snapshot = _encoder.encode(
                {"cursor": self.cursor, "time": self._time, CLUSTER: cluster, **lists}
            )
        return self._snapshot

    def change_after(self, number: int) -> bytes | None:
        """What a viewer lacks that has step ``number``, as one JSON object; None: a snapshot."""
        if number not in self._encoded:
            self._encoded[number] = self._encode(number)
        return self._encoded[number]

    def _encode(self, number: int) -> bytes | None:
        if number < self._floor[0]:
            return None
        keys: set[Key] = set()
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
