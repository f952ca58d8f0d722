"""Reading YAML with positions."""

import pytest

from skep.stack.compose.document import FileProblems, parse, resolved


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("22:22", "22:22"),  # not a number of base 60
        ("0440", 288),
        ("0o440", 288),
        ("0x1f", 31),
        ("-5", -5),
        ("1.5", 1.5),
        ("1_000", 1000),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("2001-01-01", "2001-01-01"),
        ("1e400x", "1e400x"),
        ("9" * 100, "9" * 100),
    ],
)
def test_a_scalar_without_quotes_is_what_compose_takes_it_for(text: str, value: object) -> None:
    assert resolved(text) == value
    assert type(resolved(text)) is type(value)


def test_quoted_scalars_are_text_and_keys_are_text() -> None:
    assert parse("on: '2'\n1: \"true\"", "f").plain() == {"on": "2", "1": "true"}


def test_every_node_has_its_place() -> None:
    top = parse("a:\n  - b: 1\n    c: {d: x}\n", "file.yml")
    assert top.entries is not None
    inner = top.entries["a"].items
    assert inner is not None
    assert inner[0].entries is not None
    deep = inner[0].entries["c"].entries
    assert deep is not None
    assert str(deep["d"].place) == "file.yml:3:12"
    assert str(inner[0].keys["b"]) == "file.yml:2:5"


def test_what_is_written_wins_over_what_is_merged() -> None:
    text = "base: &b {x: 1, y: 1}\nother: &o {y: 2, z: 2}\na: {<<: [*b, *o], x: 0}\n"
    assert parse(text, "f").plain()["a"] == {"x": 0, "y": 1, "z": 2}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "f:1:1: the file is empty: it has no services"),
        ("- a", "f:1:1: the top of the file is a list, not a mapping with services"),
        ("a: 1\nb: 2\na: 3", "f:3:1: duplicate key 'a': line 1 has it already"),
        ("a: {b: 1, b: 2}", "f:1:11: a: duplicate key 'b': line 1 has it already"),
        (
            "a:\n\tb: 1",
            (
                "f:2:1: this is not YAML: found character that cannot start any token; "
                "the line is indented by a tab: use spaces"
            ),
        ),
        ("a: [1, 2", "f:2:1: this is not YAML: did not find expected ',' or ']'"),
        ("a: &x [*x]", "f:1:8: a: *x is inside &x, so the value would contain itself"),
        ("a: *nothing", "f:1:4: a: undefined alias *nothing: define &nothing before it"),
        (
            "a: !python/object:os.system x",
            "f:1:4: a: unknown tag !python/object:os.system: stack files support !reset and !override",
        ),
        (
            "a: {{ b }}: c",
            "f:1:5: a: a key cannot be a list or a mapping: quote a value that begins with { or [",
        ),
        ("a: {<<: 1}", "f:1:5: a.<<: << merges mappings, and this is the number 1"),
        ("a: 1\n---\nb: 2", "f:2:1: a second document begins here: a stack is one document"),
        (f"a: {'[' * 150}{']' * 150}", "f:1:103: a: values are nested more than 100 levels deep"),
        (BOMB, "f:6:25: a5: the document has more than 500000 values, its aliases unfolded"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(FileProblems) as caught:
        parse(text, "f")
    assert str(caught.value) == problem


def test_a_file_that_is_too_large_or_no_text_is_refused() -> None:
    with pytest.raises(FileProblems, match="larger than 8 MiB: split it"):
        parse(b"#" * (9 << 20), "f")
    with pytest.raises(FileProblems, match=r"^f:2:1: the file is not UTF-8 text$"):
        parse(b"a: 1\nb: \xff\n", "f")


def test_tags_stay_on_their_values() -> None:
    entries = parse("a: !reset\nb: !override [1]\nc: !reset null\nd: !reset {x: 1}", "f").entries
    assert entries is not None
    assert [entries[name].tag for name in "abcd"] == ["!reset", "!override", "!reset", "!reset"]
