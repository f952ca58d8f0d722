"""Docker Engines of a playground, for tests: what runs on them, what is seen from inside their containers."""

import sys
from typing import Any

from tests.support.playground_rig import TestCluster, TestNode, remove_services, running, wait_until

ENGINES = ("d1", "d2")
FOR_ENGINES = ("--label", "skep.data-plane=docker")
"""Options of an overlay network that engines are on; without them the first task decides."""


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
    """Node id -> host name."""
    return {node["ID"]: node["Description"]["Hostname"] for node in m1.client().api.nodes()}


def places(m1: TestNode, service: str) -> list[str]:
    """Host names of the nodes on which tasks of ``service`` run, sorted."""
    names = node_names(m1)
    return sorted(names[task["NodeID"]] for task in running(m1, service))


def inside(engine: TestNode, container: str, *command: str) -> str:
    """What a command in a container prints; nothing if it fails."""
    done = engine.docker("exec", container, *command, check=False)
    return done.stdout if done.returncode == 0 else ""


def wait_inside(engine: TestNode, container: str, text: str, *command: str) -> str:
    """Repeat a command in a container until it prints ``text``; gives all that it printed."""
    what = f"{' '.join(command)} in {engine.name} prints {text!r}"
    return wait_until(lambda: said if text in (said := inside(engine, container, *command)) else "", what)


def fetched(cluster: TestCluster, source: str, url: str) -> str:
    """What a node gets from ``url``; empty without a response."""
    script = f"from urllib.request import urlopen; print(urlopen({url!r}, timeout=2).read().decode(), end='')"
    done = cluster.skep("exec", source, "--", sys.executable, "-c", script, check=False)
    assert done.returncode == 0 or "urlopen error" in done.stderr or "timed out" in done.stderr, done.stderr
    return done.stdout


def answers(address: str) -> tuple[str, ...]:
    """What a ping says when it was answered, and the ping."""
    return (" 0% packet loss", "busybox", "ping", "-c", "1", "-W", "1", address)


def attachments(m1: TestNode) -> list[dict[str, Any]]:
    """The tasks that stand for plain containers on cluster networks."""
    response: list[dict[str, Any]] = m1.client().api.tasks(filters={"runtime": "attachment"})
    return response
