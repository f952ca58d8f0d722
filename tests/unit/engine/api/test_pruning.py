"""The filters of the ``prune`` commands."""

import pytest

from skep.api.formats.filters import Filters, has_prunable_labels, is_prunable, until_of
from skep.errors import InvalidArgument
from skep.model.values.times import timestamp


@pytest.mark.parametrize(
    ("filters", "labels", "is_prunable"),
    [
        ({}, {"a": "1"}, True),
        ({"label": ("a", "b=2")}, {"a": "1", "b": "2"}, True),
        ({"label": ("a", "b=2")}, {"a": "1"}, False),
        ({"label!": ("a",)}, {"a": "1"}, False),
        ({"label!": ("a=2",)}, {"a": "1"}, True),
        ({"label!": ("a", "b")}, {"a": "1"}, True),
        ({"label!": ("a", "b")}, {"a": "1", "b": "2"}, False),
        ({"label!": ("a", "b")}, {}, True),
        ({"label": ("a",), "label!": ("b",)}, {"a": "1", "b": "2"}, False),
        ({"label!": ()}, {"a": "1"}, False),  # as in Docker, where no labels match every object
    ],
)
def test_an_object_is_kept_by_all_the_labels_together(
    filters: dict[str, tuple[str, ...]], labels: dict[str, str], is_prunable: bool
) -> None:
    assert has_prunable_labels(labels, Filters(filters)) is is_prunable


def test_a_wrong_time_is_refused_before_anything_is_looked_at() -> None:
    for moments in (("x",), ("1", "2")):
        with pytest.raises(InvalidArgument):
            until_of(Filters({"until": moments}), 0)
    until_ns = until_of(Filters({"until": ("100",)}), 0)
    assert [is_prunable(timestamp(ns), {}, Filters({}), until_ns) for ns in (99 * 10**9, 100 * 10**9)] == [
        True,
        False,
    ]
    assert until_of(Filters({}), 0) is None
