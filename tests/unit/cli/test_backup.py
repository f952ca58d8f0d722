"""What ``skep backup`` says that a backup holds, and ``skep restore`` that it lacks."""

import asyncio
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from skep.api.backups import RestorePlan, new_header, opening
from skep.cli.endpoint import HostOptions
from skep.cli.main import main
from skep.cli.maintain import backup
from skep.cli.maintain.backup import _backup, _described
from skep.errors import InvalidArgument


def test_one_of_a_kind_is_not_called_many() -> None:
    counts = {"services": 2, "secrets": 1, "configs": 0}
    assert _described(counts) == "2 services, 1 secret, 0 configs"


def a_backup(directory: Path, kdf: Literal["hkdf", "scrypt"] = "hkdf") -> Path:
    """The beginning of a backup."""
    file = directory / "swarm.backup"
    file.write_bytes(opening(new_header(kdf)))
    return file


@pytest.mark.parametrize(
    ("kdf", "words", "error"),
    [
        ("hkdf", (), "swarm.backup was made with a key file (--key-file). Use the same."),
        (
            "scrypt",
            ("--key-file",),
            "swarm.backup was made with a passphrase (--passphrase-file). Use the same.",
        ),
        ("scrypt", (), "No passphrase was given. Use --passphrase-file or --key-file."),
    ],
)
def test_a_restore_says_what_it_needs_before_it_asks_for_a_passphrase(
    tmp_path: Path, kdf: Literal["hkdf", "scrypt"], words: tuple[str, ...], error: str
) -> None:
    file = a_backup(tmp_path, kdf)
    host = f"unix://{tmp_path}/none.sock"
    command = ["--host", host, "restore", *(each for word in words for each in (word, str(file))), str(file)]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, error in done.stderr) == (1, True), done.output
    assert "Passphrase" not in done.stdout or not words


def test_a_backup_that_cannot_be_written_says_why() -> None:
    with pytest.raises(InvalidArgument, match=r"^cannot write /proc/b: no such file or directory\. Choose"):
        asyncio.run(_backup(HostOptions(), Path("/proc/b"), ("hkdf", bytes(32))))


def test_a_restore_says_that_removals_and_evictions_after_the_backup_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RestorePlan(
        cluster_id="c1",
        node_id="m1",
        hostname="one",
        created_at="2026-11-01T04:05:06.123456789Z",
        incarnation=2,
        skep_version="1.0",
        counts={"nodes": 3},
        advertise_addr="10.0.0.7:2377",
        is_done=True,
    )

    async def restored(*_of: object, is_dry: bool) -> RestorePlan:
        return plan

    monkeypatch.setattr(backup, "_restore", restored)
    file = a_backup(tmp_path)
    done = CliRunner().invoke(main, ["restore", "--yes", "--key-file", str(file), str(file)])
    assert done.exit_code == 0, done.output
    assert "created     2026-11-01 04:05:06 UTC by one (m1), skep 1.0\n" in done.output
    planned = CliRunner().invoke(main, ["restore", "--dry-run", "--key-file", str(file), str(file)])
    assert "If the former cluster still runs and this node can reach it, its managers stop" in planned.output
    assert done.output.splitlines()[-1] == (
        "Nodes that you removed, demoted or evicted after the backup are members again. Repeat these commands."
    )
