"""Nodes that were lost for longer than the cluster keeps them."""

from math import inf

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.orchestrator.reaper.lost_nodes import AT_ONCE, removable
from skep.manager.orchestrator.reaper.node_loop import _keeps_tasks
from skep.model.ids import NodeId
from skep.model.labels import FORGET_NODES, check_swarm_labels, forget_nodes_s
from skep.model.node import ManagerStatus, Node, NodeRole, NodeState, NodeStatus
from skep.model.task import TaskState
from skep.model.times import SECOND_NS, timestamp
from skep.store.state import State
from skep.store.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_task

NOW_NS = 1_800_000_000 * SECOND_NS
HOUR, DAY = 3600.0, 86_400.0


def down(id: str, recorded_s: float = 0.0) -> Node:
    node = replace(a_node(id), status=NodeStatus(state=NodeState.DOWN))
    return replace(node, silent_since=timestamp(NOW_NS - round(recorded_s * SECOND_NS)))


def removed(
    *nodes: Node, after_s: float | None = DAY, observed_s: float = 2 * DAY, ready: int = 20, **options: object
) -> list[NodeId]:
    present = [a_node(f"r{number}") for number in range(ready)]
    return removable(
        [*nodes, *present],
        after_s=after_s,
        observed_s=lambda node: observed_s if node.status.state is NodeState.DOWN else 0.0,
        now_ns=NOW_NS,
        **{"is_kept": lambda _: False, **options},  # type: ignore[arg-type]
    )


def test_a_worker_that_was_down_for_long_enough_is_removed_and_no_other() -> None:
    assert removed(down("w1"), down("w2")) == ["w1", "w2"]
    assert removed(down("w1"), after_s=None) == []
    assert removed(down("w1"), observed_s=DAY - 1) == []
    unknown = replace(down("w1"), status=NodeStatus(state=NodeState.UNKNOWN))
    assert removed(unknown) == []


def test_a_leader_goes_by_the_record_of_an_earlier_one_after_an_hour_of_its_own() -> None:
    assert removed(down("w1", recorded_s=DAY), observed_s=HOUR) == ["w1"]
    assert removed(down("w1", recorded_s=DAY), observed_s=HOUR - 1) == []
    assert removed(down("w1", recorded_s=DAY - 1), observed_s=HOUR) == []
    assert removed(down("w1", recorded_s=DAY), after_s=60.0, observed_s=59.0) == []


def test_managers_are_never_removed_nor_workers_with_something_of_one() -> None:
    manager = replace(down("m1"), spec=replace(down("m1").spec, role=NodeRole.MANAGER))
    demoted = replace(down("m2"), manager_status=ManagerStatus())
    assert removed(manager, demoted) == []


def test_nothing_is_removed_unless_more_than_half_of_all_nodes_are_ready() -> None:
    lost = [down(f"w{number}") for number in range(3)]
    assert removed(*lost, ready=3) == []
    assert len(removed(*lost, ready=4)) == 3
    assert removed(*lost, is_frozen=True) == []


def test_a_node_with_tasks_that_stay_there_is_kept_and_the_rest_goes_in_parts() -> None:
    assert removed(down("w1"), down("w2"), is_kept=lambda node: node.id == "w1") == ["w2"]
    many = [down(f"w{number:03}") for number in range(AT_ONCE + 5)]
    assert removed(*many, ready=100) == [node.id for node in many[:AT_ONCE]]


@pytest.mark.parametrize("value", ["59s", "2161h", "soon", "-1h"])
def test_the_setting_has_bounds(value: str) -> None:
    with pytest.raises(InvalidArgument, match=FORGET_NODES):
        check_swarm_labels({FORGET_NODES: value})
    assert forget_nodes_s({FORGET_NODES: value}) is None
    assert forget_nodes_s({FORGET_NODES: "1m"}) == 60.0


@pytest.mark.parametrize(
    ("labels", "state", "kept_s"),
    [
        ({}, TaskState.RUNNING, 0.0),
        ({"skep.on-disconnect-delay": "1h"}, TaskState.RUNNING, HOUR),
        ({"skep.on-disconnect-delay": "1h"}, TaskState.SHUTDOWN, 0.0),
        ({"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "5m"}, TaskState.RUNNING, 310.0),
        ({"skep.on-disconnect": "keep"}, TaskState.RUNNING, inf),
        ({"skep.on-disconnect": "keep"}, TaskState.SHUTDOWN, inf),
    ],
)
def test_a_node_is_kept_until_its_tasks_may_be_replaced(
    labels: dict[str, str], state: TaskState, kept_s: float
) -> None:
    """Those of a node that is removed are replaced at once."""
    tx = LocalTransaction(State(), 0)
    web = a_service("web")
    tx.put(replace(web, spec=replace(web.spec, labels=labels)))
    tx.put(a_node("w1", state=NodeState.DOWN))
    tx.put(a_task("t1", node="w1", service=web, state=state))
    for down_s in (0.0, 60.0, 309.0, 311.0, HOUR - 1, HOUR, DAY):
        assert _keeps_tasks(tx, tx.get(Node, "w1"), down_s) is (down_s < kept_s)
