"""Filters of list requests."""

import pytest

from skep.api.formats.filters import Filters
from skep.errors import InvalidArgument


@pytest.mark.parametrize("text", ['{"name": ["b", "a", "a"]}', '{"name": {"a": true, "b": true}}'])
def test_both_forms_mean_the_same(text):
    assert Filters.from_json(text)["name"] == ("a", "b")


@pytest.mark.parametrize("text", ["", "{}", "null", '{"name": null}'])
def test_no_filter_takes_everything(text):
    filters = Filters.from_json(text)
    assert filters.matches("name", "web")
    assert filters.matches_prefix("name", "web")
    assert filters.matches_labels("label", {})


def test_a_name_fits_by_its_beginning():
    filters = Filters({"name": ["we", "db"]})
    assert filters.matches_prefix("name", "web")
    assert not filters.matches_prefix("name", "a-web")
    assert not filters.matches("name", "web")


def test_all_labels_have_to_be_there():
    filters = Filters({"label": ["a", "b=1"]})
    assert filters.matches_labels("label", {"a": "x", "b": "1"})
    assert not filters.matches_labels("label", {"a": "x", "b": "2"})
    assert not filters.matches_labels("label", {"b": "1"})


def test_an_unknown_key_is_refused():
    with pytest.raises(InvalidArgument, match="Invalid filter 'bogus'"):
        Filters({"name": ["x"], "bogus": ["y"]}).refuse_unknown("name")
