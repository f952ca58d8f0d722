"""A container without privileges fills its node's disk: the node says so, gets no new tasks, and keeps what it has."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    running,
    wait_running,
    wait_until,
)
from tests.support.store.store_disks import mounted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DISK_MB = 300
ON_W1 = ("--constraint", "node.hostname==w1")
FILLS = """
while [ "$(df /tmp | awk 'NR == 2 { sub("%", "", $5); print $5 }')" -lt 97 ]; do
    dd if=/dev/zero bs=1M count=1 2>/dev/null >>/tmp/fill
done
exec sleep 1000
"""
KNOWN_S = 60.0
"""The node measures every 15 s, and describes itself to its manager every 10 s; a label stays for half a minute."""


@contextmanager
def on_a_small_disk(cluster: TestCluster, name: str, image: Path) -> Iterator[None]:
    """A node's data directory lies on ext4, which reserves 5 % of its blocks for root."""
    data = Path(cluster.node(name).description["state_dir"])
    kept = data.with_name("kept")
    with image.open("wb") as file:
        file.truncate(DISK_MB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "5", image], check=True)
    cluster.skep("kill", name)
    data.rename(kept)
    data.mkdir(mode=0o700)
    with mounted(data, "-o", "loop", image):
        try:
            shutil.copytree(kept, data, dirs_exist_ok=True, symlinks=True)
            cluster.skep("start", name)
            yield
        finally:
            cluster.skep("kill", name)


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def create(node: TestNode, name: str, *words: str) -> None:
    node.docker("service", "create", "--detach", "--restart-delay", "1s", *ON_W1, "--name", name, *words)


def pressure(seen_by: TestNode) -> str:
    labels = nodes_by_name(seen_by)["w1"]["Description"]["Engine"].get("Labels") or {}
    return str(labels.get(DISK_PRESSURE_LABEL, ""))


def test_a_node_whose_disk_a_user_has_filled_gets_no_new_tasks_until_it_has_space(tmp_path: Path) -> None:
    with (
        a_playground("small", managers=1, workers=1) as cluster,
        on_a_small_disk(cluster, "w1", tmp_path / "disk.ext4"),
    ):
        m1, w1 = cluster.node("m1"), cluster.node("w1")
        wait_until(lambda: nodes_by_name(m1)["w1"]["Status"]["State"] == "ready", "w1 is back", 60)
        create(m1, "web", IMAGE, *IDLE)
        (web,) = wait_running(m1, "web", 1)
        create(m1, "filler", "--user", "nobody", IMAGE, "sh", "-c", FILLS)
        (filler,) = wait_running(m1, "filler", 1)
        words = wait_until(lambda: pressure(m1), "the manager knows of the full disk", KNOWN_S)
        assert re.search(r" is 9[67] % full, \d+ MiB left: no new tasks until it is below 93 %$", words)
        assert words in skep(m1, "explain", "w1")
        assert "no new tasks" in skep(m1, "status")
        assert f"WARNING: {words}" in w1.client().info()["Warnings"]
        assert words in skep(w1, "status")

        create(m1, "more", IMAGE, *IDLE)
        shown = ("service", "ps", "--no-trunc", "--format", "{{.Error}}", "more")
        wait_until(
            lambda: "disk full on 1 node" in m1.docker(*shown).stdout, "a new task waits, and says why", 20
        )
        assert {task["ID"] for task in running(m1, "web")} == {web["ID"]}
        w1.docker("run", "--rm", IMAGE, "true")
        w1.docker("kill", web["Status"]["ContainerStatus"]["ContainerID"])
        wait_until(
            lambda: {task["ID"] for task in running(m1, "web")} - {web["ID"]},
            "a crashed task starts again",
            30,
        )

        w1.docker("exec", filler["Status"]["ContainerStatus"]["ContainerID"], "rm", "/tmp/fill")
        wait_running(m1, "more", 1, KNOWN_S)
        assert pressure(m1) == ""
