"""Certificates of removed and demoted nodes, at managers in machines of their own, with real etcds behind them."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

WITHIN_S = 1.0
CUT_OFF_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """m1, m2, m3, w1 and w2."""
    with a_playground("gone", managers=3, workers=2) as cluster:
        yield cluster


class Watch:
    """Probes that run.  ``first``: what each address answered first; ``results``: after the block."""

    def __init__(self, first: dict[str, str]) -> None:
        self.first = first
        self.results: dict[str, dict[str, Any]] = {}


@contextmanager
def watching(cluster: TestCluster, stolen: Path, inside: str, *addresses: str) -> Iterator[Watch]:
    """Ask ``addresses`` with a stolen certificate from inside a node, until they have refused for good."""
    netns = cluster.node(inside).description["netns"]
    command = [sys.executable, "-m", "tests.support.security.certificate_probe", str(stolen), *addresses]
    probe = subprocess.Popen(
        ["nsenter", f"--net={netns}", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert probe.stderr is not None
    lines = [probe.stderr.readline() for _ in addresses]
    watch = Watch({line.split()[-1]: line for line in lines})
    yield watch
    out, problems = probe.communicate(timeout=90)
    assert probe.returncode == 0, problems
    watch.results = json.loads(out)


@pytest.fixture
def stolen(tmp_path: Path) -> Path:
    return tmp_path / "stolen"


def steal(cluster: TestCluster, name: str, stolen: Path) -> str:
    """Copy a node's certificate; gives the node's id."""
    copy_certificate(cluster, name, stolen)
    return node_id(cluster.node("m1"), name)


def copy_certificate(cluster: TestCluster, name: str, stolen: Path) -> None:
    """All of the directory but what the node is just writing."""
    certificates = cluster.directory / name / "data" / "certificates"
    shutil.copytree(certificates, stolen, ignore=shutil.ignore_patterns("*.new"))


def node_id(manager: TestNode, name: str) -> str:
    return str(node(manager, name)["ID"])


def node(manager: TestNode, name: str) -> dict[str, Any]:
    return nodes_by_name(manager)[name]


def addr(cluster: TestCluster, name: str) -> str:
    return f"{cluster.node(name).description['addr']}:2377"


def peer(cluster: TestCluster, name: str) -> str:
    return f"peer:{cluster.node(name).description['addr']}:2378"


def told_at(cluster: TestCluster, event: str, node_id: str) -> float:
    """When a manager's log tells ``event`` of a node; 0: it has not yet."""
    for log in cluster.directory.glob("m*/skep.log"):
        for line in log.read_text().splitlines():
            if event in line and node_id in line:
                return datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp()
    return 0


def assert_refused(watch: Watch, address: str, since: float, within_s: float) -> None:
    """Taken before, refused in time, and never taken again."""
    result = watch.results[address]
    assert watch.first[address].startswith("taken")
    assert result["refused_at"] is not None
    assert result["refused_at"] - since < within_s
    assert result["retaken"] == 0


def test_with_three_managers_a_rotation_restarts_each_etcd_once_and_moves_nothing(cluster):
    m1, managers = cluster.node("m1"), ("m1", "m2", "m3")
    create(m1, "web", 5)
    tasks = sorted(task["ID"] for task in wait_running(m1, "web", 5))
    etcds = {name: cluster.node(name).pids("etcd") for name in managers}

    m1.docker("swarm", "ca", "--rotate", "-q")

    def restarted() -> dict[str, list[int]] | None:
        found = {name: cluster.node(name).pids("etcd") for name in managers}
        is_done = all(len(found[name]) == 1 and found[name] != etcds[name] for name in managers)
        return found if is_done else None

    after = wait_until(restarted, "all restarted")
    cluster.node("m3").docker("service", "update", "--detach", "--label-add", "x=y", "web")
    assert {one["Status"]["State"] for one in m1.client().api.nodes()} == {"ready"}
    assert sorted(task["ID"] for task in wait_running(m1, "web", 5)) == tasks
    assert {name: cluster.node(name).pids("etcd") for name in managers} == after
    m1.docker("service", "rm", "web")


def test_a_removed_workers_certificate_is_refused_by_every_manager_within_a_second(cluster, stolen):
    id = steal(cluster, "w1", stolen)
    managers = [addr(cluster, name) for name in ("m1", "m2", "m3")]
    with watching(cluster, stolen, "w2", *managers) as watch:
        cluster.node("m2").docker("node", "rm", "--force", id)
        removed_at = time.time()
    for manager in managers:
        assert_refused(watch, manager, removed_at, WITHIN_S)
        assert "was removed from the swarm" in watch.results[manager]["how"]


def test_a_manager_that_is_cut_off_refuses_within_two_seconds_what_it_cannot_judge(cluster, stolen):
    id = steal(cluster, "w2", stolen)
    alone = addr(cluster, "m3")
    try:
        with watching(cluster, stolen, "m3", alone) as watch:
            cluster.skep("cut", "m3")
            cut_at = time.time()
            cluster.node("m1").docker("node", "rm", "--force", id)
        assert_refused(watch, alone, cut_at, CUT_OFF_WITHIN_S + 0.3)
        assert watch.results[alone]["how"] == "no contact"
    finally:
        cluster.skep("reconnect", "m3")


def test_a_demoted_managers_certificate_is_refused_in_that_role_and_at_the_peer_port(cluster, stolen):
    wait_until(
        lambda: node(cluster.node("m1"), "m3")["ManagerStatus"].get("Reachability") == "reachable",
        "m3 is back",
    )
    m3 = cluster.node("m3")
    wait_until(
        lambda: m3.docker("node", "ls", check=False).returncode == 0, "m3 is in contact with the others"
    )
    id = steal(cluster, "m2", stolen)
    others = ("m1", "m3")
    asked = [addr(cluster, name) for name in others] + [peer(cluster, name) for name in others]
    with watching(cluster, stolen, "m2", *asked) as watch:
        cluster.node("m1").docker("node", "demote", id)
        demoted_at = wait_until(lambda: told_at(cluster, "node demoted", id), "m2 is demoted", within_s=60)
    for address in asked:
        assert_refused(watch, address, demoted_at, WITHIN_S)


def test_a_demoted_manager_that_is_removed_is_refused_as_a_worker_too(cluster, stolen):
    id = steal(cluster, "m2", stolen)
    managers = [addr(cluster, name) for name in ("m1", "m3")]
    with watching(cluster, stolen, "m1", *managers) as watch:
        cluster.node("m1").docker("node", "rm", "--force", id)
        removed_at = time.time()
    for manager in managers:
        assert_refused(watch, manager, removed_at, WITHIN_S)


def test_a_workers_certificate_gets_nothing_at_the_peer_port(cluster, stolen):
    """etcd asks for the name that only managers' certificates carry."""
    copy_certificate(cluster, "m2", stolen)
    with watching(cluster, stolen, "m1", peer(cluster, "m1"), peer(cluster, "m3")) as watch:
        pass
    assert not any(line.startswith("taken") for line in watch.first.values())
    assert {result["taken"] for result in watch.results.values()} == {0}
