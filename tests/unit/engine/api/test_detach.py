import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.api.streams.detach import DEFAULT_KEYS, DetachKeys, parse_keys
from skep.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", b"\x10\x11"),
        ("ctrl-a", b"\x01"),
        ("ctrl-a,d", b"\x01d"),
        ("ctrl-@,ctrl-_", b"\x00\x1f"),
        ("DEL", b"\x7f"),
    ],
)
def test_keys_are_named_as_in_docker(text: str, keys: bytes):
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-ab", "xy", "ctrl-a,", "é"])
def test_unknown_keys_are_refused(text: str):
    with pytest.raises(InvalidArgument, match="Invalid detach keys"):
        parse_keys(text)


def test_the_sequence_detaches_and_is_not_passed_on():
    assert DetachKeys(DEFAULT_KEYS).pass_on(b"ls\x10\x11more") == (b"ls", True)


def test_the_sequence_may_come_in_pieces():
    keys = DetachKeys(DEFAULT_KEYS)
    assert keys.pass_on(b"a\x10") == (b"a", False)
    assert keys.pass_on(b"\x11") == (b"", True)


def test_a_beginning_that_leads_to_nothing_is_passed_on():
    keys = DetachKeys(DEFAULT_KEYS)
    assert keys.pass_on(b"\x10") == (b"", False)
    assert keys.pass_on(b"x") == (b"\x10x", False)


@given(st.lists(st.binary(max_size=8)))
def test_input_without_the_sequence_arrives_whole(pieces: list[bytes]):
    keys = DetachKeys(DEFAULT_KEYS)
    sent = b"".join(pieces)
    if DEFAULT_KEYS in sent:
        return
    passed = b"".join(keys.pass_on(piece)[0] for piece in [*pieces, b"end"])
    assert passed == sent + b"end"
