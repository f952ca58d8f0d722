"""The label filters of the ``prune`` commands."""

import pytest

from skep.api.filters import Filters
from skep.engine.api.pruning import has_prunable_labels


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
    ],
)
def test_an_object_is_kept_by_all_the_labels_together(
    filters: dict[str, tuple[str, ...]], labels: dict[str, str], is_prunable: bool
) -> None:
    assert has_prunable_labels(labels, Filters(filters)) is is_prunable
