"""Go's words for what is not JSON.  The recorded engine's own are in tests/conformance."""

import json

from hypothesis import given
from hypothesis import strategies as st

from skep.api.formats.gosyntax import end_of_first_value, first_error

pieces = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        '"',
        '"a"',
        "1",
        "-",
        "0",
        ".",
        "e",
        "true",
        "nul",
        " ",
        "\\",
        "\\u00",
        "\x01",
    ]
)
texts = st.lists(pieces, max_size=12).map("".join)


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda word: 1 / 0)
    except (ValueError, ZeroDivisionError, RecursionError):
        return False
    return True


@given(texts)
def test_what_python_takes_for_json_has_no_error(text):
    if is_json(text):
        assert first_error(text.encode()) is None


@given(texts)
def test_what_has_no_error_is_json_as_far_as_its_first_value_goes(text):
    encoded = text.encode()
    if first_error(encoded) is None:
        assert is_json(encoded[: end_of_first_value(encoded)].decode())


def test_what_stands_behind_the_first_value_is_not_looked_at():
    assert first_error(b'{"a": 1} nonsense') is None
    assert end_of_first_value(b' {"a": 1} nonsense') == 9


def test_a_byte_is_quoted_as_go_quotes_it():
    assert first_error(b"{'a': 1}") == "invalid character '\\'' looking for beginning of object key string"
    assert first_error(b"\xff") == "invalid character 'ÿ' looking for beginning of value"
    assert first_error(b"[1\x00]") == "invalid character '\\x00' after array element"
