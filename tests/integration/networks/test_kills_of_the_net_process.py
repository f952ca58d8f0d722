"""Kill -9 of the net process, over and over, while an overlay changes: the node process goes on, and nothing stays."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.networks.lab import in_place, place_of
from tests.integration.networks.resolving import ask
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    create,
    running,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 30


@pytest.fixture
def cluster() -> Iterator[TestCluster]:
    with a_playground("netkill", managers=1, workers=1) as cluster:
        yield cluster


def test_kills_of_the_net_process_beside_changes_of_an_overlay_end_nothing_else(cluster: TestCluster) -> None:
    m1, w1 = cluster.node("m1"), cluster.node("w1")
    rng = random.Random(13)
    m1.docker("network", "create", "-d", "overlay", "net1")
    on_w1 = ("--network", "net1", "--constraint", "node.hostname==w1", "--restart-delay", "0s")
    create(m1, "stays", 1, *on_w1)
    create(m1, "changes", 1, *on_w1, "-p", "8080:80")
    wait_running(m1, "stays", 1, 60)
    before = {*w1.pids("skep-node"), *w1.pids("skep-zygote")}
    assert len(before) > 1
    killed: set[int] = set()
    for number in range(KILLS):
        # An address comes, goes, or changes its task at the moment of the kill, more or less.
        words = ("--replicas", str(1 + number % 3), "--env-add", f"ROUND={number // 3}")
        update(m1, *words)
        (pid,) = wait_until(lambda: set(w1.pids("skep-net")) - killed, f"net process number {number}", 60)
        for _ in range(rng.randrange(4)):
            running(m1, "changes")  # some milliseconds
        w1.kill(pid)
        killed.add(pid)
        assert before <= {one for one, _ in w1.processes()}, f"after kill {number}"
    update(m1, "--replicas", "2")
    wait_running(m1, "changes", 2, 120)
    addresses = {
        network.split("/")[0]
        for task in running(m1, "changes")
        for attachment in task["NetworksAttachments"]
        if attachment["Network"]["Spec"]["Name"] == "net1"
        for network in attachment["Addresses"]
    }
    place = place_of(w1, "stays")
    wait_until(lambda: answer(place, "tasks.changes") == addresses, "the names are right", 60)
    assert before <= {one for one, _ in w1.processes()}
    wait_until(lambda: not conditions_of(m1, "w1"), "no condition stays", 60)


def update(manager: TestNode, *words: str) -> None:
    """On a crowded machine the manager may be away for a moment."""
    command = ("service", "update", "--detach", "--quiet", *words, "changes")
    wait_until(lambda: manager.docker(*command, check=False).returncode == 0, "the service is updated", 120)


def answer(place: Path, name: str) -> set[str]:
    """What the name leads to there; empty: it is not answered for."""
    try:
        return set(in_place(place, ask, name))
    except OSError:
        return set()


def conditions_of(manager: TestNode, name: str) -> set[str]:
    """What the node says is wrong with it."""
    node = json.loads(manager.docker("node", "inspect", name).stdout)[0]
    labels = node["Description"]["Engine"].get("Labels") or {}
    return {label for label in labels if label.startswith("skep.condition.")}
