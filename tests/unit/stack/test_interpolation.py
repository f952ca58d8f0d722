"""Variables in values."""

import pytest

from skep.stack.compose.document import FileProblems, parse
from skep.stack.compose.dotenv import parse as parse_variables
from skep.stack.compose.interpolation import Substitution, interpolated

VARIABLES = {"A": "a", "EMPTY": "", "B_1": "b"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x", "x"),
        ("$A-$B_1.", "a-b."),
        ("${A}b", "ab"),
        ("$$A $${A}", "$A ${A}"),
        ("${NO:-d}", "d"),
        ("${EMPTY:-d}${EMPTY-e}", "d"),
        ("${NO-}", ""),
        ("${NO:-${A}x${NO-y}}!", "axy!"),
        ("${A:+yes}${EMPTY:+no}${EMPTY+set}${NO+no}", "yesset"),
        ("${A:?why}", "a"),
        ("${EMPTY?why}", ""),
        ("${A:-${NO:?never asked}}", "a"),
        ("${A:-}}", "a}"),
        ("{{.Node.Hostname}}", "{{.Node.Hostname}}"),
        ("${NO:-http://x:80/?a=b}", "http://x:80/?a=b"),
    ],
)
def test_a_form_gives_its_value(text: str, value: str) -> None:
    assert Substitution(VARIABLES).text(text) == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("${NO:?set it}", "the variable NO has no value: set it"),
        ("${EMPTY:?}", "the variable EMPTY has no value"),
        ("${A", "${A is followed by '': expected one of :- :? :+ - ? + or a closing brace"),
        ("${A:-x", "a ${ is never closed: write $$ for a dollar sign"),
        ("${}", "${ without the name of a variable: write $$ for a dollar sign"),
        ("$ 5", "a dollar sign without the name of a variable: write $$ for a dollar sign"),
        ("${A!}", "${A is followed by '!': expected one of :- :? :+ - ? + or a closing brace"),
        ("${X:-" * 50 + "}" * 50, "variables are nested more than 20 levels deep"),
    ],
)
def test_a_wrong_form_is_an_error(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Substitution(VARIABLES).text(text)
    assert str(caught.value) == error


def test_what_a_value_grows_to_is_bounded() -> None:
    with pytest.raises(ValueError, match="longer than 1048576 characters"):
        Substitution({"L": "x" * 100_000}).text("$L" * 20)


def test_values_are_replaced_where_they_stand_and_missing_names_are_warned_of_once() -> None:
    warnings: list[str] = []
    document = parse("$A: $A\nn: ${N:-5}\nq: '${N:-5}'\nl: [$NO, $NO]\n", "f")
    assert interpolated(document, VARIABLES, warnings.append).plain() == {
        "$A": "a", "n": 5, "q": "5", "l": ["", ""]
    }  # fmt: skip
    assert warnings == ["the variable NO is not set: it is taken as empty"]


def test_errors_have_their_places() -> None:
    with pytest.raises(FileProblems) as caught:
        interpolated(parse("a:\n  - b: ${X:?give X}\nc: $", "f"), {}, lambda _: None)
    assert str(caught.value).splitlines() == [
        "f:2:8: a[0].b: the variable X has no value: give X",
        "f:3:4: c: a dollar sign without the name of a variable: write $$ for a dollar sign",
    ]


def test_a_file_of_variables_has_quotes_comments_and_variables() -> None:
    text = (
        "\ufeff# comment\nexport A=1\nB = two words # comment\nC='$A # literal'\nD=\"$A\\n\\$A\"\nE=${A}${OUT:-x}\n"
        'F=\nHOST\nNONE\nG="line 1\nline 2"\nH=a#b\n'
    )
    assert parse_variables(text, {"OUT": "o", "HOST": "h"}) == {
        "A": "1", "B": "two words", "C": "$A # literal", "D": "1\n$A", "E": "1o", "F": "", "HOST": "h",
        "G": "line 1\nline 2", "H": "a#b",
    }  # fmt: skip
    assert parse_variables("A='$x' # y", {}, is_raw=True) == {"A": "'$x' # y"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("A=1\n=2", "line 2: expected NAME=VALUE"),
        ("A='x", "line 1: a quote is never closed"),
        ("A='x' y", "line 1: unexpected text after the closing quote"),
        ("A=$", "line 1: a dollar sign without the name of a variable: write $$ for a dollar sign"),
    ],
)
def test_a_wrong_line_of_variables_is_an_error(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_variables(text, {})
    assert str(caught.value) == error
