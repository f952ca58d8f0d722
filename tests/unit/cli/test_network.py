"""``skep network``: one verb is ours, the others are docker's."""

import pytest
from click.testing import CliRunner

from skep.cli import main as cli
from skep.cli import passthrough


@pytest.mark.parametrize(
    "words", [["ls", "--filter", "name=o"], ["rm", "a", "b"], ["create", "-d", "overlay", "x"]]
)
def test_every_verb_but_ours_is_dockers(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(passthrough, "find_docker", lambda: "/usr/bin/docker")
    monkeypatch.setattr("os.execv", lambda path, argv: started.append(argv))
    assert CliRunner().invoke(cli.main, ["-H", "unix:///x.sock", "network", *words]).exit_code == 0
    assert started == [["/usr/bin/docker", "--host", "unix:///x.sock", "network", *words]]


def test_a_subnet_has_to_be_named() -> None:
    result = CliRunner().invoke(cli.main, ["network", "update", "net1"])
    assert result.exit_code == 2
    assert "--subnet-add" in result.output
