"""``skep network``: one verb is ours, the others are docker's."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from skep.cli import main as cli
from tests.support.clients.docker_command import skep


@pytest.mark.parametrize(
    "words", [["ls", "--filter", "name=o"], ["rm", "a", "b"], ["create", "-d", "overlay", "x"]]
)
def test_every_verb_but_ours_is_dockers(tmp_path: Path, words: list[str]) -> None:
    started = skep(tmp_path, "-H", "unix:///x.sock", "network", *words).splitlines()
    assert started == ["--host", "unix:///x.sock", "network", *words]


def test_a_subnet_has_to_be_named() -> None:
    result = CliRunner().invoke(cli.main, ["network", "update", "net1"])
    assert result.exit_code == 2
    assert "--subnet-add" in result.output
