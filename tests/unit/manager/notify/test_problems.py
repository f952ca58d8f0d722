"""Which states of nodes and services are problems, and that their messages have no credentials."""

import pytest
from msgspec.structs import replace

from skep.manager.notify.problems import Problem, problems_of_node, problems_of_service
from skep.model.node import ManagerStatus, Node, NodeRole, NodeState, Reachability
from skep.model.node_reports.conditions import ConditionName, condition_label
from skep.model.options.notifications import Topic
from skep.model.service import HealthState, ServiceHealth, UpdateState, UpdateStatus
from tests.support.builders import a_node, a_service

SECRET = "hush-hush"
REJECTED = f"cannot pull https://bot:{SECRET}@registry/web: denied"
DEGRADED = ServiceHealth(state=HealthState.DEGRADED, reason=REJECTED)
HEALTHY = ServiceHealth(state=HealthState.HEALTHY)


def with_conditions(*names: ConditionName) -> Node:
    node = a_node("n1")
    labels = {condition_label(one): f"{one.value}: its text" for one in names}
    engine = replace(node.description.engine, labels=labels)
    return replace(node, description=replace(node.description, engine=engine))


def a_manager(reachability: Reachability, state: NodeState = NodeState.READY) -> Node:
    node = a_node("m1", role=NodeRole.MANAGER, state=state)
    return replace(node, manager_status=ManagerStatus(reachability=reachability))


def told(node: Node) -> list[tuple[Topic, str]]:
    return [(one.topic, one.message) for one in problems_of_node(node)]


def test_a_manager_that_is_unreachable_is_a_problem_once() -> None:
    assert told(a_manager(Reachability.REACHABLE)) == []
    assert told(a_manager(Reachability.UNREACHABLE)) == [(Topic.NODE, "manager m1 is unreachable")]
    assert told(a_manager(Reachability.UNREACHABLE, NodeState.DOWN)) == [(Topic.NODE, "node m1 is down")]


@pytest.mark.parametrize(
    "condition",
    [
        ConditionName.DISK_PRESSURE,
        ConditionName.DISK,
        ConditionName.STORE_FULL,
        ConditionName.DISK_SPACE,
    ],
)
def test_each_condition_of_a_disk_is_a_problem(condition: ConditionName) -> None:
    text = f"node n1: {condition.value}: its text"
    assert told(with_conditions(condition)) == [(Topic.DISK, text)]


def test_several_conditions_of_disks_are_one_problem_and_other_conditions_none() -> None:
    assert len(told(with_conditions(ConditionName.DISK_SPACE, ConditionName.STORE_FULL))) == 1
    assert told(with_conditions(ConditionName.REBOOT_REQUIRED)) == []


def problem_of(health: ServiceHealth, update: UpdateStatus | None = None) -> Problem:
    (found,) = problems_of_service(replace(a_service("web"), update_status=update), health)
    return found


def test_no_message_has_a_credential() -> None:
    node = a_node("n1", state=NodeState.DOWN)
    down = replace(node, status=replace(node.status, message=REJECTED))
    paused = UpdateStatus(state=UpdateState.PAUSED, message=REJECTED)
    (lost,) = problems_of_node(down)
    (full,) = problems_of_node(with_text(REJECTED))
    found = (lost, full, problem_of(DEGRADED), problem_of(HEALTHY, paused))
    assert [one.topic for one in found] == [Topic.NODE, Topic.DISK, Topic.SERVICE, Topic.DEPLOY]
    for one in found:
        assert "https://bot:***@registry/web" in one.message
        assert SECRET not in one.message


def with_text(text: str) -> Node:
    node = a_node("n1")
    engine = replace(node.description.engine, labels={condition_label(ConditionName.DISK): text})
    return replace(node, description=replace(node.description, engine=engine))
