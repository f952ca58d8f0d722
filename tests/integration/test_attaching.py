"""Which nodes' plain containers may join an overlay network, and when their addresses are free again."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.machines.docker_engines import FOR_ENGINES, attachments, inside, wait_inside
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LABEL = ("--label", "plain")
ADDRESS = "10.66.0.9"


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """m1, w1 and w2; network ``inner`` is for w1 by its label, ``engines`` for Docker Engines, ``closed`` for none."""
    with a_playground("attach", managers=1, workers=2) as made:
        m1 = made.node("m1")
        m1.docker("node", "update", "--label-add", "zone=inner", "w1")
        overlay = ("network", "create", "-d", "overlay")
        inner = ("--attachable", "--subnet", "10.66.0.0/24", "--label", "skep.attach=node.labels.zone==inner")
        m1.docker(*overlay, *inner, "inner")
        m1.docker(*overlay, "--attachable", *FOR_ENGINES, "engines")
        m1.docker(*overlay, "closed")
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    """The manager; plain containers of a test go with it."""
    node = cluster.node("m1")
    yield node
    for one in cluster.nodes():
        for id in one.docker("ps", "-aq", "--filter", "label=plain", check=False).stdout.split():
            one.docker("rm", "-f", id, check=False)
    wait_until(lambda: not attachments(node), "no place of a container is left")


def run(node: TestNode, name: str, *words: str) -> str:
    """A detached container; gives its id."""
    return node.docker("run", "-d", "--name", name, *LABEL, *words, IMAGE, *IDLE).stdout.strip()


def refused(node: TestNode, network: str) -> str:
    done = node.docker("run", "--rm", *LABEL, "--network", network, IMAGE, "true", check=False)
    assert done.returncode == 125, done.stdout
    return done.stderr


def impostor(cluster: TestCluster, network: str, attachment: str) -> dict[str, str]:
    """What the manager answers the holder of w2's files, who says that it is w1 and a Docker Engine."""
    w2 = cluster.node("w2")
    files = cluster.directory / "w2" / "data" / "certificates"
    manager = f"{cluster.node('m1').description['addr']}:2377"
    enter = (
        "nsenter",
        f"--net={w2.description['netns']}",
        sys.executable,
        "-m",
        "tests.support.security.impostor",
    )
    done = subprocess.run(
        [*enter, str(files), manager, "w1", network, attachment],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    responses: dict[str, str] = json.loads(done.stdout)
    return responses


def test_a_worker_joins_what_its_labels_allow_and_gives_its_address_back(
    cluster: TestCluster, m1: TestNode
) -> None:
    w1 = cluster.node("w1")
    box = run(w1, "box", "--network", "inner", "--ip", ADDRESS)
    (place,) = attachments(m1)
    assert place["Spec"]["NetworkAttachmentSpec"]["ContainerID"] == box
    assert place["NodeID"] == nodes_by_name(m1)["w1"]["ID"]
    assert place["NetworksAttachments"][0]["Addresses"] == [f"{ADDRESS}/24"]
    assert f"inet {ADDRESS}/24" in inside(w1, "box", "ip", "addr")
    run(w1, "other", "--network", "inner")
    wait_inside(w1, "other", " 0% packet loss", "ping", "-c", "1", "-W", "1", "box")

    w1.docker("kill", "box")
    wait_until(lambda: len(attachments(m1)) == 1, "the place goes with its container")
    run(w1, "next", "--network", "inner", "--ip", ADDRESS)
    wait_inside(w1, "other", " 0% packet loss", "ping", "-c", "1", "-W", "1", ADDRESS)


def test_other_workers_and_other_networks_are_refused(cluster: TestCluster, m1: TestNode) -> None:
    w1, w2 = cluster.node("w1"), cluster.node("w2")
    assert "Could not attach to network closed: rpc error: code = PermissionDenied" in refused(w1, "closed")
    assert "desc = network closed not manually attachable" in refused(w1, "closed")
    for node in (w2, m1):
        said = refused(node, "inner")
        assert (
            "accepts only containers of nodes with node.labels.zone==inner, which this node does not meet"
            in said
        )
        assert not node.docker("ps", "-aq", "--filter", "label=plain").stdout
    assert not attachments(m1)


def test_a_worker_that_says_it_is_another_is_still_itself(cluster: TestCluster, m1: TestNode) -> None:
    run(cluster.node("w1"), "box", "--network", "inner", "--ip", ADDRESS)
    (place,) = attachments(m1)
    responses = impostor(cluster, "inner", place["ID"])
    assert responses["attach"].startswith(
        "PermissionDenied: network inner accepts only containers of nodes with"
    )
    assert responses["detach"] == f"PermissionDenied: attachment {place['ID']} doesn't belong to this node"
    # What a node joined as decides its kind.
    responses = impostor(cluster, "engines", place["ID"])
    assert responses["attach"] == (
        "FailedPrecondition: network engines belongs to docker nodes: containers of a skep node cannot join it"
    )
    assert [one["ID"] for one in attachments(m1)] == [place["ID"]]
    wait_until(lambda: {"w1", "w2"} <= set(nodes_by_name(m1)), "w2 has its session again")


def test_a_removed_nodes_addresses_are_free(cluster: TestCluster, m1: TestNode) -> None:
    run(cluster.node("w1"), "box", "--network", "inner", "--ip", ADDRESS)
    m1.docker("node", "update", "--label-add", "zone=inner", "w2")
    cluster.skep("kill", "w1")
    wait_until(lambda: nodes_by_name(m1)["w1"]["Status"]["State"] == "down", "w1 is down", 60)
    m1.docker("node", "rm", "--force", "w1")
    wait_until(lambda: not attachments(m1), "its places are gone")
    w2 = cluster.node("w2")
    run(w2, "heir", "--network", "inner", "--ip", ADDRESS)
    assert f"inet {ADDRESS}/24" in inside(w2, "heir", "ip", "addr")
