"""Docker Engines of a playground, for tests: the tasks on them, and the view from inside their containers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.machines.directories import a_directory
from tests.support.machines.playground_rig import TestCluster, TestNode, remove_services, running, wait_until

SCRIPT = Path(__file__).resolve().parents[3] / "setup/engine.sh"
VERSIONS = {"bookworm": "20.10", "trixie": "26.1", "forky": "28.5"}
"""The Docker Engine that each Debian suite has, oldest first."""
ENGINES = ("d1", "d2")
FOR_ENGINES = ("--label", "skep.data-plane=docker")
"""Options of an overlay network for engines.  Without them the first task decides on the data plane."""


@contextmanager
def engine_of(suite: str) -> Iterator[None]:
    """Put the engine of a Debian suite first on the path as ``dockerd``.  The suite's archive provides it once."""
    with a_directory() as directory:
        done = subprocess.run(
            [str(SCRIPT), suite, str(directory)], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{directory}:{path}"
        try:
            yield
        finally:
            os.environ["PATH"] = path


def clear(m1: TestNode, engines: list[TestNode]) -> None:
    """Remove services, plain containers, networks, secrets and configs."""
    remove_services(m1)
    for engine in engines:
        for container in engine.docker("ps", "-aq", "--filter", "label=plain").stdout.split():
            engine.docker("rm", "-f", container, check=False)
    for network in m1.docker("network", "ls", "-q", "--filter", "name=net").stdout.split():
        m1.docker("network", "rm", network)
    for kind in ("secret", "config"):
        for id in m1.docker(kind, "ls", "-q").stdout.split():
            m1.docker(kind, "rm", id)


def node_names(m1: TestNode) -> dict[str, str]:
    """Return host names by node id."""
    return {node["ID"]: node["Description"]["Hostname"] for node in m1.client().api.nodes()}


def places(m1: TestNode, service: str) -> list[str]:
    """Return the sorted host names of the nodes on which tasks of ``service`` run."""
    names = node_names(m1)
    return sorted(names[task["NodeID"]] for task in running(m1, service))


def inside(engine: TestNode, container: str, *command: str) -> str:
    """Return the output of a command in a container.  Empty if it fails."""
    done = engine.docker("exec", container, *command, check=False)
    return done.stdout if done.returncode == 0 else ""


def wait_inside(engine: TestNode, container: str, text: str, *command: str) -> str:
    """Repeat a command in a container until it prints ``text``, and return its output."""
    what = f"{' '.join(command)} in {engine.name} prints {text!r}"
    return wait_until(lambda: said if text in (said := inside(engine, container, *command)) else "", what)


def fetched(cluster: TestCluster, source: str, url: str) -> str:
    """Return what a node gets from ``url``.  Empty without a response."""
    script = f"from urllib.request import urlopen; print(urlopen({url!r}, timeout=2).read().decode(), end='')"
    done = cluster.skep("exec", source, "--", sys.executable, "-c", script, check=False)
    assert done.returncode == 0 or "urlopen error" in done.stderr or "timed out" in done.stderr, done.stderr
    return done.stdout


def answers(address: str) -> tuple[str, ...]:
    """Return the texts that a successful ping prints, and the ping."""
    return (" 0% packet loss", "busybox", "ping", "-c", "1", "-W", "1", address)


def attachments(m1: TestNode) -> list[dict[str, Any]]:
    """Return the tasks that stand for plain containers on cluster networks."""
    response: list[dict[str, Any]] = m1.client().api.tasks(filters={"runtime": "attachment"})
    return response
