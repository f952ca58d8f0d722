"""Variables in a Dockerfile."""

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.build.dockerfile.substitution import (
    VALUE_BYTES_MAX,
    Budget,
    split,
    substituted,
    substituted_document,
)
from skep.errors import InvalidArgument

VARIABLES = {"A": "one", "EMPTY": "", "PATH": "/usr/bin:/bin", "F": "a.tar.gz", "PORTS": "80 443"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("$A", "one"),
        ("${A}x$A", "onexone"),
        ("$Ax", ""),
        ("$NOSUCH", ""),
        ("$", "$"),
        ("a$", "a$"),
        ("\\$A", "$A"),
        ("'$A'", "$A"),
        ('"$A b"', "one b"),
        ('"a\\"b\\n"', 'a"b\\n'),
        ("${A:-two}", "one"),
        ("${NOSUCH:-two}", "two"),
        ("${NOSUCH-two}", "two"),
        ("${EMPTY:-two}", "two"),
        ("${EMPTY-two}", ""),
        ("${A:+two}", "two"),
        ("${NOSUCH:+two}", ""),
        ("${EMPTY+two}", "two"),
        ("${NOSUCH:-${A}}", "one"),
        ("${A:?gone}", "one"),
        ("${PATH#*:}", "/bin"),
        ("${PATH%:*}", "/usr/bin"),
        ("${F%.*}", "a.tar"),
        ("${F%%.*}", "a"),
        ("${F#*.}", "tar.gz"),
        ("${F##*.}", "gz"),
        ("${PATH/bin/lib}", "/usr/lib:/bin"),
        ("${PATH//bin/lib}", "/usr/lib:/lib"),
        ("${PATH//b?n/}", "/usr/:/"),
    ],
)
def test_a_word_is_substituted_as_by_the_shell(word: str, expected: str) -> None:
    assert substituted(word, VARIABLES) == expected


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("${", "failed to process \"${\": syntax error: missing '}'"),
        ("${A", "unsupported modifier"),
        ("${}", "syntax error: bad substitution"),
        ("${A:-x", "syntax error: missing '}'"),
        ("${A!x}", "unsupported modifier (!) in substitution"),
        ("${NOSUCH:?not given}", "NOSUCH: not given"),
        ("${EMPTY:?}", "EMPTY: is not allowed to be empty"),
        ("'x", "looking for matching single-quote"),
        ('"x', "looking for matching double-quote"),
    ],
)
def test_what_cannot_be_substituted_is_an_error(word: str, error: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        substituted(word, VARIABLES)
    assert error in str(raised.value)


def test_the_escape_character_may_be_another_one() -> None:
    assert substituted("`$A\\", VARIABLES, "`") == "$A\\"


def test_a_variable_may_hold_several_words() -> None:
    assert split("$PORTS 22 '1 2'", VARIABLES) == ["80", "443", "22", "1 2"]


def test_a_value_is_bounded() -> None:
    with pytest.raises(InvalidArgument, match=f"more than {VALUE_BYTES_MAX} characters"):
        substituted("$L$L", {"L": "x" * VALUE_BYTES_MAX})


@pytest.mark.parametrize("word", ["${L//*a*a*a*a*b/x}", "${L%*a*a*a*a*a*b}", "${" * 60 + "}" * 60])
def test_an_expensive_word_ends_soon(word: str) -> None:
    begun = time.process_time()
    try:
        substituted(word, {"L": "a" * 5000})
    except InvalidArgument:
        pass
    assert time.process_time() - begun < 20


@given(st.text(alphabet="A${}:-+?#%/\\\"' x*", max_size=60))
def test_any_word_gives_text_or_an_error(word: str) -> None:
    try:
        assert len(substituted(word, VARIABLES)) < 10_000
    except InvalidArgument:
        pass


@pytest.mark.parametrize("word", ['"' + "$L" * 100 + '"', "${A//a/$L}", "${L:-x}" * 100])
def test_a_value_that_grows_too_long_is_refused_before_it_is_put_together(word: str) -> None:
    variables = {"L": "x" * (VALUE_BYTES_MAX // 2), "A": "a" * 100}
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match=f"more than {VALUE_BYTES_MAX} characters"):
            substituted(word, variables)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * VALUE_BYTES_MAX


@pytest.mark.parametrize(
    "word",
    [
        "${NOSUCH:+$L}" * 100,
        "${NOSUCH:+'$L'\"$L\"}" * 100,
        "${NOSUCH:+${A//a/b}}" * 1000,
        "${NOSUCH:+${A%a*b}}" * 10_000,
    ],
)
def test_what_is_dropped_again_is_paid_for_too(word: str) -> None:
    variables = {"L": "x" * 20_000, "A": "a" * 100}
    with pytest.raises(InvalidArgument, match="substitutions take more than 1000000 steps"):
        substituted(word, variables, budget=Budget(1_000_000))


def test_the_words_of_one_build_have_one_budget() -> None:
    budget = Budget(1000)
    for _ in range(9):
        assert len(substituted("$L", {"L": "x" * 100}, budget=budget)) == 100
    with pytest.raises(InvalidArgument, match="substitutions take more than 1000 steps"):
        substituted("$L$L", {"L": "x" * 100}, budget=budget)


def test_a_here_document_is_bounded() -> None:
    plain = "x" * (2 * VALUE_BYTES_MAX)
    assert substituted_document(plain, VARIABLES) == plain, "there is nothing to substitute"
    with pytest.raises(InvalidArgument, match="a value has more than"):
        substituted_document("${A}" + plain, VARIABLES)
