"""Rows and their differences: a snapshot with the differences after it is the later snapshot, for any reader."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from skep.manager.view.rows import StackRow
from skep.manager.view.table import CLUSTER, CLUSTER_KEY, KINDS, STEPS_MAX, Key, RowTableState

INCARNATION = 3


class Page:
    """A reader, as the pages of the dashboard are: it replaces rows by id."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.cursor = ""
        self.rows: dict[str, dict[str, Any]] = {}
        self.cluster: Any = None

    def read(self, table: RowTableState) -> str:
        """Take what there is; what it was: snapshot or change."""
        change = table.change_after(self.number) if self.number is not None else None
        sent = msgspec.json.decode(change if change is not None else table.snapshot())
        if change is None:
            self.rows = {kind: {row["id"]: row for row in sent[kind]} for kind in KINDS}
            self.cluster = sent[CLUSTER]
        else:
            for kind, rows in sent["set"].items():
                if kind == CLUSTER:
                    self.cluster = rows
                else:
                    self.rows[kind].update((row["id"], row) for row in rows)
            for kind, ids in sent["removed"].items():
                for id in ids:
                    self.rows[kind].pop(id, None)
        self.number, self.cursor = table.number, sent["cursor"]
        return "change" if change is not None else "snapshot"


def a_row(id: str, revision: int) -> StackRow:
    return StackRow(id=id, name=f"at {revision}", services=(), revision=revision, revisions=())


def fresh(table: RowTableState) -> Page:
    page = Page()
    page.read(table)
    return page


KEYS = [Key(kind, id) for kind in ("nodes", "tasks") for id in ("a", "b", "c")] + [CLUSTER_KEY]
puts = st.tuples(st.sampled_from(KEYS), st.integers(0, 3))
actions = st.lists(
    st.one_of(
        puts.map(lambda put: ("put", *put)),
        st.tuples(st.just("step"), st.integers(0, 2), st.none()),
        st.tuples(st.just("read"), st.integers(0, 1), st.booleans()),
    ),
    max_size=60,
)


@given(actions)
def test_a_snapshot_with_the_differences_after_it_is_the_later_snapshot(actions: list[Any]) -> None:
    table, revision = RowTableState(INCARNATION), 7
    table.step(revision, 0.0)
    pages = [fresh(table), fresh(table)]
    for what, one, two in actions:
        if what == "put":
            table.put(one, a_row(one.id, two) if two or one == CLUSTER_KEY else None)
        elif what == "step":
            revision += one
            table.step(revision, 0.0)
        else:
            page = pages[one]
            if two:  # its connection broke: it has nothing but its cursor
                page.number = table.number_of(page.cursor)
                assert page.number is not None
            page.read(table)
    table.step(revision, 0.0)
    expected = fresh(table)
    for page in pages:
        page.read(table)
        assert (page.rows, page.cluster) == (expected.rows, expected.cluster)


def test_a_row_that_is_the_same_again_is_no_change() -> None:
    table = RowTableState(INCARNATION)
    table.put(KEYS[0], a_row("a", 1))
    assert table.step(1, 0.0)
    table.put(KEYS[0], a_row("a", 1))
    assert not table.step(2, 0.0)
    assert table.cursor == "3-1"


def test_what_a_reader_lacks_is_merged_by_id_however_long_it_was_away() -> None:
    table = RowTableState(INCARNATION)
    table.step(1, 0.0)
    page = fresh(table)
    for revision in range(2, 500):
        table.put(KEYS[0], a_row("a", revision))
        table.step(revision, 0.0)
    assert page.number is not None
    change = table.change_after(page.number)
    assert change is not None
    assert len(change) < 300
    assert page.read(table) == "change"
    assert page.rows["nodes"]["a"]["revision"] == 499


def test_a_reader_that_is_too_far_behind_is_given_a_snapshot() -> None:
    table = RowTableState(INCARNATION)
    table.step(1, 0.0)
    page = fresh(table)
    for revision in range(2, STEPS_MAX + 4):
        table.put(KEYS[0], a_row("a", revision))
        table.step(revision, 0.0)
    assert page.read(table) == "snapshot"
    assert page.rows["nodes"]["a"]["revision"] == STEPS_MAX + 3


def test_a_difference_of_very_many_rows_is_a_snapshot() -> None:
    table = RowTableState(INCARNATION)
    table.step(1, 0.0)
    page = fresh(table)
    for number in range(5001):
        table.put(Key("tasks", f"t{number}"), a_row(f"t{number}", 1))
    table.step(2, 0.0)
    assert page.read(table) == "snapshot"
    assert len(page.rows["tasks"]) == 5001


def test_a_cursor_of_another_life_of_an_earlier_time_or_of_nothing_needs_a_snapshot() -> None:
    table = RowTableState(INCARNATION)
    table.step(10, 0.0)
    assert table.number_of("3-10") == 1
    assert table.number_of("3-11") == 1
    for cursor in ("3-9", "2-10", "4-10", "3", "3-", "-10", "3-1e1", "3-٣", "x" * 50, "3-" + "9" * 60):
        assert table.number_of(cursor) is None
