"""To which tasks a tunnel leads, and why not to the others."""

import pytest
from msgspec.structs import replace

from skep.errors import FailedPrecondition, NotFound, Unavailable, Unimplemented
from skep.manager.nodes.tunnels import container_of
from skep.model.node import NodeState
from skep.model.task import ContainerStatus, TaskState
from tests.support.builders import a_docker_node, a_node, a_task


def a_running_task(container: str = "c1", state: TaskState = TaskState.RUNNING):
    task = a_task("t1", node="n1")
    status = replace(task.status, state=state, container_status=ContainerStatus(container_id=container))
    return replace(task, status=status)


def test_a_running_task_of_a_ready_node_is_reached():
    assert container_of(a_running_task(), a_node("n1")) == "c1"


@pytest.mark.parametrize(
    ("task", "node", "error", "text"),
    [
        (a_running_task(state=TaskState.PREPARING), a_node("n1"), FailedPrecondition, "it is preparing"),
        (a_running_task(), None, NotFound, "no longer part of this swarm"),
        (a_running_task(), a_node("n1", state=NodeState.DOWN), Unavailable, "node n1, which is down"),
        (
            a_running_task(),
            a_docker_node("d1"),
            Unimplemented,
            "node d1, which is a Docker Engine.*use docker",
        ),
        (a_running_task(""), a_node("n1"), Unimplemented, "node n1 runs it as a process"),
    ],
)
def test_what_cannot_be_reached_is_named(task, node, error, text):
    with pytest.raises(error, match=text):
        container_of(task, node)
