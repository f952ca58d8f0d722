"""What templates cost is bounded, whoever wrote them."""

import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skep.engine.log_drivers.facts import LogFacts, tag_of
from skep.errors import InvalidArgument
from skep.gotemplate import (
    BoundedText,
    CallError,
    Function,
    Struct,
    TemplateBudget,
    TemplateError,
    Value,
    expand,
    to_bytes,
    to_text,
)
from skep.gotemplate.functions import BUILTINS
from skep.model.container import ContainerSpec
from skep.model.options import templates

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


PEAK_MAX = 20 << 20
"""Bytes that the text of a service or a log option may take while it is expanded."""


def peak_of(expanded: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        expanded()
    except (TemplateError, InvalidArgument):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def seen_with(labels: dict[str, str]) -> Struct:
    return templates.context(
        service_id="service",
        service_name="web",
        service_labels=labels,
        node_id="node",
        hostname="host",
        os="linux",
        architecture="x86_64",
        task_id="task",
        task_name="web.1.task",
        slot="1",
    )


LARGE = {"a": "x" * (500 << 10)}
SPREAD = {f"label{number}": "" for number in range(20_000)}
WIDE = {"a": "\U0001f600" * (100 << 10)}

HOARDERS = {
    "structs": ("{{$x := print" + " $" * 4_000 + "}}", LARGE),
    "maps": ("{{$x := println" + " $.Service.Labels" * 4_000 + "}}", LARGE),
    "many labels": ("{{$x := print" + " $" * 4_000 + "}}", SPREAD),
    "verbs": ('{{$x := printf "' + "%v" * 4_000 + '"' + " $" * 4_000 + "}}", LARGE),
    "verbs that do not fit": ('{{$x := printf "' + "%d" * 4_000 + '"' + " $" * 4_000 + "}}", LARGE),
    "arguments left": ('{{$x := printf ""' + " $" * 4_000 + "}}", LARGE),
    "widths": ('{{$x := printf "' + "%1000d" * 9_000 + '"' + " 1" * 9_000 + "}}", {}),
    "quotes": ("{{range 200}}{{$x := printf `%q` $.Service.Labels.a}}{{end}}", WIDE),
    "html": ("{{$x := html" + " $" * 4_000 + "}}", {"a": "<" * (500 << 10)}),
    "js": ("{{$x := js" + " $" * 4_000 + "}}", {"a": "<" * (500 << 10)}),
    "js of other letters": ("{{$x := js $.Service.Labels.a}}", WIDE),
    "urls": ("{{$x := urlquery" + " $" * 4_000 + "}}", WIDE),
    "joins": ("{{$x := join $.Service.Labels.a" + ' ""' * 4_000 + "}}", LARGE),
    "slices": ("{{$x := slice $.Service.Labels.a 1}}" * 1_000, LARGE),
    "errors": ("{{eq $ 1}}", LARGE),
    "ranges over structs": ("{{range $}}{{end}}", LARGE),
    "ranges in ranges": ("{{range $.Service.Labels}}" * 90 + "{{end}}" * 90, SPREAD),
    "printed as it is": ("{{$}}" * 4_000, LARGE),
    "not a template": ("{{" + "\U0001f600" * (100 << 10), {}),
}


@pytest.mark.parametrize("what", HOARDERS)
def test_a_placeholder_takes_little_memory(what):
    text, labels = HOARDERS[what]
    spec = ContainerSpec(image="web", env=(f"X={text}",))
    seen = seen_with(labels)
    assert peak_of(lambda: templates.expand_container(spec, seen)) < PEAK_MAX


@pytest.mark.parametrize("what", ["structs", "many labels", "verbs", "widths", "html", "printed as it is"])
def test_a_config_takes_little_memory(what):
    text, labels = HOARDERS[what]
    seen = seen_with(labels)
    peak = peak_of(lambda: templates.expand_payload(text.encode(), seen, (), lambda _: "", lambda _: ""))
    assert peak < 2 * PEAK_MAX


@pytest.mark.parametrize(
    "tag",
    [
        "{{json .}}" * 100,
        "{{print" + " ." * 900 + "}}",
        "{{.Command}}" * 900,
        "{{upper .Command}}{{title .Command}}{{pad .Command 1024 1024}}" * 50,
        "{{json .Command}}" * 100,
    ],
)
def test_a_tag_of_log_lines_takes_little_memory(tag):
    facts = LogFacts(
        id="1" * 64,
        name="web",
        image_id="sha256:2",
        image="web",
        command="\n" * (1 << 20),
        created="",
        hostname="host",
    )
    assert peak_of(lambda: tag_of({"tag": tag}, facts)) < PEAK_MAX


def test_what_is_not_text_is_counted_as_its_text():
    budget = TemplateBudget(produced=20)
    assert expand("{{.}}", DATA, budget=budget) == "{web map[a:1 b:2]}"
    assert budget.produced == 2
    with pytest.raises(TemplateError, match="it handles too much text"):
        expand("{{.Labels}}", DATA, budget=budget)


_OPERANDS = st.sampled_from(
    [
        ".",
        "$",
        ".Name",
        ".Labels",
        '"<é\\u0000>"',
        "7",
        "1.5",
        "true",
        "nil",
        "(print . .)",
        "`%v %q %x %300d`",
    ]
)
_COMMANDS = st.builds(
    lambda name, operands: " ".join((name, *operands)),
    st.sampled_from(sorted(BUILTINS)),
    st.lists(_OPERANDS, max_size=5),
)
_PIPELINES = st.lists(_COMMANDS, min_size=1, max_size=4).map(" | ".join)
_ACTIONS = st.one_of(
    _PIPELINES.map("{{{{{}}}}}".format),
    _PIPELINES.map("{{{{$x := {}}}}}{{{{print $x $x}}}}".format),
    _PIPELINES.map("{{{{range .Labels}}}}{{{{$y := {}}}}}{{{{$y}}}}{{{{end}}}}".format),
)


@given(st.lists(_ACTIONS, max_size=6).map("".join), st.integers(0, 3_000))
@example("{{printf `%300d` 1}}" * 2, 400)
def test_all_text_of_any_template_stays_within_the_budget(text, most):
    made = 0
    write = BoundedText.write

    def counting(self: BoundedText, piece: str) -> None:
        nonlocal made
        write(self, piece)
        made += len(piece)

    def counted(function: Function) -> Function:
        if function.writes:
            return function

        def call(*values: Value) -> Value:
            nonlocal made
            result = function.call(*values)
            made += len(result) if isinstance(result, str) else 0
            return result

        return function._replace(call=call)

    functions = {name: counted(function) for name, function in BUILTINS.items()}
    budget = TemplateBudget(produced=most, output=most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundedText, "write", counting)
        try:
            expanded = expand(text, DATA, functions, budget=budget)
        except TemplateError:
            expanded = ""
        else:
            assert made <= most - budget.produced
    assert len(to_bytes(expanded)) <= most
    assert made <= most + max(map(len, (text, *DATA.fields["Labels"].values())))


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
    budget = TemplateBudget(steps=15)
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
