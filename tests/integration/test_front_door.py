"""The front door on a playground: the blocks of its page, and no failed request over every change."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.networks.lab import asking, outside, serve
from tests.support.harness.documents import ROOT, shell_blocks
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    running,
    wait_running,
    wait_until,
)
from tests.support.security.pebble import PebbleAtSwitch, pebble_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.needs("debootstrap", "curl", "pebble", "pebble-challtestsrv"),
]

NAME = "app.example.com"
ENOUGH = 100
"""Answers that show that clients were at work all the time."""


@contextmanager
def a_cluster_with_debian() -> Iterator[TestCluster]:
    """Yield a playground with ``debian:12``, from which ``apt-get`` installs HAProxy without a network."""
    with a_playground("frontdoor", managers=1, workers=2) as cluster:
        tarball = cluster.directory / "debian.tar"
        command = [ROOT / "setup/debian-image.sh", "bookworm", tarball, "haproxy"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
        cluster.node("m1").docker("import", str(tarball), "debian:12")
        tarball.unlink()
        yield cluster


def run(cluster: TestCluster, commands: str) -> str:
    """Run commands of the page beside the nodes."""
    m1 = cluster.node("m1")
    done = subprocess.run(
        ["nsenter", f"--net={outside(cluster)}", "bash", "-e", "-o", "pipefail", "-c", commands],
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(cluster.directory),
            "DOCKER_HOST": m1.socket,
            "NODE": m1.description["addr"],
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def clients(nodes: Sequence[TestNode], *words: str) -> list[tuple[Path, list[str]]]:
    """Return a client at each node, with a pause so that the machine has time for the changes."""
    return [
        (
            outside(nodes[0].cluster),
            [
                "strict_client.py",
                "--pause",
                "0.02",
                "--name",
                NAME,
                *words,
                f"http://{one.description['addr']}:80/",
            ],
        )
        for one in nodes
    ]


def answers(cluster: TestCluster, node: TestNode, url: str) -> str:
    """Return the status and the body of a request to a node, in one text."""
    host, _, path = url.partition("/")
    url = f"http://{host}/{path}"
    resolved = f"--resolve {host}:80:{node.description['addr']}"
    return run(cluster, f"curl -s -m 5 {resolved} -w ' %{{http_code}}' {url} || true")


UP, HELLO, EXPOSE, _, ACME, SLEEP, _ = shell_blocks("docs/guide/front-door.md")


def test_the_front_door() -> None:
    with a_cluster_with_debian() as cluster:
        m1 = cluster.node("m1")
        assert "front door created" in run(cluster, UP)
        wait_running(m1, "skep-door", 3, within_s=90)
        assert run(cluster, HELLO).strip()
        printed = run(cluster, EXPOSE)
        assert "hello.example.com/hosts" in printed
        assert "failing" not in printed
        for node in cluster.nodes():  # each node answers, and a name without a route is told so
            wait_until(
                lambda node=node: answers(cluster, node, "hello.example.com").endswith(" 200"), "it answers"
            )
            assert answers(cluster, node, "other.example.com").endswith(" 404")
        m1.docker("service", "scale", "hello=0")
        wait_until(lambda: "not available" in answers(cluster, m1, "hello.example.com"), "a page says so")

        check_sleep(cluster)

        serve(m1, "web", 3, "--label", f"skep.http={NAME}", "--update-order", "start-first")
        wait_until(
            lambda: all(answers(cluster, one, NAME).endswith(" 200") for one in cluster.nodes()), "web"
        )
        check_addresses(cluster)

        nodes = cluster.nodes()
        with asking(*clients(nodes), *clients(nodes, "--fresh")) as seen:
            m1.docker("service", "update", "--env-add", "VERSION=2", "web")
            m1.docker("service", "scale", "web=5")
            m1.docker("service", "scale", "web=2")
            run(cluster, f"skep service expose web more.{NAME}")  # a reload
            m1.docker("service", "update", "--update-order", "stop-first", "--env-add", "VERSION=3", "web")
        assert seen.failed == []
        assert seen.count > ENOUGH
        wait_until(lambda: (traffic(cluster).get("RequestsPerSecond") or 0) > 0, "requests are counted")
        assert traffic(cluster)["LatencyP99"] is not None
        assert "requests/s" in run(cluster, "skep explain web")

        with asking(*clients(nodes)) as seen:
            kill_one(cluster, "web")
            wait_until(lambda: len(running(m1, "web")) == 2, "its replacement runs", within_s=60)
        assert seen.failed == []
        check_drain(cluster)
        check_certificates(cluster)


def check_addresses(cluster: TestCluster) -> None:
    """The service sees the addresses of clients, by IPv4 and by IPv6."""
    m1 = cluster.node("m1")
    address = m1.description["addr"]
    switch = f"{address.rpartition('.')[0]}.1"
    for netns, device, own in (
        (m1.description["netns"], "eth0", "fd0c::11"),
        (outside(cluster), "br0", "fd0c::1"),
    ):
        command = ["nsenter", f"--net={netns}", "ip", "address", "add", f"{own}/64", "dev", device, "nodad"]
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    for own, client in ((address, switch), ("[fd0c::11]", "fd0c::1")):
        asked = f"curl -s -m 5 --resolve '{NAME}:80:{own}' http://{NAME}/"
        assert run(cluster, asked).split()[1] == client


def check_drain(cluster: TestCluster) -> None:
    """The tasks of a drained node move without a failed request at the other nodes.  Its own proxy ends."""
    m1 = cluster.node("m1")
    drained = next(one for one in cluster.nodes()[1:] if container_pids(one, "web"))
    others = [one for one in cluster.nodes() if one.name != drained.name]
    with asking(*clients(others), *clients(others, "--fresh")) as seen:
        m1.docker("node", "update", "--availability", "drain", drained.name)
        wait_until(lambda: not container_pids(drained, "web"), "its tasks have moved", within_s=60)
        wait_until(lambda: len(running(m1, "web")) == 2, "they run elsewhere", within_s=60)
    assert seen.failed == []
    m1.docker("node", "update", "--availability", "active", drained.name)
    wait_running(m1, "skep-door", 3, within_s=90)


def traffic(cluster: TestCluster) -> dict[str, object]:
    """Return the route of the service web with its recent requests, over all nodes."""
    found = json.loads(run(cluster, "skep door status -o json"))
    return next(one for one in found["Routes"] if one["Route"] == NAME)


def check_sleep(cluster: TestCluster) -> None:
    """A service without requests loses its last task, and each node's next request starts one and is served."""
    m1 = cluster.node("m1")
    assert "localhost" in run(cluster, SLEEP)
    m1.docker("service", "update", "--label-add", "skep.autoscale.idle-after=15s", "--detach", "night")
    told = "night: scaled to zero"
    for node in cluster.nodes():
        wait_until(lambda: told in run(cluster, "skep explain night"), "it sleeps", within_s=120)
        assert answers(cluster, node, "night.example.com/hosts").endswith(" 200")
        assert len(running(m1, "night")) == 1
    m1.docker("service", "rm", "night")


def check_certificates(cluster: TestCluster) -> None:
    """Certificates from Pebble: every node answers, and a renewal and new proxies lose no request."""
    m1 = cluster.node("m1")
    assert "Certificates are ordered from" in run(cluster, ACME)
    switch = f"{m1.description['addr'].rpartition('.')[0]}.1"
    with pebble_in(outside(cluster), switch, m1.description["addr"], cluster.directory) as pebble:
        run(
            cluster,
            f"skep door acme ops@{NAME} --agree-tos --directory {pebble.directory} --roots {pebble.own_roots}",
        )
        nodes = [one.description["addr"] for one in cluster.nodes()]
        for node in nodes:
            wait_until(lambda node=node: has_https(cluster, node, pebble), "it has https", within_s=90)
        assert answers(cluster, m1, NAME).endswith(" 308")
        first = end_of_certificate(cluster)
        strict = ["strict_client.py", "--pause", "0.02", "--name", NAME, "--ca", str(pebble.issuer)]
        with asking(*((outside(cluster), [*strict, f"https://{node}:443/"]) for node in nodes)) as seen:
            run(cluster, f"skep certificate renew {NAME}")
            wait_until(lambda: end_of_certificate(cluster) > first, "another certificate", within_s=90)
        assert seen.failed == []
        assert seen.count > ENOUGH
        m1.docker("service", "update", "--force", "--detach=false", "skep-door")
        for node in nodes:
            wait_until(lambda node=node: has_https(cluster, node, pebble), "the new proxy has it")


def has_https(cluster: TestCluster, node: str, pebble: PebbleAtSwitch) -> bool:
    """Return whether a client that trusts Pebble's root gets an answer from a node."""
    ask = f"curl -s -m 5 --cacert {pebble.issuer} --resolve {NAME}:443:{node} -w ' %{{http_code}}'"
    return run(cluster, f"{ask} https://{NAME}/ || true").endswith(" 200")


def end_of_certificate(cluster: TestCluster) -> str:
    found = json.loads(run(cluster, "skep certificate ls -o json"))
    [certificate] = [one for one in found["Certificates"] if one["Name"] == NAME]
    return str(certificate["NotAfter"])


def kill_one(cluster: TestCluster, service: str) -> None:
    """Kill the first process of one of the service's containers."""
    for node in cluster.nodes():
        for pid in container_pids(node, service).values():
            node.kill(pid)
            return
    raise AssertionError(f"{service} has no container")
