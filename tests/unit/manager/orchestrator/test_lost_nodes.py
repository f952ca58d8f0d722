"""Nodes that were lost for longer than the cluster keeps them."""

from math import inf

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.orchestrator.reaper.kept_nodes import KeptNodes
from skep.manager.orchestrator.reaper.lost_nodes import AT_ONCE, removable
from skep.manager.orchestrator.reaper.node_loop import remove_lost
from skep.manager.routes.representations import problems_of, shown_node
from skep.model.container import ContainerSpec, Mount
from skep.model.node import ManagerStatus, Node, NodeRole, NodeState, NodeStatus
from skep.model.node_reports.conditions import ConditionName, condition_label
from skep.model.options.labels import FORGET_NODES, check_swarm_labels, forget_nodes_s
from skep.model.options.slot_volumes import (
    FORGOTTEN_LABEL,
    SLOT_VOLUMES_LABEL,
    SlotVolume,
    slot_volumes_label,
)
from skep.model.service import Service
from skep.model.swarm import Swarm, SwarmSpec
from skep.model.task import Task, TaskState, VolumeAttachment
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import SECOND_NS, timestamp
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeScope, VolumeSharing
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_cluster_volume, a_node, a_service, a_task

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
        assert bool(why_kept(tx, down_s)) is (down_s < kept_s)


def why_kept(tx: LocalTransaction, down_s: float = DAY) -> str:
    return KeptNodes(tx).reason(tx.get(Node, "w1"), down_s)


def a_cluster_with(*objects: Node | Service | Volume | Task) -> LocalTransaction:
    """With the node w1, which is down, unless it is among ``objects``."""
    tx = LocalTransaction(State(), 0)
    tx.put(Swarm(id=ClusterId("c"), spec=SwarmSpec(labels={FORGET_NODES: "1h"})))
    tx.put(down("w1", recorded_s=2 * DAY))
    for one in objects:
        tx.put(one)
    return tx


@pytest.mark.parametrize("state", PublishState)
@pytest.mark.parametrize("sharing", [VolumeSharing.NONE, VolumeSharing.ALL])
def test_a_node_on_which_a_cluster_volume_may_be_published_is_never_removed(
    state: PublishState, sharing: VolumeSharing
) -> None:
    """Its containers may still write, and the volume would be published on another node."""
    scope = VolumeScope.MULTI if sharing is VolumeSharing.ALL else VolumeScope.SINGLE
    volume = a_cluster_volume("orders", on={"w1": state}, scope=scope, sharing=sharing)
    tx = a_cluster_with(volume)
    assert why_kept(tx) == "it may still write to cluster volume orders"
    assert not remove_lost(tx, NodeId("w1"), lambda _: DAY, NOW_NS)
    assert tx.lookup(Node, "w1") is not None


def test_an_entry_for_which_no_driver_was_called_keeps_no_node() -> None:
    entry = PublishStatus(node_id=NodeId("w1"), state=PublishState.PENDING)
    tx = a_cluster_with(replace(a_cluster_volume(), publish_status=(entry,)))
    assert why_kept(tx) == ""
    assert remove_lost(tx, NodeId("w1"), lambda _: DAY, NOW_NS)


@pytest.mark.parametrize("state", [TaskState.RUNNING, TaskState.SHUTDOWN])
def test_a_task_with_a_cluster_volume_keeps_its_node_until_it_has_ended(state: TaskState) -> None:
    """The volume itself may have been removed with force."""
    web = a_service("web")
    task = a_task(node="w1", service=web, state=state, desired=TaskState.SHUTDOWN)
    attachment = VolumeAttachment(id="v", source="orders", target="/d")
    tx = a_cluster_with(web, replace(task, volumes=(attachment,)))
    assert bool(why_kept(tx)) is not state.is_terminal


def a_service_with_data(policy: str = "required", *, source: str = "data", replicas: int = 0) -> Service:
    service = a_service("db", replicas=replicas)
    container = ContainerSpec(image="db", mounts=(Mount(type="volume", source=source, target="/d"),))
    template = replace(service.spec.task_template, container_spec=container)
    return replace(
        service, spec=replace(service.spec, task_template=template, labels={"skep.volume-affinity": policy})
    )


def with_slots(node: Node, label: str, **labels: str) -> Node:
    engine = replace(node.description.engine, labels={SLOT_VOLUMES_LABEL: label})
    spec = replace(node.spec, labels=labels)
    return replace(node, spec=spec, description=replace(node.description, engine=engine))


@pytest.mark.parametrize(
    ("service", "label", "is_kept"),
    [
        (a_service_with_data(), "data=db.1@1700000000000", True),
        (a_service_with_data(source="data-{{.Task.Slot}}"), "data-7=db.7@1700000000000", True),
        (a_service_with_data(), "other=db.1@1700000000000", False),
        (a_service_with_data(), "data=web.1@1700000000000", False),
        (a_service_with_data("preferred"), "data=db.1@1700000000000", False),
        (replace(a_service_with_data(), removed_at=timestamp(NOW_NS)), "data=db.1@1700000000000", False),
    ],
)
def test_a_node_with_data_that_tasks_return_to_is_kept_though_no_task_is_there(
    service: Service, label: str, is_kept: bool
) -> None:
    """The service is scaled to 0, or it is a job between two runs, or no history is kept."""
    tx = a_cluster_with(with_slots(down("w1"), label), service)
    assert bool(why_kept(tx)) is is_kept
    assert remove_lost(tx, NodeId("w1"), lambda _: DAY, NOW_NS) is not is_kept


def test_the_data_that_the_spec_of_a_jobs_present_run_or_a_rollback_needs_keeps_its_node() -> None:
    past = a_service_with_data()
    present = replace(past, spec=a_service_with_data(source="new").spec, previous_spec=past.spec)
    tx = a_cluster_with(with_slots(down("w1"), "data=db.1@1700000000000"), present)
    assert why_kept(tx) == "it has the data of db.1 in volume data"


def test_a_node_that_cannot_report_all_its_volumes_is_kept_for_the_data_of_any_service() -> None:
    """The label has the latest uses, as many as fit."""
    uses = [SlotVolume("v" * 200, f"web{number}", 1, 1_700_000_000_000 + number) for number in range(200)]
    full = with_slots(down("w1"), slot_volumes_label(uses))
    assert why_kept(a_cluster_with(full, a_service_with_data())).startswith("it has more volumes than")
    assert why_kept(a_cluster_with(full, a_service_with_data("preferred"))) == ""
    some = with_slots(down("w1"), slot_volumes_label(uses[:100]))
    assert why_kept(a_cluster_with(some, a_service_with_data())) == ""
    # The size of the whole description cuts the label at any length.
    engine = some.description.engine
    labels = {**engine.labels, condition_label(ConditionName.DESCRIPTION_SIZE): "slots with volumes were cut"}
    cut = replace(some, description=replace(some.description, engine=replace(engine, labels=labels)))
    assert why_kept(a_cluster_with(cut, a_service_with_data())).startswith("it has more volumes than")


def test_data_that_a_user_gave_up_keeps_no_node() -> None:
    forgotten = {FORGOTTEN_LABEL: "data@1700000000000"}
    given_up = with_slots(down("w1"), "data=db.1@1700000000000", **forgotten)
    assert why_kept(a_cluster_with(given_up, a_service_with_data())) == ""
    later = with_slots(down("w1"), "data=db.1@1700000000001", **forgotten)
    assert why_kept(a_cluster_with(later, a_service_with_data())) == "it has the data of db.1 in volume data"


def test_the_status_of_a_lost_node_says_why_it_is_not_removed() -> None:
    tx = a_cluster_with(a_cluster_volume("orders", on={"w1": PublishState.PUBLISHED}), down("w2"))

    def message(id: str) -> str:
        return shown_node(problems_of(tx, Node), tx.get(Node, id)).status.message

    reason = "it may still write to cluster volume orders (skep node forget removes it)"
    assert message("w1") == f"not removed by skep.forget-nodes: {reason}"
    assert message("w2") == ""
    swarm = tx.find(Swarm)[0]
    tx.put(replace(swarm, spec=SwarmSpec()))
    assert message("w1") == ""
