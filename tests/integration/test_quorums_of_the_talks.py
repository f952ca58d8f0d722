"""Three members of etcd and of ZooKeeper from one stack file: each is lost with its node, and returns with its data."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from tests.support.machines.lab import etcd_image, zookeeper_image
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    nodes_by_name,
    ready,
    remove_stacks,
    running,
    wait_running,
    wait_until,
)
from tests.support.machines.stand_ins import load
from tests.support.machines.talks import deploy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STACK = """\
version: "3.8"
services:
  member:
    image: IMAGE:3
    environment: {SLOT: "{{.Task.Slot}}"}
    volumes: ["data:/data"]
    networks: [members]
    stop_grace_period: 5s
    deploy:
      replicas: 3
      labels: {skep.volume-affinity: required}
      restart_policy: {delay: 1s}
      placement: {max_replicas_per_node: 1, constraints: [node.role == worker]}
networks: {members: {}}
volumes: {data: {name: "IMAGE-{{.Task.Slot}}"}}
"""


class Quorum(msgspec.Struct, frozen=True):
    """A program that is three members with one set of keys."""

    image: str
    put: tuple[str, ...]
    """Command in a member that writes the key which follows."""
    keys: tuple[str, ...]
    """Command in a member that shows the keys that it has itself."""


ETCD = Quorum(
    "etcd",
    ("sh", "-c", 'etcdctl --command-timeout=5s put "$0" x'),
    ("etcdctl", "get", "--prefix", "key", "--keys-only", "--consistency=s"),
)
ZOOKEEPER = Quorum("zookeeper", ("sh", "-c", 'zkcli create "/$0" x'), ("zkcli", "ls", "/"))


@pytest.fixture(scope="module")
def four() -> Iterator[TestCluster]:
    with a_playground("quorums", managers=1, workers=3) as playground:
        yield playground


@pytest.fixture
def m1(four: TestCluster) -> Iterator[TestNode]:
    node = four.node("m1")
    yield node
    remove_stacks(node)


def test_three_members_of_etcd_outlive_the_loss_of_each(
    four: TestCluster, m1: TestNode, tmp_path: Path
) -> None:
    load(m1, tmp_path, etcd_image())
    outlives_each(four, m1, tmp_path, ETCD)


def test_three_members_of_zookeeper_outlive_the_loss_of_each(
    four: TestCluster, m1: TestNode, tmp_path: Path
) -> None:
    load(m1, tmp_path, zookeeper_image())
    outlives_each(four, m1, tmp_path, ZOOKEEPER)


def outlives_each(four: TestCluster, m1: TestNode, directory: Path, quorum: Quorum) -> None:
    service = f"{quorum.image}_member"

    def inside(node: TestNode, *command: str) -> str:
        for id in container_pids(node, service):
            done = node.docker("exec", id, *command, check=False)
            return done.stdout if done.returncode == 0 else ""
        return ""

    def can_put(name: str, key: str) -> bool:
        node = four.node(name)
        return bool(inside(node, *quorum.put, key)) or key in inside(node, *quorum.keys)

    def has(name: str, keys: list[str]) -> bool:
        shown = inside(four.node(name), *quorum.keys)
        return all(key in shown for key in keys)

    deploy(m1, directory, quorum.image, STACK.replace("IMAGE", quorum.image))
    wait_running(m1, service, 3, 120)
    places = slots(m1, service)
    assert sorted(places.values()) == ["w1", "w2", "w3"]
    first = {name: inside(four.node(name), "cat", "/data/first") for name in places.values()}
    keys = ["key-first"]
    wait_until(lambda: can_put("w1", "key-first"), "a key is written", 120)
    for lost in places.values():
        other = next(name for name in places.values() if name != lost)
        wait_until(partial(has, lost, keys), f"{lost} has every key", 60)
        four.skep("kill", lost)
        keys.append(f"key-without-{lost}")
        wait_until(partial(can_put, other, keys[-1]), "the others write", 120)
        wait_until(partial(is_down, m1, lost), f"the loss of {lost} is seen", 60)
        assert lost not in slots(m1, service).values(), "its task waits for its data"
        four.skep("start", lost)
        wait_running(m1, service, 3, 120)
        assert slots(m1, service) == places
        wait_until(partial(has, lost, keys), f"{lost} has what was written without it", 120)
        assert inside(four.node(lost), "cat", "/data/first") == first[lost], "it has its data again"


def is_down(m1: TestNode, name: str) -> bool:
    return name not in ready(m1)


def slots(m1: TestNode, service: str) -> dict[int, str]:
    """Slot -> host name of the node of its running task."""
    names = {node["ID"]: name for name, node in nodes_by_name(m1).items()}
    return {task["Slot"]: names[task["NodeID"]] for task in running(m1, service)}
