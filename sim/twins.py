"""Metamorphic lives: the same life with and without changes of leader ends alike.

A life is drawn from its seed beforehand: one service, its updates, and which of its containers end when.  It is lived
twice, once with one leader from begin to end, once with others taking over in between.  Slots, their images and the
state of the update are then the same.  Only a window of the restart policy may be kept less strictly: a new leader does
not know when earlier restarts were, so a slot may run that would have been given up, but never the other way round.
"""

from collections.abc import Iterable, Sequence
from math import inf
from random import Random

import msgspec
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.life import Outcome
from sim.node import image_of
from sim.truth import Change
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
from skep.model.times import SECOND_NS
from skep.store.interface import Updated, View

NAME = "web"
NEXT = "app:2"
APART_S = (4.0, 7.0, 20.0)
"""Between two events: longer than a restart, and than a change of leader takes."""
MOVED_S = 2.5
"""A change of leader keeps this distance to what happens next: what meets it is judged by other rules."""
MOVE = -1
"""In place of a slot: leadership moves."""
JUDGED_S = 3.5
"""Longer than the monitor time: whether a slot has been updated a moment before its container ends depends on the delay
between slots, which each leader begins anew."""
SETTLED_S = 10.0
UPDATED_S = 200.0


class Life(msgspec.Struct, frozen=True):
    """What happens to one service.  ``events``: at which second which slot's container ends; None: an update."""

    spec: ServiceSpec
    events: tuple[tuple[float, int | None], ...]
    moves: tuple[float, ...]
    """When, in the second of its lives, leadership moves."""


class Ending(msgspec.Struct, frozen=True):
    """How a life ended.  ``slots``: the image that each slot runs; ``update``: the state of the update."""

    slots: dict[int, str]
    update: str


def live(seed: int) -> Outcome:
    """Live the life of ``seed`` twice, and compare."""
    life = drawn(seed)
    quiet, _ = lived(seed, life, ())
    moved, trace = lived(seed, life, life.moves)
    told = [
        f"drawn: {life.spec.task_template.restart_policy} {life.spec.update_config}",
        f"events: {life.events}",
    ]
    return Outcome(seed, list(differences(life, quiet, moved)), [*told, f"moves: {life.moves}", *trace])


def drawn(seed: int) -> Life:
    """A life by chance."""
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
    return Life(spec, tuple(events), tuple(moves))


def lived(seed: int, life: Life, moves: Sequence[float]) -> tuple[Ending, list[str]]:
    """Live it, with changes of leader at ``moves``; how it ended, and what happened."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        began = cluster.loop.time()
        running_at: dict[str, float] = {}

        def note(change: Change, view: View) -> None:
            for event in change.events:
                match event:
                    case Updated(_, Task() as task) if task.status.state is TaskState.RUNNING:
                        running_at.setdefault(task.id, change.time_s)

        cluster.truth.watchers.append(note)
        cluster.create(life.spec)
        happening = sorted([*life.events, *((at, MOVE) for at in moves)], key=lambda one: one[0])
        for at, slot in happening:
            cluster.run_for(max(began + at - cluster.loop.time(), 0.0))
            if slot is None:
                cluster.update(NAME, _updated)
            elif slot == MOVE:
                cluster.depose()
            else:
                for task in cluster.wanted(NAME):
                    is_old = cluster.loop.time() - running_at.get(task.id, inf) > JUDGED_S
                    if task.slot == slot and is_old and _runs(cluster, task.id):
                        cluster.kill_container(task, exit_code=1)
        _settle(cluster)
        service = cluster.service(NAME)
        status = service.update_status if service is not None else None
        slots = {task.slot: image_of(task) for task in cluster.wanted(NAME)}
        return Ending(
            slots, status.state.value if status is not None and status.state else ""
        ), cluster.trace.lines()


def _settle(cluster: SimulatedCluster) -> None:
    """Until its update is over: each leader begins the delays between slots anew."""
    until = cluster.loop.time() + UPDATED_S
    while (service := cluster.service(NAME)) is not None and cluster.loop.time() < until:
        cluster.run_for(SETTLED_S)
        if service.update_status is None or service.update_status.state not in UNDER_WAY:
            return


def differences(life: Life, quiet: Ending, moved: Ending) -> Iterable[str]:
    """What a change of leader has made of it."""
    policy = life.spec.task_template.restart_policy or RestartPolicy()
    kept = {slot: image for slot, image in moved.slots.items() if not policy.window or slot in quiet.slots}
    if kept != quiet.slots:
        yield f"with changes of leader the slots run {moved.slots}, without {quiet.slots}"
    if moved.update != quiet.update:
        yield f"with changes of leader the update is {moved.update!r}, without {quiet.update!r}"


def _updated(spec: ServiceSpec) -> ServiceSpec:
    container = spec.task_template.container_spec
    assert container is not None
    template = replace(spec.task_template, container_spec=replace(container, image=NEXT))
    return replace(spec, task_template=template)


def _runs(cluster: SimulatedCluster, id: str) -> bool:
    return any(id in node.containers for node in cluster.nodes.values())
