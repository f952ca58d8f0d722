"""One option and one renderer for whatever commands show."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from skep.cli.apps.job import shown as jobs_shown
from skep.cli.output import Cell, OutputOptions, Screen, Shown, filled, shortened, shows, table, width_of
from skep.cli.see.runs import shown as runs_shown
from skep.cli.see.status import ClusterStatus, StatusScreen, lines_of
from skep.cli.stack.stack_lists import stacks
from skep.errors import InvalidArgument, Unavailable

NOW = 1_769_860_800.0

ROWS = [
    {"Name": "web", "Tasks": 2, "Why": {"Code": 3}, "Nodes": ["m1"]},
    {"Name": "db", "Tasks": 1, "Why": None, "Nodes": []},
]


def lines(screen: Screen) -> Iterator[str]:
    return table(("NAME", "WHY"), [("web", "a long reason, longer than fits"), ("db", "")], screen)


REPORT = Shown(data={"Services": ROWS}, rows=ROWS, lines=lines, exit_code=3)


def a_command() -> click.Command:
    @click.command()
    @shows
    def command(output: OutputOptions) -> None:
        """Shows a report."""

        async def fetch() -> Shown:
            return REPORT

        output.show(fetch)

    return command


def ran(*words: str) -> Any:
    return CliRunner().invoke(a_command(), list(words))


def test_what_is_piped_is_plain_and_whole_and_ends_with_the_reports_code() -> None:
    done = ran()
    assert done.output.splitlines() == ["NAME  WHY", "web   a long reason, longer than fits", "db"]
    assert done.exit_code == 3


def test_a_command_whose_output_is_read_no_more_ends_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from {__name__} import a_command; a_command()()"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_json_and_yaml_have_the_same_data() -> None:
    import yaml

    assert msgspec.json.decode(ran("-o", "json").output) == REPORT.data
    assert yaml.safe_load(ran("-o", "yaml").output) == REPORT.data


def test_a_template_is_filled_for_each_row() -> None:
    assert ran("--format", "{{.Name}}\\t{{.Tasks}}").output == "web\t2\ndb\t1\n"
    assert ran("--format", "{{json .Why}} {{json .Nodes}}").output == '{"Code":3} ["m1"]\nnull []\n'
    assert filled("{{if .Why}}{{.Why.Code}}{{else}}-{{end}}", ROWS[1]) == "-"
    wrong = ran("--format", "{{.Nam}}")
    assert (wrong.exit_code, "To see the fields, use -o json" in wrong.output) == (1, True)
    both = ran("--format", "{{.Name}}", "-o", "json")
    assert (both.exit_code, "cannot be used together" in both.output) == (2, True)


def test_what_nodes_say_cannot_steer_the_terminal() -> None:
    with pytest.raises(InvalidArgument):
        filled("{{", {"Name": ""})
    assert "\x1b" not in filled("{{.Name}}", {"Name": "\x1b[2J"})
    assert not any("\x1b" in line for line in table(("A",), [("\x1b[31mred",)], Screen()))


def test_a_narrow_terminal_cuts_the_last_column_and_colors_only_terminals() -> None:
    narrow = Screen(columns=20)
    assert list(lines(narrow))[1] == "web   a long reason…"
    assert all(width_of(line) <= 20 for line in lines(narrow))
    colored = list(table(("A", "B"), [(Cell("down", "red"), "x")], Screen(has_colors=True)))
    assert "\x1b[31mdown" in colored[1]
    assert "\x1b" not in "".join(table(("A", "B"), [(Cell("down", "red"), "x")], Screen()))
    assert (shortened("日本語", 5), width_of("日本")) == ("日本…", 4)
    assert Screen(columns=12).fitted("one two three four", indent=2) == ["one two", "  three four"]
    assert Screen(columns=12).fitted("  one two three", indent=4) == ["  one two", "    three"]


def test_no_color_is_honored(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours), open(os.devnull, "w") as nothing:
        assert Screen.present(is_wide=False, output=terminal).has_colors
        assert not Screen.present(is_wide=False, output=nothing).has_colors
        monkeypatch.setenv("NO_COLOR", "1")
        assert not Screen.present(is_wide=False, output=terminal).has_colors


def test_a_watch_goes_on_when_the_node_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    responses = iter([REPORT, Unavailable("no leader"), REPORT, KeyboardInterrupt()])

    async def fetch() -> Shown:
        response = next(responses)
        if isinstance(response, BaseException):
            raise response
        return response

    output = OutputOptions(watches=True, template="{{.Name}}", watch_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        output.show(fetch)
    assert capsys.readouterr().out == "web\ndb\nThe state could not be read: no leader\nweb\ndb\n"


def test_a_template_may_be_one_of_dockers_words() -> None:
    assert ran("--format", "json").output.splitlines() == [msgspec.json.encode(row).decode() for row in ROWS]
    assert ran("--format", "table {{.Name}}\\t{{.Tasks}}").output == "NAME  TASKS\nweb   2\ndb    1\n"
    assert OutputOptions(template="table {{.CurrentState}}").lines(
        Shown(data=None, rows=[{"CurrentState": "Running"}], lines=lines)
    ) == ["CURRENT STATE", "Running"]


def test_what_happens_is_shown_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    """For people, what they need not see has no line; programs see everything."""
    for output in (
        OutputOptions(),
        OutputOptions(form="json"),
        OutputOptions(form="yaml"),
        OutputOptions(template="{{.Name}}"),
    ):
        output.show_next(ROWS[0], "a line")
        output.show_next(ROWS[1], "")
    shown = capsys.readouterr().out
    assert shown.startswith('a line\n{"Name":"web","Tasks":2')
    assert shown.count('"Name"') == 2
    assert "---\nName: web\n" in shown
    assert shown.endswith("\nweb\n")


def test_a_table_without_rows_is_a_sentence_with_a_command() -> None:
    for shown in (
        jobs_shown([], Screen(), NOW),
        stacks([]).lines(Screen()),
        runs_shown("nightly", {"Runs": []}, Screen(), NOW),
        lines_of(StatusScreen(health="healthy", node=(("node", "m1"),), cluster=ClusterStatus()), Screen()),
    ):
        *_, last = shown
        assert re.search(r"^No .*\. .*\bskep [a-z]+ [a-z]+", last), last
    assert list(table(("NAME",), [], Screen())) == ["NAME"]
