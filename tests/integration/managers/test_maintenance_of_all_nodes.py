"""Each node of a cluster under load is drained, upgraded and rebooted in turn: no service and no request is lost."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from docker.errors import DockerException
from requests.exceptions import RequestException

from skep import __version__
from tests.integration.managers.test_upgrade_command import FORMER, last_commit, skep
from tests.integration.networks.lab import asking, outside, serve
from tests.support.machines.boots import boots, count_boots
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    running,
    wait_until,
)
from tests.support.machines.versions import Versions, package_of
from tests.support.managers.managers_rig import wait_managers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.needs("curl")]

MANAGERS, WORKERS = ("m1", "m2", "m3"), ("w1", "w2", "w3", "w4", "w5")
EVERY = (*MANAGERS, *WORKERS)
REQUESTS = 20_000
SERVICES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "web": (8080, 4, ("--label", "skep.min-available=75%", "--update-parallelism", "2")),
    "single": (
        8081,
        1,
        (
            "--label",
            "skep.min-available=1",
        ),
    ),
    "plain": (8082, 3, ()),
}
"""Port, replicas and options of each service.  All of them are updated stop-first."""
LEAST = {"web": 3, "single": 1, "plain": 2}
"""Tasks of each service that must be available at any time: by label, by label, and by the update policy."""
LOOK_S = 0.1
"""Seconds between two looks at the tasks.  The start of a task takes longer."""
BLIND_S = 15.0
"""Longest time without a look, while a manager that was asked is switched off."""

MAINTAIN = """#!/bin/sh
# What an operator does to a drained machine: out of the balancer, upgrade, reboot, and back when it serves.
set -e
mv "{rotation}/$SKEP_NODE" "{rotation}/.$SKEP_NODE"
flock -x "{rotation}/.$SKEP_NODE" true
cp "{folder}/version" "{folder}/$SKEP_NODE"
"{playground}" playground kill --dir {directory} --name {name} "$SKEP_NODE"
# A busy machine takes longer than the command waits.  What counts is that the node serves.
"{playground}" playground start --dir {directory} --name {name} "$SKEP_NODE" || true
for port in {ports}; do
    until nsenter --net={outside} curl -sf -o /dev/null -m 2 "http://$SKEP_ADDRESS:$port/"; do sleep 0.2; done
done
mv "{rotation}/.$SKEP_NODE" "{rotation}/$SKEP_NODE"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TestCluster]:
    earlier = package_of(last_commit(), tmp_path / "package")
    (earlier / "skep/__init__.py").write_text(f'__version__ = "{FORMER}"\n')
    versions = Versions(tmp_path, earlier)
    (tmp_path / "version").write_text(str(tmp_path / "present"))
    count_boots(versions.command.with_name("skep"), tmp_path, *EVERY)
    counts = {"managers": len(MANAGERS), "workers": len(WORKERS)}
    with a_playground("maint", command=str(versions.command), **counts) as made:
        wait_managers(made.node("m1"), *MANAGERS)
        yield made


Json = dict[str, Any]


def serves(task: Json) -> bool:
    return bool(task["DesiredState"] == "running" and task["Status"]["State"] == "running")


class Availability:
    """Looks at the tasks of all services, through any manager that answers, and keeps every state that differs."""

    def __init__(self, cluster: TestCluster) -> None:
        self._cluster = cluster
        self._is_over = threading.Event()
        self.seen: dict[str, set[int]] = {name: set() for name in LEAST}
        """Numbers of available tasks, by service."""
        self.below: list[str] = []
        """Times at which a service had fewer tasks than its least."""
        self.looks = 0
        self.blind_s = 0.0
        """Longest time between two looks."""

    @contextmanager
    def watched(self) -> Iterator["Availability"]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()

    def _run(self) -> None:
        clients = [self._cluster.node(name).client() for name in MANAGERS]
        for client in clients:
            client.api.timeout = 3
        ids = {one["ID"]: one["Spec"]["Name"] for one in clients[0].api.services()}
        last = time.monotonic()
        while not self._is_over.wait(LOOK_S):
            for client in clients:
                with suppress(DockerException, RequestException):
                    self._look(client.api.nodes(), client.api.tasks(), ids)
                    self.blind_s = max(self.blind_s, time.monotonic() - last)
                    last = time.monotonic()
                    break

    def _look(self, nodes: Sequence[Json], tasks: Sequence[Json], ids: Mapping[str, str]) -> None:
        up = {node["ID"] for node in nodes if node["Status"]["State"] != "down"}
        available = Counter(task["ServiceID"] for task in tasks if serves(task) and task["NodeID"] in up)
        self.looks += 1
        for id, name in ids.items():
            count = available[id]
            self.seen[name].add(count)
            if count < LEAST[name]:
                self.below.append(f"{time.time():.3f} {name} has {count} of {LEAST[name]}")


def start_services(m1: TestNode) -> None:
    """Start the services.  Each request of their clients may take its time, and their connections close gracefully."""
    common = ("--stop-grace-period", "90s", "--label", "skep.drain=5s", "--update-monitor", "100ms")
    for name, (port, replicas, labels) in SERVICES.items():
        serve(m1, name, replicas, *common, *labels, "-p", f"{port}:80")
    for name, (_, replicas, _) in SERVICES.items():
        wait_until(partial(runs, m1, name, replicas), f"{replicas} tasks of {name} run", 180)


def runs(node: TestNode, service: str, count: int) -> bool:
    with suppress(DockerException, RequestException):
        # Eight nodes start on one machine, and a leader may change.
        return len(running(node, service)) == count
    return False


def test_all_nodes_are_upgraded_and_rebooted_and_nothing_is_lost(
    cluster: TestCluster, tmp_path: Path
) -> None:
    m1 = cluster.node("m1")
    start_services(m1)
    rotation = tmp_path / "rotation"
    rotation.mkdir()
    for name in EVERY:
        (rotation / name).write_text(cluster.node(name).description["addr"])
    maintain = tmp_path / "maintain"
    maintain.write_text(
        MAINTAIN.format(
            rotation=rotation,
            folder=tmp_path,
            playground=tmp_path / "playground/bin/skep-playground",
            directory=cluster.directory,
            name=cluster.name,
            outside=outside(cluster),
            ports=" ".join(str(port) for port, *_ in SERVICES.values()),
        )
    )
    maintain.chmod(0o755)
    before = nodes_by_name(m1)
    assert {node["Description"]["Engine"]["EngineVersion"] for node in before.values()} == {FORMER}

    ports = [str(port) for port, *_ in SERVICES.values()]
    words = ("--rotation", str(rotation), "--at-least", str(REQUESTS), *ports)
    with (
        Availability(cluster).watched() as availability,
        asking((outside(cluster), ("balanced_client.py", *words)), within_s=300) as seen,
    ):
        done = skep(cluster, "upgrade", "--system", "--command", str(maintain), within_s=1800)
        assert (done.returncode, done.stdout) == (0, "8 nodes rebooted\n"), done.stderr

    assert boots(tmp_path) == dict.fromkeys(EVERY, 2)
    nodes = nodes_by_name(m1)
    assert {name: node["Description"]["Engine"]["EngineVersion"] for name, node in nodes.items()} == (
        dict.fromkeys(EVERY, __version__)
    )
    assert {node["Spec"]["Availability"] for node in nodes.values()} == {"active"}
    assert availability.below == [], done.stderr
    assert availability.blind_s < BLIND_S
    assert seen.failed == [], done.stderr
    assert seen.count >= REQUESTS
    moved = {answer.split()[1] for answer in seen.answered}
    assert len(moved) > sum(replicas for _, replicas, _ in SERVICES.values()), "no task has moved under load"
