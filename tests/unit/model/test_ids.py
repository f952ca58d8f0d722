"""Ids: how numbers are written in them."""

from hypothesis import example, given
from hypothesis import strategies as st

from skep.model.values.ids import ID_LENGTH, base36


@given(st.integers(0, 2**128 - 1), st.integers(1, 30))
@example(0, ID_LENGTH)
@example(36, 1)
@example(36**25 - 1, ID_LENGTH)
def test_a_number_in_base_36_is_as_wide_as_asked_and_reads_back(number, width):
    text = base36(number, width)
    assert int(text, 36) == number
    assert len(text) >= width
    assert len(text) == width or not text.startswith("0")
    assert text == text.lower()
