"""`skep upgrade --system` on a playground, where a reboot ends a node with its containers and begins another boot."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.managers.test_upgrade_command import skep
from tests.integration.networks.lab import serve
from tests.support.machines.boots import boots, count_boots
from tests.support.machines.playground_rig import TestCluster, a_playground, nodes_by_name, wait_running
from tests.support.machines.versions import ROOT, environment
from tests.support.managers.managers_rig import wait_managers


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TestCluster]:
    command = environment(tmp_path / "playground", ROOT) / "bin/skep"
    playground = command.with_name("skep-playground")
    shutil.copy(command, playground)
    count_boots(command, tmp_path, "w1", "m2")
    with a_playground("reboot", command=str(playground), managers=3, workers=2) as made:
        wait_managers(made.node("m1"), "m1", "m2", "m3")
        yield made


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_machines_are_rebooted_one_at_a_time_and_a_lost_one_stops_the_run(
    cluster: TestCluster, tmp_path: Path
) -> None:
    m1 = cluster.node("m1")
    serve(m1, "web", 2, "--constraint", "node.role==worker", "--update-monitor", "100ms")
    wait_running(m1, "web", 2, 90)
    before = nodes_by_name(m1)
    assert "needs a reboot" in before["w1"]["Status"]["Message"]
    command = tmp_path / "playground/bin/skep-playground"
    verbs = {
        verb: f"{command} playground {verb} --dir {cluster.directory} --name {cluster.name}"
        for verb in ("kill", "start")
    }

    lost = skep(
        cluster,
        "upgrade",
        "--system",
        "--within",
        "20s",
        "--command",
        f'{verbs["kill"]} "$SKEP_NODE"',
        within_s=200,
    )
    assert (lost.returncode, "w1 did not return healthy from its reboot" in lost.stderr) == (1, True), (
        lost.stderr
    )
    subprocess.run(f"{verbs['start']} w1", shell=True, check=True, timeout=90)

    both = f'{verbs["kill"]} "$SKEP_NODE" && {verbs["start"]} "$SKEP_NODE"'
    done = skep(cluster, "upgrade", "--system", "--continue", "--command", both, within_s=400)
    assert (done.returncode, done.stdout) == (0, "1 node rebooted\n"), done.stderr
    assert boots(tmp_path) == {"m1": 1, "m2": 2, "m3": 1, "w1": 2, "w2": 1}
    after = nodes_by_name(m1)
    assert {node["Spec"]["Availability"] for node in after.values()} == {"active"}
    changed = {
        name
        for name, node in after.items()
        if node["Description"]["Engine"]["Labels"]["skep.boot"]
        != before[name]["Description"]["Engine"]["Labels"]["skep.boot"]
    }
    assert changed == {"w1", "m2"}
    assert not [name for name, node in after.items() if "reboot" in json.dumps(node["Status"])]
    assert skep(cluster, "upgrade", "--system", "--dry-run").stdout == "up to date: w1, w2, m2, m3, m1\n"
    assert skep(cluster, "reboot-lock", "status").stdout == "No node holds the lock.\n"
