"""What ``skep user add`` checks before anything is made."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from skep.cli.cluster.user import _table
from skep.cli.main import main
from skep.cli.output import Screen
from skep.security.authority import Authority


@pytest.mark.parametrize(
    ("ca", "address", "error"),
    [
        (b"no PEM", "tcp://manager1:2376", "ca.pem has no CA certificate in PEM format"),
        (b"\xff\xfe", "tcp://manager1:2376", "ca.pem has no CA certificate in PEM format"),
        (b"", "tcp://manager1:2376", "ca.pem has no CA certificate in PEM format"),
        (None, "tcp://manager1", "unable to parse docker host `tcp://manager1`"),
        (None, "tcp://manager1:port", "unable to parse docker host `tcp://manager1:port`"),
    ],
)
def test_files_and_addresses_are_checked_before_a_token_is_made(
    tmp_path: Path, ca: bytes | None, address: str, error: str
) -> None:
    """A token is shown once: it would be lost with an error after it was made.  No request is sent: the node that
    the command would use is not there, and that is not the error."""
    (tmp_path / "ca.pem").write_bytes(Authority.create().root_pem if ca is None else ca)
    words = ["--host", f"unix://{tmp_path}/none.sock", "user", "add", "ann", "--role", "viewer", "--token"]
    words += ["--context", "--address", address, "--ca", str(tmp_path / "ca.pem")]
    result = CliRunner(env={"DOCKER_CONFIG": str(tmp_path / "docker")}).invoke(main, words)
    assert result.exit_code == 1
    assert error in result.output
    assert not (tmp_path / "docker").exists()


@pytest.mark.parametrize("option", ["--address", "--ca"])
def test_options_of_a_certificate_are_refused_without_one(tmp_path: Path, option: str) -> None:
    (tmp_path / "ca.pem").write_bytes(Authority.create().root_pem)
    value = {"--address": "tcp://manager1:2376", "--ca": str(tmp_path / "ca.pem")}[option]
    words = ["--host", f"unix://{tmp_path}/none.sock", "user", "add", "ann", "--role", "viewer"]
    result = CliRunner().invoke(main, [*words, option, value])
    assert (result.exit_code, "Add --context or --out DIRECTORY." in result.output) == (1, True)


def test_an_inspected_user_is_shown_with_its_roles() -> None:
    tokens = [{"Kind": "token", "ID": "7k2m9x4q1w"}]
    shown = _table({}, tokens, "No tokens.", above="ann: viewer, operator:shop")
    assert list(shown.lines(Screen())) == ["ann: viewer, operator:shop", "KIND   ID", "token  7k2m9x4q1w"]
    shown = _table({}, [], "No tokens.", above="ann: viewer")
    assert list(shown.lines(Screen())) == ["ann: viewer", "No tokens."]
