"""Unix times of ``since`` and ``until``."""

import pytest

from skep.api.errors import Untranslated
from skep.api.formats.timestamps import parse_unix_time


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [("", None), ("0", 0), ("5", 5_000_000_000), ("5.5", 5_500_000_000), ("1.000000001", 1_000_000_001)],
)
def test_seconds_and_their_fractions_are_read(text, nanoseconds):
    assert parse_unix_time(text) == nanoseconds


@pytest.mark.parametrize("text", ["yesterday", "1.x", "1h", "9" * 30])
def test_anything_else_is_refused(text):
    with pytest.raises(Untranslated, match="invalid syntax"):
        parse_unix_time(text)
