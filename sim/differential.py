"""Metamorphic tests: a scenario has the same final state with and without changes of leader.

A scenario is generated from its seed: one service, its updates, and the times at which its containers end.  It is
simulated twice, once with one leader, once with changes of leader.  The slots, their images and the state of the
update must be the same.  Only the window of a restart policy may be applied less strictly, because a new leader does
not have the times of earlier restarts.  So a slot may run that the old leader would have given up, but not the other
way round.
"""

from collections.abc import Iterable, Sequence
from math import inf
from random import Random

import msgspec
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.run import RunResult
from sim.world.committed import Change
from sim.world.images import image_of
from skep.model.container import ContainerSpec
from skep.model.service import (
    UNDER_WAY,
    ReplicatedService,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateFailureAction,
)
from skep.model.task import Task, TaskState
from skep.model.values.times import SECOND_NS
from skep.store.interface import Updated, View

NAME = "web"
NEXT = "app:2"
APART_S = (4.0, 7.0, 20.0)
"""Seconds between two events.  They are longer than a restart or a change of leader takes."""
MOVED_S = 2.5
"""Seconds between a change of leader and the next event.  Other invariants check concurrent ones."""
MOVE = -1
"""Marks a change of leader in place of a slot."""
ESTABLISHED_S = 3.5
"""Seconds after an update during which no container ends.  They are longer than the monitor time.  Each leader restarts
the delay between slots, so with a shorter time it would be uncertain whether a slot was updated just before its
container ends.
"""
SETTLED_S = 10.0
UPDATED_S = 200.0


class Scenario(msgspec.Struct, frozen=True):
    """The events of one service.  ``events``: (time in seconds, slot whose container ends or None for an update)."""

    spec: ServiceSpec
    events: tuple[tuple[float, int | None], ...]
    moves: tuple[float, ...]
    """Times of the changes of leader in the second run."""


class FinalState(msgspec.Struct, frozen=True):
    """Final state of a run.  ``slots``: the image that each slot runs.  ``update``: the state of the update."""

    slots: dict[int, str]
    update: str


def simulate(seed: int) -> RunResult:
    """Simulate the scenario of ``seed`` twice, and compare the final states."""
    scenario = generated(seed)
    expected, _ = run_scenario(seed, scenario, ())
    actual, trace = run_scenario(seed, scenario, scenario.moves)
    head = [
        f"scenario: {scenario.spec.task_template.restart_policy} {scenario.spec.update_config}",
        f"events: {scenario.events}",
    ]
    return RunResult(
        seed, list(differences(scenario, expected, actual)), [*head, f"moves: {scenario.moves}", *trace]
    )


def generated(seed: int) -> Scenario:
    """Return a random scenario."""
    random = Random(seed)
    is_updated = random.random() < 0.5
    replicas = random.randint(1, 3 if is_updated else 2)
    spec = ServiceSpec(
        name=NAME,
        task_template=TaskSpec(
            container_spec=ContainerSpec(image="app:1", stop_grace_period=SECOND_NS),
            restart_policy=RestartPolicy(
                condition=random.choice((RestartCondition.ANY, RestartCondition.ON_FAILURE)),
                delay=SECOND_NS // 2,
                max_attempts=0 if is_updated else random.randint(1, 2),
                window=random.choice((0, 10, 10)) * SECOND_NS,
            ),
        ),
        mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)),
        update_config=UpdateConfig(
            parallelism=1,
            delay=30 * SECOND_NS,
            monitor=2 * SECOND_NS,
            failure_action=random.choice((UpdateFailureAction.ROLLBACK, UpdateFailureAction.PAUSE)),
        ),
    )
    events: list[tuple[float, int | None]] = []
    moves: list[float] = []
    now = 3.0
    for number in range(random.randint(3, 6)):
        slot = None if is_updated and number == 1 else random.randint(1, replicas)
        events.append((now, slot))
        pause_s = random.choice(APART_S)
        if random.random() < 0.5:
            moves.append(now + random.uniform(1.5, pause_s - MOVED_S + 1.5))
        now += pause_s
    return Scenario(spec, tuple(events), tuple(moves))


def run_scenario(seed: int, scenario: Scenario, moves: Sequence[float]) -> tuple[FinalState, list[str]]:
    """Simulate a scenario with changes of leader at ``moves``.  Return the final state and the trace."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        began = cluster.loop.time()
        running_at: dict[str, float] = {}

        def note(change: Change, view: View) -> None:
            for event in change.events:
                match event:
                    case Updated(_, Task() as task) if task.status.state is TaskState.RUNNING:
                        running_at.setdefault(task.id, change.time_s)

        cluster.committed.watchers.append(note)
        cluster.create(scenario.spec)
        schedule = sorted([*scenario.events, *((at, MOVE) for at in moves)], key=lambda one: one[0])
        for at, slot in schedule:
            cluster.run_for(max(began + at - cluster.loop.time(), 0.0))
            if slot is None:
                cluster.update(NAME, _updated)
            elif slot == MOVE:
                cluster.depose()
            else:
                for task in cluster.wanted(NAME):
                    is_old = cluster.loop.time() - running_at.get(task.id, inf) > ESTABLISHED_S
                    if task.slot == slot and is_old and _runs(cluster, task.id):
                        cluster.kill_container(task, exit_code=1)
        _settle(cluster)
        service = cluster.service(NAME)
        status = service.update_status if service is not None else None
        slots = {task.slot: image_of(task) for task in cluster.wanted(NAME)}
        return FinalState(
            slots, status.state.value if status is not None and status.state else ""
        ), cluster.trace.lines()


def _settle(cluster: SimulatedCluster) -> None:
    """Wait until the update has ended, because each leader restarts the delays between slots."""
    until = cluster.loop.time() + UPDATED_S
    while (service := cluster.service(NAME)) is not None and cluster.loop.time() < until:
        cluster.run_for(SETTLED_S)
        if service.update_status is None or service.update_status.state not in UNDER_WAY:
            return


def differences(scenario: Scenario, expected: FinalState, actual: FinalState) -> Iterable[str]:
    """Yield the differences that changes of leader have caused."""
    policy = scenario.spec.task_template.restart_policy or RestartPolicy()
    kept = {
        slot: image for slot, image in actual.slots.items() if not policy.window or slot in expected.slots
    }
    if kept != expected.slots:
        yield f"with changes of leader the slots run {actual.slots}, without {expected.slots}"
    if actual.update != expected.update:
        yield f"with changes of leader the update is {actual.update!r}, without {expected.update!r}"


def _updated(spec: ServiceSpec) -> ServiceSpec:
    container = spec.task_template.container_spec
    assert container is not None
    template = replace(spec.task_template, container_spec=replace(container, image=NEXT))
    return replace(spec, task_template=template)


def _runs(cluster: SimulatedCluster, id: str) -> bool:
    return any(id in node.containers for node in cluster.nodes.values())
