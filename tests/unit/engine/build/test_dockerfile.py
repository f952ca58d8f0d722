"""What the text of a Dockerfile means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.build.dockerfile.dockerfile import parse
from skep.engine.build.dockerfile.instructions import (
    STEPS_MAX,
    Arg,
    Copy,
    Env,
    Expose,
    Healthcheck,
    OnBuild,
    Run,
    Shell,
    Stages,
    Volume,
    stages_of,
)
from skep.errors import InvalidArgument
from skep.model.container import HealthConfig


def stages(text: str) -> Stages:
    return stages_of(parse(text))


def only(text: str) -> object:
    """The instruction that follows FROM."""
    found = stages(f"FROM a\n{text}").stages[0].instructions
    assert len(found) == 1
    return found[0]


def test_stages_and_arguments_before_them() -> None:
    found = stages("ARG V=1 W\nFROM a:$V AS One\nRUN x\nFROM one\nfrom b aS two\n")
    assert [(stage.base.base, stage.base.name) for stage in found.stages] == [
        ("a:$V", "one"),
        ("one", ""),
        ("b", "two"),
    ]
    assert [arg.pairs for arg in found.arguments] == [(("V", "1"), ("W", None))]
    assert found.steps == 5
    assert [found.index(name) for name in ("ONE", "two", "1", "3", "x", "-1")] == [0, 2, 1, None, None, None]


def test_continued_lines_are_one_instruction_without_comments_and_empty_lines() -> None:
    parsed = parse("FROM a\nRUN one \\  \n  # comment \\\n\n  two\\\n\nRUN three\n")
    assert [line.original for line in parsed.lines] == ["FROM a", "RUN one   twoRUN three"]
    assert parsed.warnings[0] == "Empty continuation line found in: RUN one   twoRUN three"


def test_the_escape_directive_changes_escapes_and_continuations() -> None:
    parsed = parse("# escape=`\nFROM a\nRUN dir `\n c:\\\nENV A=b` c\n")
    assert parsed.escape == "`"
    assert [line.arguments for line in parsed.lines[1:]] == [("dir  c:\\",), ("A", "b` c", "=")]


def test_a_directive_behind_a_comment_is_a_comment() -> None:
    assert parse("# comment\n# escape=`\nFROM a\n").escape == "\\"
    assert parse("\ufeff# syntax = docker/dockerfile:1\nFROM a\n").syntax == "docker/dockerfile:1"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "file with no instructions"),
        ("# nothing\n", "file with no instructions"),
        ("FROM a\nFOO x", "dockerfile parse error line 2: unknown instruction: FOO"),
        ("RUN x\nFROM a", "no build stage in current context"),
        ("FROM", "dockerfile parse error line 1: FROM requires either one or three arguments"),
        ("FROM a b c", "dockerfile parse error line 1: FROM requires either one or three arguments"),
        (
            "FROM a AS 1x",
            """invalid name for build stage: "1x", name can't start with a number or contain symbols""",
        ),
        ("FROM a\nENV A", "ENV must have two arguments"),
        (
            "FROM a\nENV A=1 B",
            'Syntax error - can\'t find = in "B". Must be of the form: name=value',
        ),
        ("FROM a\nENV", "dockerfile parse error line 2: ENV requires at least one argument"),
        ("FROM a\nENV =x", "dockerfile parse error line 2: ENV names can not be blank"),
        ("FROM a\nARG =x", "dockerfile parse error line 2: ARG names can not be blank"),
        ("FROM a\nUSER", "dockerfile parse error line 2: USER requires exactly one argument"),
        ("FROM a\nCOPY x", "dockerfile parse error line 2: COPY requires at least two arguments"),
        ("FROM a\nCOPY --nosuch x y", "dockerfile parse error line 2: Unknown flag: nosuch"),
        (
            "FROM a\nCOPY --from=x --from=y a b",
            "dockerfile parse error line 2: Duplicate flag specified: from",
        ),
        ("FROM a\nCOPY --chown a b", "dockerfile parse error line 2: Missing a value on flag: chown"),
        ("FROM a\nSHELL sh -c", "SHELL requires the arguments to be in JSON form"),
        ("FROM a\nCMD [1]", "when using JSON array syntax, arrays must be comprised of strings only"),
        ("FROM a\nONBUILD FROM b", "FROM isn't allowed as an ONBUILD trigger"),
        ("FROM a\nONBUILD onbuild RUN x", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
        ("FROM a\nHEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments"),
        ("FROM a\nHEALTHCHECK x", 'Unknown type "X" in HEALTHCHECK (try CMD)'),
        ("FROM a\nHEALTHCHECK --interval=1us CMD x", "cannot be less than 1ms"),
        ("FROM a\nHEALTHCHECK --retries=-1 CMD x", "--retries cannot be negative (-1)"),
        ('FROM a\nVOLUME [""]', "VOLUME specified can not be an empty string"),
        ("# escape=x\nFROM a", "invalid escape token 'x' does not match ` or \\"),
        ("# escape=`\n# escape=`\nFROM a", "only one escape parser directive can be used"),
        ("FROM a\nRUN <<EOF\nx\n", "unterminated heredoc"),
        ("FROM a\n" + "RUN x\n" * STEPS_MAX, f"the Dockerfile has more than {STEPS_MAX} instructions"),
        ("FROM a\nRUN " + "x" * 70_000, "dockerfile line greater than max allowed size of 65535"),
    ],
)
def test_what_is_no_dockerfile_is_refused_with_the_builders_words(text: str, error: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        stages(text)
    assert error in str(raised.value)


def test_commands_have_a_shell_form_and_an_exec_form() -> None:
    shell, exec_form = only("RUN echo  [x]"), only('RUN ["echo", "a b"]')
    assert isinstance(shell, Run)
    assert isinstance(exec_form, Run)
    assert shell.command.resolved(("/bin/sh", "-c")) == ("/bin/sh", "-c", "echo  [x]")
    assert exec_form.command.resolved(("/bin/sh", "-c")) == ("echo", "a b")
    assert only('SHELL ["bash", "-c"]').words == ("bash", "-c")  # type: ignore[attr-defined]
    assert isinstance(only('SHELL ["x"]'), Shell)


def test_flags_stand_before_the_arguments() -> None:
    copy = only('COPY --from=0 --chown="a:b" -- --x /y/')
    assert isinstance(copy, Copy)
    assert (copy.origin, copy.chown, copy.sources, copy.destination) == ("0", "a:b", ("--x",), "/y/")
    run = only("RUN --mount=type=cache,target=/a --mount=type=tmpfs,target=/b --network=none ls --all")
    assert isinstance(run, Run)
    assert run.mounts == ("type=cache,target=/a", "type=tmpfs,target=/b")
    assert (run.network, run.command.words) == ("none", ("ls --all",))


def test_variables_and_their_values_keep_their_quotes_until_they_are_substituted() -> None:
    env, old, arg = only('ENV A=1 B="x y" C=d\\ e'), only("ENV A  b = c"), only("ARG A B=c D=")
    assert isinstance(env, Env)
    assert isinstance(old, Env)
    assert isinstance(arg, Arg)
    assert env.pairs == (("A", "1"), ("B", '"x y"'), ("C", "d\\ e"))
    assert old.pairs == (("A", "b = c"),)
    assert arg.pairs == (("A", None), ("B", "c"), ("D", ""))


def test_other_instructions() -> None:
    volume, expose, trigger = only("VOLUME /a /b"), only("EXPOSE 80 22/udp"), only("ONBUILD  RUN  make x")
    health = only("HEALTHCHECK --interval=5s --retries=3 CMD curl x")
    assert isinstance(volume, Volume)
    assert isinstance(expose, Expose)
    assert isinstance(trigger, OnBuild)
    assert isinstance(health, Healthcheck)
    assert volume.paths == ("/a", "/b")
    assert expose.ports == ("22/udp", "80")
    assert trigger.expression == "RUN  make x"
    assert health.health == HealthConfig(test=("CMD-SHELL", "curl x"), interval=5_000_000_000, retries=3)


def test_here_documents_belong_to_their_instruction() -> None:
    found = stages(
        "FROM a\nRUN <<A cat <<-'B'\n  one $x\nA\n\ttwo\n\tB\nCOPY <<c.txt /c\nthree\nc.txt\nRUN end\n"
    )
    run, copy, end = found.stages[0].instructions
    assert [(one.name, one.text, one.expands) for one in run.heredocs] == [
        ("A", "  one $x\n", True),
        ("B", "two\n", False),
    ]
    assert isinstance(copy, Copy)
    assert [(one.name, one.text) for one in copy.documents] == [("c.txt", "three\n")]
    assert copy.sources == ()
    assert end.text == "RUN end"


def test_many_comments_cost_no_more_than_other_lines_and_the_last_are_kept() -> None:
    """A copy of all comments at each of them would take many seconds."""
    comments = "".join(f"# {number}\n" for number in range(90_000))
    first, second = parse(f"FROM a\n{comments}RUN x\n").lines
    assert first.comments == ()
    assert second.comments == tuple(map(str, range(89_900, 90_000)))
    assert parse("FROM a\n# 1\n#\n# 2\nRUN x\n").lines[1].comments == ("2",)


@given(st.text(alphabet="FROMRUNCPY adb\\`#\n\t\"'$<{}[]=-\r\u2028:,", max_size=200))
def test_any_text_is_a_dockerfile_or_an_error(text: str) -> None:
    try:
        stages(text)
    except InvalidArgument:
        pass
