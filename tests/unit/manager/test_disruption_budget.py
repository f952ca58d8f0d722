"""How many tasks of a service may be taken away now."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.control.validation.service_rules import check_service_spec
from skep.manager.services.disruption_budget import DisruptionBudget, budget_of
from skep.model.node import Availability, NodeState
from skep.model.options.labels import MIN_AVAILABLE
from skep.model.service import Service, UpdateConfig
from skep.model.task import Preemption, Task, TaskState
from skep.model.task_end import EndCause, TaskEnd
from skep.model.values.ids import TaskId
from tests.support.builders import a_node, a_service, a_service_spec, a_task

NODES = {
    node.id: node
    for node in (
        a_node("n1"),
        a_node("drained", availability=Availability.DRAIN),
        a_node("down", state=NodeState.DOWN),
    )
}
RUNNING = TaskState.RUNNING


def a_web(replicas: int, minimum: str | None = None, parallelism: int = 1) -> Service:
    spec = a_service_spec(replicas=replicas, update=UpdateConfig(parallelism=parallelism))
    return a_service(spec=replace(spec, labels={} if minimum is None else {MIN_AVAILABLE: minimum}))


def running(*nodes: str) -> list[Task]:
    return [
        a_task(f"t{slot}", slot=slot, node=node, state=RUNNING, desired=RUNNING)
        for slot, node in enumerate(nodes, 1)
    ]


def budget(service: Service, tasks: Sequence[Task]) -> DisruptionBudget:
    return budget_of(service, tasks, NODES.get)


@pytest.mark.parametrize(
    ("minimum", "parallelism", "spare"),
    [("2", 1, 1), ("100%", 1, 0), ("0", 1, 3), (None, 1, 1), (None, 2, 2), (None, 0, 3), (None, 9, 3)],
)
def test_the_label_counts_and_otherwise_the_parallelism(
    minimum: str | None, parallelism: int, spare: int
) -> None:
    assert budget(a_web(3, minimum, parallelism), running("n1", "n1", "drained")).spare == spare


def test_tasks_count_only_while_they_serve() -> None:
    tasks = running("n1", "drained", "down", "removed", "n1", "n1", "n1", "n1")
    tasks[4] = replace(tasks[4], desired_state=TaskState.SHUTDOWN)
    tasks[5] = replace(tasks[5], status=replace(tasks[5].status, state=TaskState.STARTING))
    tasks[6] = replace(tasks[6], preemption=Preemption(task_id=TaskId("vip")))
    tasks[7] = replace(tasks[7], status=replace(tasks[7].status, end=TaskEnd(cause=EndCause.UNHEALTHY.value)))
    assert budget(a_web(8, "1"), tasks).available == 2


def test_two_tasks_of_one_slot_count_once() -> None:
    first, second = running("n1", "n1")
    assert budget(a_web(1, "1"), [first, replace(second, slot=1)]).available == 1


def test_the_reason_names_the_numbers_and_where_the_minimum_is_from() -> None:
    found = budget(a_web(3, "3"), running("n1", "n1", "down"))
    assert found.reason == "2 tasks are available, and 3 must stay available (skep.min-available)"
    assert budget(a_web(3, "1"), running("n1", "n1", "down")).reason == ""
    assert budget(a_web(3), running("n1", "n1")).reason.endswith("2 must stay available (update parallelism)")


def test_only_replicated_services_have_a_minimum() -> None:
    spec = replace(a_service_spec(is_global=True), labels={MIN_AVAILABLE: "1"})
    with pytest.raises(
        InvalidArgument, match=r"the label skep\.min-available works on replicated services only"
    ):
        check_service_spec(spec)
