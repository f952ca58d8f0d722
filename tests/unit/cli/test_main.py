"""The skep command finds its commands, and docker's."""

import pytest
from click.testing import CliRunner

from skep.cli import main as cli
from skep.cli import passthrough


def test_help_lists_every_command_with_a_sentence_and_examples() -> None:
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    for name in cli.COMMANDS:
        assert f"  {name} " in result.output


def test_a_noun_of_docker_becomes_docker_on_skeps_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(passthrough, "find_docker", lambda: "/usr/bin/docker")
    monkeypatch.setattr("os.execv", lambda path, argv: started.append(argv))
    words = ["-H", "unix:///x.sock", "service", "ls", "--filter", "name=web", "--help"]
    assert CliRunner().invoke(cli.main, words).exit_code == 0
    expected = [
        "/usr/bin/docker",
        "--host",
        "unix:///x.sock",
        "service",
        "ls",
        "--filter",
        "name=web",
        "--help",
    ]
    assert started == [expected]


def test_an_unknown_word_is_refused() -> None:
    result = CliRunner().invoke(cli.main, ["honey"])
    assert result.exit_code == 2
    assert "No such command 'honey'" in result.output
    assert "Did you mean" not in result.output


@pytest.mark.parametrize(("typed", "meant"), [("statsu", "'stats' or 'status'"), ("servcie", "'service'")])
def test_a_word_that_is_nearly_one_is_answered_with_it(typed: str, meant: str) -> None:
    result = CliRunner().invoke(cli.main, [typed])
    assert result.exit_code == 2
    assert f"No such command '{typed}'. Did you mean {meant}?" in result.output
