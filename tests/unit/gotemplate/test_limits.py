"""What templates cost is bounded, whoever wrote them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.gotemplate import Budget, CallError, Function, Struct, TemplateError, expand, to_bytes, to_text

DATA = Struct("*template.Context", {"Name": "web", "Labels": {"a": "1", "b": "2"}})

BOMBS = {
    "steps": "{{range 1000000000}}{{range 1000000000}}{{end}}{{end}}",
    "templates that include themselves": '{{define "r"}}{{template "r"}}{{template "r"}}{{end}}{{template "r"}}',
    "templates that include others": "".join(
        f'{{{{define "t{n}"}}}}{f"{{{{template `t{n + 1}`}}}}" * 10}{{{{end}}}}' for n in range(30)
    )
    + '{{define "t30"}}x{{end}}{{template "t0"}}',
    "a text that doubles": '{{$x := "xxxxxxxxxxxxxxxx"}}' + "{{$x = print $x $x}}" * 60,
    "wide fields": "{{range 100000}}{{printf `%1000d` 1}}{{end}}",
    "a width that Go takes": "{{printf `%999999d` 1}}" * 1000,
    "parentheses": "{{" + "(" * 10_000 + "1" + ")" * 10_000 + "}}",
    "branches": "{{if 1}}" * 10_000 + "{{end}}" * 10_000,
    "else ifs": "{{if 0}}" + "{{else if 0}}" * 10_000 + "{{end}}",
    "variables": "".join(f"{{{{$x{n} := 1}}}}" for n in range(20_000)),
    "output": "{{range 90000}}" + "x" * 100 + "{{end}}",
    "escapes": '{{$x := "' + "&" * 100_000 + '"}}' + "{{$x = html $x}}" * 20,
    "a chain of pipes": '{{"x"' + "|html" * 200_000 + "}}",
    "many opened": "{{" * 100_000,
    "many comments": "{{/*" * 100_000,
}


@pytest.mark.parametrize("what", BOMBS)
def test_what_costs_too_much_ends_with_an_error_or_little_text(what):
    try:
        found = expand(BOMBS[what], DATA)
    except TemplateError as error:
        found = str(error)
        most = 1_000
    else:
        most = 1 << 20
    assert len(found) <= most


def test_a_budget_is_shared():
    budget = Budget(steps=15)
    expand("{{range 3}}{{.}}{{end}}", DATA, budget=budget)
    with pytest.raises(TemplateError, match="too many steps"):
        expand("{{range 3}}{{.}}{{end}}", DATA, budget=budget)


@given(
    st.text(alphabet=st.sampled_from("{}-./*\"`'$|:=(),ifendrangewithlsproch0123 \n\t.%+é\x00"), max_size=80)
)
def test_any_text_gives_text_or_an_error(text):
    try:
        expand("{{" + text + "}}", DATA)
    except TemplateError:
        pass


@given(st.binary(max_size=50).filter(lambda data: b"{{" not in data))
def test_bytes_that_are_no_text_stay_as_they_are(data):
    assert to_bytes(expand(to_text(b"{{1}}" + data), DATA)) == b"1" + data


def test_what_a_function_refuses_is_the_templates_error():
    def refuse(_: str) -> str:
        raise CallError("not today")

    with pytest.raises(TemplateError, match=r"at <get \"x\">: error calling get: not today"):
        expand('{{get "x"}}', DATA, {"get": Function(refuse, 1, texts=1)})
    with pytest.raises(TemplateError, match=r"expected string; found 1"):
        expand("{{get 1}}", DATA, {"get": Function(refuse, 1, texts=1)})
    with pytest.raises(TemplateError, match=r"wrong type for value; expected string; got int"):
        expand("{{len .Name | get}}", DATA, {"get": Function(refuse, 1, texts=1)})
