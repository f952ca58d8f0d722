"""What a task without a node needs, in the words of its reason."""

import pytest
from msgspec.structs import replace

from skep.manager.diagnosis.reasons import problem_of
from skep.model.node import Node
from skep.model.service import PortConfig, PublishMode, Resources, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from tests.support.builders import a_node, a_service, a_service_spec, a_task

ZONE = "node.labels.zone"


def reason(task: Task, service: Service, *nodes: Node) -> str:
    return problem_of(task, (), {node.id: node for node in nodes}, spec=service.spec).reason


def test_resources_that_are_kept_for_the_system_are_named() -> None:
    """Without it, the node seems to have fewer processors than it has."""
    service = a_service("web", reserve=Resources(nano_cpus=10**9))
    refused = "no suitable node (insufficient resources on 1 node)"
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    has = Resources(nano_cpus=2 * 10**9, memory_bytes=2 << 30)
    node = a_node("m1", has=has, labels={"skep.reserve.cpus": "1.8"})
    assert reason(task, service, node) == (
        "needs 1 CPU; the largest node, m1, has 0.2 (skep.reserve.cpus keeps 1.8 for the system)"
    )
    node = a_node("m1", has=has, labels={"skep.reserve.memory": "8GiB"})
    tight = a_service("web", reserve=Resources(memory_bytes=1 << 30))
    task = replace(task, spec=tight.spec.task_template)
    assert reason(task, tight, node) == (
        "needs 1024 MiB of memory; the largest node, m1, has 0 MiB (skep.reserve.memory keeps 2048 MiB for the system)"
    )


@pytest.mark.parametrize(
    ("replicas", "constraints", "words"),
    [
        (
            3,
            (),
            "needs 3 nodes, because its host-mode port 80/tcp allows 1 task per node; the cluster has 2 nodes",
        ),
        (
            2,
            ("node.hostname==m1",),
            "needs 2 nodes, because its host-mode port 80/tcp allows 1 task per node; 1 node meets its constraints",
        ),
        (2, (), ""),
    ],
)
def test_more_tasks_than_nodes_for_a_host_mode_port_wait_for_a_node(
    replicas: int, constraints: tuple[str, ...], words: str
) -> None:
    """The port is in use by tasks of the service itself, so that no other program can free it."""
    port = PortConfig(target_port=80, published_port=80, publish_mode=PublishMode.HOST)
    service = a_service("web", replicas=replicas, ports=(port,), constraints=constraints)
    refused = "no suitable node (host-mode port already in use on 2 nodes)"
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    nodes = (a_node("m1"), a_node("m2"))
    found = problem_of(task, (), {node.id: node for node in nodes}, spec=service.spec)
    assert found.reason == (words or f"needs port 80/tcp; {refused}")
    assert found.kind == ("too-large" if words else "no-node")


def test_more_tasks_than_a_limit_per_node_allows_wait_for_a_node() -> None:
    service = a_service("web", replicas=5, max_replicas=2)
    task = a_task(service=service, state=TaskState.PENDING)
    refused = "no suitable node (max replicas per node limit exceed)"
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    assert reason(task, service, a_node("m1"), a_node("m2")) == (
        "needs 3 nodes, because its limit of replicas per node allows 2 tasks per node; the cluster has 2 nodes"
    )
    assert reason(task, service, *(a_node(name) for name in ("m1", "m2", "m3"))).endswith(refused)


@pytest.mark.parametrize(
    ("labels", "refusal", "needs"),
    [
        ({"skep.affinity": "db"}, "affinity not satisfied", "a node with a task of db"),
        (
            {"skep.affinity": f"db@{ZONE},mail"},
            "affinity not satisfied",
            f"a {ZONE} with a task of db, a node with a task of mail; no node has {ZONE}",
        ),
        ({"skep.anti-affinity": "web"}, "anti-affinity not satisfied", "a node without a task of web"),
        (
            {"skep.anti-affinity": f"web@{ZONE}"},
            "anti-affinity not satisfied",
            f"a {ZONE} without a task of web",
        ),
        (
            {"skep.max-skew": f"1@{ZONE}"},
            "max skew exceeded",
            f"a {ZONE} with at most 1 task more than any other; no node has {ZONE}",
        ),
        (
            {"skep.max-skew": "2@node.labels.rack,1@engine.labels.hall"},
            "max skew exceeded",
            (
                "a node.labels.rack with at most 2 tasks more than any other, an engine.labels.hall with at most "
                "1 task more than any other; no node has engine.labels.hall"
            ),
        ),
    ],
)
def test_affinities_and_skews_that_no_node_meets_are_named(
    labels: dict[str, str], refusal: str, needs: str
) -> None:
    service = a_service("web", spec=replace(a_service_spec("web"), labels=labels))
    refused = f"no suitable node ({refusal} on 1 node)"
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    nodes = (a_node("m1", labels={"rack": "r1"}),)
    assert reason(task, service, *nodes) == f"needs {needs}; {refused}"


def test_a_constraint_with_a_key_that_no_node_has_is_named() -> None:
    service = a_service("web", constraints=("node.label.ssd==yes",))
    refused = "no suitable node (scheduling constraints not satisfied on 1 node)"
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    assert reason(task, service, a_node("m1")) == (
        f"needs node.label.ssd==yes; no node has the key node.label.ssd, did you mean node.labels.ssd?; {refused}"
    )
