"""An earlier version becomes this one, node by node, under load: no task moves, nothing is lost.

The earlier version is built from this repository's own history.  One node goes back half-way, as after a bad start.
"""

import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from docker.errors import DockerException
from requests.exceptions import RequestException

from tests.support import playground_rig as rig
from tests.support.managers_rig import wait_managers
from tests.support.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    nodes_by_name,
    ready,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[3]
EARLIER = os.environ.get("SKEP_EARLIER", "05d92a5")
"""The commit from which the upgrade starts."""

MANAGERS, WORKERS = ("m1", "m2", "m3"), ("w1", "w2")
SERVICES = {"web": 4, "api": 3}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the earlier version's package."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", EARLIER, "skep"], capture_output=True, check=False
    )
    assert archive.returncode == 0, (
        f"commit {EARLIER} is not in this clone: fetch the whole history (git fetch --unshallow), or name "
        f"another commit in SKEP_EARLIER\n{archive.stderr.decode()}"
    )
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


class Versions:
    """Which version each node of a playground runs: its daemon is started by a launcher that reads it from a file.

    Each version has an environment of its own: this one's libraries, another package.
    """

    def __init__(self, folder: Path, earlier: Path) -> None:
        self._folder = folder
        self._environments = {
            is_present: _environment(folder / name, package)
            for is_present, name, package in ((True, "present", ROOT), (False, "earlier", earlier))
        }
        playground = _environment(folder / "playground", ROOT)
        self.command = playground / "bin/skep-playground"
        (playground / "bin/skep").rename(self.command)
        launcher = playground / "bin/skep"
        node = f"{folder}/$(cat /proc/sys/kernel/hostname)"
        launcher.write_text(
            f'#!/bin/sh\nexec "$(cat "{node}" 2>/dev/null || cat "{folder}/all")/bin/skep" "$@"\n'
        )
        launcher.chmod(0o755)
        self._write("all", is_present=False)

    def set(self, name: str, *, is_present: bool) -> None:
        """What ``name`` runs from its next start on."""
        self._write(name, is_present=is_present)

    def check(self, node: TestNode, *, is_present: bool) -> None:
        """The node's processes are of this version."""
        wanted = str(self._environments[is_present])
        found = {
            comm: Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
            for pid, comm in node.processes()
            if comm in ("skep-node", "skep-manager")
        }
        assert found
        assert all(command.startswith(wanted) for command in found.values()), f"{wanted}: {found}"

    def _write(self, name: str, *, is_present: bool) -> None:
        (self._folder / name).write_text(str(self._environments[is_present]))


def _environment(folder: Path, package: Path) -> Path:
    """A virtual environment with the libraries of this one and the package below ``package``."""
    real = Path(sys.prefix)
    library = next((real / "lib").glob("python3*")).name
    packages = folder / "lib" / library / "site-packages"
    packages.mkdir(parents=True)
    # Lines of its own: files like this one are not read in folders that come by such a line.
    (packages / "packages.pth").write_text(f"{package}\n{real}/lib/{library}/site-packages\n")
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to((real / "bin/python").resolve())
    (folder / "libexec").symlink_to(real / "libexec")
    (folder / "pyvenv.cfg").write_text((real / "pyvenv.cfg").read_text())
    command = folder / "bin/skep"
    command.write_text(f"#!{folder}/bin/python\nfrom skep.cli.main import main\n\nmain()\n")
    command.chmod(0o755)
    return folder


@contextmanager
def a_cluster(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestCluster]:
    monkeypatch.setattr(rig, "SKEP", str(versions.command))
    with a_playground("roll", managers=len(MANAGERS), workers=len(WORKERS)) as cluster:
        yield cluster


def tasks_of(cluster: TestCluster) -> dict[str, tuple[str, str]]:
    """Id -> node and state of each task that is wanted, as any manager that answers shows them."""
    for name in MANAGERS:
        with suppress(DockerException, RequestException):
            tasks = cluster.node(name).client().api.tasks(filters={"desired-state": "running"})
            return {task["ID"]: (task["NodeID"], task["Status"]["State"]) for task in tasks}
    return {}


def restart(cluster: TestCluster, name: str) -> None:
    """End the node's processes, but not its containers, as an upgrade of the package does; it is started again."""
    node = cluster.node(name)
    ends = cluster.directory / name / "ends"
    before = len(ends.read_text().splitlines()) if ends.exists() else 0
    daemon = node.pids("skep-node")[0]
    os.kill(daemon, 15)
    wait_until(lambda: ends.exists() and len(ends.read_text().splitlines()) > before, f"{name} has ended", 60)
    wait_until(lambda: _answers(node), f"{name} answers", 60)


def _answers(node: TestNode) -> bool:
    with suppress(DockerException, RequestException):
        return bool(node.client().info()["Swarm"]["LocalNodeState"] == "active")
    return False


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


def test_an_upgrade_node_by_node_moves_no_task_and_loses_nothing(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = Versions(tmp_path, earlier)
    with a_cluster(versions, monkeypatch) as cluster:
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
