"""An error of a command names what to do next: a command, an option, or what to change."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from skep.cli.main import main
from tests.support.harness.sources import parsed

ROOT = Path(__file__).parents[1]
FOLDERS = ("skep/cli", "skep/stack")
STATES = ("NotFound", "FailedPrecondition")
"""What a user has to change something about: what is named, or its state."""
OTHERS = ("AlreadyExists", "InvalidArgument", "PermissionDenied", "Unavailable", "Unimplemented")
"""Errors about the arguments, and about the machines and programs that the command depends on."""

COMMAND = re.compile(r"\b(skep|docker) [a-z-]|(^|\s)-{1,2}[a-z]")
ADVICE = re.compile(
    r"([:;,.] |\n)([Aa]dd|[Cc]hoose|[Cc]reate|[Dd]eploy|[Ff]ix|[Ii]nstall|[Rr]emove|[Rr]erun|[Rr]un|[Tt]ry again"
    r"|[Uu]se)\b"
)
IN_PASSING = re.compile(r"[:;,] (skep|docker) [a-z]|\((skep|docker) [^)]*\)$|`|; ")
CAUSES_ALONE = {
    "the task is …: …": "its service is removed again, so there is nothing left to look at",
}
DOCKERS = {
    "the input device is not a TTY",
    '"default" is a reserved context name',
    'context name "…" is invalid, names are validated against regexp "^…$"',
}
"""Texts of the docker command."""
CAUSES = {
    "…. …": "ends with ``_REPAIR``",
    "…: …. …": "ends with ``_REPAIR``",
    "after … s it is … with …": "the upgrade adds which node it was and what to do",
    "the command ended with code …": "the same",
    "the command did not finish within … s": "the same",
    "the deploy failed, and …. Reason: ….…": "ends with a hint",
    "the deploy failed: …. The previous revision cannot be deployed again: …": "its causes have the next step",
    "not done within … s": "``skep up`` adds the machine and what to do",
}
"""Parts of a longer message, and why they have no next step."""
"""Messages without a next step, and why."""


class Message(NamedTuple):
    """A literal message of an error that is raised; ``…``: what is filled in."""

    where: str
    error: str
    text: str


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Free the syntax trees at the end, so that later garbage collections do not scan them."""
    yield
    parsed.cache_clear()


def messages() -> Iterator[Message]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(parsed(path)):
                match node:
                    case ast.Raise(exc=ast.Call(func=ast.Name(id=error), args=[text, *_])):
                        yield Message(
                            f"{path.relative_to(ROOT)}:{node.lineno}", error, "".join(literal(text))
                        )


def literal(text: ast.expr) -> Iterator[str]:
    match text:
        case ast.Constant(value=str(part)):
            yield part
        case ast.JoinedStr(values=parts):
            for part in parts:
                yield from literal(part)
        case _:
            yield "…"


def has_next_step(text: str) -> bool:
    return COMMAND.search(text) is not None or ADVICE.search(text) is not None


def test_a_next_step_is_a_sentence() -> None:
    """``Run skep status.``, and not a command behind a colon or in parentheses."""
    assert [one for one in messages() if IN_PASSING.search(one.text)] == []


def is_known(words: list[str]) -> bool:
    """Whether the words behind ``skep`` begin with a command: of groups, down to one that is none."""
    command: click.Command | None = main
    context = click.Context(main)
    for word in words:
        if not isinstance(command, click.Group):
            return True
        command = command.get_command(context, word)
        if command is None:
            return False
    return not isinstance(command, click.Group)


def test_every_refusal_of_a_command_names_a_next_step() -> None:
    refusals = [one for one in messages() if one.error in STATES and one.text.strip("…")]
    assert len(refusals) > 20
    silent = {one.text: one.where for one in refusals if not has_next_step(one.text)}
    assert {text: where for text, where in silent.items() if text not in CAUSES_ALONE} == {}
    assert set(CAUSES_ALONE) <= set(silent), "gone, or with a next step"


def test_every_other_error_of_a_command_names_a_next_step_unless_the_text_is_dockers() -> None:
    others = [one for one in messages() if one.where.startswith("skep/cli/") and one.error in OTHERS]
    assert len(others) > 60
    silent = {one.text: one.where for one in others if one.text.strip("…") and not has_next_step(one.text)}
    assert {text: where for text, where in silent.items() if text not in DOCKERS and text not in CAUSES} == {}
    assert DOCKERS | set(CAUSES) <= set(silent), "gone, or with a next step"


def test_every_command_of_skep_that_an_error_names_exists() -> None:
    named = {
        (one.where, found[1])
        for one in messages()
        for found in re.finditer(r"(?<!install )\bskep ((?:[a-z][a-z-]*\b ?)+)", one.text)
    }
    assert len(named) > 20
    assert [(where, words) for where, words in sorted(named) if not is_known(words.split())] == []


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("stack … has no services. List stacks with skep stack ls.", True),
        ("…. Use --continue to take over, or --abort to end it.", True),
        ("this node is a worker. Run the command on a manager.", True),
        ("no node has a local volume … of a service", False),
        ("the task is …: …", False),
        ("well-known, not named", False),
    ],
)
def test_a_next_step_is_a_command_an_option_or_what_to_do(text: str, has: bool) -> None:
    assert has_next_step(text) is has


@pytest.mark.parametrize(
    ("words", "exists"),
    [
        ("explain", True),
        ("explode", False),
        ("reboot-lock status", True),
        ("reboot-lock hold", False),
        ("service ps", True),
        ("stack", False),
        ("status at another manager", True),
    ],
)
def test_a_command_exists_down_to_its_last_word(words: str, exists: bool) -> None:
    assert is_known(words.split()) is exists
