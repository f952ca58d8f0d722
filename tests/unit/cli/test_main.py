"""The skep command finds its commands, and docker's."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from skep.cli import main as cli
from skep.cli.running import with_next_step, without_code
from tests.support.clients.docker_command import skep


def test_help_lists_every_command_with_a_sentence_and_examples() -> None:
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    for name in cli.COMMANDS:
        assert f"  {name} " in result.output


def test_a_noun_of_docker_becomes_docker_on_skeps_socket(tmp_path: Path) -> None:
    words = ["service", "ls", "--filter", "name=web", "--help"]
    started = skep(tmp_path, "-H", "unix:///x.sock", *words).splitlines()
    assert started == ["--host", "unix:///x.sock", *words]


def test_an_unknown_word_is_refused() -> None:
    result = CliRunner().invoke(cli.main, ["honey"])
    assert result.exit_code == 2
    assert "No such command 'honey'" in result.output
    assert "Did you mean" not in result.output


@pytest.mark.parametrize(
    ("typed", "meant"), [("statsu", "'stats' or 'status'"), ("servcie", "'service' or 'survive'")]
)
def test_a_word_that_is_nearly_one_is_answered_with_it(typed: str, meant: str) -> None:
    result = CliRunner().invoke(cli.main, [typed])
    assert result.exit_code == 2
    assert f"No such command '{typed}'. Did you mean {meant}?" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["events", "--since", "foo"], "Error: invalid time 'foo'. Use '10 min ago'"),
        (["events", "--filter", "bad"], "Error: invalid filter 'bad': expected KEY=VALUE"),
        (["--host", "foo", "status"], "`foo`. Use unix:///path, tcp://address:port or ssh://user@machine."),
    ],
)
def test_a_wrong_word_is_an_error_with_a_next_step(words: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.output


def test_what_is_not_found_is_listed_by_a_command() -> None:
    assert (
        with_next_step("service web not found")
        == "service web not found. List services with skep service ls."
    )
    missing = "notification target ops not found"
    assert with_next_step(missing) == f"{missing}. List targets with skep notify ls."
    silent = "tcp://m1:2376 does not answer: connection refused"
    assert with_next_step(silent) == f"{silent}. Check that the node runs, or choose another one with --host."
    hangs = "no response from unix:///run/skep/skep.sock within 20 s"
    assert with_next_step(hangs).startswith(f"{hangs}. Check the load and the log of that node, or choose")
    no_leader = "The swarm does not have a leader. It's possible that too few managers are online."
    assert with_next_step(no_leader).endswith(". Run skep status to see which managers do not respond.")
    assert with_next_step("service web not found. Run it.") == "service web not found. Run it."


def test_no_command_but_top_waits_for_textual() -> None:
    """The modules of all commands are imported, ``skep top``'s too: Textual only when that runs.

    The playground's has structlog, which takes ``rich`` where it finds it.
    """
    found = {entry.location.partition(":")[0] for entry in cli.COMMANDS.values()}
    modules = sorted(found - {"skep.playground.cli"})
    script = f"import sys, {', '.join(modules)}; sys.exit('textual' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=50, check=False).returncode == 0


def completed(*words: str) -> list[str]:
    """What a shell offers for the last word."""
    from click.shell_completion import ShellComplete

    *before, last = words
    found = ShellComplete(cli.main, {}, "skep", "_SKEP_COMPLETE").get_completions(before, last)
    return [item.value for item in found]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("update", ""), ["abort", "pause", "promote", "resume", "switch-back"]),
        (("cluster", "re"), ["rebalance", "recover", "resume"]),
        (("cluster", "recover", "--d"), ["--dry-run"]),
        (("cluster", "fo"), ["forget-nodes"]),
        (("context", ""), ["create", "ls", "rm", "show", "use"]),
        (("version", "--a"), ["--all"]),
        (("status", "-o", "w"), ["wide"]),
        (("update", "some-container", "--"), ["--help"]),
    ],
)
def test_a_shell_completes_every_verb_and_runs_no_docker_for_it(
    words: tuple[str, ...], offered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: object) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr("os.execv", started)
    assert completed(*words) == offered


def test_codes_of_errors_are_left_out_also_within_a_text() -> None:
    code = "rpc error: code = FailedPrecondition desc = "
    assert without_code(f"{code}network n is in use") == "network n is in use"
    quoted = f"network net was not removed: {code}n is in use. Rerun the command."
    assert without_code(quoted) == "network net was not removed: n is in use. Rerun the command."


@pytest.mark.parametrize("words", [("version", "--format", "x"), ("update", "--memory", "1g", "c1")])
def test_version_without_all_and_update_of_a_container_are_dockers(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    started = skep(tmp_path, "-H", "unix:///x.sock", *words).splitlines()
    assert started == ["--host", "unix:///x.sock", *words]
