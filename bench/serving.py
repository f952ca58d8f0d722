"""Times at the front door of a playground: until a new task serves, and until a service without tasks responds.

A service gets one task more.  A client asks the proxy of a node all the time, on new connections.  The time counts from
the task's own report that it runs, until the client gets its first response.  Another service is scaled to zero, and
has no container when a request arrives.  Its time ends with the head of the response.
"""

import http.client
import os
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from bench.figures import Figure, run_alone
from bench.machine import noise
from skep.dataplane.netns.kernel.namespaces import inside
from tests.support.machines.lab import door_image
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    a_playground,
    running,
    wait_running,
    wait_until,
)

T = TypeVar("T")

SERVES_S_MAX, COLD_S_MAX = 0.3, 0.7
"""Limits: users wait for neither."""
QUANTILE = 0.95
ROUNDS = 3
"""Values of a pair, because a round takes a few seconds."""
ASK_S = 0.003
"""Seconds between two requests, far less than the limit."""
HTTPD = ("httpd", "-f", "-p", "80", "-h", "/etc")
"""The page ``/hostname`` has the short id of the task's container."""


def figures(pairs: int) -> list[Figure]:
    """Measure both times."""
    with a_playground("serving", managers=1, workers=1) as cluster:
        m1 = cluster.node("m1")
        (cluster.directory / "door.tar").write_bytes(door_image().data)
        m1.docker("load", "--quiet", "--input", str(cluster.directory / "door.tar"))
        _skep(cluster, "door", "up", "--image", "skep-door:latest")
        wait_running(m1, "skep-door", 2, within_s=60)
        create = (
            "service",
            "create",
            "--detach",
            "--stop-grace-period",
            "1s",
            "--constraint",
            "node.role==worker",
        )
        m1.docker(*create, "--name", "web", "--label", "skep.http=web.example", "busybox:1", *HTTPD)
        night = ("--label", "skep.http=night.example", "--label", "skep.autoscale=0..3")
        m1.docker(*create, "--name", "night", *night, "busybox:1", *HTTPD)
        wait_running(m1, "web", 1)
        wait_running(m1, "night", 1)
        address = cluster.node("w1").description["addr"]
        wait_until(lambda: bool(_name(cluster, address, "web.example")), "the front door serves", within_s=60)
        busy, serves, cold = [], [], []
        for _ in range(pairs * ROUNDS):
            busy.append(noise(0.3))
            serves.append(_serves_s(cluster, address))
            cold.append(_cold_s(cluster, address))
    return [
        _figure("time from running to the first response of a new task", serves, SERVES_S_MAX, busy),
        _figure("time of a request that starts the first task of a service", cold, COLD_S_MAX, busy),
    ]


def _figure(what: str, values: list[float], limit: float, busy: list[float]) -> Figure:
    return Figure(
        number=0,
        what=f"{what} (p95)",
        unit="s",
        values=tuple(values),
        quantile=QUANTILE,
        limit=limit,
        busy=tuple(round(one, 3) for one in busy),
    )


def _serves_s(cluster: TestCluster, address: str) -> float:
    """Add a task, and return the seconds from its own time of running to its first response.  Remove it afterwards."""
    m1 = cluster.node("m1")
    known, found, is_over = {_name(cluster, address, "web.example")}, dict[str, float](), threading.Event()

    def ask() -> None:
        while not is_over.wait(ASK_S):
            if (name := _fetched(address, "web.example")) and name not in found:
                found[name] = time.time()

    asking = threading.Thread(target=partial(_outside, cluster, ask))
    asking.start()
    try:
        m1.docker("service", "scale", "--detach", "web=2")
        wait_until(lambda: found.keys() > known, "the new task responds")
    finally:
        is_over.set()
        asking.join()
    (name,) = found.keys() - known
    (began,) = [
        datetime.fromisoformat(task["Status"]["Timestamp"][:26] + "+00:00").timestamp()
        for task in running(m1, "web")
        if task["Status"]["ContainerStatus"]["ContainerID"].startswith(name)
    ]
    m1.docker("service", "scale", "--detach", "web=1")
    wait_until(lambda: len(running(m1, "web")) == 1 and _container_count(cluster, "web") == 1, "it has ended")
    return found[name] - began


def _cold_s(cluster: TestCluster, address: str) -> float:
    cluster.node("m1").docker("service", "scale", "--detach", "night=0")
    wait_until(lambda: _container_count(cluster, "night") == 0, "no task is left")
    began = time.monotonic()
    assert _name(cluster, address, "night.example"), "the request failed"
    return time.monotonic() - began


def _container_count(cluster: TestCluster, service: str) -> int:
    words = ("ps", "--quiet", "--filter", f"label=com.docker.swarm.service.name={service}")
    return sum(len(one.docker(*words).stdout.split()) for one in cluster.nodes())


def _name(cluster: TestCluster, address: str, host: str) -> str:
    return _outside(cluster, partial(_fetched, address, host))


def _fetched(address: str, host: str) -> str:
    """Return the name of the task that responds, or an empty text."""
    connection = http.client.HTTPConnection(address, 80, timeout=10)
    try:
        connection.request("GET", "/hostname", headers={"Host": host})
        response = connection.getresponse()
        text = response.read().decode().strip()
    except OSError:
        return ""
    finally:
        connection.close()
    return text if response.status == http.HTTPStatus.OK else ""


def _outside(cluster: TestCluster, call: Callable[[], T]) -> T:
    """Call on a machine outside of the cluster, and return."""
    namespace, _ = cluster.node("m1").description["link"]
    return inside(Path("/run/netns") / namespace, call)


def _skep(cluster: TestCluster, *words: str) -> None:
    """Run ``skep`` with the first manager."""
    environment = {**os.environ, "DOCKER_HOST": cluster.node("m1").socket}
    subprocess.run([SKEP, *words], env=environment, check=True, timeout=120, capture_output=True)


if __name__ == "__main__":
    run_alone(__doc__ or "", "serving", figures)
