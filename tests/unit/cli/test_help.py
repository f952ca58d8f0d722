"""The rules of the command's help: summaries, groups, one spelling of each option, former spellings."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from skep.cli import main as cli
from skep.cli.options import Duration
from tests.support.clients.docker_command import skep

ROOT = Path(__file__).parents[3]
SUMMARY_MAX = 60
SENTENCE_MAX = 25
HELP_WORDS_MAX = 90
UNNAMED = re.compile(r"(What|Who|That|Those|Which|Of)\b")
"""Beginnings of sentences that make the reader look for their subject."""
RIDDLE = re.compile(r"\b(anew|beside|goes on|go on|any more|is no|run on(?=[.,])|too(?=[.,])|as well)\b")
"""Words that are not the field's."""
VERBS = frozenset(
    {
        *(
            "Abort",
            "Add",
            "Attach",
            "Balance",
            "Register",
            "Serve",
            "Back",
            "Check",
            "Compare",
            "Convert",
            "Copy",
            "Create",
            "Cut",
            "Return",
            "Stop",
            "Suppose",
            "Deploy",
            "Diagnose",
        ),
        *(
            "Disconnect",
            "Drain",
            "Encrypt",
            "End",
            "Explain",
            "Expose",
            "Forward",
            "Freeze",
            "Give",
            "Hide",
            "Kill",
            "List",
            "Load",
            "Manage",
            "Move",
            "Open",
            "Pause",
        ),
        *(
            "Print",
            "Reconnect",
            "Recover",
            "Release",
            "Remove",
            "Renew",
            "Replace",
            "Restart",
            "Restore",
            "Resume",
        ),
        *("Retry", "Run", "Send", "Set", "Show", "Start", "Take", "Test", "Turn", "Upgrade", "Wait"),
    }
)
PLACES = {"start", "see", "apps", "cluster", "maintain"}


def commands(
    command: click.Command = cli.main, context: click.Context | None = None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command of Skep's own, groups included, by its words."""
    name = "skep" if context is None else str(command.name)
    context = click.Context(command, info_name=name, parent=context, **command.context_settings)
    if not isinstance(command, click.Group):
        return
    for child in command.list_commands(context):
        found = command.get_command(context, child)
        assert found is not None
        yield (
            f"{context.command_path} {child}",
            found,
            click.Context(found, info_name=child, parent=context, **found.context_settings),
        )
        if isinstance(found, click.Group):
            found.name = child
            yield from commands(found, context)


def read(path: Path) -> str:
    return path.read_text()


ALL = {words: (command, context) for words, command, context in commands()}


@pytest.mark.parametrize("words", sorted(ALL))
def test_a_summary_starts_with_a_verb_and_is_short(words: str) -> None:
    summary = ALL[words][0].get_short_help_str(1000)
    assert summary.split()[0].rstrip(",") in VERBS, summary
    assert len(summary) <= SUMMARY_MAX, summary
    assert summary.endswith(".")


def test_the_groups_have_every_command_once_and_its_own_summary() -> None:
    assert {title.lower() for title in cli.GROUPS} == PLACES
    assert sum(map(len, cli.GROUPS.values())) == len(cli.COMMANDS)
    for name, entry in cli.COMMANDS.items():
        assert ALL[f"skep {name}"][0].get_short_help_str(1000) == entry.summary
    shown = CliRunner().invoke(cli.main, ["--help"]).output
    assert all(f"{title}:\n" in shown for title in (*cli.GROUPS, "Docker", "Environment"))


@pytest.mark.parametrize("words", sorted(ALL))
def test_every_option_has_a_help_sentence_and_every_argument_a_name(words: str) -> None:
    command, context = ALL[words]
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, parameter.opts
            assert type(parameter.type) is not click.types.FloatParamType, "a time is a DURATION"
    usage = command.get_usage(context)
    assert usage.count("[OPTIONS]") == 1
    assert "..." not in usage.split()


def sentences_of(command: click.Command) -> Iterator[str]:
    """The sentences of a command's help and options, without the examples."""
    texts = [part for part in (command.help or "").partition("\b")[0].split("\n\n") if part.strip()]
    texts += [
        one.help.partition("  [default")[0]
        for one in command.params
        if isinstance(one, click.Option) and one.help and not one.hidden
    ]
    for text in texts:
        yield from re.split(r"(?<=[.?])\s+", re.sub(r"\s+", " ", text.strip()))


@pytest.mark.parametrize("words", sorted(ALL))
def test_every_sentence_of_the_help_is_understood_at_the_first_reading(words: str) -> None:
    """Short, without asides after a semicolon, and about a thing that it names."""
    for sentence in sentences_of(ALL[words][0]):
        assert len(sentence.split()) <= SENTENCE_MAX, sentence
        assert ";" not in sentence, sentence
        assert not UNNAMED.match(sentence), sentence
        assert not RIDDLE.search(sentence), sentence


@pytest.mark.parametrize("words", sorted(ALL))
def test_the_help_fits_on_a_screen_and_options_name_their_values(words: str) -> None:
    command, context = ALL[words]
    about = (command.help or "").partition("\b")[0]
    assert len(about.split()) <= HELP_WORDS_MAX
    assert not re.search(r"\b(INTEGER|FLOAT|RANGE)\b", command.get_help(context))


@pytest.mark.parametrize(
    "sentence", ["What fails is shown first.", "Of a service it is the task.", "That it has."]
)
def test_a_sentence_that_names_nothing_is_found(sentence: str) -> None:
    assert UNNAMED.match(sentence)


@pytest.mark.parametrize("sentence", ["It goes on as before.", "Attempts are counted anew.", "Yes, too."])
def test_a_riddle_is_found(sentence: str) -> None:
    assert RIDDLE.search(sentence)


def test_tables_of_all_commands_use_the_same_headings() -> None:
    """The words of Docker and Kubernetes, as in docs/reference/screens.md and the views of ``skep top``."""
    texts = [*map(read, sorted((ROOT / "skep/cli").rglob("*.py"))), read(ROOT / "skep/top/rows.py")]
    headings = {word for text in texts for word in re.findall(r'"([A-Z][A-Z ]{2,14})"', text)}
    assert {"REASON", "STARTED", "EVENT"} <= headings
    assert not headings & {"WHY", "WHY NOT", "WHAT", "BEGAN", "SINCE", "AGO", "UNTIL"}


@pytest.mark.parametrize(
    ("words", "present", "former"),
    [
        ("secret prune", "yes", "--force"),
        ("config prune", "yes", "-f"),
        ("upgrade", "dry_run", "--plan"),
    ],
)
def test_former_spellings_of_switches_still_work_and_are_not_shown(
    words: str, present: str, former: str
) -> None:
    command, context = ALL[f"skep {words}"]
    assert command.make_context(words, [former], parent=context.parent).params[present] is True
    assert former not in command.get_help(context).split()


@pytest.mark.parametrize("words", ["doctor network", "events"])
def test_json_is_still_the_output_json(words: str) -> None:
    command, context = ALL[f"skep {words}"]
    assert command.make_context(words, ["--json"], parent=context.parent).params["form"] == "json"
    assert "--json" not in command.get_help(context)


@pytest.mark.parametrize(
    ("words", "given", "name", "seconds"),
    [
        ("service wait", ["--timeout", "0.5", "web"], "timeout", 0.5),
        ("service wait", ["--timeout", "2h", "web"], "timeout", 7200.0),
        ("service wait", ["web"], "timeout", 600.0),
        ("reboot-lock take", ["--ttl", "10", "w1"], "ttl", 600.0),
        ("reboot-lock take", ["--ttl", "90s", "w1"], "ttl", 90.0),
        ("upgrade", ["--within", "60"], "within", 60.0),
        ("user token", ["--days", "2", "ci"], "lifetime", 172_800.0),
        ("user token", ["--lifetime", "1d12h", "ci"], "lifetime", 129_600.0),
    ],
)
def test_a_time_is_a_duration_and_numbers_have_their_former_unit(
    words: str, given: list[str], name: str, seconds: float
) -> None:
    command, context = ALL[f"skep {words}"]
    assert command.make_context(words, given, parent=context.parent).params[name] == seconds


@pytest.mark.parametrize(
    ("text", "error"), [("soon", "is not a duration"), ("5", "is out of range"), ("2m", "out of")]
)
def test_a_bad_duration_is_refused_with_what_to_write(text: str, error: str) -> None:
    with pytest.raises(click.BadParameter, match=error):
        Duration(least_s=10, most_s=60).convert(text, None, None)


def test_the_daemons_help_is_that_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, argv: started.append(argv))
    shown = CliRunner().invoke(cli.main, ["daemon", "--help"]).output
    assert "--advertise-addr" in shown
    assert "--image-disk-high" not in shown
    assert CliRunner().invoke(cli.main, ["daemon", "--nonsense"]).exit_code == 2
    assert not started
    words = ["--debug", "--label", "a=b", "--image-disk-high", "80"]
    assert CliRunner().invoke(cli.main, ["daemon", *words]).exit_code == 0
    assert list(started[0][-5:]) == words


def test_a_former_verb_of_the_playground_is_the_present_one() -> None:
    group, context = ALL["skep playground"]
    assert isinstance(group, click.Group)
    assert group.get_command(context, "mend") is group.get_command(context, "reconnect") is not None
    assert "mend" not in group.list_commands(context)


def test_version_shows_skeps_before_dockers(tmp_path: Path) -> None:
    shown = skep(tmp_path, "-H", "unix:///x.sock", "version").splitlines()
    lines = [line.split(":")[0].strip() for line in shown]
    assert lines[:5] == ["Skep", "Version", "Git commit", "Date", "API version"]
    assert shown[-3:] == ["--host", "unix:///x.sock", "version"]
