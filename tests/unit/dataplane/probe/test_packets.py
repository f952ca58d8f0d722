"""Questions and answers of the probes as bytes."""

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.probe.packets import (
    PAIRS_MAX,
    QUESTION_BYTES_MIN,
    Said,
    answer,
    answered,
    asked,
    question,
)

NONCES = st.integers(0, 2**64 - 1)
MTUS = st.integers(0, 2**16 - 1)
SAID = st.builds(Said, MTUS, st.dictionaries(st.integers(0, 2**32 - 1), MTUS, max_size=60))


@given(NONCES, st.integers(0, 9000))
def test_a_question_has_the_size_that_is_tried(nonce: int, size: int) -> None:
    datagram = question(nonce, size)
    assert len(datagram) == max(size, QUESTION_BYTES_MIN)
    assert asked(datagram) == nonce
    assert answered(datagram) is None


@given(NONCES, SAID)
def test_an_answer_says_it_all_and_is_shorter_than_any_question(nonce: int, said: Said) -> None:
    datagram = answer(nonce, said)
    assert len(datagram) <= QUESTION_BYTES_MIN
    assert asked(datagram) is None
    found = answered(datagram)
    assert found is not None
    if len(said.lower) <= PAIRS_MAX:
        assert found == (nonce, said)
    for address, mtu in said.lower.items():  # who does not fit is covered by the device's
        assert min(found[1].mtu, found[1].lower.get(address, 2**16)) <= mtu


@given(st.binary(max_size=400))
def test_what_is_neither_is_neither(garbage: bytes) -> None:
    assert asked(garbage) is None or garbage.startswith(b"skpp\x01\x01")
    assert answered(garbage) is None or garbage.startswith(b"skpp\x01\x02")


@given(NONCES, SAID, st.integers(1, 255))
def test_a_piece_of_an_answer_is_none(nonce: int, said: Said, cut: int) -> None:
    assert answered(answer(nonce, said)[:-cut]) is None
