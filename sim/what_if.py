"""Runs that ask ``skep what-if`` what a change does, make the change, and compare.

A cluster gets services at random.  A node is lost or drained, or a service gets another number of tasks, or another
image and other reservations.  Nothing else changes afterwards.  As soon as the cluster is at rest, every service must
be as predicted: the available tasks, and the number and kind of reasons of the missing ones.

``simulate(seed)`` returns all differences.  The same seed produces the same run.
"""

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from typing import TypeAlias

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.run import RunResult
from sim.users.questions import ask
from sim.users.random_specs import ZONE, ZONES, Dependencies, a_spec, with_image
from skep.api.formats.service_form import settled
from skep.errors import SkepError
from skep.manager.control.nodes import update_node
from skep.manager.control.services import create_service, update_service
from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.departures import split_off_replacements
from skep.manager.diagnosis.reasons import CauseKind
from skep.manager.diagnosis.service_problems import problems_of
from skep.manager.services.disruption_budget import is_available
from skep.manager.what_if.answer import SupposedOutcome
from skep.manager.what_if.rehearsal import Rehearsal
from skep.manager.what_if.suppositions import deploy, drain, lose
from skep.model.node import Availability, Node
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.labels import PROGRESS_DEADLINE, priority_of
from skep.model.service import (
    ReplicatedService,
    ResourceRequirements,
    Resources,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.times import timestamp
from skep.store.interface import Transaction, View

NAMES = ("web", "api", "db", "mail", "queue", "cache")
DEPLOYED = ("app:1", "app:2", "app:3")
"""Images of deploys.  What-if supposes that tasks that start keep running, so crashing images are left out."""
RESERVED = (0, 300 << 20, 700 << 20, 1 << 30)
"""Memory that tasks reserve after a deploy.  Nodes have at least 1 GiB."""
SOON_S, REST_S = 20.0, 100.0
"""Seconds after the supposed end, because nodes and managers take longer here for some steps: usually, and at most."""
PATIENCE = "15s"
"""Progress deadline of updates.  What-if only estimates how long tasks take to start and stop, so it cannot tell
whether they miss a deadline of a second.
"""

Outcome: TypeAlias = tuple[int, Mapping[str, int]]
"""Available tasks of a service, and the number of its other slots by the kind of their reason."""


def outcome(view: View, service: Service) -> Outcome:
    """Return how the service really is."""
    tasks = view.find(Task, service_id=service.id)
    nodes = {node.id: node for node in view.find(Node)}
    available = sum(is_available(task, nodes.get(task.node_id)) for task in tasks)
    known = [replace(task, status=known_status(view, task)) if task.is_active else task for task in tasks]
    found = problems_of(service, known, nodes, wanted=0, now_ns=0)
    problems, _ = split_off_replacements(found, service, known, nodes)
    return available, Counter(one.kind for one in problems)


def outcomes(view: View) -> dict[str, Outcome]:
    return {one.id: outcome(view, one) for one in view.find(Service)}


def predicted(answer: SupposedOutcome) -> dict[str, Outcome]:
    """Return how the services are that differ, according to ``answer``."""
    found: dict[str, Outcome] = {}
    for one in answer.services:
        kinds = Counter[str]()
        for each in one.missing:
            kinds[each.kind] += each.tasks
        found[one.id] = one.after, kinds
    return found


def some_specs(random: Random) -> Iterator[ServiceSpec]:
    """Yield specs of services that run until they are stopped."""
    names = random.sample(NAMES, random.randint(2, len(NAMES)))
    while names:
        spec = a_spec(names[0], random, Dependencies(services=tuple(names)), random)
        if spec.mode.name in ("replicated", "global") and AUTOSCALE not in spec.labels:
            names.pop(0)
            deadline = {PROGRESS_DEADLINE: PATIENCE} if PROGRESS_DEADLINE in spec.labels else {}
            yield replace(spec, labels={**spec.labels, **deadline})


def drain_really(tx: Transaction, ids: Sequence[NodeId]) -> None:
    """Drain nodes at the same moment.  Otherwise the tasks of the first one get the places that are free."""
    for id in ids:
        node = tx.get(Node, id)
        update_node(tx, id, replace(node.spec, availability=Availability.DRAIN), node.version.index)


def create_really(tx: Transaction, spec: ServiceSpec) -> None:
    create_service(tx, settled(spec), new_id=lambda: spec.name, new_name=lambda: spec.name, now=timestamp(0))


def update_really(tx: Transaction, spec: ServiceSpec) -> None:
    service = tx.get(Service, spec.name)
    update_service(tx, service.id, settled(spec), service.version.index, now=timestamp(0))


class Change:
    """A random change: nodes that are lost or drained, or a service with another number of tasks."""

    def __init__(self, cluster: SimulatedCluster, random: Random) -> None:
        self._cluster = cluster
        self._nodes = random.sample(cluster.workers, random.choice((1, 1, 2)))
        replicated = [one.spec for one in cluster.view.find(Service) if one.spec.mode.name == "replicated"]
        kinds = ("lose", "lose", "drain", "scale") if replicated else ("lose", "drain")
        self._kind = random.choice(kinds)
        if replicated:
            mode = ServiceMode(replicated=ReplicatedService(replicas=random.randint(0, 9)))
            self._spec = replace(random.choice(replicated), mode=mode)

    def __str__(self) -> str:
        is_of_nodes = self._kind in ("lose", "drain")
        return f"{self._kind} {' '.join(self._nodes) if is_of_nodes else self._spec.name}"

    def suppose(self, rehearsal: Rehearsal) -> None:
        match self._kind:
            case "lose":
                lose(rehearsal, self._nodes)
            case "drain":
                drain(rehearsal, self._nodes)
            case "scale" | "deploy":
                deploy(rehearsal, self._spec)

    def make(self) -> None:
        match self._kind:
            case "lose":
                for id in self._nodes:
                    self._cluster.kill_node(id)
            case "drain":
                self._cluster.write(partial(drain_really, ids=self._nodes))
            case "scale" | "deploy":
                self._cluster.write(partial(update_really, spec=self._spec))


class Deploy(Change):
    """A service of any mode with another image and other reservations.

    It is a class of its own, so that the draws of seeds stay the same.
    """

    def __init__(self, cluster: SimulatedCluster, random: Random) -> None:
        super().__init__(cluster, random)
        if specs := [one.spec for one in cluster.view.find(Service)]:
            self._kind = "deploy"
            spec = with_image(random.choice(specs), random.choice(DEPLOYED))
            reserved = ResourceRequirements(reservations=Resources(memory_bytes=random.choice(RESERVED)))
            self._spec = replace(spec, task_template=replace(spec.task_template, resources=reserved))


def simulate(seed: int, kind: type[Change] = Change) -> RunResult:
    """Run the simulation of ``seed`` with a change of this kind."""
    random = Random(seed)
    managers = random.choice((1, 1, 1, 3))  # three cost twice as much, and decide the same
    workers = random.randint(2, 6)
    capacity = Resources(nano_cpus=4_000_000_000, memory_bytes=random.choice((1, 2, 8)) << 30)
    cluster = SimulatedCluster(managers=managers, workers=workers, seed=seed, capacity=capacity)
    differences: list[str] = []
    try:
        with cluster:
            differences += _differences(cluster, random, kind)
    except Exception as error:
        differences += [f"{type(error).__name__}: {error}", traceback.format_exc()]
    return RunResult(seed, differences, cluster.trace.lines())


def _compete(
    view: View, expected: Mapping[str, Outcome], found: Mapping[str, Outcome], ids: Sequence[str]
) -> bool:
    """Return whether services of one priority compete for the same places, which either of them may get.

    They then have, together, the outcome that was predicted.
    """
    if expected.keys() != found.keys() or len(ids) < 2:
        return False
    priorities = {priority_of(view.get(Service, ServiceId(id)).spec.labels) for id in ids}
    return len(priorities) == 1 and _sum(expected, ids) == _sum(found, ids)


def _alike(one: Outcome | None, other: Outcome | None) -> bool:
    """Return whether outcomes differ at most in why tasks have no node.

    A waiting task shows why it was refused at its last decision.  What-if decides about each task again.
    """
    if one is None or other is None:
        return one is other
    return _without_causes(one) == _without_causes(other)


def _without_causes(outcome: Outcome) -> Outcome:
    kinds = Counter[str]()
    for kind, number in outcome[1].items():
        kinds[CauseKind.NO_NODE.value if kind == CauseKind.TOO_LARGE.value else kind] += number
    return outcome[0], kinds


def _sum(outcomes: Mapping[str, Outcome], ids: Sequence[str]) -> Outcome:
    kinds = Counter[str]()
    for id in ids:
        kinds.update(outcomes[id][1])
    return sum(outcomes[id][0] for id in ids), kinds


def _differences(cluster: SimulatedCluster, random: Random, kind: type[Change]) -> Iterator[str]:
    for id in cluster.workers:
        cluster.label(id, **{ZONE: random.choice(ZONES)})
    for spec in some_specs(random):
        with suppress(SkepError):  # its port or its rules conflict with an earlier service
            cluster.write(partial(create_really, spec=spec))
    cluster.run_for(random.choice((0.3, 2.0, 40.0)))
    change = kind(cluster, random)
    before = outcomes(cluster.view)
    answer, settled_s = ask(cluster.view, change.suppose)
    change.make()
    cluster.run_for(settled_s + SOON_S)
    expected = {**before, **predicted(answer)}
    if outcomes(cluster.view) != expected:
        cluster.run_for(REST_S - SOON_S)
    found = outcomes(cluster.view)
    ids = sorted(expected.keys() | found.keys())
    differing = [id for id in ids if not _alike(expected.get(id), found.get(id))]
    if not _compete(cluster.view, expected, found, differing):
        for service in differing:
            yield f"{change}: {service} is {found.get(service)}, predicted {expected.get(service)}"
