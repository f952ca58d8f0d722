"""Plain containers on nodes without an engine: ``docker run`` as users type it, on every kind of network."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import (
    CLIS,
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    create,
    remove_services,
    wait_running,
    wait_until,
)
from tests.integration.engines import answers, attachments, inside, wait_inside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LABEL = ("--label", "plain")
SERVE = ("httpd", "-f", "-p", "80")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("plain", managers=1, workers=1) as made:
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    for one in (node, cluster.node("w1")):
        for id in one.docker("ps", "-aq", "--filter", "label=plain").stdout.split():
            one.docker("rm", "-f", "-v", id, check=False)
    remove_services(node)
    wait_until(lambda: not attachments(node), "no place of a container is left")
    for one in (node, cluster.node("w1")):
        one.docker("network", "prune", "-f")


@pytest.fixture
def w1(cluster: TestCluster) -> TestNode:
    return cluster.node("w1")


def run(node: TestNode, name: str, *words: str, command: tuple[str, ...] = IDLE) -> str:
    """A detached container; gives its id."""
    return node.docker("run", "-d", "--name", name, *LABEL, *words, IMAGE, *command).stdout.strip()


def refused(node: TestNode, *words: str) -> str:
    done = node.docker(*words, check=False)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("cli", CLIS)
def test_run_takes_its_input_gives_its_output_and_exit_code_and_leaves_nothing(
    m1: TestNode, cli: str
) -> None:
    words = ("run", "--rm", "-i", *LABEL, IMAGE, "sh", "-c", "cat; echo oops >&2; exit 7")
    done = m1.docker(*words, cli=cli, stdin="to the end", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "to the end", "oops\n")
    assert m1.docker("ps", "-aq", "--filter", "label=plain").stdout == ""


def test_names_go_both_ways_between_a_plain_container_and_tasks_of_other_nodes(
    m1: TestNode, w1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    create(m1, "web", 1, "--network", "net1", "--constraint", "node.hostname==m1", command=IDLE)
    wait_running(m1, "web", 1)
    box = run(w1, "box", "--network", "net1", "--network-alias", "crate")
    (task,) = m1.docker("ps", "-q", "--filter", "name=web").stdout.split()
    for name in ("box", "crate", box[:12]):
        wait_inside(m1, task, " 0% packet loss", "ping", "-c", "1", "-W", "1", name)
    for name in ("web", "tasks.web"):
        wait_inside(w1, "box", " 0% packet loss", "ping", "-c", "1", "-W", "1", name)
    run(m1, "other", "--network", "net1")
    wait_inside(m1, "other", " 0% packet loss", "ping", "-c", "1", "-W", "1", "box")
    (shown,) = json.loads(w1.docker("network", "inspect", "net1").stdout)
    assert shown["Containers"][box]["Name"] == "box"
    assert "(container" in refused(m1, "network", "rm", "net1") or "(service web" in refused(
        m1, "network", "rm", "net1"
    )
    w1.docker("rm", "-f", "box")
    wait_until(lambda: len(attachments(m1)) == 1, "the place is given back")


def test_a_container_outlives_the_daemon_with_its_place_and_its_names(
    cluster: TestCluster, m1: TestNode, w1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    run(w1, "box", "--network", "net1")
    run(m1, "here", "--network", "net1")
    before = w1.docker("inspect", "-f", "{{.State.Pid}} {{json .NetworkSettings.Networks}}", "box").stdout
    cluster.skep("kill", "w1")
    cluster.skep("start", "w1")
    after = w1.docker("inspect", "-f", "{{.State.Pid}} {{json .NetworkSettings.Networks}}", "box").stdout
    assert after == before
    wait_inside(m1, "here", " 0% packet loss", "ping", "-c", "1", "-W", "1", "box")
    w1.docker("rm", "-f", "box")
    wait_until(lambda: len(attachments(m1)) == 1, "the place is given back")
