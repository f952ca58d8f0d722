"""What ``skep backup`` says that a backup holds, and ``skep restore`` that it lacks."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from skep.api.backups import RestorePlan
from skep.cli.main import main
from skep.cli.maintain import backup
from skep.cli.maintain.backup import _described


def test_one_of_a_kind_is_not_called_many() -> None:
    counts = {"services": 2, "secrets": 1, "configs": 0}
    assert _described(counts) == "2 services, 1 secret, 0 configs"


def test_a_restore_says_that_removals_and_evictions_after_the_backup_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RestorePlan(
        cluster_id="c1",
        node_id="m1",
        hostname="one",
        created_at="2026-11-01T00:00:00Z",
        incarnation=2,
        skep_version="1.0",
        counts={"nodes": 3},
        advertise_addr="10.0.0.7:2377",
        is_done=True,
    )

    async def restored(*_of: object, is_dry: bool) -> RestorePlan:
        return plan

    monkeypatch.setattr(backup, "_restore", restored)
    file = tmp_path / "swarm.backup"
    file.write_bytes(bytes(32))
    done = CliRunner().invoke(main, ["restore", "--yes", "--key-file", str(file), str(file)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == (
        "Nodes that you removed, demoted or evicted after the backup are members again. Repeat these commands."
    )
