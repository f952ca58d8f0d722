"""A playground for tests, and a test's operations on it: run docker, look at processes, kill, wait."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import docker
from docker.errors import APIError, DockerException, NotFound
from requests.exceptions import RequestException

from tests.support.harness import last_logs as last_words
from tests.support.machines.daemon_rig import wait_until
from tests.support.machines.directories import a_directory

SKEP = str(Path(sys.executable).with_name("skep"))
UNPACKED = Path(sys.prefix) / "libexec/skep"


@cache
def docker_version(cli: str) -> str:
    """Return the version: ``28.2.2`` for ``Docker version 28.2.2, build e6534b4``."""
    said = subprocess.run([cli, "--version"], capture_output=True, text=True, timeout=120, check=True).stdout
    return said.split()[2].strip(",").partition("+")[0]


def _docker_commands() -> tuple[str, ...]:
    """Return the command of the distribution's release and the newest one, or one if they have the same version."""
    release, *others = (str(UNPACKED / name) for name in ("release/docker", "docker", "newest/docker"))
    found = {
        docker_version(cli): cli
        for cli in (*others, shutil.which("docker"), release)
        if cli and os.access(cli, os.X_OK)
    }
    newest = max(found, key=lambda version: [int(part) for part in version.split(".")], default="")
    return tuple(dict.fromkeys(cli for cli in (release, found.get(newest)) if cli in found.values()))


CLIS = _docker_commands() or ("docker",)
"""The docker commands of the tests: the distribution's release, and the newest of this machine."""

IMAGE = "busybox:1"
IDLE = ("sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done")
"""Command that idles, and exits at once on SIGTERM."""


class TestNode:
    """One node of the playground, seen from outside."""

    __test__ = False

    def __init__(self, cluster: "TestCluster", name: str) -> None:
        self.cluster, self.name = cluster, name

    @property
    def description(self) -> dict[str, Any]:
        nodes = self.cluster.description["nodes"]
        return next(node for node in nodes if node["name"] == self.name)

    @property
    def socket(self) -> str:
        return str(self.description["endpoint"])

    def client(self) -> docker.DockerClient:
        """Return a docker-py client on this node's socket."""
        return docker.DockerClient(base_url=self.socket, timeout=60)

    def docker(
        self, *words: str, cli: str = CLIS[-1], check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the docker command against this node."""
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": self.socket}
        done = subprocess.run(
            [cli, *words],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{cli} {' '.join(words)}: {done.stderr}{done.stdout}"
        return done

    def pids(self, comm: str) -> list[int]:
        """Return the processes of this node's network namespace with this command name (``/proc/PID/comm``), oldest
        first.
        """
        return sorted(pid for pid, name in self.processes() if name == comm)

    def processes(self) -> Iterator[tuple[int, str]]:
        """Yield (pid, comm) of all processes in this node's network namespace, except zombies."""
        inode = f"net:[{os.stat(self.description['netns']).st_ino}]"
        for entry in os.listdir("/proc"):
            try:
                if not entry.isdigit() or os.readlink(f"/proc/{entry}/ns/net") != inode:
                    continue
                stat = Path(f"/proc/{entry}/stat").read_text()
                if stat.rsplit(")", 1)[1].split()[0] != "Z":
                    yield int(entry), Path(f"/proc/{entry}/comm").read_text().strip()
            except OSError:
                continue

    def kill(self, pid: int) -> None:
        """Kill one process of this node with SIGKILL."""
        os.kill(pid, signal.SIGKILL)


class TestCluster:
    """A playground that tests share or own."""

    __test__ = False

    def __init__(self, directory: Path, name: str, command: str = SKEP) -> None:
        self.directory, self.name, self._command = directory, name, command

    def up(self, **counts: int) -> subprocess.CompletedProcess[str]:
        """Start nodes: ``up(managers=1, docker_workers=2)``.  Without arguments, start only one manager."""
        words = ({"managers": 1, "workers": 0} | counts).items()
        return self.skep(
            "up", "--no-relay", *(f"--{name.replace('_', '-')}={count}" for name, count in words)
        )

    def down(self) -> None:
        self.skep("down")

    def skep(self, verb: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``skep playground VERB ...`` on this playground."""
        where = ["--dir", str(self.directory), "--name", self.name]
        command = [self._command, "playground", verb, *where, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done

    @property
    def description(self) -> dict[str, Any]:
        response: dict[str, Any] = json.loads((self.directory / "cluster.json").read_text())
        return response

    def node(self, name: str) -> TestNode:
        return TestNode(self, name)

    def nodes(self) -> list[TestNode]:
        """Return all nodes in the order of their creation."""
        return [self.node(one["name"]) for one in self.description["nodes"]]


@contextmanager
def a_playground(
    name: str,
    *,
    configured: Mapping[str, str] = MappingProxyType({}),
    command: str = SKEP,
    **counts: int,
) -> Iterator[TestCluster]:
    """Run a playground for one test or module, and remove it afterwards.

    Args:
        configured: content of ``skep.toml``, by node.
        command: the ``skep`` of its nodes.
        counts: see ``TestCluster.up``.
    """
    with a_directory() as directory:
        cluster = _named(directory, name, command)
        for node, configuration in configured.items():
            (directory / node).mkdir()
            (directory / node / "skep.toml").write_text(configuration)
        last_words.live[cluster.name] = directory
        try:
            cluster.up(**counts)
            yield cluster
        except BaseException:
            last_words.ended[cluster.name] = last_words.of(directory)
            raise
        finally:
            del last_words.live[cluster.name]
            cluster.down()


@contextmanager
def no_playground_yet(name: str) -> Iterator[TestCluster]:
    """Return a playground that is not up.  It is removed afterwards."""
    with a_directory() as directory:
        cluster = _named(directory / "playground", name)
        try:
            yield cluster
        finally:
            cluster.skep("down", check=False)


def _named(directory: Path, name: str, command: str = SKEP) -> TestCluster:
    return TestCluster(directory, f"{name}{os.getpid()}"[:15], command)


def nodes_by_name(seen_by: TestNode) -> dict[str, dict[str, Any]]:
    """Return all nodes that have described themselves, as this node shows them."""
    shown: list[dict[str, Any]] = seen_by.client().api.nodes()
    return {node["Description"]["Hostname"]: node for node in shown if "Hostname" in node["Description"]}


def ready(seen_by: TestNode) -> set[str]:
    """Return the names of the nodes that are ready."""
    return {name for name, node in nodes_by_name(seen_by).items() if node["Status"]["State"] == "ready"}


def remove_stacks(node: TestNode) -> None:
    """Remove the docker command's stacks, and all services."""
    for stack in node.docker("stack", "ls", "--format", "{{.Name}}").stdout.split():
        node.docker("stack", "rm", stack)
    remove_services(node)


def remove_services(node: TestNode) -> None:
    """Remove all services, and return when no task is left.  Their containers on the cluster's nodes are killed.

    A program that ignores SIGTERM (``sleep``) would otherwise delay every test by its ten seconds of grace.
    """
    api = node.client().api
    for service in api.services():
        api.remove_service(service["ID"])

    def is_clear() -> bool:
        for one in node.cluster.nodes():
            with suppress(DockerException, RequestException):  # a node that a test has switched off
                kill_containers(one)
        return not api.tasks()

    wait_until(is_clear, "all services and their tasks are removed", 180)


def kill_containers(node: TestNode) -> None:
    """Kill the containers that run on ``node``, without any grace period."""
    api = node.client().api
    for container in api.containers():
        with suppress(APIError):  # it has ended by itself
            api.kill(container["Id"])


def running(node: TestNode, service: str) -> list[dict[str, Any]]:
    """Return the running tasks of ``service`` whose desired state is running."""
    tasks: list[dict[str, Any]] = node.client().api.tasks(filters={"service": service})
    return [t for t in tasks if t["Status"]["State"] == "running" and t["DesiredState"] == "running"]


def wait_running(node: TestNode, service: str, count: int, within_s: float = 30) -> list[dict[str, Any]]:
    """Wait until exactly ``count`` tasks of ``service`` run."""

    def exactly() -> list[dict[str, Any]] | bool:
        tasks = running(node, service)
        return (tasks or True) if len(tasks) == count else False

    tasks = wait_until(exactly, f"{count} running tasks of {service}", within_s)
    return tasks if isinstance(tasks, list) else []


def containers(node: TestNode, service: str) -> list[dict[str, Any]]:
    """Return the running containers of ``service`` on this node."""
    label = f"com.docker.swarm.service.name={service}"
    response: list[dict[str, Any]] = node.client().api.containers(filters={"label": label})
    return response


def container_pids(node: TestNode, service: str) -> dict[str, int]:
    """Return the pid of each container's first process, by container id."""
    api = node.client().api
    found: dict[str, int] = {}
    for container in containers(node, service):
        with suppress(NotFound):  # it was removed while the list was read
            found[container["Id"]] = api.inspect_container(container["Id"])["State"]["Pid"]
    return found


def create(
    node: TestNode, name: str, replicas: int = 1, *options: str, command: Sequence[str] = IDLE
) -> None:
    """Run ``docker service create`` in the background."""
    words = ["--detach", "--name", name, "--replicas", str(replicas), *options, IMAGE, *command]
    node.docker("service", "create", *words)
