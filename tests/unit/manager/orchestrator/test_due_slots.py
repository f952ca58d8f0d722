"""A node or task event has only its own slots decided, and the decision is the same as one about all slots."""

from collections.abc import Sequence
from typing import Final, TypeAlias

from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.time_slices import run_at_once
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import RemoveService, ReplaceTask, Step
from skep.manager.orchestrator.convergence import deciding_all, deciding_some
from skep.manager.orchestrator.due_slots import Settled, SlotKey, slot_key
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import JOB_TTL, MIN_AVAILABLE, ON_DISCONNECT, ON_DISCONNECT_DELAY
from skep.model.service import (
    GlobalJob,
    GlobalService,
    JobStatus,
    ReplicatedJob,
    ReplicatedService,
    Resources,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Preemption, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from skep.store.interface import Commit, Updated
from tests.support.builders import a_node, a_service, a_service_spec
from tests.support.managers.worlds import World

NODES: Final = ("n1", "n2", "n3", "n4")
MODES: Final = {
    "replicated": ServiceMode(replicated=ReplicatedService(replicas=4)),
    "global": ServiceMode(global_=GlobalService()),
    "replicated-job": ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=4)),
    "global-job": ServiceMode(global_job=GlobalJob()),
}
POLICIES: Final = (
    None,
    RestartPolicy(condition=RestartCondition.NONE),
    RestartPolicy(condition=RestartCondition.ON_FAILURE, max_attempts=1, delay=0),
    RestartPolicy(delay=3 * SECOND_NS, max_attempts=2, window=60 * SECOND_NS),
)
LABELS: Final = ({}, {ON_DISCONNECT: "keep"}, {ON_DISCONNECT_DELAY: "30s"})
STATES: Final = (TaskState.PENDING, TaskState.READY, TaskState.RUNNING, TaskState.FAILED, TaskState.COMPLETE)
Happening: TypeAlias = tuple[str, int, int]
"""What happens, to which task or node, and a variant of it."""

NODE_EVENTS: Final = ("down", "up", "drain", "pause", "label", "small", "gone")


def happenings(
    kinds: Sequence[str] = ("task", "task", "delete", *NODE_EVENTS),
) -> st.SearchStrategy[list[Happening]]:
    one = st.tuples(st.sampled_from(kinds), st.integers(0, 7), st.integers(0, len(STATES) - 1))
    return st.lists(one, min_size=1, max_size=3)


class Changing(World):
    """A world whose events are recorded as the slots that they make due."""

    def __init__(self, service: Service, nodes: Sequence[Node]) -> None:
        super().__init__(service, (), nodes)
        self.due: set[SlotKey] = set()

    def put(self, object: object) -> object:
        if isinstance(object, Task):
            self.due.add(slot_key(object))
        return super().put(object)

    def put_node(self, node: Node) -> None:
        old = self.nodes[node.id]
        self.nodes[node.id] = node
        self.seen.record(Commit(1, (Updated(old, node),)), self.now)
        self._node_event(node.id)

    def _node_event(self, id: NodeId) -> None:
        if self.service.spec.mode.name in ("global", "global-job"):
            self.due.add(id)
        self.due |= {slot_key(task) for task in self.tasks.values() if task.node_id == id}

    def happen(self, what: str, which: int, variant: int) -> None:
        tasks = sorted(self.tasks)
        if what in ("task", "delete"):
            if tasks:
                self._task_event(what, self.tasks[tasks[which % len(tasks)]], STATES[variant])
            return
        node = self.nodes.get(NodeId(NODES[which % len(NODES)]))
        if node is None:
            return
        match what:
            case "down" | "up":
                state = NodeState.DOWN if what == "down" else NodeState.READY
                self.put_node(replace(node, status=replace(node.status, state=state)))
            case "drain" | "pause":
                availability = Availability.DRAIN if what == "drain" else Availability.PAUSE
                self.put_node(replace(node, spec=replace(node.spec, availability=availability)))
            case "label":
                self.put_node(replace(node, spec=replace(node.spec, labels={"zone": "b"})))
            case "small":
                small = replace(node.description, resources=Resources(nano_cpus=1, memory_bytes=1))
                self.put_node(replace(node, description=small))
            case "gone":
                del self.nodes[node.id]
                self._node_event(node.id)

    def _task_event(self, what: str, task: Task, state: TaskState) -> None:
        if what == "delete":
            del self.tasks[task.id]
            self.due.add(slot_key(task))
        elif state >= task.status.state:
            self.report(task.id, state)

    def advance(self, rounds: int) -> None:
        for _ in range(rounds):
            self.apply(self.changes())
            _progress(self)
            self.now += 40.0

    def decide(self) -> tuple[Sequence[Step], Settled | None]:
        return run_at_once(deciding_all(self.situation))

    def decide_some(self, settled: Settled) -> Sequence[Step] | None:
        tasks = tuple(task for task in self.tasks.values() if slot_key(task) in self.due)
        nodes = tuple(self.nodes[id] for id in sorted(self.nodes) if id in self.due)
        some = replace(self.situation, tasks=tasks, nodes=lambda: nodes)
        return run_at_once(deciding_some(some, self.due, settled))


def a_settled_world(
    mode: str, restart: int, labels: int, before: Sequence[Happening], rounds: int
) -> tuple[Changing, Settled]:
    """``rounds``: of an update that was paused then; 0 for no update."""
    spec = a_service_spec(
        replicas=4,
        restart=POLICIES[restart],
        constraints=("node.labels.zone==a",),
        reserve=Resources(memory_bytes=2),
    )
    ttl = {JOB_TTL: "60s"} if "job" in mode and restart == 1 else {}
    spec = replace(spec, mode=MODES[mode], labels={**LABELS[labels], **ttl})
    job = JobStatus(job_iteration=Version(index=1)) if "job" in mode else None
    service = replace(a_service(spec=spec), job_status=job)
    world = Changing(service, [a_node(id, labels={"zone": "a"}) for id in NODES])
    world.advance(6)
    for happening in before:
        world.happen(*happening)
        world.advance(6)
    if rounds:
        world.update(replace(spec, task_template=a_service_spec(image="busybox:2").task_template))
        world.advance(rounds)
        world.put(replace(world.service, update_status=UpdateStatus(state=UpdateState.PAUSED)))
        world.advance(3)
    world.due.clear()
    _, settled = world.decide()
    assume(settled is not None)
    assert settled is not None
    return world, settled


def _progress(world: Changing) -> None:
    """Tasks that wait get nodes, and come as far as they are meant to."""
    for number, task in enumerate(sorted(world.tasks)):
        one = world.tasks[task]
        if not one.node_id and one.is_active:
            world.put(replace(one, node_id=NodeId(NODES[number % len(NODES)])))
    for one in [*world.tasks.values()]:
        if one.desired_state in (TaskState.RUNNING, TaskState.COMPLETE) and one.is_active:
            world.report(one.id, TaskState.RUNNING)
        elif not one.is_wanted and not one.status.state.is_terminal:
            world.report(one.id, TaskState.SHUTDOWN)
    world.prepare_all()


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["replicated", "global"]),
    st.integers(0, len(POLICIES) - 1),
    st.integers(0, len(LABELS) - 1),
    st.one_of(st.just([]), happenings()),
    happenings(),
    st.integers(0, 3),
    st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_a_decision_about_the_due_slots_is_the_one_about_all(
    mode: str,
    restart: int,
    labels: int,
    before: Sequence[Happening],
    after: Sequence[Happening],
    rounds: int,
    passed_s: float,
) -> None:
    world, settled = a_settled_world(mode, restart, labels, before, rounds)
    for happening in after:
        world.happen(*happening)
    world.now += passed_s
    some = world.decide_some(settled)
    event(f"{mode}: {'all' if some is None else 'nothing' if not some else 'some'}")
    assert some is None or list(some) == list(world.decide()[0])


def test_a_decision_about_the_due_slots_takes_no_task_that_runs_by_now() -> None:
    """As one about all: the task then draws on the service's disruption budget."""
    spec = replace(a_service_spec(replicas=4), labels={MIN_AVAILABLE: "4"})
    world = Changing(a_service(spec=spec), [a_node(id) for id in NODES])
    world.advance(6)
    task = min(world.tasks.values(), key=lambda one: one.slot)
    starting = replace(task, status=replace(task.status, state=TaskState.STARTING))
    world.put(starting)
    _, settled = world.decide()
    assert settled is not None
    world.put(replace(starting, preemption=Preemption(task_id=TaskId("vip"))))
    some = world.decide_some(settled)
    assert some is not None
    assert some == list(world.decide()[0])
    world.report(task.id, TaskState.RUNNING)
    world.apply([step for step in some if isinstance(step, ReplaceTask)])
    assert world.tasks[task.id].is_wanted


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, len(POLICIES) - 1),
    st.one_of(st.just([]), happenings()),
    happenings(),
    st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_the_due_nodes_of_a_global_job_are_decided_as_with_all(
    restart: int, before: Sequence[Happening], after: Sequence[Happening], passed_s: float
) -> None:
    """A running time to live is checked at its end, and with all tasks when one of them changes."""
    world, settled = a_settled_world("global-job", restart, 0, before, 0)
    has_ttl = JOB_TTL in world.service.spec.labels
    assume(not has_ttl or _has_node_events_alone(after))
    for happening in after:
        world.happen(*happening)
    world.now += passed_s
    some = world.decide_some(settled)
    event(f"{'all' if some is None else 'nothing' if not some else 'some'}")
    every = [
        step for step in world.decide()[0] if not (has_ttl and isinstance(step, Recheck | RemoveService))
    ]
    assert some is None or list(some) == every


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(POLICIES) - 1), st.one_of(st.just([]), happenings()), happenings(NODE_EVENTS))
def test_a_replicated_job_is_decided_about_only_if_a_node_event_changes_a_run(
    restart: int, before: Sequence[Happening], after: Sequence[Happening]
) -> None:
    world, settled = a_settled_world("replicated-job", restart, 0, before, 0)
    for happening in after:
        world.happen(*happening)
    some = world.decide_some(settled)
    event("all" if some is None else "nothing")
    assert some is None or (some == [] and _are_rechecks(world.decide()[0]))


def _are_rechecks(steps: Sequence[Step]) -> bool:
    return all(isinstance(step, Recheck) for step in steps)


def _has_node_events_alone(some: Sequence[Happening]) -> bool:
    return not any(what in ("task", "delete") for what, _, _ in some)
