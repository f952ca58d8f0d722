"""Indexes of tables: ids by value, and copies that change apart."""

from collections.abc import Iterable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from skep.store.tables import FieldIndex

CHANGES = st.lists(
    st.tuples(st.sampled_from(["m1", "m2"]), st.sampled_from(["a", "b", "c", "d"])), max_size=20
)


def shown(index: FieldIndex) -> Mapping[str, tuple[str, ...]]:
    return {value: tuple(ids) for value in ("m1", "m2") if (ids := index.ids(value))}


def toggle(index: FieldIndex, model: dict[str, set[str]], changes: Iterable[tuple[str, str]]) -> None:
    """Add each id that does not have the value, and remove each one that has it."""
    for value, id in changes:
        ids = model.setdefault(value, set())
        if id in ids:
            ids.remove(id)
            index.remove(value, id)
        else:
            ids.add(id)
            index.add(value, id)


@given(before=CHANGES, after=CHANGES, in_copy=CHANGES, at_last=CHANGES)
def test_an_index_has_the_sorted_ids_and_its_copies_change_apart(
    before: list[tuple[str, str]],
    after: list[tuple[str, str]],
    in_copy: list[tuple[str, str]],
    at_last: list[tuple[str, str]],
) -> None:
    index, model = FieldIndex(), dict[str, set[str]]()
    toggle(index, model, before)
    copy, copied = index.copied(), {value: set(ids) for value, ids in model.items()}
    assert copy == index
    toggle(index, model, after)
    toggle(copy, copied, in_copy)
    second, in_second = copy.copied(), {value: set(ids) for value, ids in copied.items()}
    toggle(copy, copied, at_last)
    for one, ids_of in ((index, model), (copy, copied), (second, in_second)):
        assert shown(one) == {value: tuple(sorted(ids)) for value, ids in ids_of.items() if ids}
