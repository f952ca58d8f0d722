"""A swarm that is restored at an address which no worker knows."""

import subprocess
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import (
    SKEP,
    TestNode,
    a_playground,
    create,
    ready,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 or words == ("status",), done.stderr
    return done.stdout


def test_workers_come_to_a_manager_at_a_new_address_by_the_line_that_restore_prints(tmp_path: Path) -> None:
    with a_playground("moved", managers=1, workers=1) as cluster:
        m1, w1 = cluster.node("m1"), cluster.node("w1")
        create(m1, "web", 1, "--constraint", "node.role == worker")
        (task,) = wait_running(m1, "web", 1)
        key = tmp_path / "key"
        key.write_bytes(bytes(range(64)))
        skep(m1, "backup", "--key-file", str(key), str(tmp_path / "swarm.backup"))
        new = cluster.node(cluster.skep("add", "manager").stdout.split()[0])
        cluster.skep("kill", "m1")
        restored = skep(new, "restore", "--yes", "--key-file", str(key), str(tmp_path / "swarm.backup"))
        (line,) = [line.strip() for line in restored.splitlines() if line.strip().startswith("managers = ")]
        wait_until(
            lambda: "no manager answers: this node tries 192." in skep(w1, "status"),
            "the worker names the managers it tries",
        )
        toml = cluster.directory / "w1" / "skep.toml"
        toml.write_text(f"{line}\n{toml.read_text()}")
        cluster.skep("kill", "w1")
        cluster.skep("start", "w1")
        wait_until(lambda: "w1" in ready(new), "the worker is back", within_s=60)
        wait_running(new, "web", 1)
        assert "no manager answers" not in skep(w1, "status")
        assert [one["ID"] for one in wait_running(new, "web", 1)] == [task["ID"]], "it ran on"
