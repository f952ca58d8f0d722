"""Whatever the order of drains, relabeled nodes, updates, pauses and failures, each slot ends with one right task."""

from typing import TypeAlias

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.outdated_tasks import is_dirty
from skep.manager.orchestrator.slots import group_by_slot
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import DRAIN_NOW, MIN_AVAILABLE
from skep.model.service import (
    PAUSED,
    Placement,
    ReplicatedService,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, timestamp
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.worlds import World

RUNNING = TaskState.RUNNING
NODES = ("n1", "n2", "n3")
ROUNDS = 60
ROUND_S = 15.0
"""Longer than every restart delay and monitor time here."""
OUTSIDE = {"zone": "outside"}
"""Labels of a node on which no task may run."""
Happening: TypeAlias = tuple[str, int]

configs = st.builds(
    UpdateConfig,
    parallelism=st.integers(0, 2),
    failure_action=st.sampled_from([UpdateFailureAction.CONTINUE, UpdateFailureAction.PAUSE]),
    order=st.sampled_from(list(UpdateOrder)),
)
happenings = st.lists(
    st.tuples(
        st.sampled_from(
            ["goes on"] * 4
            + ["drain", "drain", "drain now", "activate", "down", "fails", "is rejected"]
            + ["relabel", "relabel", "image", "pause", "resume", "scale", "leader"]
        ),
        st.integers(0, 30),
    ),
    max_size=20,
)
minimums = st.sampled_from([None, "1", "50%", "100%"])


def begun(config: UpdateConfig, minimum: str | None, per_node: int, *, data: bool) -> World:
    """Three replicas run on three nodes."""
    spec = a_service_spec(
        replicas=3, image="app:1", update=config, rollback=config, restart=RestartPolicy(delay=0)
    )
    labels = {MIN_AVAILABLE: minimum} if minimum is not None else {}
    mounts = (Mount(type="volume", source="data", target="/data"),) if data else ()
    container = replace(spec.task_template.container_spec or ContainerSpec(), mounts=mounts)
    placement = Placement(max_replicas=per_node, constraints=("node.labels.zone != outside",))
    template = replace(spec.task_template, container_spec=container, placement=placement)
    service = a_service(spec=replace(spec, labels=labels, task_template=template))
    world = World(service, nodes=map(a_node, NODES))
    for slot in (1, 2, 3):
        world.put(a_task(f"old{slot}", slot=slot, node=f"n{slot}", service=service))
    return world


def happen(world: World, what: str, which: int, *, per_node: int) -> None:
    tasks = list(world.tasks.values())
    task, name = tasks[which % len(tasks)], NODES[which % len(NODES)]
    match what:
        case "goes on":
            go_on(world, which, per_node)
        case "fails" if task.status.state is RUNNING:
            world.report(task.id, TaskState.FAILED)
        case "is rejected" if task.is_wanted and task.node_id and task.status.state < RUNNING:
            world.report(task.id, TaskState.REJECTED)
        case "drain":
            put_node(world, a_node(name, availability=Availability.DRAIN))
        case "drain now":
            put_node(world, a_node(name, availability=Availability.DRAIN, labels={DRAIN_NOW: "true"}))
        case "relabel":
            put_node(world, a_node(name, labels=OUTSIDE))
        case "activate":
            put_node(world, a_node(name))
        case "down":
            put_node(world, replace(world.nodes[NodeId(name)], status=a_node(state=NodeState.DOWN).status))
        case "image":
            world.update(with_image(world.service.spec, f"app:{which % 3}"))
        case "pause" | "resume":
            set_update(world, UpdateState.PAUSED if what == "pause" else UpdateState.UPDATING)
        case "scale":
            mode = ServiceMode(replicated=ReplicatedService(replicas=which % 4))
            world.update(replace(world.service.spec, mode=mode))
        case "leader":
            world.seen = ObservedTimes(world.now)


def with_image(spec: ServiceSpec, image: str) -> ServiceSpec:
    container = replace(spec.task_template.container_spec or ContainerSpec(), image=image)
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def set_update(world: World, state: UpdateState) -> None:
    if world.service.update_status is not None and world.service.update_status.state is not None:
        # As a user who resumes an update, tolerate the failures until now.  Tasks are created from this second on.
        until = (
            None if state is UpdateState.PAUSED else timestamp((2 * 10**9 + 1 + int(world.now)) * SECOND_NS)
        )
        world.put(replace(world.service, update_status=UpdateStatus(state=state, tolerated_until=until)))


def put_node(world: World, node: Node) -> None:
    world.nodes[node.id] = node


def go_on(world: World, which: int, per_node: int) -> None:
    """Each task gets a node if one has a free place, and its node follows its desired state."""
    for number, task in enumerate(list(world.tasks.values())):
        if task.status.state.is_terminal:
            continue
        if not task.node_id:
            place(world, task, which + number, per_node)
        elif world.nodes[task.node_id].status.state is NodeState.DOWN:
            continue
        elif task.desired_state > RUNNING:
            world.report(task.id, TaskState.SHUTDOWN)
        elif task.status.state < task.desired_state:
            world.report(task.id, task.desired_state)


def place(world: World, task: Task, which: int, per_node: int) -> None:
    if not task.is_wanted:
        return
    nodes = [world.nodes[NodeId(NODES[(which + one) % len(NODES)])] for one in range(len(NODES))]
    for node in nodes:
        held = [one for one in world.tasks.values() if one.node_id == node.id and one.is_active]
        if (
            node.spec.availability is Availability.ACTIVE
            and node.status.state is not NodeState.DOWN
            and node.spec.labels != OUTSIDE
            and len(held) < per_node
        ):
            status = replace(task.status, state=TaskState.ASSIGNED, err="")
            world.put(replace(task, node_id=node.id, status=status))
            return
    err = "no suitable node (max replicas per node limit exceed)"
    world.put(replace(task, status=replace(task.status, state=TaskState.PENDING, err=err)))


def end(world: World, per_node: int, last: Availability) -> None:
    """Let the cluster be sound for long.  The availability of n3 is ``last``."""
    for name in NODES:
        put_node(world, a_node(name, availability=last if name == "n3" else Availability.ACTIVE))
    for number in range(ROUNDS):
        if world.service.update_status is not None and world.service.update_status.state in PAUSED:
            set_update(world, UpdateState.UPDATING)
        world.settle()
        go_on(world, number, per_node)
        world.settle()
        world.now += ROUND_S


@given(
    config=configs,
    minimum=minimums,
    data=st.booleans(),
    per_node=st.sampled_from([1, 2, 10]),
    last=st.sampled_from([Availability.ACTIVE, Availability.DRAIN]),
    life=happenings,
)
@settings(max_examples=60, deadline=None)
def test_each_slot_ends_with_one_task_of_the_present_spec(
    config: UpdateConfig,
    minimum: str | None,
    data: bool,
    per_node: int,
    last: Availability,
    life: list[Happening],
) -> None:
    # Otherwise there is no place for a new task, and no old task may stop.
    assume(per_node > 1 or minimum != "100%")
    # Two nodes must have places for all tasks, and a task that stops first must be spared.
    assume(last is Availability.ACTIVE or (per_node == 10 and (minimum is None or not data)))
    world = begun(config, minimum, per_node, data=data)
    for what, which in life:
        happen(world, what, which, per_node=per_node)
        world.settle()
    end(world, per_node, last)
    slots = group_by_slot(task for task in world.tasks.values() if task.is_wanted)
    assert len(slots) == world.service.spec.replicas
    for slot in slots.values():
        assert [task.status.state for task in slot] == [RUNNING]
        assert not is_dirty(slot[0], world.situation)
        assert last is Availability.ACTIVE or slot[0].node_id != "n3"
