"""Updates to a task that no node of the cluster can take: they fail early, with the reason."""

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.replacement.early_failures import step_seconds_max
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import PROGRESS_DEADLINE
from skep.model.service import Resources, ServiceSpec, UpdateConfig, UpdateFailureAction, UpdateState
from skep.model.task import TaskState
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import message, state, wanted
from tests.support.managers.worlds import World

NO_NODE = "no suitable node (scheduling constraints not satisfied on 2 nodes)"
NOWHERE = ("node.labels.zone==nowhere",)


def a_refused_update(
    spec: ServiceSpec, refusal: str = NO_NODE, *, nodes: tuple[Node, ...] = (a_node("n1"), a_node("n2"))
) -> World:
    """Both tasks of app:1 run on n1, and the scheduler refuses the first task of ``spec``."""
    service = a_service(spec=a_service_spec(image="app:1", replicas=2))
    world = World(service, nodes=nodes)
    for slot in (1, 2):
        world.put(a_task(node="n1", slot=slot, service=service))
    world.update(spec)
    world.settle()
    (new,) = wanted(world, "app:2")
    world.put(replace(new, status=replace(new.status, state=TaskState.PENDING, err=refusal)))
    world.settle()
    return world


def a_spec(
    action: UpdateFailureAction = UpdateFailureAction.PAUSE,
    labels: dict[str, str] | None = None,
    constraints: tuple[str, ...] = NOWHERE,
    reserve: Resources | None = None,
) -> ServiceSpec:
    update = UpdateConfig(parallelism=1, failure_action=action)
    spec = a_service_spec(
        image="app:2", replicas=2, update=update, constraints=constraints, reserve=reserve or Resources()
    )
    return replace(spec, labels=labels or {})


def test_an_update_to_a_constraint_that_no_node_meets_pauses_after_seconds_with_the_constraint() -> None:
    world = a_refused_update(a_spec())
    (lead,) = wanted(world, "app:2")
    world.now = 9.9
    world.settle()
    assert state(world) is UpdateState.UPDATING
    world.now = 10.0
    world.settle()
    words = f"update paused because no node can take task {lead.id}: needs {NOWHERE[0]}; {NO_NODE}"
    assert (state(world), message(world)) == (UpdateState.PAUSED, words)
    assert len(wanted(world, "app:1")) == 2, "the running tasks stay"


def test_it_is_rolled_back_as_the_failure_action_says() -> None:
    world = a_refused_update(a_spec(UpdateFailureAction.ROLLBACK))
    world.now = 10.0
    world.settle()
    assert state(world) in (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_COMPLETED)
    assert "no node can take task" in message(world)
    assert not wanted(world, "app:2")


def test_a_size_that_no_node_has_is_named_too() -> None:
    reserve = Resources(nano_cpus=64 * 10**9)
    world = a_refused_update(
        a_spec(constraints=(), reserve=reserve), "no suitable node (insufficient resources on 2 nodes)"
    )
    world.now = 10.0
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert message(world).endswith("needs 64 CPUs; no suitable node (insufficient resources on 2 nodes)")


def test_a_deadline_that_the_service_sets_counts_whatever_the_nodes_are() -> None:
    world = a_refused_update(a_spec(labels={PROGRESS_DEADLINE: "30m"}))
    world.now = 1_800.0
    world.settle()
    assert state(world) is UpdateState.UPDATING


@pytest.mark.parametrize(
    ("spec", "refusal", "nodes"),
    [
        (a_spec(constraints=()), "host-mode port already in use on 2 nodes", (a_node("n1"), a_node("n2"))),
        (a_spec(constraints=()), "insufficient resources on 2 nodes", (a_node("n1"), a_node("n2"))),
        (a_spec(constraints=()), "disk full on 2 nodes", (a_node("n1"), a_node("n2"))),
        (
            a_spec(constraints=("node.id==n2",)),
            "scheduling constraints not satisfied on 1 node; 1 node not available for new tasks",
            (a_node("n1"), a_node("n2", state=NodeState.DOWN)),
        ),
        (
            a_spec(constraints=("node.id==n2",)),
            "scheduling constraints not satisfied on 1 node; 1 node not available for new tasks",
            (a_node("n1"), a_node("n2", availability=Availability.DRAIN)),
        ),
    ],
)
def test_an_update_waits_for_what_may_come(spec: ServiceSpec, refusal: str, nodes: tuple[Node, ...]) -> None:
    world = a_refused_update(spec, f"no suitable node ({refusal})", nodes=nodes)
    world.now = 500.0
    world.settle()
    assert state(world) is UpdateState.UPDATING


def test_an_unavailable_node_that_does_not_meet_the_constraint_helps_no_update() -> None:
    refusal = "no suitable node (scheduling constraints not satisfied on 1 node; 1 node not available for new tasks)"
    world = a_refused_update(a_spec(), refusal, nodes=(a_node("n1"), a_node("n2", state=NodeState.DOWN)))
    world.now = 10.0
    world.settle()
    assert state(world) is UpdateState.PAUSED


def refuse(world: World, refusal: str) -> None:
    """The scheduler writes another refusal of the new task."""
    (lead,) = wanted(world, "app:2")
    world.put(replace(lead, status=replace(lead.status, err=refusal)))
    world.settle()


def test_a_task_of_a_global_service_fails_early_if_its_own_node_is_too_small() -> None:
    spec = a_service_spec(image="app:1", is_global=True)
    world = World(
        a_service(spec=spec), nodes=(a_node("n1", has=Resources(nano_cpus=64 * 10**9)), a_node("n2"))
    )
    for node in ("n1", "n2"):
        world.put(a_task(node=node, slot=0, service=world.service))
    reserve = Resources(nano_cpus=32 * 10**9)
    update = UpdateConfig(parallelism=0)
    world.update(a_service_spec(image="app:2", is_global=True, update=update, reserve=reserve))
    world.settle()
    for task in wanted(world, "app:2"):
        err = "no suitable node (insufficient resources on 1 node)"
        world.put(replace(task, status=replace(task.status, state=TaskState.PENDING, err=err)))
    world.settle()
    world.now = 10.0
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert [task.id in message(world) for task in wanted(world, "app:2") if task.node_id == "n2"] == [True]


def test_the_ten_seconds_begin_when_the_last_node_that_may_take_the_task_is_gone() -> None:
    """A machine is replaced: its node is removed, and the new one joins and gets its label a few seconds later."""
    north = a_node("n2", state=NodeState.DOWN, labels={"zone": "nowhere"})
    waits = "no suitable node (scheduling constraints not satisfied on 1 node; 1 node not available for new tasks)"
    world = a_refused_update(a_spec(), waits, nodes=(a_node("n1"), north))
    world.now = 60.0
    del world.nodes[north.id]
    refuse(world, "no suitable node (scheduling constraints not satisfied on 1 node)")
    assert state(world) is UpdateState.UPDATING
    world.now = 69.9
    world.settle()
    assert state(world) is UpdateState.UPDATING
    world.now = 70.0
    world.settle()
    assert state(world) is UpdateState.PAUSED


def test_the_progress_deadline_counts_also_if_it_passes_earlier() -> None:
    north = a_node("n2", state=NodeState.DOWN, labels={"zone": "nowhere"})
    waits = "no suitable node (scheduling constraints not satisfied on 1 node; 1 node not available for new tasks)"
    world = a_refused_update(a_spec(), waits, nodes=(a_node("n1"), north))
    world.now = deadline_s = step_seconds_max(a_spec())
    world.now -= 1.0
    del world.nodes[north.id]
    refuse(world, "no suitable node (scheduling constraints not satisfied on 1 node)")
    assert state(world) is UpdateState.UPDATING
    world.now = deadline_s
    world.settle()
    assert state(world) is UpdateState.PAUSED


def test_a_deadline_that_is_set_during_the_update_counts_for_tasks_that_wait_already() -> None:
    """The task stays, because its spec is the same, and no other slot is stopped for the update before the deadline."""
    world = a_refused_update(a_spec())
    world.now = 5.0
    world.update(a_spec(labels={PROGRESS_DEADLINE: "30m"}))
    world.settle()
    world.now = 1_000.0
    world.settle()
    assert len(wanted(world, "app:2")) == 1
