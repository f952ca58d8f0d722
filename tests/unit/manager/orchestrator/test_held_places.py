"""What an update stops where no node accepts a new task: what its own service holds, and nothing else."""

from typing import Any

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.changes import RetireTask
from skep.model.service import PortConfig, PublishMode, Resources, UpdateConfig, UpdateOrder
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import wanted
from tests.support.managers.worlds import World

ROOM = Resources(memory_bytes=1 << 30)
HOST_PORT = PortConfig(target_port=80, published_port=80, publish_mode=PublishMode.HOST)


def an_update_that_is_refused(
    refusal: str,
    *,
    order: UpdateOrder,
    nodes: int = 1,
    before: dict[str, Any] | None = None,
    settles: bool = True,
    **requested: Any,
) -> World:
    """Both tasks of app:1, which requested what ``before`` has, run on the nodes in turn; no node takes app:2.

    ``settles``: whether the orchestrator has decided after that.
    """
    update = UpdateConfig(parallelism=1, order=order)
    old = a_service_spec(
        image="app:1", replicas=2, update=update, **{**requested, "constraints": (), **(before or {})}
    )
    service = a_service(spec=old)
    world = World(service, nodes=[a_node(f"n{number}") for number in range(nodes)])
    for slot in (1, 2):
        world.put(a_task(node=f"n{slot % nodes}", slot=slot, service=service))
    world.update(a_service_spec(image="app:2", replicas=2, update=update, **requested))
    world.settle()
    for new in wanted(world, "app:2"):
        status = replace(new.status, state=TaskState.PENDING, err=f"no suitable node ({refusal})")
        world.put(replace(new, status=status))
    if settles:
        world.settle()
    return world


@pytest.mark.parametrize(
    ("requested", "refusal"),
    [
        ({"ports": (HOST_PORT,)}, "host-mode port already in use on 2 nodes"),
        ({"ports": (HOST_PORT,), "reserve": ROOM}, "insufficient resources on 2 nodes"),
        ({"max_replicas": 1}, "max replicas per node limit exceed"),
        ({"max_replicas": 3}, "max replicas per node limit exceed"),
    ],
)
def test_start_first_stops_one_task_first_where_its_own_service_holds_the_place(
    requested: dict[str, Any], refusal: str
) -> None:
    world = an_update_that_is_refused(refusal, order=UpdateOrder.START_FIRST, nodes=2, **requested)
    assert len(wanted(world, "app:1")) == 1, "as many as parallelism allows"
    (new,) = wanted(world, "app:2")
    assert new.desired_state is TaskState.RUNNING


@pytest.mark.parametrize(
    ("requested", "refusal"),
    [
        ({"reserve": ROOM}, "insufficient resources on 2 nodes"),
        ({"max_replicas": 3}, "insufficient resources on 2 nodes"),
        ({}, "2 nodes not available for new tasks"),
    ],
)
def test_start_first_waits_for_what_others_may_free(requested: dict[str, Any], refusal: str) -> None:
    world = an_update_that_is_refused(refusal, order=UpdateOrder.START_FIRST, nodes=2, **requested)
    assert len(wanted(world, "app:1")) == 2


@pytest.mark.parametrize(
    "requested", [{"ports": (HOST_PORT,)}, {"max_replicas": 1}, {"ports": (HOST_PORT,), "reserve": ROOM}]
)
@pytest.mark.parametrize(
    "refusal",
    [
        "unsupported platform on 2 nodes",
        "missing plugin on 2 nodes",
        "scheduling failed: it cannot say that a host-mode port already in use",
    ],
)
def test_start_first_stops_no_task_for_a_refusal_that_its_end_cannot_lift(
    requested: dict[str, Any], refusal: str
) -> None:
    world = an_update_that_is_refused(refusal, order=UpdateOrder.START_FIRST, nodes=2, **requested)
    assert len(wanted(world, "app:1")) == 2


@pytest.mark.parametrize("reserve", [Resources(memory_bytes=1 << 40), Resources(nano_cpus=10**12)])
def test_start_first_stops_no_task_for_more_than_its_node_has(reserve: Resources) -> None:
    requested = {"ports": (HOST_PORT,), "max_replicas": 1, "reserve": reserve}
    refusal = "insufficient resources on 2 nodes"
    world = an_update_that_is_refused(
        refusal, order=UpdateOrder.START_FIRST, nodes=2, before={"reserve": ROOM}, **requested
    )
    assert len(wanted(world, "app:1")) == 2


@pytest.mark.parametrize("order", list(UpdateOrder))
def test_a_constraint_that_no_node_meets_stops_no_task_whatever_it_holds(order: UpdateOrder) -> None:
    requested = {"ports": (HOST_PORT,), "reserve": ROOM, "max_replicas": 1}
    refusal = "scheduling constraints not satisfied on 2 nodes"
    wrong = ("node.labels.zone==nowhere",)
    world = an_update_that_is_refused(refusal, order=order, nodes=2, constraints=wrong, **requested)
    assert len(wanted(world, "app:1")) == 2
    met = ("node.labels.zone!=nowhere",)
    refusal = "host-mode port already in use on 1 node; scheduling constraints not satisfied on 1 node"
    world = an_update_that_is_refused(refusal, order=order, nodes=2, constraints=met, **requested)
    assert len(wanted(world, "app:1")) == 1


@pytest.mark.parametrize("order", [UpdateOrder.START_FIRST, UpdateOrder.STOP_FIRST])
def test_an_old_task_goes_on_if_its_refused_successor_has_just_got_a_node(order: UpdateOrder) -> None:
    """The scheduler writes that between the decision and its write, for example because a node has joined."""
    refusal = "no suitable node (max replicas per node limit exceed)"
    world = an_update_that_is_refused(refusal, order=order, nodes=2, settles=False, max_replicas=1)
    changes = world.changes()
    (stopped,) = [one for one in changes if isinstance(one, RetireTask)]
    (new,) = wanted(world, "app:2")
    assert stopped.successor == new.id
    placed = replace(new.status, state=TaskState.ASSIGNED, err="")
    world.put(replace(new, node_id=NodeId("n9"), status=placed))
    world.apply(changes)
    assert stopped.task.id in {task.id for task in wanted(world, "app:1")}


@pytest.mark.parametrize("order", list(UpdateOrder))
def test_no_order_stops_a_task_for_more_than_its_node_has(order: UpdateOrder) -> None:
    before = {"reserve": ROOM}
    refusal = "insufficient resources on 2 nodes"
    large = Resources(memory_bytes=1 << 40)
    world = an_update_that_is_refused(refusal, order=order, nodes=2, before=before, reserve=large)
    assert len(wanted(world, "app:1")) == 2
