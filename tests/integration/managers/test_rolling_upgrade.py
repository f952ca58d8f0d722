"""An earlier version becomes this one, node by node, under load: no task moves, nothing is lost.

The earlier version is built from this repository's own history.  One node goes back half-way, as after a bad start.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from docker.errors import DockerException
from requests.exceptions import RequestException

from tests.support.machines.playground_rig import (
    TestCluster,
    a_playground,
    container_pids,
    create,
    nodes_by_name,
    ready,
    wait_running,
    wait_until,
)
from tests.support.machines.versions import Versions, package_of, restart
from tests.support.managers.managers_rig import wait_managers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EARLIER = os.environ.get("SKEP_EARLIER", "05d92a5")
"""The commit from which the upgrade starts."""

MANAGERS, WORKERS = ("m1", "m2", "m3"), ("w1", "w2")
SERVICES = {"web": 4, "api": 3}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the earlier version's package."""
    return package_of(EARLIER, tmp_path_factory.mktemp("earlier"))


@contextmanager
def a_cluster(versions: Versions) -> Iterator[TestCluster]:
    counts = {"managers": len(MANAGERS), "workers": len(WORKERS)}
    with a_playground("roll", command=str(versions.command), **counts) as cluster:
        yield cluster


def tasks_of(cluster: TestCluster) -> dict[str, tuple[str, str]]:
    """Id -> node and state of each task that is wanted, as any manager that answers shows them."""
    for name in MANAGERS:
        with suppress(DockerException, RequestException):
            tasks = cluster.node(name).client().api.tasks(filters={"desired-state": "running"})
            return {task["ID"]: (task["NodeID"], task["Status"]["State"]) for task in tasks}
    return {}


class Load:
    """Writes of a user all the time; each one that was acknowledged has to be there at the end."""

    def __init__(self, cluster: TestCluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.made: list[str] = []

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.2):
            number += 1
            name = f"config-{number}"
            with suppress(DockerException, RequestException):  # this manager is being upgraded
                self._cluster.node(MANAGERS[number % 3]).client().api.create_config(name, b"x" * 100)
                self.made.append(name)


def check_unmoved(cluster: TestCluster, before: dict[str, tuple[str, str]], what: str) -> None:
    """All tasks of ``before`` run, on the same nodes, and there are no others."""

    def as_before() -> bool:
        return tasks_of(cluster) == before

    wait_until(as_before, f"tasks are as before {what}: {before} {tasks_of(cluster)}", 60)


def test_an_upgrade_node_by_node_moves_no_task_and_loses_nothing(earlier: Path, tmp_path: Path) -> None:
    versions = Versions(tmp_path, earlier)
    with a_cluster(versions) as cluster:
        asked = cluster.node("m1")
        wait_managers(asked, *MANAGERS)
        for service, replicas in SERVICES.items():
            create(asked, service, replicas, "--constraint", "node.role==worker", "--label", "kept=yes")
            wait_running(asked, service, replicas, 90)
        for name in (*MANAGERS, *WORKERS):
            versions.check(cluster.node(name), is_present=False)
        before = tasks_of(cluster)
        pids = {(name, one): container_pids(cluster.node(name), one) for name in WORKERS for one in SERVICES}
        with Load(cluster) as load:
            order = [
                ("w1", True),
                ("m1", True),
                ("m2", True),
                ("m1", False),
                ("m1", True),
                ("w2", True),
                ("m3", True),
            ]
            for name, is_present in order:
                versions.set(name, is_present=is_present)
                restart(cluster, name)
                every = {*MANAGERS, *WORKERS}
                wait_until(lambda every=every: _ready(cluster) == every, f"all are ready after {name}", 120)
                versions.check(cluster.node(name), is_present=is_present)
                check_unmoved(cluster, before, f"{name} {'upgraded' if is_present else 'downgraded'}")
        assert {
            (name, one): container_pids(cluster.node(name), one) for name in WORKERS for one in SERVICES
        } == pids
        assert len(load.made) > 20
        stored = {config["Spec"]["Name"] for config in asked.client().api.configs()}
        assert set(load.made) <= stored
        for service in SERVICES:
            assert asked.client().services.get(service).attrs["Spec"]["Labels"] == {"kept": "yes"}
        asked.docker("service", "scale", "--detach", "web=5")
        wait_running(asked, "web", 5, 60)
        assert nodes_by_name(asked).keys() == {*MANAGERS, *WORKERS}


def _ready(cluster: TestCluster) -> set[str]:
    for name in MANAGERS:
        with suppress(DockerException, RequestException):
            return ready(cluster.node(name))
    return set()
