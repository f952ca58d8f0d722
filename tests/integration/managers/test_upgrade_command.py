"""`skep upgrade`: node by node under drain and load, with a way back; the reboot lock."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep import __version__
from tests.integration.networks.lab import asking, outside, serve
from tests.support.machines.playground_rig import SKEP, TestCluster, a_playground, nodes_by_name, wait_running
from tests.support.machines.versions import ROOT, Versions, package_of
from tests.support.managers.managers_rig import wait_managers

FORMER = "0.0.9"
"""What the earlier commit is called here, so that nodes tell the versions apart."""

EVERY = ("m1", "m2", "m3", "w1", "w2")


def skep(cluster: TestCluster, *words: str, within_s: float = 60) -> subprocess.CompletedProcess[str]:
    """The command, as an operator of m1 gives it."""
    command = (SKEP, "--host", cluster.node("m1").socket, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False, cwd=ROOT)


def last_commit() -> str:
    """The last tag, or the commit before this one; the environment may name another."""
    tags = ["git", "-C", str(ROOT), "describe", "--tags", "--abbrev=0", "HEAD~1"]
    tag = subprocess.run(tags, capture_output=True, text=True, check=False).stdout.strip()
    return os.environ.get("SKEP_EARLIER") or tag or "HEAD~1"


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    earlier = package_of(last_commit(), tmp_path / "package")
    (earlier / "skep/__init__.py").write_text(f'__version__ = "{FORMER}"\n')
    return Versions(tmp_path, earlier)


@pytest.fixture
def cluster(versions: Versions) -> Iterator[TestCluster]:
    with a_playground("upgr", command=str(versions.command), managers=3, workers=2) as made:
        wait_managers(made.node("m1"), "m1", "m2", "m3")
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_node_is_upgraded_under_load_and_a_bad_version_is_taken_back(
    cluster: TestCluster, tmp_path: Path
) -> None:
    m1 = cluster.node("m1")
    where = ("--constraint", "node.role==worker", "-p", "8080:80", "--stop-grace-period", "90s")
    serve(
        m1,
        "web",
        4,
        *where,
        "--label",
        "skep.drain=5s",
        "--update-parallelism",
        "2",
        "--update-monitor",
        "100ms",
    )
    wait_running(m1, "web", 4, 90)
    arguments = f"{cluster.directory} {cluster.name} {tmp_path} $SKEP_NODE"
    change = f"{sys.executable} -m tests.support.machines.versions {arguments}"
    back = ("--to", __version__, "--rollback-command", f"{change} earlier")

    failed = skep(cluster, "upgrade", "--command", "false", *back, within_s=300)
    assert failed.returncode == 1
    assert (
        f"w1 did not become healthy with {__version__}: the command ended with code 1. It has {FORMER} again"
        in (failed.stderr)
    )
    assert nodes_by_name(m1)["w1"]["Spec"]["Availability"] == "active"

    urls = [f"http://{cluster.node(name).description['addr']}:8080/" for name in ("m1", "w2")]
    with asking((outside(cluster), ("strict_client.py", "--pause=0.002", *urls))) as seen:
        done = skep(cluster, "upgrade", "--command", f"{change} present", *back, within_s=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"5 nodes upgraded to {__version__}\n"
    upgraded = [line.partition(":")[0] for line in done.stderr.splitlines() if "upgrading from" in line]
    assert (sorted(upgraded[:2]), sorted(upgraded[2:])) == (["w1", "w2"], ["m1", "m2", "m3"])
    nodes = nodes_by_name(m1)
    found = {name: node["Description"]["Engine"]["EngineVersion"] for name, node in nodes.items()}
    assert found == dict.fromkeys(EVERY, __version__)
    assert {node["Spec"]["Availability"] for node in nodes.values()} == {"active"}
    assert Counter(seen.failed) == Counter()
    assert seen.count > 1_000
    assert skep(cluster, "reboot-lock", "status").stdout == "No node holds the lock.\n"


@pytest.fixture(scope="module")
def two() -> Iterator[TestCluster]:
    with a_playground("lock", managers=1, workers=1) as made:
        yield made


def test_the_reboot_lock_is_given_to_one_node_at_a_time_and_keeps_upgrades_away(two: TestCluster) -> None:
    assert skep(two, "reboot-lock", "take", "w1").returncode == 0
    refused = skep(two, "reboot-lock", "take", "m1")
    assert refused.returncode == 1
    assert "the reboot lock is held by" in refused.stderr
    upgrade = ("upgrade", "--to", "9.9", "--command", "true")
    refused = skep(two, *upgrade)
    assert (refused.returncode, "the reboot lock is held by" in refused.stderr) == (1, True)
    planned = skep(two, *upgrade, "--plan")
    assert planned.returncode == 2
    assert planned.stdout.splitlines() == [
        f"1. w1 (worker): drain, upgrade, activate, from {__version__} to 9.9",
        f"2. m1 (leader): drain, upgrade, activate, from {__version__} to 9.9",
    ]
    assert skep(two, "reboot-lock", "release", "w1").returncode == 0
    assert skep(two, "reboot-lock", "status", "--format", "json").stdout == ""
    assert skep(two, *upgrade, "--plan").returncode == 0
